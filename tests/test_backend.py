"""Which backend runs: the choice, the reasons, the report; and what every internal op must have."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_fused_block import op_arguments
from torch._subclasses.fake_tensor import FakeTensorMode

import mamba_ssm
from mamba_ssm.ops import backend, native
from mamba_ssm.ops.backend import BackendError
from mamba_ssm.ops.schema import OPS
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

ROOT = Path(__file__).resolve().parent.parent
NAMES = [op.name for op in OPS]


def fresh(program: str, **environment: str) -> subprocess.CompletedProcess:
    """A new interpreter; the variables of this library are only those given."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAMBA_SSM_")}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=clean | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def overload(name: str, which: str):
    return getattr(getattr(torch.ops.mamba_ssm, name), which)


# -- selection -------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """The table of loaded kernels, to be filled by the test."""
    table: dict[tuple[str, str], bool] = {}
    monkeypatch.setattr(native, "_kernels", table)
    monkeypatch.setattr(backend, "_warned", {"cpu", "cuda"})
    return table


def test_auto_takes_the_kernel_where_there_is_one(kernels):
    kernels["_state_update", "cpu"] = True
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = backend.resolve("_state_update", "cpu", dtype)
        assert found is overload("_state_update", "default")
    reference = overload("_state_update", "reference")
    assert backend.resolve("_state_update", "cpu", torch.float64) is reference
    assert backend.resolve("_state_update", "cuda", torch.float32) is reference
    assert backend.resolve("_state_update", "mps", torch.float32) is reference
    other = overload("_add_norm_fwd", "reference")
    assert backend.resolve("_add_norm_fwd", "cpu", torch.float32) is other


def test_reference_is_taken_even_where_there_is_a_kernel(kernels):
    kernels["_state_update", "cpu"] = True
    with mamba_ssm.backend("reference"):
        found = backend.resolve("_state_update", "cpu", torch.float32)
    assert found is overload("_state_update", "reference")


def test_native_never_falls_back(kernels):
    with mamba_ssm.backend("native"):
        for op in NAMES:
            with pytest.raises(backend.BackendError, match=f"does not serve {op} on cpu in"):
                backend.resolve(op, "cpu", torch.float32)
        kernels["_state_update", "cpu"] = True
        found = backend.resolve("_state_update", "cpu", torch.float32)
        assert found is overload("_state_update", "default")
        with pytest.raises(backend.BackendError, match="take fp32, fp16 and bf16, not"):
            backend.resolve("_state_update", "cpu", torch.float64)
        with pytest.raises(backend.BackendError, match="no kernels exist for 'mps'"):
            backend.resolve("_state_update", "mps", torch.float32)


def test_triton_never_falls_back():
    with mamba_ssm.backend("triton"):
        for op in NAMES:
            with pytest.raises(backend.BackendError, match=f"no kernel for {op}; choose 'auto'"):
                backend.resolve(op, "cpu", torch.float32)


@pytest.mark.parametrize("choice", ["native", "triton"])
def test_public_functions_obey_the_choice(choice, kernels):
    x, w = torch.randn(1, 4, 6), torch.randn(4, 3)
    A, B = -torch.rand(4, 2), torch.randn(1, 2, 6)
    state = torch.zeros(1, 4, 2)
    calls = {
        "_selective_scan_fwd": lambda: mamba_ssm.selective_scan_fn(x, x, A, B, B),
        "_causal_conv1d_fwd": lambda: mamba_ssm.ops.causal_conv1d.causal_conv1d_fn(x, w),
        "_causal_conv1d_update": lambda: mamba_ssm.ops.causal_conv1d.causal_conv1d_update(
            x[..., 0], torch.zeros(1, 4, 3), w
        ),
        "_state_update": lambda: mamba_ssm.selective_state_update(
            state, x[..., 0], x[..., 0], A, B[..., 0], B[..., 0]
        ),
        "_add_norm_fwd": lambda: mamba_ssm.ops.layer_norm.layer_norm_fn(x, torch.ones(6), None),
    }
    with mamba_ssm.backend(choice):
        for op, call in calls.items():
            with pytest.raises(backend.BackendError, match=op):
                call()
    assert not state.any()


