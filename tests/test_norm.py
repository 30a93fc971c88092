"""Add and norm: every optional argument, dtypes, gradients, the historical homes, wrong calls."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from helpers import assert_matches, cotangent, evaluate, to_double
from hypothesis import given
from hypothesis import strategies as st

from mamba_ssm.ops.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_forward,
    rms_norm_ref,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KINDS = pytest.mark.parametrize("rms", [False, True], ids=["layer norm", "rms norm"])


def make(shape=(3, 5, 12), dtype=torch.float32, weight_dtype=torch.float32, residual=None,
         bias=True, x1=False, weight1=False, rowscale=False, layout="contiguous", scale=1.0,
         device="cpu"):  # fmt: skip
    """Inputs of layer_norm_fn by name; ``residual`` is its dtype or None."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape, dtype=dtype):
        return (scale * torch.randn(shape, generator=generator) + 0.5).to(device, dtype)

    x = rand(*shape)
    if layout == "transposed":
        x = rand(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    if layout == "sliced":
        x = rand(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "expanded":
        x = rand(shape[-1]).expand(shape)
    d = shape[-1]
    return {
        "x": x,
        "weight": rand(d, dtype=weight_dtype),
        "bias": rand(d, dtype=weight_dtype) if bias else None,
        "residual": None if residual is None else rand(*shape, dtype=residual),
        "x1": rand(*shape) if x1 else None,
        "weight1": rand(d, dtype=weight_dtype) if weight1 else None,
        "bias1": rand(d, dtype=weight_dtype) if weight1 and bias else None,
        "rowscale": rand(*shape[:-1]) if rowscale else None,
    }


def plain(rms, residual_in_fp32=False, **fixed):
    """The oracle with the residual in the dtype that the fused function promises."""
    ref = rms_norm_ref if rms else layer_norm_ref

    def run(x, residual=None, **inputs):
        *ys, total = ref(x, residual=residual, **inputs, **fixed, prenorm=True, upcast=True)
        dtype = x.dtype if residual is None else residual.dtype
        if residual is None and residual_in_fp32 and dtype != torch.float64:
            dtype = torch.float32
        return *ys, total.to(dtype)

    return run


def fused(rms, **fixed):
    fn = rms_norm_fn if rms else layer_norm_fn
    return lambda **inputs: fn(**inputs, **fixed, prenorm=True)


ROWS = (
    [{}]
    + [{"shape": (4, d)} for d in (1, 2, 3, 63, 64, 65, 127, 1000)]
    + [{"shape": shape} for shape in ((7,), (0, 8), (2, 0, 8), (2, 3, 4, 8))]
    + [{"dtype": dtype, "weight_dtype": dtype} for dtype in FLOATS]
    + [{"dtype": dtype, "residual": torch.float32} for dtype in (torch.float16, torch.bfloat16)]
    + [{"dtype": torch.bfloat16, "residual": torch.bfloat16, "shape": (4, 127)}]
    + [{"residual": torch.bfloat16}, {"residual": torch.float32}, {"bias": False}]
    + [{"layout": layout} for layout in ("transposed", "sliced", "expanded")]
    + [{"layout": "sliced", "residual": torch.float32, "dtype": torch.bfloat16}]
    + [{"scale": 1e-3}, {"scale": 1e3}]
    + [{"x1": True}, {"weight1": True}, {"rowscale": True}]
    + [{"x1": True, "weight1": True, "residual": torch.float32, "dtype": torch.bfloat16}]
    + [{"rowscale": True, "residual": torch.float32, "bias": False}]
)


@KINDS
@pytest.mark.parametrize("residual_in_fp32", [False, True])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_matches_the_plain_norm(row, residual_in_fp32, rms, backend, device):
    inputs = make(**row, device=device)
    assert_matches(
        fused(rms, residual_in_fp32=residual_in_fp32), plain(rms, residual_in_fp32), inputs
    )


@given(shape=st.lists(st.integers(0, 5), max_size=3), d=st.integers(1, 70), rms=st.booleans())
def test_law_every_row_is_normed_alone(shape, d, rms):
    inputs = make(shape=(*shape, d), residual=torch.float32)
    y, total = fused(rms)(**inputs)
    rows = inputs["x"].reshape(-1, d) + inputs["residual"].reshape(-1, d)
    for row, y_row in zip(rows, y.reshape(-1, d), strict=True):
        alone = rms_norm_forward(row[None], inputs["weight"], inputs["bias"], is_rms_norm=rms)[0]
        torch.testing.assert_close(y_row, alone)
    assert torch.equal(total.reshape(-1, d), rows)


@KINDS
def test_y_comes_from_the_unrounded_sum(rms):
    x = torch.full((1, 4), 256.0, dtype=torch.bfloat16)  # 256 + 0.5 rounds back to 256
    residual = torch.tensor([[0.5, -0.5, 0.5, -0.5]]).bfloat16()
    y, total = fused(rms)(x=x, weight=torch.ones(4), bias=None, residual=residual)
    assert torch.equal(total, x)
    if not rms:
        torch.testing.assert_close(y.float(), torch.tensor([[1.0, -1, 1, -1]]))


def test_with_nothing_to_add_the_sum_is_x():
    x = torch.randn(2, 4)
    assert rms_norm_fn(x, torch.ones(4), None, prenorm=True)[1] is x
    wide = rms_norm_fn(x.bfloat16(), torch.ones(4), None, prenorm=True, residual_in_fp32=True)[1]
    assert wide.dtype == torch.float32 and torch.equal(wide, x.bfloat16().float())


@KINDS
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("more", [{}, {"weight1": True}], ids=str)
def test_gradcheck_also_of_second_order(rms, residual, more):
    double = torch.float64
    inputs = make((2, 3), double, double, residual=double if residual else None, **more)
    names = [name for name, value in inputs.items() if value is not None]
    leaves = [inputs[name].requires_grad_() for name in names]

    def run(*values):
        return fused(rms)(**dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32], ids=str)
def test_second_order_in_low_precision(residual):
    inputs = make(shape=(3, 8), dtype=torch.bfloat16, residual=residual)
    inputs = {name: inputs[name] for name in ("x", "weight", "bias", "residual")}

    def gradients(fn):
        def run(**inputs):
            y, total = fn(**inputs)
            loss = y.double().square().sum() + total.double().pow(3).sum()
            return torch.autograd.grad(loss, inputs["x"], create_graph=True)

        return run

    assert_matches(gradients(fused(True)), gradients(plain(True)), inputs)


@KINDS
@pytest.mark.parametrize("x1", [False, True])
def test_dropout_is_the_plain_norm_with_the_returned_masks(rms, x1):
    inputs = make(shape=(40, 50), x1=x1, residual=torch.float32)
    torch.manual_seed(3)
    fn = rms_norm_fn if rms else layer_norm_fn
    fixed = {"dropout_p": 0.25, "prenorm": True}
    *_, mask, mask1 = fn(**inputs, **fixed, return_dropout_mask=True)
    assert mask.dtype == torch.bool and 0.7 < mask.float().mean() < 0.8
    assert (mask1 is not None) == x1
    if x1:
        assert not torch.equal(mask, mask1)

    def seeded(**inputs):
        torch.manual_seed(3)
        return fn(**inputs, **fixed)

    reference = plain(rms, dropout_p=0.25, dropout_mask=mask, dropout_mask1=mask1)
    assert_matches(seeded, reference, inputs)


def test_order_and_number_of_results():
    inputs = make(shape=(2, 4), weight1=True)
    flags = ("prenorm", "return_dropout_mask")
    assert len(layer_norm_fn(**inputs)) == 2
    assert len(layer_norm_fn(**inputs, prenorm=True)) == 3
    y, y1, total, mask, mask1 = layer_norm_fn(**inputs, **dict.fromkeys(flags, True))
    assert torch.equal(total, inputs["x"]) and mask is None and mask1 is None
    inputs |= {"weight1": None, "bias1": None}
    assert torch.equal(layer_norm_fn(**inputs), y)
    assert [type(t) for t in layer_norm_fn(**inputs, return_dropout_mask=True)][1:] == [
        type(None)
    ] * 2
    assert not torch.equal(y, y1)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [None, torch.float32], ids=str)
