"""The decode step: both forms, mixed dtypes, any strides, indices, gradients, wrong calls."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from helpers import assert_matches, evaluate

import mamba_ssm
from mamba_ssm.ops.selective_state_update import selective_state_update, selective_state_update_ref

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OPTIONAL = ("D", "z", "dt_bias")


def make(b=3, d=8, n=5, heads=None, groups=None, dtype=torch.float32, state_dtype=torch.float32,
         fixed_dtype=torch.float32, absent=(), indices=None, layout="contiguous", softplus=True,
         large_dt=False, device="cpu"):  # fmt: skip
    """(inputs by name, fixed keyword arguments); ``heads`` None is the form without heads."""
    generator = torch.Generator().manual_seed(0)
    rows, inner = (b if indices is None else 5), (d,) if heads is None else (heads, d)
    dims = (n,) if groups is None else (groups, n)

    def rand(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    state = rand(rows, *inner, n, dtype=state_dtype)
    if layout == "strided":
        state = rand(2 * rows, n, *inner, dtype=state_dtype)[::2].movedim(1, -1)
    inputs = {
        "state": state,
        "x": rand(b, *inner),
        "dt": rand(b, *inner) * (30 if large_dt else 1),
        "A": -rand(*inner, n, dtype=fixed_dtype).exp(),
        "B": rand(b, *dims),
        "C": rand(b, *dims),
        "D": rand(*inner, dtype=fixed_dtype),
        "z": rand(b, *inner),
        "dt_bias": rand(*inner, dtype=fixed_dtype),
    }
    if layout == "strided":
        inputs["x"] = rand(*reversed(inner), b).permute(*reversed(range(len(inner) + 1)))
        inputs["B"] = rand(b, *dims[:-1], 2 * n)[..., ::2]
    if layout == "expanded":  # one value for all channels of a head, as Mamba-2 style clients pass
        for name in ("dt", "D", "dt_bias"):
            inputs[name] = inputs[name][..., :1].expand(inputs[name].shape)
        inputs["A"] = inputs["A"][..., :1, :1].expand(inputs["A"].shape)
    fixed = {"dt_softplus": softplus}
    if indices is not None:
        fixed["state_batch_indices"] = torch.tensor(indices, dtype=torch.int32, device=device)
    return inputs | dict.fromkeys(absent), fixed


def stepped(fn, fixed):
    """``fn`` on a copy of the state with the same strides, returning the state as well."""

    def run(state, **inputs):
        copy = torch.empty_strided(
            state.shape, state.stride(), dtype=state.dtype, device=state.device
        ).copy_(state)
        return fn(copy, **inputs, **fixed), copy

    return run


FORMS = ({}, {"heads": 4}, {"heads": 4, "groups": 2}, {"heads": 4, "groups": 1}, {"groups": 2})
ROWS = (
    [{}]
    + [{"absent": (name,)} for name in OPTIONAL]
    + [{"absent": OPTIONAL}, {"softplus": False}, {"large_dt": True}]
    + [{"b": b} for b in (0, 1)]
    + [{"n": n} for n in (1, 16, 17, 256)]
    + [{"dtype": dtype, "state_dtype": dtype, "fixed_dtype": dtype} for dtype in FLOATS]
    + [{"dtype": torch.bfloat16}, {"dtype": torch.float16, "state_dtype": torch.bfloat16}]
    + [{"layout": "strided"}, {"layout": "expanded"}]
    + [{"dtype": torch.bfloat16, "layout": "expanded"}]
    + [{"indices": [4, -1, 0]}, {"indices": [-1, -1, -1]}, {"indices": [2, 1, 0]}]
    + [{"indices": [4, -1, 0], "layout": "strided"}]
)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_matches_the_plain_loop(row, form, grad, backend, device):
    inputs, fixed = make(**row, **form, device=device)
    if grad and row.get("layout") == "expanded":
        pytest.skip("the gradient of an expanded leaf is torch's own affair")
    skip = () if grad else tuple(inputs)
    reference = stepped(selective_state_update_ref, fixed)
    assert_matches(stepped(selective_state_update, fixed), reference, inputs, skip)


def test_skipped_rows_leave_the_state_untouched(backend):
    inputs, fixed = make(indices=[4, -1, 0])
    out, state = stepped(selective_state_update, fixed)(**inputs)
    assert torch.equal(state[1:4], inputs["state"][1:4])
    assert torch.equal(out[1], torch.zeros(8)) and not torch.equal(state[4], inputs["state"][4])


def test_a_skipped_row_may_hold_anything(backend):
    inputs, fixed = make(indices=[4, -1, 0])
    clean = stepped(selective_state_update, fixed)(**inputs)
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name][1] = float("nan")
    dirty = stepped(selective_state_update, fixed)(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_gradients_flow_through_several_steps():
    inputs, _ = make(
        b=2, d=2, n=3, absent=OPTIONAL,
        dtype=torch.float64, state_dtype=torch.float64, fixed_dtype=torch.float64,
    )  # fmt: skip
    inputs = {k: v for k, v in inputs.items() if v is not None}

    def steps(state, x, dt, A, B, C):
        state = state.clone()
        outs = [
            selective_state_update(state, x * k, dt, A, B, C, dt_softplus=True) for k in (1, 2, 3)
        ]
        return torch.stack(outs), state

    def plain(state, x, dt, A, B, C):
        dt, outs = torch.nn.functional.softplus(dt), []
        for k in (1, 2, 3):
            state = torch.exp(dt[..., None] * A) * state + (dt * x * k)[..., None] * B[:, None]
            outs.append((state * C[:, None]).sum(-1))
        return torch.stack(outs), state

    assert_matches(steps, plain, inputs)
    leaves = [t.clone().requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(steps, leaves)


def test_no_history_is_kept_without_grad_mode():
    inputs, fixed = make()
    inputs["A"].requires_grad_()
    with torch.no_grad():
        out, state = stepped(selective_state_update, fixed)(**inputs)
    assert not out.requires_grad and not state.requires_grad


def test_autocast_keeps_the_precision(backend):
    inputs, fixed = make(heads=4)
    run = stepped(selective_state_update, fixed)
    expected = evaluate(run, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = evaluate(run, inputs)
        plain = run(**inputs)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    torch.testing.assert_close(plain[0], expected["output 0"])


def test_historical_homes():
    module = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
    assert module.selective_state_update is mamba_ssm.selective_state_update
    assert module.selective_state_update_ref is selective_state_update_ref
    assert inspect.ismodule(importlib.import_module("mamba_ssm.ops.triton").selective_state_update)
    expected = "state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices"
    assert ", ".join(inspect.signature(selective_state_update).parameters) == expected


@pytest.mark.parametrize("overload", ["default", "reference"])
@pytest.mark.parametrize("indices", [None, [4, -1, 0]])
def test_opcheck(overload, indices):
    inputs, fixed = make(heads=4, groups=2, dtype=torch.bfloat16, indices=indices)
    op = getattr(torch.ops.mamba_ssm._state_update, overload)
    args = (*inputs.values(), True, fixed.get("state_batch_indices"))
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("indices", [None, [4, -1, 0]])
@pytest.mark.parametrize("grad", [False, True])
def test_compiles_into_one_graph(indices, grad, backend):
    inputs, fixed = make(indices=indices, heads=2)

    def run(state, **inputs):
        state = state.clone()
        return selective_state_update(state, **inputs, **fixed), state

    skip = () if grad else tuple(inputs)
    expected = evaluate(run, inputs, skip)
    actual = evaluate(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs, skip)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name)


WRONG = [
    ({"state": (3, 8)}, ValueError, "state must be"),
    ({"state": (2, 8, 5)}, ValueError, "state has 2 rows"),
    ({"x": (3, 2, 8)}, ValueError, "x must be 2-D"),
    ({"x": (3, 7)}, ValueError, "x must have shape"),
    ({"dt": (3, 1)}, ValueError, "dt must have shape"),
    ({"z": (2, 8)}, ValueError, "z must have shape"),
    ({"A": (8, 4)}, ValueError, "A must have shape"),
    ({"D": (1,)}, ValueError, "D must have shape"),
    ({"dt_bias": (3, 8)}, ValueError, "dt_bias must have shape"),
    ({"B": (3, 4)}, ValueError, "B must have shape"),
    ({"B": (5,)}, ValueError, "B must be"),
    ({"C": (3, 2, 5)}, ValueError, "C must have shape"),
    ({"B": (3, 3, 5), "C": (3, 3, 5)}, ValueError, "3 groups"),
    ({"B": (3, 0, 5), "C": (3, 0, 5)}, ValueError, "0 groups"),
    ({"state": torch.zeros(1, 8, 5).expand(3, 8, 5)}, ValueError, "expanded view"),
    ({"A": torch.zeros(8, 5, dtype=torch.complex64)}, TypeError, "A must be one of"),
    ({"state": torch.zeros(3, 8, 5).long()}, TypeError, "state must be one of"),
    ({"dt": torch.zeros(3, 8, device="meta")}, ValueError, "dt is on meta"),
    ({"state_batch_indices": torch.tensor([0, 1, 3])}, IndexError, "holds 3"),
    ({"state_batch_indices": torch.tensor([0, 1])}, ValueError, "state_batch_indices must have"),
    ({"state_batch_indices": torch.zeros(3)}, TypeError, "state_batch_indices must be one of"),
]


@pytest.mark.parametrize("change,error,message", WRONG, ids=lambda v: str(v)[:40])
def test_wrong_calls_change_nothing(change, error, message):
    inputs, _ = make()
    inputs |= {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in change.items()}
    before = inputs["state"].clone()
    with pytest.raises(error, match=message):
        selective_state_update(**inputs)
    assert torch.equal(inputs["state"], before)