@pytest.fixture
def gpus(monkeypatch):
    """A library with code for 9.0 alone, and GPUs of the compute capabilities that are set."""

    class Library:
        @staticmethod
        def mamba_ssm_cuda_archs():
            return b"9.0"

    def set_capabilities(*capabilities):
        native.device_reason.cache_clear()
        native._gpu_reason.cache_clear()
        monkeypatch.setattr(native, "status", lambda: {"cuda": (True, ""), "cpu": (True, "")})
        monkeypatch.setattr(native.ctypes, "CDLL", lambda path: Library())
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])

    yield set_capabilities
    native.device_reason.cache_clear()
    native._gpu_reason.cache_clear()


def test_a_gpu_without_code_in_the_library_gets_the_reference(kernels, gpus, monkeypatch):
    kernels["_state_update", "cuda"] = True
    call = ("_state_update", "cuda", torch.float16)
    gpus((9, 0), (9, 0))
    assert backend.resolve(*call) is overload("_state_update", "default")
    monkeypatch.setattr(backend, "_warned", set())
    gpus((9, 0), (7, 5))
    with pytest.warns(RuntimeWarning, match=r"for compute capability 9.0, but GPU 1 has 7.5"):
        assert backend.resolve(*call) is overload("_state_update", "reference")
    with mamba_ssm.backend("native"), pytest.raises(BackendError, match=r"GPU 1 has 7.5"):
        backend.resolve(*call)
    assert backend._served(*call)[0] == "reference"


def test_the_question_about_gpus_is_answered_while_tracing(gpus):
    gpus((7, 5))
    torch._dynamo.reset()
    traced = torch.compile(
        lambda x: x + (1 if native.gpu_reason() else 2), backend="eager", fullgraph=True
    )
    assert traced(torch.zeros(())) == 1


def test_importing_asks_no_gpu():
    program = (
        "import torch; torch.cuda.get_device_capability = torch.cuda._lazy_init = None; "
        "import mamba_ssm.models.mixer_seq_simple; assert not torch.cuda.is_initialized()"
    )
    done = fresh(program)
    assert done.returncode == 0, done.stderr


def test_blocks_nest_and_restore_the_choice_after_errors():
    before = backend.current()
    with pytest.raises(KeyError), mamba_ssm.backend("reference"):
        with pytest.raises(ZeroDivisionError), mamba_ssm.backend("native"):
            assert backend.current() == "native"
            raise ZeroDivisionError
        assert backend.current() == "reference"
        raise KeyError
    assert backend.current() == before


def test_a_block_can_be_entered_again_as_a_decorator():
    @mamba_ssm.backend("reference")
    def chosen():
        return backend.current()

    assert chosen() == chosen() == "reference" and backend.current() != "reference"


@pytest.mark.parametrize("name", ["Native", "", "cuda"])
def test_unknown_names_are_refused_and_change_nothing(name):
    before = backend.current()
    message = f"backend name is {name!r}; allowed: auto, native, triton, reference"
    with pytest.raises(ValueError, match=re.escape(message)), mamba_ssm.backend(name):
        pass
    assert backend.current() == before


def test_environment_variable():
    program = "from mamba_ssm.ops import backend; print(backend.current())"
    assert fresh(program, MAMBA_SSM_BACKEND="native").stdout.split() == ["native"]
    done = fresh(program, MAMBA_SSM_BACKEND="fastest")
    assert done.returncode == 1
    assert (
        "ValueError: MAMBA_SSM_BACKEND is 'fastest'; allowed: auto, native, triton, reference"
        in done.stderr
    )


# -- the warning -----------------------------------------------------------------------------------

_WARNING = """
import warnings, torch, mamba_ssm
def step():
    state = torch.zeros(1, 4, 2)
    one = torch.ones(1, 4)
    mamba_ssm.selective_state_update(
        state, one, one, -torch.ones(4, 2), torch.ones(1, 2), torch.ones(1, 2)
    )
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with mamba_ssm.backend("reference"):
        step()
    print("explicit", len(caught))
    step(); step()
print("auto", len(caught))
for w in caught:
    print(w.category.__name__, w.message)
"""


def test_auto_on_the_reference_says_so_once_with_the_remedy():
    done = fresh(_WARNING, MAMBA_SSM_DISABLE_NATIVE="1")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["explicit 0", "auto 1"], done
    assert lines[2].startswith("RuntimeWarning mamba_ssm runs on the slower pure PyTorch reference")
    for part in ("MAMBA_SSM_DISABLE_NATIVE=1", "python -m mamba_ssm build", "info", "=reference"):
        assert part in lines[2]


def test_no_warning_when_the_reference_was_chosen_or_for_work_without_kernels():
    done = fresh(_WARNING, MAMBA_SSM_DISABLE_NATIVE="1", MAMBA_SSM_BACKEND="reference")
    assert done.stdout.splitlines() == ["explicit 0", "auto 0"], done


