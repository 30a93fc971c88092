"""selective_scan_fn: every backend against the sequential oracle: outputs, states, gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_close_to_oracle, assert_matches, evaluate, to_double
from hypothesis import given
from hypothesis import strategies as st
from scan_cases import BASE, CASES, make_inputs, make_seq_idx

import mamba_ssm
from mamba_ssm.ops.reference import scan_layout
from mamba_ssm.ops.selective_scan_interface import (
    SelectiveScanFn,
    selective_scan_fn,
    selective_scan_ref,
)


def _fn(**inputs):
    return selective_scan_fn(**inputs, return_last_state=True)


def _ref(**inputs):
    return selective_scan_ref(**inputs, return_last_state=True)


@pytest.mark.parametrize("name", CASES)
def test_table(name, device, backend):
    assert_matches(_fn, _ref, make_inputs(CASES[name], device))


@pytest.mark.parametrize("n", [2, 5, 20])
def test_nothing_is_left_of_what_ran_before(n, device, backend):
    # On a GPU a block's shared memory still holds the last kernel's B and C, here NaN; n states do
    # not fill what the kernel stages at once. Rows of 64 steps are copied whole.
    before = make_inputs(replace(BASE, b=8, d=2048, length=64), device)
    for name in ("B", "C"):
        before[name] = torch.full_like(before[name], float("nan"))
    _fn(**before)
    assert_matches(_fn, _ref, make_inputs(replace(BASE, length=64, n=n), device))


@pytest.mark.parametrize("name", ["initial state", "packed, groups", "constant B", "l=257"])
def test_fp64_agrees_to_rounding(name):
    # The oracle is fp64 itself, so the tolerance rule, which takes it for exact, does not apply.
    inputs = {k: to_double(v) for k, v in make_inputs(CASES[name]).items()}
    actual, expected = evaluate(_fn, inputs), evaluate(_ref, inputs)
    assert actual.keys() == expected.keys()
    for key in actual:
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["base", "groups", "constant B, C", "holes", "l=127", "b=0"])
@pytest.mark.parametrize("elements", [1, 2**9, 2**30])
def test_table_with_any_group_of_chunks(name, elements, monkeypatch):
    # One chunk at a time, a few, all at once: the number of chunks that advance together.
    monkeypatch.setitem(scan_layout._GROUP_ELEMENTS, "cpu", elements)
    with mamba_ssm.backend("reference"):
        assert_matches(_fn, _ref, make_inputs(CASES[name]))


@pytest.mark.parametrize("name", ["base", "initial state", "groups differ", "holes", "constant B"])
def test_gradcheck(name):
    case = CASES[name]
    inputs = make_inputs(case.__class__(**{**vars(case), "length": 7, "d": 6, "n": 2}))
    inputs = {
        k: v.double().requires_grad_()
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for k, v in inputs.items()
    }
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad]

    def run(*values):
        return _fn(**{**inputs, **dict(zip(names, values, strict=True))})

    with mamba_ssm.backend("reference"):
        assert torch.autograd.gradcheck(run, [inputs[k] for k in names])
        if name in ("initial state", "holes"):
            assert torch.autograd.gradgradcheck(run, [inputs[k] for k in names])


def _slice_time(inputs: dict, lo: int, hi: int) -> dict:
    """The same call on steps lo..hi."""
    part = dict(inputs)
    for name in ("u", "delta", "z", "B", "C", "seq_idx"):
        if isinstance(part.get(name), torch.Tensor):
            part[name] = part[name][..., lo:hi]
    return part


def _in_pieces(bounds: list[int], **inputs):
    """The scan over [0, bounds[0]), [bounds[0], bounds[1]), ..., each from the last one's state."""
    length = inputs["u"].shape[2]
    outs, state = [], inputs["initial_state"]
    for lo, hi in zip([0, *bounds], [*bounds, length], strict=True):
        out, state = _fn(**{**_slice_time(inputs, lo, hi), "initial_state": state})
        outs.append(out)
    return torch.cat(outs, dim=2), state


_STATEFUL = BASE.__class__(b=2, d=3, length=23, n=4, initial_state=True)


@given(st.lists(st.integers(0, 23), max_size=5))
def test_pieces_equal_one_pass(bounds):
    assert_matches(lambda **i: _in_pieces(sorted(bounds), **i), _ref, make_inputs(_STATEFUL))


