"""``mamba_ssm.compat.causal_conv1d()``, in processes of their own: imports decide here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba_ssm.compat import _causal_conv1d_cuda as compiled
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn

ROOT = Path(__file__).resolve().parents[1]
ABSENT = pytest.mark.skipif(
    importlib.util.find_spec("causal_conv1d") is not None,
    reason="the real causal_conv1d is installed, so nothing is put in its place",
)


def run(code: str, *path: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path))),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-W", "always::RuntimeWarning", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def output(code: str, *path: Path) -> str:
    result = run(code, *path)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@ABSENT
def test_nothing_happens_without_the_call():
    code = """
import importlib.util, mamba_ssm, mamba_ssm.compat
assert importlib.util.find_spec("causal_conv1d") is None
"""
    output(code)


@ABSENT
def test_the_name_is_found_as_clients_look_for_it():
    code = """
import importlib, importlib.metadata, importlib.util, inspect, sys
from mamba_ssm import compat
from mamba_ssm.ops import causal_conv1d as ours
module = compat.causal_conv1d()
assert compat.causal_conv1d() is module is sys.modules["causal_conv1d"]
spec = importlib.util.find_spec("causal_conv1d")
assert spec is not None and spec.name == "causal_conv1d" and module.__spec__ is spec
assert importlib.util.find_spec("causal_conv1d.nothing") is None
for name in ("causal_conv1d", "causal-conv1d", "Causal_Conv1d"):
    assert importlib.metadata.version(name) == "1.4.0+mamba.ssm" == module.__version__
names = [d.metadata["Name"] for d in importlib.metadata.distributions()]
assert names.count("causal-conv1d") == 1 and "torch" in names
try:
    importlib.metadata.version("causal-conv1d-other")
except importlib.metadata.PackageNotFoundError:
    pass
else:
    raise AssertionError
from packaging.version import parse
assert parse(module.__version__) >= parse("1.4")
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref
from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
for function in (causal_conv1d_fn, causal_conv1d_update, causal_conv1d_ref,
                 causal_conv1d_update_ref, causal_conv1d_varlen_states):
    assert function is getattr(ours, function.__name__)
assert "activation" in inspect.signature(causal_conv1d_fn).parameters
import causal_conv1d_cuda
assert callable(causal_conv1d_cuda.causal_conv1d_fwd)
del sys.modules["causal_conv1d"]
assert importlib.import_module("causal_conv1d").causal_conv1d_fn is causal_conv1d_fn
"""
    output(code)


@ABSENT
def test_importing_mamba_ssm_does_not_import_it():
    assert output("import sys, mamba_ssm; print('mamba_ssm.compat' in sys.modules)") == "False"


def test_a_real_package_is_left_alone(tmp_path):
    (tmp_path / "causal_conv1d").mkdir()
    (tmp_path / "causal_conv1d" / "__init__.py").write_text("__version__ = 'real'\n")
    code = """
import sys, mamba_ssm.compat
before = list(sys.meta_path)
assert mamba_ssm.compat.causal_conv1d().__version__ == "real" and sys.meta_path == before
"""
    output(code, tmp_path)


@ABSENT
def test_a_real_package_that_appears_later_comes_first(tmp_path):
    (tmp_path / "causal_conv1d").mkdir()
    (tmp_path / "causal_conv1d" / "__init__.py").write_text("__version__ = 'real'\n")
    code = f"""
import importlib, sys, mamba_ssm.compat
mamba_ssm.compat.causal_conv1d()
sys.path.insert(0, {str(tmp_path)!r})
del sys.modules["causal_conv1d"]
assert importlib.import_module("causal_conv1d").__version__ == "real"
"""
    output(code)


def test_a_blocked_name_is_an_error():
    code = """