def test_a_library_without_the_kernel_is_named_as_the_reason(kernels, monkeypatch):
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setattr(native, "_status", {"cpu": (True, "loaded from somewhere")})
    kernels.pop(("_add_norm_fwd", "cpu"), None)
    with pytest.warns(RuntimeWarning, match="the cpu library has no kernel for _add_norm_fwd"):
        backend.resolve("_add_norm_fwd", "cpu", torch.float32)


# -- the report ------------------------------------------------------------------------------------


def test_report_has_a_row_for_each_op_device_and_dtype():
    rows = backend.report()
    keys = [(row["op"], row["device"], row["dtype"]) for row in rows]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    dtypes = ["float32", "float16", "bfloat16", "float64"]
    assert keys == [(o, v, t) for o in NAMES for v in devices for t in dtypes]
    for row in rows:
        dtype = getattr(torch, row["dtype"])
        served = backend.resolve(row["op"], row["device"], dtype)
        which = {"native": "default", "reference": "reference"}[row["backend"]]
        assert served is overload(row["op"], which), row
        assert bool(row["reason"]) == (row["backend"] == "reference"), row


def test_report_follows_the_choice(kernels):
    kernels.update({(name, "cpu"): True for name in NAMES})
    served = {(row["op"], row["dtype"]): row["backend"] for row in backend.report()}
    assert served["_state_update", "float32"] == "native"
    assert served["_state_update", "float64"] == "reference"
    with mamba_ssm.backend("reference"):
        assert {row["backend"] for row in backend.report()} == {"reference"}
    with mamba_ssm.backend("native"):
        served = {(row["op"], row["dtype"]): row["backend"] for row in backend.report()}
        assert served["_state_update", "float32"] == "native"
        assert served["_state_update", "float64"] == "none"
    with mamba_ssm.backend("triton"):
        assert {row["backend"] for row in backend.report()} == {"none"}


def _registered(device_type: str) -> set[str]:
    sources = sorted((ROOT / "csrc").glob(f"bindings_{device_type}*.cpp"))
    return {op for path in sources for op in re.findall(r'm\.impl\("(\w+)"', path.read_text())}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_shipped_kernels_are_those_that_the_sources_register(device_type):
    assert _registered(device_type) == backend.SHIPPED_KERNELS[device_type]
    assert backend.SHIPPED_KERNELS[device_type] <= set(NAMES)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_shipped_kernels_are_those_of_the_loaded_library(device_type):
    loaded, reason = native.status()[device_type]
    if not loaded:
        pytest.skip(reason)
    found = {op for op in NAMES if native.has_kernel(op, device_type)}
    assert found == backend.SHIPPED_KERNELS[device_type]


# -- every internal op -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_op_is_registered_twice_with_one_schema(name):
    default, reference = overload(name, "default"), overload(name, "reference")
    key = "CompositeExplicitAutograd"
    for op in (default, reference):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)
    assert str(reference._schema).replace(".reference(", "(") == str(default._schema)
    for native_key in ("CPU", "CUDA"):
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(reference.name(), native_key)
    (op,) = (op for op in OPS if op.name == name)
    assert op.meaning and name.startswith("_")


def _opchecked(tree: ast.Module) -> set[str]:
    """Names of internal ops in the test functions that call torch.library.opcheck."""
    found = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            text = ast.unparse(function)
            if "torch.library.opcheck(" in text:
                found |= {name for name in NAMES if re.search(rf"\b{name}\b", text)}
    return found


def test_every_op_has_an_opcheck_test():
    files = (Path(__file__).parent).glob("test_*.py")
    found = set().union(*(_opchecked(ast.parse(path.read_text())) for path in files))
    assert found == set(NAMES)


# Their arguments are a whole model: test_cpu_decode.py and test_cuda_decode.py have them, and
# opcheck compares the fakes.
_ON_MODELS = (
    "_decode_step", "_decode_and_choose", "_decode_step_weights", "_prefill_layers", "_pack_weight",
)  # fmt: skip


