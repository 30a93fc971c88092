"""mamba_inner_fn: the fused block against its parts written out, with all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_matches, evaluate, to_double

from mamba_ssm.ops import mamba_inner, mamba_inner_steps
from mamba_ssm.ops.selective_scan_interface import (
    MambaInnerFn,
    mamba_inner_fn,
    mamba_inner_ref,
    rms_norm_forward,
    selective_scan_ref,
)

SIZES = {"b": 2, "d": 6, "length": 17, "n": 4, "r": 3, "e": 5, "w": 4}


def make(device: str = "cpu", **options) -> dict:
    """Arguments of mamba_inner_fn by name, the same numbers every time. Options replace SIZES, or

    name what to change: ``B``/``C`` "constant" or a number of groups, ``present`` and ``absent``
    optional arguments, ``layout`` "channel last", ``dtype``, ``param_dtype``, ``complex_A``.
    """
    o = {"B": None, "C": None, "present": (), "absent": (), "dtype": torch.float32}
    o |= SIZES | options
    dtype, complex_A = o["dtype"], o.get("complex_A", False)
    param_dtype = o.get("param_dtype", dtype)
    b, d, length, n, r, e = (o[k] for k in ("b", "d", "length", "n", "r", "e"))
    rows = n * (2 if complex_A else 1)
    g = torch.Generator().manual_seed(3)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=g)

    A = -0.1 - torch.rand(d, n, generator=g)
    A = torch.complex(A, normal(d, n)) if complex_A else A
    xz = normal(b, 2 * d, length).to(dtype)
    if o.get("layout") == "channel last":
        xz = xz.transpose(1, 2).contiguous().transpose(1, 2)
    variable = (o["B"] is None) + (o["C"] is None)
    args = {
        "xz": xz,
        "conv1d_weight": normal(d, *([1] if o.get("conv3d") else []), o["w"], scale=0.5),
        "conv1d_bias": normal(d),
        "x_proj_weight": normal(r + rows * variable, d, scale=0.5),
        "delta_proj_weight": normal(d, r, scale=0.5),
        "out_proj_weight": normal(e, d, scale=0.5),
        "out_proj_bias": normal(e),
        "A": A,
        "B": None,
        "C": None,
        "D": normal(d),
        "delta_bias": normal(d, scale=0.5),
        "B_proj_bias": normal(rows),
        "C_proj_bias": normal(rows),
        "delta_softplus": o.get("softplus", True),
        "checkpoint_lvl": o.get("checkpoint_lvl", 1),
        "b_rms_weight": 1 + normal(n, scale=0.1),
        "c_rms_weight": 1 + normal(n, scale=0.1),
        "dt_rms_weight": 1 + normal(d, scale=0.1),
        "b_c_dt_rms_eps": o.get("eps", 1e-6),
    }
    for name in ("B", "C"):
        if o[name] == "constant":
            args[name] = torch.complex(normal(d, n), normal(d, n)) if complex_A else normal(d, n)
        elif o[name] is not None:
            args[name] = normal(b, o[name], n, length).to(dtype)
    optional = {"B_proj_bias", "C_proj_bias", "b_rms_weight", "c_rms_weight", "dt_rms_weight"}
    for name in (optional - set(o["present"])) | set(o["absent"]):
        args[name] = None
    for name in ("conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight",
                 "out_proj_weight", "out_proj_bias"):  # fmt: skip
        args[name] = None if args[name] is None else args[name].to(param_dtype)
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}


def _normed(rows, weight, eps):
    if weight is None:
        return rows
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight).to(rows.dtype)


def plain(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
    out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
    checkpoint_lvl, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps,
):  # fmt: skip
    """The block from its parts: shifted sums, linear maps, norms, and the sequential scan."""
    d, length, rank = A.shape[0], xz.shape[2], delta_proj_weight.shape[1]
    x, z = xz[:, :d], xz[:, d:]
    weight = conv1d_weight.reshape(d, -1)
    w = weight.shape[1]
    wide = torch.promote_types(xz.dtype, torch.float32)
    padded = F.pad(x.to(wide), (w - 1, 0))
    total = sum(weight[:, k, None].to(wide) * padded[..., k : k + length] for k in range(w))
    x = F.silu(total if conv1d_bias is None else total + conv1d_bias.to(wide)[:, None]).to(xz.dtype)

    rows = F.linear(x.transpose(1, 2).to(x_proj_weight.dtype), x_proj_weight)
    delta = _normed(F.linear(rows[..., :rank], delta_proj_weight), dt_rms_weight, b_c_dt_rms_eps)
    rest = rows[..., rank:]
    values = []
    for value, bias, norm in ((B, B_proj_bias, b_rms_weight), (C, C_proj_bias, c_rms_weight)):
        if value is None:
            n = A.shape[1] * (2 if A.is_complex() else 1)
            part, rest = rest[..., :n], rest[..., n:]
            part = part if bias is None else part + bias.to(part.dtype)
            part = _normed(part, norm, b_c_dt_rms_eps)
            pairs = part.unflatten(-1, (A.shape[1], -1))  # (b, l, n, 1 or re and im)
            value = pairs.permute(0, 2, 1, 3).flatten(2)
        elif value.dim() > 2:
            value = value.to(delta.dtype)
        values.append(value)
    y = selective_scan_ref(
        x.to(delta.dtype), delta.transpose(1, 2), A, *values, D, z.to(delta.dtype), delta_bias,
        delta_softplus,
    )  # fmt: skip
    bias = None if out_proj_bias is None else out_proj_bias.to(out_proj_weight.dtype)
    return F.linear(y.transpose(1, 2).to(out_proj_weight.dtype), out_proj_weight, bias)


RMS = ("b_rms_weight", "c_rms_weight", "dt_rms_weight")
CASES = {
    "base": {},
    **{f"l={i}": {"length": i} for i in (0, 1, 3, 64)},
    "b=0": {"b": 0},
    "no biases": {"absent": ("out_proj_bias", "conv1d_bias", "delta_bias")},
    "no D": {"absent": ("D",)},
    "nothing optional": {"absent": ("out_proj_bias", "conv1d_bias", "delta_bias", "D")},
    "no softplus": {"softplus": False, "length": 5},
    "projection biases": {"present": ("B_proj_bias", "C_proj_bias")},
    "constant B": {"B": "constant", "present": ("C_proj_bias",)},
    "constant C": {"C": "constant", "present": ("B_proj_bias",)},
    "constant B, C": {"B": "constant", "C": "constant"},
    "variable B in groups": {"B": 3},
    "variable B, C in groups": {"B": 2, "C": 3},
    "constant B, variable C": {"B": "constant", "C": 1},
    "norms": {"present": RMS},
    "norm of delta": {"present": RMS[2:]},
    "norm of B, large eps": {"present": RMS[:1], "eps": 0.5},
    "norm of C, constant B": {"present": RMS[1:2], "B": "constant"},
    "norms and biases": {"present": (*RMS, "B_proj_bias", "C_proj_bias")},
    "conv weight (d, 1, w)": {"conv3d": True},
    "w=1": {"w": 1},
    "rank 1, n 1, one channel": {"r": 1, "n": 1, "d": 1, "e": 1},
    "channel last": {"layout": "channel last"},
    "bf16": {"dtype": torch.bfloat16, "layout": "channel last", "conv3d": True},
    "bf16, norms": {"dtype": torch.bfloat16, "present": RMS},
    "bf16, constant B": {"dtype": torch.bfloat16, "B": "constant", "C": 2},
    "fp16": {"dtype": torch.float16},
    "bf16 activations, fp32 weights": {"dtype": torch.bfloat16, "param_dtype": torch.float32},
    "complex": {"complex_A": True},
    "complex, biases": {"complex_A": True, "present": ("B_proj_bias", "C_proj_bias")},
    "complex, constant B": {"complex_A": True, "B": "constant"},
}  # fmt: skip


@pytest.mark.parametrize("checkpoint_lvl", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_table(name, checkpoint_lvl, device):
    inputs = make(device, **CASES[name], checkpoint_lvl=checkpoint_lvl)
    assert_matches(mamba_inner_fn, plain, inputs)


@pytest.mark.parametrize("name", [n for n in CASES if "norm" not in n])
def test_the_plain_function_of_the_package(name):
    def ref(**inputs):
        names = ("checkpoint_lvl", *RMS, "b_c_dt_rms_eps")
        return mamba_inner_ref(**{k: v for k, v in inputs.items() if k not in names})

    assert_matches(ref, plain, make(**CASES[name]))


@pytest.mark.parametrize("name", ["base", "norms and biases", "constant B", "variable B in groups"])
def test_both_levels_give_the_same_bits(name):
    results = [evaluate(mamba_inner_fn, make(**CASES[name], checkpoint_lvl=i)) for i in (0, 1)]
    for key in results[0]:
        assert torch.equal(results[0][key], results[1][key]), key


def _kept(**options) -> int:
    """Elements that autograd keeps beyond the arguments."""
    inputs = make(**options)
    given = [v for v in inputs.values() if isinstance(v, torch.Tensor)]
    storages = {v.untyped_storage().data_ptr() for v in given}
    found = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in storages:
            found[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for v in given:
            v.requires_grad_()
        mamba_inner_fn(**inputs)
    return sum(found.values())


def test_level_1_keeps_less_memory():
    # Level 0 keeps the convolution's output and delta as well.
    sizes = {"b": 2, "d": 16, "length": 64}
    assert _kept(**sizes, checkpoint_lvl=0) - _kept(**sizes, checkpoint_lvl=1) == 2 * 2 * 16 * 64


GRADCHECK = {
    "base": {"conv3d": True},
    "norms and biases": CASES["norms and biases"],
    "constant B": CASES["constant B"],
    "variable B in groups": CASES["variable B in groups"],
    "complex": CASES["complex"],
}


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck_also_of_second_order(name):
    small = {"b": 1, "length": 3, "n": 2, "r": 2, "e": 2, "w": 2}
    inputs = {k: to_double(v) for k, v in make(**GRADCHECK[name], **small).items()}
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)]
    values = tuple(inputs[k].requires_grad_() for k in names)

    def run(*values):
        return mamba_inner_fn(**{**inputs, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(run, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, values, fast_mode=True)


@pytest.mark.parametrize("xz_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["base", "norms and biases", "constant B", "no biases"])
def test_autocast(name, xz_dtype):
    def autocast(fn):
        def run(**inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return fn(**inputs)

        return run

    inputs = make(**CASES[name], dtype=xz_dtype, param_dtype=torch.float32)
    results = evaluate(autocast(mamba_inner_fn), inputs)
    assert results["output 0"].dtype == torch.bfloat16
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor):
            assert results[f"grad of {key}"].dtype == value.dtype, key
    assert_matches(autocast(mamba_inner_fn), autocast(plain), inputs)


def test_weights_too_large_to_keep_give_the_same_bits(monkeypatch):
    def autocast(**inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return mamba_inner_fn(**inputs)

    inputs = make()
    kept = evaluate(autocast, inputs)
    for module in (mamba_inner, mamba_inner_steps):
        monkeypatch.setattr(module, "SMALL_WEIGHT", 0)
    cast_again = evaluate(autocast, inputs)
    for key, value in kept.items():
        assert torch.equal(cast_again[key], value), key


def test_the_backward_may_run_outside_autocast():
    inputs = make()
    weight = inputs["x_proj_weight"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = mamba_inner_fn(**inputs)
    (outside,) = torch.autograd.grad(out.float().sum(), weight, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = torch.autograd.grad(out.float().sum(), weight)
    assert outside.dtype == torch.float32 and torch.equal(outside, inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_of_transformers(dtype):
    # Eleven positional arguments, then keywords; xz with stride(1) = 1; the output bias in fp32.
    inputs = make(dtype=dtype, layout="channel last", conv3d=True, present=RMS)
    inputs["out_proj_bias"] = inputs["out_proj_bias"].float().requires_grad_()
    assert inputs["xz"].stride(1) == 1
    positional = list(inputs.values())[:11]
    out = mamba_inner_fn(
        *positional,
        delta_bias=inputs["delta_bias"],
        delta_softplus=True,
        b_rms_weight=inputs["b_rms_weight"],
        c_rms_weight=inputs["c_rms_weight"],
        dt_rms_weight=inputs["dt_rms_weight"],
        b_c_dt_rms_eps=1e-6,
    )
    assert out.dtype == dtype and torch.equal(out, mamba_inner_fn(**inputs))
    out.sum().backward()
    assert inputs["out_proj_bias"].grad.dtype == torch.float32
    assert_matches(mamba_inner_fn, plain, inputs)


def test_autograd_function_takes_the_same_positions():
    inputs = make(present=(*RMS, "B_proj_bias"))
    assert torch.equal(MambaInnerFn.apply(*inputs.values()), mamba_inner_fn(**inputs))
    short = list(inputs.values())[:8]
    assert torch.equal(MambaInnerFn.apply(*short), mamba_inner_fn(*short))


def test_defect_output_bias_gradient_has_its_shape():
    inputs = make()
    bias = inputs["out_proj_bias"].requires_grad_()
    out = mamba_inner_fn(**inputs)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    assert bias.grad.shape == (SIZES["e"],)
    torch.testing.assert_close(bias.grad, cotangent.sum((0, 1)))


def test_defect_norm_weights_get_gradients():
    inputs = make(present=RMS)
    for name in RMS:
        inputs[name].requires_grad_()
    mamba_inner_fn(**inputs).square().sum().backward()
    for name in RMS:
        assert inputs[name].grad is not None and inputs[name].grad.abs().min() > 0, name


def test_only_some_gradients_are_asked_for():
    expected = evaluate(mamba_inner_fn, make(present=RMS))
    inputs = make(present=RMS)
    everything = {k for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    for name in ("xz", "A", "dt_rms_weight"):
        alone = evaluate(mamba_inner_fn, inputs, everything - {name})
        assert torch.equal(alone[f"grad of {name}"], expected[f"grad of {name}"]), name


@pytest.mark.parametrize("name", ["base", "norms and biases", "variable B, C in groups"])
def test_compiles_into_one_graph(name):
    inputs = make(**CASES[name])
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)]

    def run(*values):
        return mamba_inner_fn(**{**inputs, **dict(zip(names, values, strict=True))})

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (run, compiled):
        leaves = [inputs[k].detach().clone().requires_grad_() for k in names]
        out = fn(*leaves)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for key, eager, whole in zip(["out", *names], *results, strict=True):
        torch.testing.assert_close(whole, eager, msg=lambda text, key=key: f"{key}: {text}")


def test_rms_norm_forward():
    x, weight, bias = torch.randn(3, 5), torch.randn(5), torch.randn(5)
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(rms_norm_forward(x, weight, None), rms)
    torch.testing.assert_close(rms_norm_forward(x, weight, bias), rms + bias)
    torch.testing.assert_close(
        rms_norm_forward(x, weight, bias, eps=0.1, is_rms_norm=False),
        F.layer_norm(x, (5,), weight, bias, 0.1),
    )


def _ones(*shape):
    return lambda i, name: i.update({name: torch.ones(shape)})


WRONG = [
    ("xz", _ones(2, 12), ValueError, r"xz must have shape \(b, 2 d, l\), but has \(2, 12\)"),
    ("xz", _ones(2, 11, 3), ValueError, "xz must have shape"),
    ("A", _ones(5, 4), ValueError, r"A must have shape \(d, n\) = \(6, n\), but has \(5, 4\)"),
    ("conv1d_weight", _ones(5, 4), ValueError, "conv1d_weight must have shape"),
    ("conv1d_weight", _ones(6, 2, 4), ValueError, "conv1d_weight must have shape"),
    ("conv1d_weight", _ones(), ValueError, "conv1d_weight must have shape"),
    ("delta_proj_weight", _ones(3, 6), ValueError, "delta_proj_weight must have shape"),
    ("x_proj_weight", _ones(7, 6), ValueError, r"x_proj_weight must have .* = \(11, 6\)"),
    ("out_proj_weight", _ones(5, 7), ValueError, "out_proj_weight must have shape"),
    ("out_proj_bias", _ones(1), ValueError, r"out_proj_bias must have shape \(5,\)"),
    ("conv1d_bias", _ones(1), ValueError, r"conv1d_bias must have shape \(6,\)"),
    ("D", _ones(6, 1), ValueError, "D must have shape"),
    ("delta_bias", _ones(5), ValueError, "delta_bias must have shape"),
    ("B_proj_bias", _ones(1), ValueError, r"B_proj_bias must have shape \(4,\) = \(n,\)"),
    ("C_proj_bias", _ones(6), ValueError, "C_proj_bias must have shape"),
    ("b_rms_weight", _ones(6), ValueError, "b_rms_weight must have shape"),
    ("c_rms_weight", _ones(1), ValueError, "c_rms_weight must have shape"),
    ("dt_rms_weight", _ones(3), ValueError, "dt_rms_weight must have shape"),
    ("checkpoint_lvl", lambda i, n: i.update({n: 2}), ValueError, "must be 0 or 1, but is 2"),
    ("D", lambda i, n: i.update({n: i[n].to("meta")}), ValueError, "D is on meta, but"),
    ("xz", lambda i, n: i.update({n: i[n].long()}), TypeError, "xz must be one of"),
    ("D", lambda i, n: i.update({n: i[n].int()}), TypeError, "D must be one of"),
    ("D", lambda i, n: i.update({n: i[n] * 1j}), TypeError, "D must be one of"),
    ("out_proj_weight", lambda i, n: i.update({n: i[n].half()}), TypeError, "one dtype outside"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "error", "message"), WRONG)
def test_wrong_arguments_are_named(name, change, error, message):
    inputs = make()
    change(inputs, name)
    with pytest.raises(error, match=message):
        mamba_inner_fn(**inputs)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.ones(6, 5), ValueError, r"B \(constant\) must have shape \(d, n\) = \(6, 4\)"),
        (torch.ones(2, 4, 5), ValueError, r"B must have shape \(b, n, l\) = \(2, 4, 17\)"),
        (torch.ones(2, 4, 4, 17), ValueError, "B has 4 groups, which do not divide the 6"),
        (torch.ones(6, 4) * 1j, TypeError, "a constant B must have A's dtype"),
    ],
)
def test_wrong_B_is_named(value, error, message):
    inputs = make(B="constant")
    inputs["B"] = value
    for fn in (mamba_inner_fn, mamba_inner_ref):
        names = list(inputs) if fn is mamba_inner_fn else list(inputs)[:15]
        with pytest.raises(error, match=message):
            fn(**{k: inputs[k] for k in names})
