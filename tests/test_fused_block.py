"""The mixer as one autograd function, in_proj included, against its parts, with all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_oracle, assert_matches, evaluate, to_double
from mamba_cases import inputs as layer_inputs
from mamba_cases import make as make_layer
from test_mamba_inner import plain as inner_plain
from torch.utils.checkpoint import checkpoint

from mamba_ssm.modules import mamba_simple
from mamba_ssm.ops import mamba_block as module
from mamba_ssm.ops.layer_norm import rms_norm_fn
from mamba_ssm.ops.mamba_block import BlockArgs, mamba_block
from mamba_ssm.utils.generation import InferenceParams

OPS, BF16 = torch.ops.mamba_ssm, torch.bfloat16
SIZES = {"b": 2, "m": 5, "d": 6, "length": 17, "n": 4, "r": 3, "w": 4}
ABSENT = ("in_bias", "conv_bias", "dt_bias", "out_bias")
CASES = {
    "base": {},
    "no biases": {"absent": ABSENT},
    **{f"l={i}": {"length": i} for i in (0, 1, 2, 70)},
    "b=0": {"b": 0},
    "d=1": {"d": 1},
    "n=1, r=1": {"n": 1, "r": 1},
    "width 1": {"w": 1},
    "bf16": {"dtype": BF16},
    "fp16": {"dtype": torch.float16, "absent": ABSENT},
    "bf16, vectors": {"dtype": BF16, "d": 32, "n": 16, "r": 16, "m": 16, "length": 40},
}


def make(device: str = "cpu", dtype=torch.float32, param_dtype=None, absent=(), **sizes) -> dict:
    """The same numbers every time."""
    s = SIZES | sizes
    b, m, d, length, n, r, w = (s[k] for k in SIZES)
    g = torch.Generator().manual_seed(3)

    def normal(*shape, scale=1.0, to=param_dtype or dtype):
        return (scale * torch.randn(shape, generator=g)).to(device, to)

    values = {
        "hidden": normal(b, length, m, to=dtype),
        "in_proj": normal(2 * d, m, scale=0.5),
        "in_bias": normal(2 * d, scale=0.2),
        "conv_weight": normal(d, 1, w, scale=0.5),
        "conv_bias": normal(d),
        "x_proj": normal(r + 2 * n, d, scale=0.5),
        "dt_proj": normal(d, r, scale=0.5),
        "dt_bias": normal(d, scale=0.5),
        "A_log": normal(d, n, scale=0.3, to=torch.float32),
        "D": normal(d, to=torch.float32),
        "out_proj": normal(m, d, scale=0.5),
        "out_bias": normal(m),
    }
    return {name: None if name in absent else value for name, value in values.items()}


def op_arguments(name: str, device: str, dtype: torch.dtype, full: bool, **sizes) -> tuple:
    """Arguments of the ops; ``full``: with the optional ones, and with weights in fp32."""
    inputs = make(device, dtype, torch.float32 if full else dtype, absent=("in_bias",), **sizes)
    hidden, in_proj, _, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj, _ = (
        inputs.values()
    )
    if not full:
        conv_bias = dt_bias = None
    wide = torch.float32
    forward = (hidden, in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D,
               out_proj, dtype, 64)  # fmt: skip
    if name == "_mamba_block_fwd":
        return forward
    out, rows, xz, x_dbl, A, y, states, _, *used, conv, delta = OPS._mamba_block_fwd.reference(
        *forward
    )
    rows = rows if rows.dim() == 2 else hidden.flatten(0, 1)
    given = in_proj, x_proj, dt_proj, out_proj
    w_in, w_x, w_dt, w_out = (u if u.dim() == 2 else w for u, w in zip(used, given, strict=True))
    return (
        out.flatten(0, 1), y if full else None, w_out, rows, xz, x_dbl, conv if full else None,
        delta if full else None, A, states, w_in, conv_weight, conv_bias, w_x, w_dt, dt_bias, D,
        wide, wide, dtype, wide, wide,
        63 if full else 5, 64,
    )  # fmt: skip


def plain(**inputs):
    t = BlockArgs(**inputs)
    # As F.linear does under autocast, which leaves fp64 alone.
    xz = F.linear(t.hidden, t.in_proj, t.in_bias).transpose(1, 2)
    wide = torch.promote_types(t.A_log.dtype, torch.float32)
    dt_bias = None if t.dt_bias is None else t.dt_bias.to(wide)
    return inner_plain(
        xz, t.conv_weight, t.conv_bias, t.x_proj, t.dt_proj, t.out_proj, t.out_bias,
        -torch.exp(t.A_log), None, None, t.D, dt_bias, None, None, True, 1, None, None, None, 1e-6,
    )  # fmt: skip


def autocast(fn, device):
    def run(**inputs):
        with torch.autocast(torch.device(device).type, BF16):
            return fn(**inputs)

    return run


@pytest.mark.parametrize("name", CASES)
def test_table(name, device, backend):
    assert_matches(mamba_block, plain, make(device, **CASES[name]))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", ["base", "no biases", "l=70"])
def test_autocast(name, dtype, device, backend):
    inputs = make(device, **CASES[name], dtype=dtype, param_dtype=torch.float32)
    results = evaluate(autocast(mamba_block, device), inputs)
    assert results["output 0"].dtype == BF16
    for key, value in inputs.items():
        if value is not None:
            assert results[f"grad of {key}"].dtype == value.dtype, key
    assert_matches(autocast(mamba_block, device), autocast(plain, device), inputs)


def test_weights_too_large_to_keep_give_the_same_bits(monkeypatch, device):
    run, inputs = autocast(mamba_block, device), make(device)
    kept = evaluate(run, inputs)
    monkeypatch.setattr(module, "SMALL_WEIGHT", 0)
    again = evaluate(run, inputs)
    assert all(torch.equal(kept[key], again[key]) for key in kept)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_what_is_kept_or_computed_again_gives_the_same_bits(monkeypatch, dtype, device):
    inputs = make(device, dtype)
    kept = evaluate(mamba_block, inputs)
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    again = evaluate(mamba_block, inputs)
    assert all(torch.equal(kept[key], again[key]) for key in kept)


def test_gradcheck_also_of_second_order():
    small = {"b": 1, "m": 2, "d": 2, "length": 3, "n": 2, "r": 1, "w": 2}
    values = {k: to_double(v) for k, v in make(**small).items()}
    leaves = tuple(v.requires_grad_() for v in values.values())

    def run(*leaves):
        return mamba_block(**dict(zip(values, leaves, strict=True)))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


BIGGER = {"b": 1, "d": 64, "n": 16, "r": 4, "m": 32, "length": 130}


@pytest.mark.parametrize(
    ("dtype", "sizes"), [(torch.float32, {}), (BF16, {}), (torch.float32, BIGGER)]
)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", ["_mamba_block_fwd", "_mamba_block_bwd"])
def test_ops_in_one_call_against_the_oracle(name, dtype, full, sizes, device):
    args = op_arguments(name, device, dtype, full, **sizes)
    double = [torch.float64 if a in (dtype, torch.float32) else to_double(a) for a in args]
    op, reference = getattr(OPS, name).default, getattr(OPS, name).reference
    results = zip(op(*args), reference(*args), reference(*double), strict=True)
    for i, (actual, expected, oracle) in enumerate(results):
        if oracle.shape == expected.shape:
            assert_close_to_oracle(actual, expected, oracle, f"result {i}")
        else:  # what needs no conversion in fp64
            assert torch.equal(actual, expected), i
    assert all(map(torch.equal, op(*args), op(*args)))
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(OPS._mamba_block_bwd.default if "bwd" in name else op, args, **checks)


@pytest.mark.parametrize("trained", [["hidden"], ["A_log"], ["in_proj", "out_bias"], ["dt_bias"]])
def test_frozen_parts_get_no_gradient_and_the_others_the_same(trained, device):
    expected = evaluate(mamba_block, make(device))
    values = make(device)
    for name in trained:
        values[name].requires_grad_()
    out = mamba_block(**values)
    assert torch.equal(out.detach(), expected["output 0"])
    grads = torch.autograd.grad(out, [values[name] for name in trained], torch.ones_like(out))
    whole = {name: value.detach().requires_grad_() for name, value in make(device).items()}
    out = mamba_block(**whole)
    every = torch.autograd.grad(out, [whole[name] for name in trained], torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(grads, every, strict=True))


@pytest.mark.parametrize("trained", [None, "hidden", "in_proj", "x_proj", "out_proj", "A_log"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_backward_in_stages_gives_the_bits_of_one_call(mixed, trained, monkeypatch, device):
    if mixed and device == "cpu":
        pytest.skip("torch has no product of 16-bit matrices in fp32 on the CPU")
    monkeypatch.setattr(module, "_dtype_in_one", lambda t, autocast: autocast or t.in_proj.dtype)
    run, values = mamba_block, make(device, absent=("in_bias", "out_bias"))
    run = autocast(run, device) if mixed else run
    every = evaluate(run, values)
    frozen = [] if trained is None else [name for name in values if name != trained]
    for bytes_in_one in (0, 1 << 25):
        monkeypatch.setattr(module, "ONE_CALL_BYTES", bytes_in_one)
        results = evaluate(run, values, without_grad=frozen)
        assert len(results) == (len(every) if trained is None else 2)
        assert all(torch.equal(every[key], value) for key, value in results.items())


def test_a_layer_uses_it_and_gives_what_its_parts_give(monkeypatch, device):
    layer, x = make_layer(dtype=torch.float32).to(device), layer_inputs(2, 9, 6).float().to(device)
    called = []
    apply = module.MambaBlockFn.apply
    monkeypatch.setattr(module.MambaBlockFn, "apply", lambda *a: called.append(1) or apply(*a))
    whole = layer(x)
    assert called == [1]
    fused = mamba_simple.mamba_inner_fn
    monkeypatch.setattr(mamba_simple, "mamba_inner_fn", lambda *a, **k: fused(*a, **k))
    torch.testing.assert_close(layer(x), whole)
    monkeypatch.undo()
    layer.in_proj.register_forward_hook(lambda *_: called.append("hook"))
    torch.testing.assert_close(layer(x), whole)
    assert called == [1, "hook"]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("length", [3, 4, 70])
def test_prefill_is_one_call_that_fills_the_cache_as_the_parts_do(dtype, length, device, backend):
    layer, x = (
        make_layer(dtype=dtype).to(device),
        torch.randn(2, length, 6, device=device, dtype=dtype),
    )
    caches = [layer.allocate_inference_cache(2, length) for _ in range(2)]
    with torch.inference_mode():
        whole = layer(x, _prefill(caches[0]))
        layer.use_fast_path = False
        parts = layer(x, _prefill(caches[1]))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == BF16 else {}
    torch.testing.assert_close(whole, parts, **tolerance)
    for fast, plain in zip(*caches, strict=True):
        torch.testing.assert_close(fast, plain, **tolerance)


def test_recomputed_it_keeps_what_it_kept_the_first_time(device):
    layer, x = make_layer(d_model=7, dtype=torch.float32).to(device), torch.randn(2, 9, 7)
    x = x.to(device).requires_grad_()
    with torch.autocast(torch.device(device).type, BF16):
        out = checkpoint(layer, x, use_reentrant=False)
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_wrong_calls_say_so():
    with pytest.raises(ValueError, match="x_proj_weight must have shape"):
        mamba_block(**make() | {"x_proj": torch.randn(4, 6)})
    with pytest.raises(TypeError, match="the projections must have one dtype"):
        mamba_block(**make() | {"out_proj": torch.randn(5, 6, dtype=BF16)})
    with pytest.raises(ValueError, match="hidden must have shape"):
        mamba_block(**make() | {"hidden": torch.randn(2, 17, 4)})
    with pytest.raises(ValueError, match="in_bias must have shape"):
        mamba_block(**make() | {"in_bias": torch.randn(3)})
    with pytest.raises(TypeError, match="hidden and in_proj must have one dtype"):
        mamba_block(**make() | {"hidden": torch.randn(2, 17, 5, dtype=BF16)})
    with pytest.raises(TypeError, match="hidden must be one of"):
        mamba_block(**make() | {"hidden": torch.ones(2, 17, 5, dtype=torch.int32)})


def _prefill(cache):
    return InferenceParams(9, 2, key_value_memory_dict={0: cache})


@pytest.mark.parametrize("fast", [True, False])
def test_inference_mode_gives_the_same_bits(fast, device, backend):
    layer, x = make_layer(dtype=torch.float32, use_fast_path=fast), torch.randn(2, 9, 6)
    layer, x = layer.to(device), x.to(device)
    with torch.no_grad():
        expected = layer(x, return_final_state=not fast)
        expected = expected if fast else expected[0]
        normed = rms_norm_fn(x, layer.in_proj.weight[0], None, residual=x.bfloat16(), prenorm=True)
    with torch.inference_mode():
        cache = layer.allocate_inference_cache(2, 9)
        actual = layer(x) if fast else layer(x, _prefill(cache))
        again = rms_norm_fn(x, layer.in_proj.weight[0], None, residual=x.bfloat16(), prenorm=True)
    assert torch.equal(actual, expected)
    assert all(torch.equal(a, b) for a, b in zip(again, normed, strict=True))
    if not fast:
        with torch.no_grad():
            conv_input = layer.in_proj(x).transpose(1, 2)[:, : layer.d_inner]
        assert torch.equal(cache[0], conv_input[..., -layer.d_conv :])