def _arguments(name: str, dtype: torch.dtype, full: bool) -> tuple:
    """Arguments of an internal op, with or without its optional ones."""
    b, d, length, n, w, states = 2, 6, 21, 3, 4, 3
    g = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=g).to(dtype)

    f32 = torch.float32
    seq_idx = torch.arange(length).expand(b, length).div(15, rounding_mode="floor").int().clone()
    some = (lambda x: x) if full else (lambda x: None)
    states = states if full else b
    scan = (
        normal(b, d, length), normal(b, d, length), -normal(d, n, dtype=f32).abs(),
        normal(b, 2, n, length), normal(b, 2, n, length), some(normal(d, dtype=f32)),
        some(normal(b, d, length)), some(normal(d, dtype=f32)), True,
        some(normal(states, d, n, dtype=f32)), some(seq_idx), states, 16,
    )  # fmt: skip
    conv = (
        normal(b, d, length), normal(d, w), some(normal(d)), some(normal(states, d, w - 1)),
        some(seq_idx), states, True,
    )  # fmt: skip
    rows, weight = normal(5, d), normal(d, dtype=f32)
    residual, bias = some(normal(5, d, dtype=f32)), some(normal(d, dtype=f32))
    indices = some(torch.tensor([2, 0], dtype=torch.int32))
    table = {
        "_selective_scan_fwd": scan,
        "_causal_conv1d_fwd": conv,
        "_causal_conv1d_update": (
            normal(b, d, 2), normal(states, d, w), normal(d, w), some(normal(d)), True,
            some(torch.tensor([1, 5], dtype=torch.int32)), indices,
        ),
        "_state_update": (
            normal(states, 2, 3, n, dtype=f32), normal(b, 2, 3), normal(b, 2, 3),
            -normal(2, 3, n, dtype=f32).abs(), normal(b, 1, n), normal(b, 1, n),
            some(normal(2, 3, dtype=f32)), some(normal(b, 2, 3)), some(normal(2, 3, dtype=f32)),
            True, indices,
        ),
        "_add_norm_fwd": (rows, residual, weight, bias, 1e-5, not full, some(f32)),
        "_mixer_step": (
            normal(b, 2 * d), normal(d, w), some(normal(d)), normal(5 + 2 * n, d), normal(d, 5),
            some(normal(d)), normal(d, n, dtype=f32), normal(d, dtype=f32), normal(b, d, w),
            normal(b, d, n),
        ),
        "_argmax_rows": (normal(5, d), torch.zeros(5, dtype=torch.long)),
        "_cross_entropy": (normal(5, d), torch.arange(5), 2 if full else -100),
    }  # fmt: skip
    if name.startswith("_mamba_block"):
        return op_arguments(name, "cpu", dtype, full)
    if name in table:
        return table[name]
    forward = table[name.replace("_bwd", "_fwd")]
    results = overload(name.replace("_bwd", "_fwd"), "reference")(*forward)
    if name == "_selective_scan_bwd":
        return (results[0], some(results[1]), *scan, results[2])
    if name == "_causal_conv1d_bwd":
        return (results[0], some(results[1]), *conv)
    y, total, mean, rstd = results
    if full:
        return (y, total, rows, residual, weight, bias, mean, rstd, False, dtype, torch.float16)
    return (y, None, rows, None, weight, bias, mean, rstd, True, None, None)


@pytest.mark.parametrize("which", ["default", "reference"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in _ON_MODELS])
def test_fake_results_have_the_real_shapes_dtypes_and_strides(name, dtype, full, which):
    arguments = _arguments(name, dtype, full)
    op = overload(name, "reference" if dtype == torch.float64 else which)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake = op(*fakes)
    real = op(*arguments)
    assert (fake is None) == (real is None)
    if real is None:
        return
    as_tuple = (lambda r: r) if isinstance(real, tuple) else (lambda r: (r,))
    for i, (f, r) in enumerate(zip(as_tuple(fake), as_tuple(real), strict=True)):
        assert (f.shape, f.dtype, f.device) == (r.shape, r.dtype, r.device), i
        assert f.stride() == r.stride(), i


def test_what_only_the_reference_serves_is_refused_by_an_explicit_choice():
    u = torch.ones(1, 2, 3, requires_grad=True)
    real, imaginary = -torch.ones(2, 2), torch.ones(2, 2)
    constant = torch.complex(real, imaginary)
    with mamba_ssm.backend("native"), pytest.raises(BackendError, match="complex A is served by"):
        selective_scan_fn(u, u, constant, constant, constant)
    assert selective_scan_fn(u, u, constant, constant, constant).shape == u.shape
    out = selective_scan_fn(u, u.detach(), real, imaginary, imaginary)
    with mamba_ssm.backend("native"), pytest.raises(BackendError, match="differentiated again"):
        torch.autograd.grad(out.sum(), u, create_graph=True)