def test_norm_then_linear(rms, dtype, residual):
    inputs = make(dtype=dtype, residual=residual)
    inputs = {name: inputs[name] for name in ("x", "weight", "bias", "residual")}
    inputs |= {"linear_weight": torch.randn(7, 12), "linear_bias": torch.randn(7)}

    def run(x, weight, bias, residual, linear_weight, linear_bias):
        return layer_norm_linear_fn(
            x, weight, bias, linear_weight, linear_bias, residual, prenorm=True, is_rms_norm=rms
        )

    def unfused(linear_weight, linear_bias, **inputs):
        y, total = plain(rms)(**inputs)
        return torch.nn.functional.linear(y, linear_weight.to(y), linear_bias.to(y)), total

    assert_matches(run, unfused, inputs)


@KINDS
def test_autocast_keeps_x_dtype_and_uses_the_autocast_dtype_for_the_linear_map(rms):
    x, weight, linear = torch.randn(2, 8), torch.ones(8), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer_norm_fn(x, weight, None, is_rms_norm=rms)
        product = layer_norm_linear_fn(x, weight, None, linear, None, is_rms_norm=rms)
    assert y.dtype == torch.float32 and product.dtype == torch.bfloat16
    assert torch.equal(y, layer_norm_fn(x, weight, None, is_rms_norm=rms))