import sys
sys.modules["causal_conv1d"] = None
import mamba_ssm.compat
mamba_ssm.compat.causal_conv1d()
"""
    result = run(code)
    assert result.returncode == 1 and "which blocks the import" in result.stderr


def test_a_broken_real_package_is_an_error(tmp_path):
    (tmp_path / "causal_conv1d").mkdir()
    (tmp_path / "causal_conv1d" / "__init__.py").write_text("import no_such_library_of_kernels\n")
    result = run("import mamba_ssm.compat as c; c.causal_conv1d()", tmp_path)
    assert result.returncode == 1 and "no_such_library_of_kernels" in result.stderr


TRANSFORMERS = """
import torch
torch.cuda.is_available = lambda: True  # what transformers asks for besides the package
{first}
import transformers
from transformers.utils import import_utils
{second}
from transformers import MambaConfig, MambaForCausalLM
import_utils.is_torch_cuda_available = lambda: True
available = import_utils.is_causal_conv1d_available()
torch.cuda.is_available = lambda: False
"""
CALL = "import mamba_ssm.compat; mamba_ssm.compat.causal_conv1d()"


@ABSENT
@pytest.mark.parametrize("place", ["first", "second"])
def test_transformers_takes_it_when_called_before_the_model_is_imported(place):
    pytest.importorskip("transformers", reason="transformers is not installed")
    code = (
        TRANSFORMERS.format(**{"first": "", "second": ""} | {place: CALL})
        + """
assert available
from torch.utils._python_dispatch import TorchDispatchMode
names = set()
class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names.add(func._schema.name)
        return func(*args, **(kwargs or {}))
config = MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1)
if int(transformers.__version__.split(".")[0]) >= 5:
    with torch.no_grad(), Mode():
        MambaForCausalLM(config).eval()(torch.ones(1, 5, dtype=torch.long))
    assert "mamba_ssm::_causal_conv1d_fwd" in names, names
"""
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "RuntimeWarning" not in result.stderr


@ABSENT
def test_calling_it_late_is_said():
    pytest.importorskip("transformers", reason="transformers is not installed")
    result = run("from transformers import MambaForCausalLM\n" + CALL)
    assert result.returncode == 0
    assert "RuntimeWarning: transformers.models.mamba.modeling_mamba looked for" in result.stderr


@ABSENT
def test_an_answer_that_transformers_kept_is_forgotten():
    pytest.importorskip("transformers", reason="transformers is not installed")
    code = """
import torch
torch.cuda.is_available = lambda: True
from transformers.utils import import_utils
import_utils.is_torch_cuda_available = lambda: True
assert not import_utils.is_causal_conv1d_available()
import mamba_ssm.compat
mamba_ssm.compat.causal_conv1d()
assert import_utils.is_causal_conv1d_available()
"""
    output(code)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_the_compiled_modules_functions(silu, bias, states, backend):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 9, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    b = torch.randn(5, requires_grad=True) if bias else None
    initial = torch.randn(2, 5, 3, requires_grad=True) if states else None
    activation = "silu" if silu else None
    out, final = causal_conv1d_fn(
        x, weight, b, initial_states=initial, return_final_states=True, activation=activation
    )
    given = torch.empty(2, 5, 3) if states else None
    result = compiled.causal_conv1d_fwd(x, weight, b, None, initial, given, silu)
    assert torch.equal(result, out) and not result.requires_grad
    assert not states or torch.equal(given, final)
    dout, dfinal = torch.randn_like(out), torch.randn_like(final) if states else None
    outputs = (out, final) if states else (out,)
    inputs = [t for t in (x, weight, b, initial) if t is not None]
    expected = torch.autograd.grad(outputs, inputs, (dout, dfinal) if states else (dout,))
    dx = torch.empty_like(x)
    arguments = (x, weight, b, dout, None, initial, dfinal, dx, states, silu)
    results = compiled.causal_conv1d_bwd(*arguments)
    assert results[0] is dx and len(results) == 4
    for actual, e in zip([t for t in results if t is not None], expected, strict=True):
        assert torch.equal(actual, e)