def test_pieces_equal_one_pass_on_every_backend(device, backend):
    inputs = make_inputs(_STATEFUL, device)
    assert_matches(lambda **i: _in_pieces([1, 2, 9], **i), _ref, inputs)
    assert_matches(lambda **i: _in_pieces(list(range(1, 23)), **i), _ref, inputs)


def _each_alone(rows: list[list[int]], **inputs):
    """Every sequence by itself through the oracle: what a packed or padded call must equal."""
    shape = inputs["u"].shape
    initial = inputs.pop("initial_state")
    inputs.pop("seq_idx", None), inputs.pop("num_sequences", None)
    out = inputs["u"].new_zeros(shape)
    finals = list(initial)
    for row, ids in enumerate(rows):
        for sequence in sorted({i for i in ids if i >= 0}):
            steps = [t for t, i in enumerate(ids) if i == sequence]
            part = dict(inputs)
            for name in ("u", "delta", "z", "B", "C"):
                part[name] = inputs[name][row : row + 1, ..., steps]
            y, final = _ref(**part, initial_state=initial[sequence : sequence + 1])
            out[row, :, steps] = y[0]
            finals[sequence] = final[0]
    return out, torch.stack(finals)


@st.composite
def _packings(draw, length: int = 19, rows: int = 2):
    """Sequence numbers of every row: contiguous runs, with padding anywhere."""
    numbers, packed = iter(range(100)), []
    for _ in range(rows):
        ids, current = [], next(numbers)
        for _ in range(length):
            kind = draw(st.sampled_from(["same", "same", "same", "next", "padding"]))
            current = next(numbers) if kind == "next" else current
            ids.append(-1 if kind == "padding" else current)
        packed.append(ids)
    return packed, next(numbers)


@given(_packings())
def test_packed_equals_each_alone(packing):
    rows, states = packing
    inputs = make_inputs(BASE.__class__(b=2, d=3, length=19, n=2))
    inputs["initial_state"] = torch.randn(states, 3, 2)
    inputs["seq_idx"], inputs["num_sequences"] = torch.tensor(rows, dtype=torch.int32), states
    assert_matches(_fn, lambda **i: _each_alone(rows, **i), inputs)


@pytest.mark.parametrize("kind", ["packed", "holes", "masked", "padding"])
def test_packed_equals_each_alone_on_every_backend(kind, device, backend):
    inputs = make_inputs(BASE.__class__(b=2, d=3, length=19, n=2), device)
    seq_idx, states = make_seq_idx(kind, 2, 19)
    inputs["initial_state"] = torch.randn(states, 3, 2, device=device)
    inputs["seq_idx"], inputs["num_sequences"] = seq_idx.to(device), states
    assert_matches(_fn, lambda **i: _each_alone(seq_idx.tolist(), **i), inputs)


def test_cu_seqlens_is_the_same_packing():
    inputs = make_inputs(BASE.__class__(b=1, d=3, length=19, n=2))
    bounds = torch.tensor([0, 4, 4, 17], dtype=torch.int32)
    ids = torch.tensor([[0] * 4 + [2] * 13 + [-1] * 2], dtype=torch.int32)
    actual = _fn(**inputs, cu_seqlens=bounds)
    expected = _fn(**inputs, seq_idx=ids, num_sequences=3)
    assert actual[1].shape[0] == 3
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_padding_may_hold_anything():
    inputs = make_inputs(CASES["holes"])
    padded = (inputs["seq_idx"] < 0)[:, None, :]
    spoiled = dict(inputs)
    for name in ("u", "delta", "z", "B", "C"):
        mask = padded if inputs[name].dim() == 3 else padded[:, None]
        spoiled[name] = inputs[name].masked_fill(mask, float("nan"))
    clean, actual = _fn(**inputs), _fn(**{k: _leaf(v) for k, v in spoiled.items()})
    for a, e in zip(actual, clean, strict=True):
        assert torch.equal(a.detach(), e)
    leaves = {k: _leaf(v) for k, v in spoiled.items()}
    out, final = _fn(**leaves)
    (out.sum() + final.sum()).backward()
    for name in ("u", "delta", "z", "B", "C", "A", "D", "delta_bias", "initial_state"):
        assert leaves[name].grad.isfinite().all(), name
    assert (leaves["u"].grad.masked_select(padded.expand_as(inputs["u"])) == 0).all()