def test_module():
    norm = RMSNorm(6, eps=1e-3, dropout_p=0.5, dtype=torch.float64)
    assert norm.bias is None and list(norm.state_dict()) == ["weight"] and norm.drop.p == 0.5
    x, residual = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    y, total = norm.eval()(x, residual, prenorm=True)
    expected = rms_norm_ref(x, norm.weight, None, residual, eps=1e-3)
    torch.testing.assert_close(y, expected)
    assert torch.equal(total, x + residual)
    norm.train()
    assert not torch.equal(norm(x), norm(x))
    assert RMSNorm(4).eps == 1e-5 and RMSNorm(4).drop is None
    assert "4, eps=1e-05" in repr(RMSNorm(4))


def test_module_compiles_into_one_graph(backend):
    norm = RMSNorm(8)

    def run(x, residual):
        return norm(x, residual, prenorm=True, residual_in_fp32=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for residual in (None, torch.randn(3, 8)):
        inputs = {"x": cotangent((3, 8), torch.bfloat16), "residual": residual}
        expected, actual = evaluate(run, inputs), evaluate(compiled, inputs)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], msg=name)


@pytest.mark.parametrize("overload", ["default", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@KINDS
def test_opcheck(rms, dtype, overload):
    ops = torch.ops.mamba_ssm
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    for residual, out_dtype in ((None, None), (None, torch.float32), (dtype, dtype)):
        inputs = make(shape=(4, 6), dtype=dtype, residual=residual, bias=residual is None)
        x, residual, weight, bias = (inputs[k] for k in ("x", "residual", "weight", "bias"))
        args = (x, residual, weight, bias, 1e-5, rms, out_dtype)
        torch.library.opcheck(getattr(ops._add_norm_fwd, overload), args, **checks)
        y, _, mean, rstd = ops._add_norm_fwd.reference(*args)
        for dtotal, *dtypes in ((None, None, None), (y, dtype, torch.float16)):
            args = (y, dtotal, x, residual, weight, bias, mean, rstd, rms, *dtypes)
            torch.library.opcheck(getattr(ops._add_norm_bwd, overload), args, **checks)


def test_historical_homes_and_their_argument_orders():
    new = importlib.import_module("mamba_ssm.ops.triton.layer_norm")
    old = importlib.import_module("mamba_ssm.ops.triton.layernorm")
    assert new.RMSNorm is old.RMSNorm is RMSNorm and new.layer_norm_fn is layer_norm_fn
    x, weight, bias = torch.randn(2, 4), torch.randn(4), torch.randn(4)
    residual = torch.randn(2, 4)
    for rms, expected_fn in ((False, layer_norm_ref), (True, rms_norm_ref)):
        y, total = old.layer_norm_fn(x, weight, bias, residual, 1e-2, True, True, rms)
        expected = expected_fn(x, weight, bias, residual, eps=1e-2)
        torch.testing.assert_close(y, expected)
        assert torch.equal(total, x + residual)
    y, total = old.rms_norm_fn(x, weight, None, residual, True, False, 1e-2)
    torch.testing.assert_close(y, rms_norm_ref(x, weight, None, residual, eps=1e-2))

    def names(fn):
        return ", ".join(inspect.signature(fn).parameters)

    assert names(layer_norm_fn) == (
        "x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, "
        "residual_in_fp32, is_rms_norm, return_dropout_mask"
    )
    assert names(rms_norm_fn) == names(layer_norm_fn).replace("is_rms_norm, ", "")
    assert names(old.layer_norm_fn) == (
        "x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm"
    )
    assert names(old.rms_norm_fn) == "x, weight, bias, residual, prenorm, residual_in_fp32, eps"


def test_upcast_false_adds_in_the_given_dtype():
    x, residual = torch.full((1, 4), 256.0).bfloat16(), torch.full((1, 4), 0.5).bfloat16()
    rounded = layer_norm_ref(x, torch.ones(4), None, residual, prenorm=True)[1]
    exact = layer_norm_ref(x, torch.ones(4), None, residual, prenorm=True, upcast=True)[1]
    assert torch.equal(rounded, x) and torch.equal(to_double(exact), x.double() + 0.5)


WRONG = [
    ({"x": torch.tensor(1.0)}, ValueError, "at least one dimension"),
    ({"weight": torch.ones(3)}, ValueError, "weight must have shape"),
    ({"bias": torch.ones(1)}, ValueError, "bias must have shape"),
    ({"residual": torch.ones(4)}, ValueError, "residual must have shape"),
    ({"x1": torch.ones(4)}, ValueError, "x1 must have shape"),
    ({"weight1": torch.ones(5)}, ValueError, "weight1 must have shape"),
    ({"bias1": torch.ones(4)}, ValueError, "bias1 needs weight1"),
    ({"rowscale": torch.ones(3)}, ValueError, "rowscale must have shape"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must be in"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be in"),
    ({"x": torch.ones(2, 4).long()}, TypeError, "x must be one of"),
    ({"residual": torch.ones(2, 4).int()}, TypeError, "residual must be one of"),
    ({"weight": torch.ones(4, device="meta")}, ValueError, "weight is on meta"),
]


@pytest.mark.parametrize("change,error,message", WRONG, ids=lambda v: str(v)[:40])
def test_wrong_calls(change, error, message):
    arguments = {"x": torch.ones(2, 4), "weight": torch.ones(4), "bias": None} | change
    with pytest.raises(error, match=message):
        layer_norm_fn(**arguments)


def test_wrong_shapes_of_the_other_functions():
    with pytest.raises(ValueError, match="x must be"):
        rms_norm_forward(torch.ones(2, 3, 4), torch.ones(4), None)
    with pytest.raises(ValueError, match="linear_weight must have shape"):
        layer_norm_linear_fn(torch.ones(2, 4), torch.ones(4), None, torch.ones(3, 5), None)
