"""The historical extension module: its functions against selective_scan_fn and its autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scan_cases import BASE, make_inputs

import selective_scan_cuda
from mamba_ssm import selective_scan_fn
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

SMALL = replace(BASE, d=4, n=3, length=37)
CASES = {
    "base": SMALL,
    "no z": replace(SMALL, z=False),
    "no D": replace(SMALL, D=False),
    "no delta_bias": replace(SMALL, delta_bias=False),
    "no softplus": replace(SMALL, softplus=False),
    "nothing optional": replace(SMALL, D=False, z=False, delta_bias=False, softplus=False),
    "constant B": replace(SMALL, groups_B=0),
    "constant C": replace(SMALL, groups_C=0),
    "constant B, C": replace(SMALL, groups_B=0, groups_C=0),
    "vision": replace(SMALL, d=8, groups_B=4, groups_C=4, length=197),
    "groups differ": replace(SMALL, groups_B=2, groups_C=4),
    "channel last": replace(SMALL, layout="channel last"),
    "bf16": replace(SMALL, dtype=torch.bfloat16),
    "fp16, groups": replace(SMALL, dtype=torch.float16, groups_B=2, groups_C=2),
    "l=0": replace(SMALL, length=0),
    "l=1": replace(SMALL, length=1),
    "b=0": replace(SMALL, b=0),
}
FIRST_EIGHT = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def positional(inputs: dict) -> list:
    return [inputs[name] for name in FIRST_EIGHT]


@pytest.mark.parametrize("name", CASES)
def test_fwd(name, device):
    inputs = make_inputs(CASES[name], device)
    results = selective_scan_cuda.fwd(*positional(inputs), inputs["delta_softplus"])
    ungated = selective_scan_fn(**{**inputs, "z": None})
    assert isinstance(results, list) and len(results) == (2 if inputs["z"] is None else 3)
    assert torch.equal(results[0], ungated) and results[0].dtype == inputs["u"].dtype
    if inputs["z"] is not None:
        assert torch.equal(results[2], selective_scan_fn(**inputs))


@pytest.mark.parametrize("with_z", [True, False])
@pytest.mark.parametrize("length", [0, 1, 2047, 2048, 2049, 4096, 5000])
def test_x_holds_the_state_and_the_decay_at_the_end_of_each_2048_steps(length, with_z, device):
    case = replace(BASE, b=2, d=2, n=3, length=length, z=with_z)
    inputs = make_inputs(case, device)
    x = selective_scan_cuda.fwd(*positional(inputs), True)[1]
    ends = [*range(2048, length, 2048), length] if length else []
    assert x.shape == (2, 2, len(ends), 6) and x.dtype == torch.float32
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    dt = torch.nn.functional.softplus(wide["delta"] + wide["delta_bias"][:, None])
    state, start = None, 0
    for i, end in enumerate(ends):
        part = dict(wide)
        for name in ("u", "delta", "B", "C", "z"):
            part[name] = None if part[name] is None else part[name][..., start:end]
        _, state = selective_scan_ref(**part, return_last_state=True, initial_state=state)
        torch.testing.assert_close(x[:, :, i, 1::2].double(), state, rtol=1e-5, atol=1e-6)
        decay = torch.exp(dt[..., :end].sum(-1)[..., None] * wide["A"])
        torch.testing.assert_close(x[:, :, i, 0::2].double(), decay, rtol=1e-4, atol=1e-12)
        start = end


def _autograd(inputs: dict, dout: torch.Tensor) -> list:
    """The gradients of selective_scan_fn in the order of bwd."""
    leaves = {
        k: v.detach().clone().requires_grad_() if isinstance(v, torch.Tensor) else v
        for k, v in inputs.items()
    }
    selective_scan_fn(**leaves).backward(dout)
    order = ("u", "delta", "A", "B", "C", "D", "delta_bias", "z")
    return [None if leaves[k] is None else leaves[k].grad for k in order]


@pytest.mark.parametrize(
    ("name", "recompute_out_z"),
    [(name, asked) for name in CASES for asked in (False, True) if CASES[name].z or not asked],
)
def test_bwd(name, recompute_out_z, device):
    inputs = make_inputs(CASES[name], device)
    dout = torch.randn(inputs["u"].shape, device=device).to(inputs["u"].dtype)
    forward = selective_scan_cuda.fwd(*positional(inputs), inputs["delta_softplus"])
    out, x = forward[:2]
    expected = _autograd(inputs, dout)
    softplus = inputs["delta_softplus"]
    for given in ((x, out), (None, None)):
        results = selective_scan_cuda.bwd(
            *positional(inputs), dout, *given, None, softplus, recompute_out_z
        )
        if inputs["z"] is None:
            assert len(results) == 7
        else:
            assert len(results) == 8 + recompute_out_z
        if recompute_out_z:
            assert torch.equal(results[8], forward[2])
        for i, (a, e) in enumerate(zip(results[:8], expected[: len(results)], strict=True)):
            assert (a is None) == (e is None), i
            if e is not None:
                assert a.dtype == e.dtype and torch.equal(a, e), i


def test_dz_is_filled_in_place():
    inputs = make_inputs(SMALL)
    dout = torch.randn(inputs["u"].shape)
    # A client hands in a view of the gradient of xz.
    dxz = torch.full((2, 8, 37), 7.0)
    dz = dxz[:, 4:]
    results = selective_scan_cuda.bwd(*positional(inputs), dout, None, None, dz, True, False)
    assert results[7] is dz and torch.equal(dz, _autograd(inputs, dout)[7])
    assert (dxz[:, :4] == 7).all()


def test_no_history_is_recorded():
    inputs = make_inputs(SMALL)
    inputs["u"].requires_grad_()
    results = selective_scan_cuda.fwd(*positional(inputs), True)
    results += selective_scan_cuda.bwd(
        *positional(inputs), results[0], None, None, None, True, True
    )
    assert not any(t.requires_grad for t in results)


WRONG = {
    "B must be .b, g, n, l. or .d, n. here.*B.unsqueeze.1.": {"B": lambda t: t[:, 0]},
    "C must be .b, g, n, l.": {"C": lambda t: t[:, 0]},
    "complex A is served by selective_scan_fn": {"A": lambda t: t * 1j},
    "delta must have shape": {"delta": lambda t: t[:, :2]},
    "delta is torch.float16, but u is torch.float32": {"delta": lambda t: t.half()},
    "C is on meta": {"C": lambda t: t.to("meta")},
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    inputs = make_inputs(SMALL)
    for name, change in WRONG[message].items():
        inputs[name] = change(inputs[name])
    with pytest.raises((ValueError, TypeError), match=message):
        selective_scan_cuda.fwd(*positional(inputs), True)
    with pytest.raises((ValueError, TypeError), match=message):
        selective_scan_cuda.bwd(*positional(inputs), inputs["u"], None, None, None, True, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dout": torch.ones(2, 4, 1)}, r"dout must have u's shape \(2, 4, 37\)"),
        ({"dout": torch.ones(2, 4, 37, device="meta")}, "dout is on meta"),
        ({"dz": torch.ones(3, 2, 4, 37)}, "dz must have u's shape"),
        ({"z": None, "dz": torch.ones(2, 4, 37)}, "need z, which is None"),
        ({"z": None, "recompute": True}, "need z, which is None"),
    ],
)
def test_bad_gradients_are_named(change, message):
    inputs = make_inputs(SMALL)
    call = {"dout": torch.ones(2, 4, 37), "dz": None, "recompute": False, "z": inputs["z"]} | change
    inputs["z"] = call["z"]
    with pytest.raises(ValueError, match=message):
        selective_scan_cuda.bwd(
            *positional(inputs), call["dout"], None, None, call["dz"], True, call["recompute"]
        )