def _leaf(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    return value


def test_sequence_numbers_without_states_need_no_count():
    inputs = make_inputs(BASE.__class__(b=1, d=2, length=9, n=2))
    ids = torch.tensor([[0, 0, 5, 5, 5, 40, 40, 40, 40]], dtype=torch.int32)
    out = selective_scan_fn(**inputs, seq_idx=ids)
    expected = _ref(**inputs, seq_idx=ids, num_sequences=41)[0]
    assert torch.allclose(out, expected, atol=1e-5)
    u = inputs["u"].requires_grad_()
    out = selective_scan_fn(**{**inputs, "u": u}, seq_idx=ids)
    (grad,) = torch.autograd.grad(out.square().sum(), u, create_graph=True)
    assert torch.autograd.grad(grad.sum(), u)[0].isfinite().all()


def test_autocast_leaves_the_recurrence_alone(device, backend):
    inputs = {k: _leaf(v) for k, v in make_inputs(CASES["initial state"], device).items()}
    plain = _fn(**inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = _fn(**inputs)
        cast[0].sum().backward()
    gradient, inputs["u"].grad = inputs["u"].grad, None
    plain[0].sum().backward()
    assert torch.equal(cast[0], plain[0]) and torch.equal(cast[1], plain[1])
    assert torch.equal(gradient, inputs["u"].grad)


def test_repeats_are_bit_identical(device, backend):
    def grads():
        inputs = {k: _leaf(v) for k, v in make_inputs(CASES["packed, groups"], device).items()}
        out, final = _fn(**inputs)
        (out.square().sum() + final.square().sum()).backward()
        return [
            out,
            final,
            *(v.grad for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad),
        ]

    for first, second in zip(grads(), grads(), strict=True):
        assert torch.equal(first, second)


def test_small_delta_is_not_lost():
    # softplus(-20) = 2.06e-9; written as log(1 + exp(x)) in fp32 it is 0 and the state never moves.
    one = torch.ones(1, 1, 1)
    out = selective_scan_fn(
        one, -20 * one, -torch.ones(1, 1), one[:, None], one[:, None], delta_softplus=True
    )
    assert out.item() == pytest.approx(2.0611536e-9, rel=1e-5)


def test_constant_B_reaches_the_last_state():
    inputs = make_inputs(CASES["constant B, C"])
    inputs["B"] = inputs["B"].clone()
    state = _fn(**inputs)[1]
    inputs["B"] = 2 * inputs["B"]
    assert torch.allclose(_fn(**inputs)[1], 2 * state, rtol=1e-5)


def test_last_state_only_when_truthy():
    inputs = make_inputs(BASE)
    assert isinstance(selective_scan_fn(**inputs, return_last_state=None), torch.Tensor)
    assert len(selective_scan_fn(**inputs, return_last_state=1)) == 2


def test_positional_order_of_the_function_and_its_autograd():
    i = make_inputs(BASE)
    positional = [
        i[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus")
    ]
    expected = _fn(**i)
    for call in (selective_scan_fn, SelectiveScanFn.apply):
        for a, e in zip(call(*positional, True), expected, strict=True):
            assert torch.equal(a, e)


def test_autograd_apply_takes_three_dimensional_B():
    i = make_inputs(CASES["three dims"])
    i["B"] = i["B"].requires_grad_()
    SelectiveScanFn.apply(i["u"], i["delta"], i["A"], i["B"], i["C"]).sum().backward()
    assert i["B"].grad.shape == i["B"].shape


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def run(u, delta, B, C, z, state):
        return selective_scan_fn(
            u, delta, A, B, C, D, z, bias, True, return_last_state=True, initial_state=state
        )

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for length in (20, 31):
        i = make_inputs(BASE.__class__(b=2, d=4, length=length, n=3, initial_state=True))
        A, D, bias = i["A"], i["D"], i["delta_bias"]
        names = ("u", "delta", "B", "C", "z", "initial_state")
        results = []
        for fn in (run, compiled):
            leaves = [_leaf(i[k]) for k in names]
            out, final = fn(*leaves)
            (out.square().sum() + final.square().sum()).backward()
            results.append([out, final, *(x.grad for x in leaves)])
        for a, e in zip(*results, strict=True):
            assert torch.allclose(a, e, atol=1e-6)


@pytest.mark.parametrize("name", ["base", "constant B, C", "holes", "nothing optional"])
def test_opcheck(name, monkeypatch):
    monkeypatch.undo()  # opcheck compares unwritten memory with its own
    i = make_inputs(CASES[name].__class__(**{**vars(CASES[name]), "length": 20}))
    states = i.get("num_sequences", 2)
    shared = (
        i["u"], i["delta"], i["A"], i["B"], i["C"], i["D"], i["z"], i["delta_bias"], True,
        i.get("initial_state"), i.get("seq_idx"), states, 16,
    )  # fmt: skip
    for overload in ("default", "reference"):
        forward = getattr(torch.ops.mamba_ssm._selective_scan_fwd, overload)
        torch.library.opcheck(forward, shared)
        out, final, chunk_states = forward(*shared)
        backward = getattr(torch.ops.mamba_ssm._selective_scan_bwd, overload)
        torch.library.opcheck(backward, (out, final, *shared, chunk_states))


_WRONG = {
    "u must have shape": lambda i: i.update(u=i["u"][0]),
    "delta must have shape": lambda i: i.update(delta=i["delta"][:, :1]),
    "z is torch.bfloat16": lambda i: i.update(z=i["z"].bfloat16()),
    "u must be fp32": lambda i: i.update(u=i["u"].long()),
    "A must have shape": lambda i: i.update(A=i["A"][:2]),
    "allowed: 1 to 256": lambda i: i.update(A=torch.ones(6, 257)),
    "A must be fp32 or complex64": lambda i: i.update(A=i["A"].long()),
    "B must have shape": lambda i: i.update(B=i["B"][..., :3]),
    "B .constant. must have shape": lambda i: i.update(B=i["B"][0, 0]),
    "must have A's dtype": lambda i: i.update(B=torch.ones(6, 16, dtype=torch.complex64)),
    "4 groups, which do not divide the 6": lambda i: i.update(C=i["C"].expand(2, 4, -1, -1)),
    "B is torch.float16, but u": lambda i: i.update(B=i["B"].half()),
    "C must have shape .d, n.,": lambda i: i.update(C=i["C"][0, 0, 0]),
    "D must have shape": lambda i: i.update(D=i["D"][:1]),
    "D must be fp32": lambda i: i.update(D=i["D"].long()),
    "delta_bias must have shape": lambda i: i.update(delta_bias=torch.ones(2, 6)),
    "delta is on meta": lambda i: i.update(delta=i["delta"].to("meta")),
    "initial_state must have shape": lambda i: i.update(initial_state=torch.ones(3, 6, 16)),
    "initial_state must be fp32": lambda i: i.update(initial_state=torch.ones(2, 6, 16).long()),
    "initial_state is complex": lambda i: i.update(initial_state=torch.ones(2, 6, 16) * 1j),
    "seq_idx must be": lambda i: i.update(seq_idx=torch.zeros(2, 3, dtype=torch.int32)),
    "seq_idx must be an integer": lambda i: i.update(seq_idx=torch.zeros(2, 65)),
    "sequence number 9": lambda i: i.update(
        seq_idx=torch.full((2, 65), 9), initial_state=torch.ones(2, 6, 16)
    ),
    "num_sequences needs": lambda i: i.update(num_sequences=3),
    "packed batch of one": lambda i: i.update(cu_seqlens=torch.tensor([0, 65])),
    "not both": lambda i: i.update(
        cu_seqlens=torch.tensor([0, 65]), seq_idx=torch.zeros(2, 65, dtype=torch.int32)
    ),
}


@pytest.mark.parametrize("message", _WRONG)
@pytest.mark.parametrize("fn", [selective_scan_fn, selective_scan_ref])
def test_bad_input_is_named(message, fn):
    inputs = make_inputs(BASE)
    _WRONG[message](inputs)
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        fn(**inputs)


@pytest.mark.parametrize("bounds", [[1, 5], [0, 6, 3], [0, 99], [0.0, 3.0]])
def test_bad_cu_seqlens_is_named(bounds):
    inputs = make_inputs(BASE.__class__(b=1, length=9))
    with pytest.raises(ValueError, match="cu_seqlens must"):
        selective_scan_fn(**inputs, cu_seqlens=torch.tensor(bounds))


def test_reference_keeps_no_state_per_step():
    # The memory that autograd keeps must not grow with b d l n.
    i = make_inputs(BASE.__class__(b=1, d=64, length=1024, n=64, z=False))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        selective_scan_fn(**{k: _leaf(v) for k, v in i.items()})
    assert max(kept) <= 64 * 1024 * 64 // 32


def test_close_to_oracle_rule_can_fail():
    exact = torch.ones(10, dtype=torch.float64)
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_oracle(torch.ones(10) + 1e-5, torch.ones(10), exact)
