"""The causal convolution: every optional argument, the state laws, gradients, wrong calls."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import assert_matches, evaluate
from hypothesis import given
from hypothesis import strategies as st

from mamba_ssm.ops.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    causal_conv1d_varlen_states,
)

LENGTHS = (0, 1, 2, 3, 63, 64, 65, 127, 1000)
WIDTHS = (1, 2, 3, 4, 7)
LAYOUTS = ("contiguous", "channel last", "sliced", "expanded")


def make(b=2, d=6, l=17, w=4, dtype=torch.float32, bias=True, states=True, layout="contiguous",
         weight_dtype=torch.float32, num_states=None, device="cpu", seed=0):  # fmt: skip
    """Inputs of causal_conv1d_fn by name; x in one of several layouts."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    x = {
        "contiguous": lambda: rand(b, d, l),
        "channel last": lambda: rand(b, l, d).transpose(1, 2),
        "sliced": lambda: rand(b, 2 * d, 2 * l)[:, 1::2, ::2],
        "expanded": lambda: rand(b, 1, l).expand(b, d, l),
    }[layout]()
    return {
        "x": x,
        "weight": rand(d, w, dtype=weight_dtype),
        "bias": rand(d, dtype=weight_dtype) if bias else None,
        "initial_states": rand(b if num_states is None else num_states, d, w - 1)
        if states
        else None,
    }


def both(fn, **fixed):
    """``fn`` with the fixed arguments, returning the final states too."""
    return lambda **inputs: fn(**inputs, **fixed, return_final_states=True)


ROWS = (
    [{"l": l} for l in LENGTHS]
    + [{"w": w} for w in WIDTHS]
    + [{"l": 2, "w": 7}]
    + [{"layout": layout} for layout in LAYOUTS]
    + [{"layout": layout, "dtype": torch.bfloat16} for layout in LAYOUTS]
    + [{"d": d} for d in (1, 5, 33)]
    + [{"b": b} for b in (0, 1, 3)]
    + [{"dtype": dtype} for dtype in (torch.float16, torch.bfloat16, torch.float64)]
    + [{"dtype": torch.bfloat16, "weight_dtype": torch.bfloat16, "l": 127}]
    # Gradients of the weights are sums over so many steps.
    + [{"l": 2048}, {"l": 4616, "w": 3, "dtype": torch.bfloat16}, {"l": 65_544, "d": 2, "w": 2}]
    + [{"l": 65_544, "d": 2, "dtype": torch.bfloat16}]
    + [{"bias": False}, {"states": False}, {"bias": False, "states": False, "w": 3}]
)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_matches_the_plain_convolution(row, activation, backend, device):
    inputs = make(**row, device=device)
    assert_matches(
        both(causal_conv1d_fn, activation=activation),
        both(causal_conv1d_ref, activation=activation),
        inputs,
    )


PACKINGS = {
    "one sequence": [[0] * 9],
    "three in a row": [[0, 0, 0, 0, 1, 1, 2, 2, 2]],
    "padded left and right": [[-1, -1, 0, 0, 0, 0, -1, -1, -1]],
    "padded in the middle": [[0, 0, -1, 0, -1, -1, 0, 0, 1]],
    "several rows": [[0, 0, 1, 1, 1, 1, -1, 2, 2], [3, 3, 3, -1, 3, 3, 3, 3, -1]],
    "only padding": [[-1] * 9, [0] * 9],
    "an id comes back": [[0, 0, 0, 1, 0, 0, 2, 2, 0]],
    "single steps": [[0, 1, 2, 3, 0, 1, 2, 3, 3]],
    "no steps": [[], []],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_matches_one_sequence_after_the_other(packing, states, dtype, backend, device):
    seq_idx = torch.tensor(PACKINGS[packing], dtype=torch.int32, device=device)
    for width in (1, 2, 4):
        inputs = make(*seq_idx.shape[:1], l=seq_idx.shape[1], w=width, states=states, num_states=5,
                      dtype=dtype, device=device)  # fmt: skip
        kwargs = {"seq_idx": seq_idx, "num_sequences": 5, "activation": "silu"}
        assert_matches(both(causal_conv1d_fn, **kwargs), both(causal_conv1d_ref, **kwargs), inputs)


def test_padding_may_hold_anything():
    inputs = make(b=1, l=6)
    seq_idx = torch.tensor([[0, -1, 0, 0, -1, 0]], dtype=torch.int32)
    run = both(causal_conv1d_fn, seq_idx=seq_idx, activation="silu")
    clean = evaluate(run, inputs)
    inputs["x"] = inputs["x"].masked_fill(seq_idx[:, None] < 0, float("nan"))
    dirty = evaluate(run, inputs)
    for name in clean:
        torch.testing.assert_close(dirty[name], clean[name], rtol=0, atol=0, msg=name)


def test_sequence_numbers_need_no_states_when_none_go_in_or_out():
    inputs = make(b=1, l=6, states=False)
    seq_idx = torch.tensor([[7, 7, 7, 9, 9, 9]], dtype=torch.int32)
    out = causal_conv1d_fn(**inputs, seq_idx=seq_idx)
    first = causal_conv1d_fn(inputs["x"][..., :3], inputs["weight"], inputs["bias"])
    second = causal_conv1d_fn(inputs["x"][..., 3:], inputs["weight"], inputs["bias"])
    torch.testing.assert_close(out, torch.cat([first, second], dim=-1))


def split_law(inputs, cuts, activation):
    """One pass, and the same in chunks with the state carried on."""

    def chunked(x, weight, bias, initial_states):
        outs, state = [], initial_states
        for lo, hi in zip([0, *cuts], [*cuts, x.shape[2]], strict=True):
            out, state = causal_conv1d_fn(
                x[..., lo:hi], weight, bias, initial_states=state, return_final_states=True,
                activation=activation,
            )  # fmt: skip
            outs.append(out)
        return torch.cat(outs, dim=-1), state

    assert_matches(chunked, both(causal_conv1d_ref, activation=activation), inputs)


@given(
    l=st.integers(0, 12), w=st.integers(1, 5), data=st.data(), silu=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_law_chunks_with_carried_state_are_one_pass(l, w, data, silu, dtype):
    cuts = sorted(data.draw(st.lists(st.integers(0, l), max_size=3)))
    split_law(make(l=l, w=w, dtype=dtype, d=3), cuts, "silu" if silu else None)


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4), w=st.integers(1, 5))
def test_law_packed_is_each_sequence_alone(lengths, w):
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    inputs = make(b=1, d=3, l=sum(lengths), w=w, num_states=len(lengths))

    def alone(x, weight, bias, initial_states):
        outs, finals = [], []
        for i, (lo, hi) in enumerate(itertools.pairwise(bounds)):
            out, final = causal_conv1d_fn(
                x[..., lo:hi], weight, bias, initial_states=initial_states[i : i + 1],
                return_final_states=True, activation="silu",
            )  # fmt: skip
            outs.append(out)
            finals.append(final)
        return torch.cat(outs, dim=-1), torch.cat(finals)

    assert_matches(both(causal_conv1d_fn, cu_seqlens=bounds, activation="silu"), alone, inputs)


@given(mask=st.lists(st.booleans(), min_size=1, max_size=12), w=st.integers(1, 5))
def test_law_padded_is_unpadded(mask, w):
    mask = torch.tensor(mask)
    inputs = make(b=1, d=3, l=len(mask), w=w)
    seq_idx = torch.where(mask, 0, -1).to(torch.int32)[None]

    def unpadded(x, weight, bias, initial_states):
        out, final = causal_conv1d_fn(
            x[..., mask], weight, bias, initial_states=initial_states, return_final_states=True
        )
        return torch.zeros_like(x).masked_scatter(mask.expand_as(x), out), final

    assert_matches(both(causal_conv1d_fn, seq_idx=seq_idx), unpadded, inputs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck_also_of_second_order(packed, activation):
    inputs = make(b=1, d=2, l=5, w=3, dtype=torch.float64, weight_dtype=torch.float64, num_states=2)
    if not packed:
        inputs["initial_states"] = inputs["initial_states"][:1]
    seq_idx = torch.tensor([[0, 0, -1, 0, 1]], dtype=torch.int32) if packed else None
    leaves = [t.requires_grad_() for t in inputs.values()]

    def run(x, weight, bias, states):
        return causal_conv1d_fn(x, weight, bias, seq_idx, states, True, activation=activation)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_gradient_of_the_final_states_alone():
    x = torch.randn(1, 2, 5, requires_grad=True)
    causal_conv1d_fn(x, torch.randn(2, 4), return_final_states=True)[1].sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 0, 1, 1, 1]).expand(1, 2, 5))


def test_results_are_laid_out_as_x_and_never_alias(backend):
    x = torch.randn(1, 9, 4).transpose(1, 2)
    weight = torch.zeros(4, 4)
    weight[:, -1] = 1.0
    out, final = causal_conv1d_fn(x, weight, return_final_states=True)
    assert torch.equal(out, x) and torch.equal(final, x[..., -3:])
    storages = {t.untyped_storage().data_ptr() for t in (x, out, final)}
    assert len(storages) == 3 and out.stride() == x.stride() and final.is_contiguous()
    assert causal_conv1d_fn(x.contiguous(), weight).is_contiguous()
    assert causal_conv1d_fn(x[:, :1].expand(1, 4, 9), weight).is_contiguous()
    x.requires_grad_()
    out, final = causal_conv1d_fn(x, weight, return_final_states=True)
    (dx,) = torch.autograd.grad(out.sum() + final.sum(), x)
    assert dx.stride() == x.stride()


def test_final_states_out_is_filled_and_activation_may_sit_in_fourth_place():
    inputs = make(l=5)
    expected = causal_conv1d_fn(**inputs, return_final_states=True, activation="silu")
    buffer = torch.full((2, 6, 3), 7.0)
    out, final = causal_conv1d_fn(
        **inputs, return_final_states=True, final_states_out=buffer, activation="swish"
    )
    assert torch.equal(buffer, expected[1]) and torch.equal(final, expected[1])
    assert torch.equal(out, expected[0])
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    assert torch.equal(
        causal_conv1d_fn(x, weight, bias, "silu"),
        causal_conv1d_fn(x, weight, bias, activation="silu"),
    )


def test_autocast_keeps_the_dtype_and_the_precision():
    inputs = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = causal_conv1d_fn(**inputs, activation="silu")
    assert torch.equal(out, causal_conv1d_fn(**inputs, activation="silu"))


UPDATE_ROWS = (
    {},
    {"l": None},
    {"l": 5},
    {"l": 0},
    {"l": 9, "columns": 3},
    {"columns": 4},
    {"columns": 7},
    {"w": 1, "columns": 0},
    {"w": 1, "columns": 2},
    {"w": 2, "columns": 1},
    {"bias": False},
    {"activation": None},
    {"b": 0},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "state_dtype": torch.float32},
    {"dtype": torch.float64},
    {"indices": [4, -1, 0]},
    {"indices": [-1, -1, -1]},
    {"indices": [2, 1, 0], "l": 4},
    {"ring": [0, 1, 9], "columns": 5},
    {"ring": [0, 1, 9], "l": 4},
    {"ring": [3, 2, 1], "l": 8, "columns": 4},
    {"ring": [3, 2, 1], "indices": [3, -1, 1], "columns": 6},
    {"strided": True},
    {"strided": True, "indices": [4, -1, 0]},
)


def make_update(b=3, d=6, l=1, w=4, columns=3, dtype=torch.float32, state_dtype=None,
                bias=True, activation="silu", indices=None, ring=None, strided=False,
                device="cpu"):  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def rand(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(device, dtype)

    shape = (b if indices is None else 5, d, columns)
    state = rand(*shape, dtype=state_dtype or dtype)
    if strided:
        state = rand(2 * shape[0], columns, d, dtype=dtype)[::2].transpose(1, 2)
    inputs = {
        "x": rand(*(b, d) if l is None else (b, d, l), dtype=dtype),
        "conv_state": state,
        "weight": rand(d, w),
        "bias": rand(d) if bias else None,
    }
    numbers = {"cache_seqlens": ring, "conv_state_indices": indices}
    fixed = {
        k: torch.tensor(v, dtype=torch.int32, device=device)
        for k, v in numbers.items()
        if v is not None
    }
    return inputs, {"activation": activation, **fixed}


def moved_on(fn, fixed):
    """``fn`` on a copy of the state (same strides), returning the state as well."""

    def run(x, conv_state, weight, bias):
        state = torch.empty_strided(
            conv_state.shape, conv_state.stride(), dtype=conv_state.dtype, device=conv_state.device
        ).copy_(conv_state)
        return fn(x, state, weight, bias, **fixed), state

    return run


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("row", UPDATE_ROWS, ids=str)
def test_update_matches_the_plain_loop(row, grad, backend, device):
    inputs, fixed = make_update(**row, device=device)
    skip = () if grad else tuple(inputs)
    assert_matches(
        moved_on(causal_conv1d_update, fixed),
        moved_on(causal_conv1d_update_ref, fixed),
        inputs,
        skip,
    )


@pytest.mark.parametrize("columns", [3, 4, 6])
@pytest.mark.parametrize("ring", [False, True])
def test_law_step_by_step_is_one_pass(ring, columns, backend):
    inputs = make(b=2, l=9, w=4)
    out, final = causal_conv1d_fn(**inputs, return_final_states=True, activation="silu")
    state = torch.cat([torch.zeros(2, 6, columns - 3), inputs["initial_states"]], dim=-1)
    for t in range(9):
        at = torch.full((2,), columns + t, dtype=torch.int32) if ring else None
        step = causal_conv1d_update(
            inputs["x"][..., t], state, inputs["weight"], inputs["bias"], "silu", at
        )
        torch.testing.assert_close(step, out[..., t])
    newest = state.roll(-(columns + 9), dims=-1) if ring else state
    assert torch.equal(newest[..., -3:], final)


def test_gradients_flow_through_several_updates():
    inputs = make(b=1, d=2, l=4, w=3, bias=False)

    def steps(x, weight, initial_states, bias):
        state = initial_states.clone()
        outs = [causal_conv1d_update(x[..., t], state, weight) for t in range(x.shape[2])]
        return torch.stack(outs, dim=-1), state

    assert_matches(steps, both(causal_conv1d_ref), inputs)


def test_varlen_states_are_the_last_inputs_of_each_sequence():
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    bounds = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    states = causal_conv1d_varlen_states(x, bounds, 3)
    zeros = torch.zeros(3, 1, dtype=torch.float64)
    assert torch.equal(states[0], torch.cat([zeros, x[:2].T], dim=-1))
    assert torch.equal(states[1], torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(states[2], x[4:].T)
    states.sum().backward()
    assert torch.equal(x.grad[:, 0], torch.tensor([1, 1, 0, 0, 1, 1, 1], dtype=torch.float64))
    assert causal_conv1d_varlen_states(x[:0], bounds * 0, 3).shape == (3, 3, 3)


OPCHECKS = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck(packed, full, overload):
    ops = torch.ops.mamba_ssm
    inputs = make(d=3, dtype=torch.bfloat16, l=6, bias=full, states=full)
    seq_idx = torch.zeros(2, 6, dtype=torch.int32) if packed else None
    args = (*inputs.values(), seq_idx, 2, full)
    forward, backward = (
        getattr(op, overload) for op in (ops._causal_conv1d_fwd, ops._causal_conv1d_bwd)
    )
    torch.library.opcheck(forward, args, test_utils=OPCHECKS)
    dfinal = torch.randn(2, 3, 3).bfloat16() if full else None
    torch.library.opcheck(backward, (inputs["x"], dfinal, *args), test_utils=OPCHECKS)
    update, fixed = make_update(indices=[4, -1, 0] if packed else None, bias=full)
    args = (*update.values(), full, None, fixed.get("conv_state_indices"))
    torch.library.opcheck(getattr(ops._causal_conv1d_update, overload), args, test_utils=OPCHECKS)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_into_one_graph(packed, backend):
    inputs = make(b=1, d=3, l=6, num_states=1)
    kwargs = {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)} if packed else {}
    run = both(causal_conv1d_fn, activation="silu", **kwargs)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    plain, traced = evaluate(run, inputs), evaluate(compiled, inputs)
    for name in plain:
        torch.testing.assert_close(traced[name], plain[name], rtol=0, atol=0, msg=name)

    update, fixed = make_update(indices=[4, -1, 0])

    def run_update(x, conv_state, weight, bias):
        state = conv_state.clone()
        return causal_conv1d_update(x, state, weight, bias, **fixed), state

    compiled = torch.compile(run_update, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for got, expected in zip(compiled(**update), run_update(**update), strict=True):
            assert torch.equal(got, expected)


X, W = torch.zeros(2, 4, 5), torch.zeros(4, 3)
IDS = torch.zeros(2, 5, dtype=torch.int32)
STATE = torch.zeros(2, 4, 2)

WRONG = [
    ((X[0], W), {}, ValueError, "x must be"),
    ((X, W[None]), {}, ValueError, "weight must be"),
    ((X, W[:3]), {}, ValueError, "4 channels"),
    ((X, W[:, :0]), {}, ValueError, "width 0"),
    ((X, W, torch.zeros(3)), {}, ValueError, "bias must have shape"),
    ((X.int(), W), {}, TypeError, "x must be one of"),
    ((X, W.to(torch.complex64)), {}, TypeError, "weight must be one of"),
    ((X, W.to("meta")), {}, ValueError, "weight is on meta"),
    ((X, W), {"activation": "relu"}, NotImplementedError, "'relu'"),
    ((X, W), {"initial_states": STATE[:1]}, ValueError, "initial_states must have shape"),
    ((X, W), {"initial_states": STATE.long()}, TypeError, "initial_states must be one of"),
    ((X, W), {"final_states_out": STATE[..., :1]}, ValueError, "final_states_out must have shape"),
    (
        (X, W),
        {"final_states_out": torch.zeros(1).expand(2, 4, 2)},
        ValueError,
        "final_states_out is changed in place",
    ),
    ((X, W), {"seq_idx": IDS[:, :4]}, ValueError, "seq_idx must be"),
    ((X, W), {"seq_idx": IDS.float()}, TypeError, "seq_idx must be an integer"),
    ((X, W), {"seq_idx": IDS + 2, "return_final_states": True}, IndexError, "sequence number 2"),
    ((X, W), {"seq_idx": IDS, "num_sequences": -1}, ValueError, "must not be negative"),
    ((X, W), {"num_sequences": 2}, ValueError, "num_sequences needs"),
    ((X, W), {"cu_seqlens": torch.tensor([0, 5])}, ValueError, "batch of one"),
    ((X[:1], W), {"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens must start at 0"),
    ((X[:1], W), {"cu_seqlens": torch.tensor([0, 3, 2])}, ValueError, "never fall"),
]


@pytest.mark.parametrize("args,kwargs,error,message", WRONG, ids=lambda v: str(v)[:30])
def test_wrong_calls(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        causal_conv1d_fn(*args, **kwargs)


def numbers(*values):
    return torch.tensor(values, dtype=torch.int32)


WRONG_UPDATES = [
    ((X[0, 0], STATE, W), {}, ValueError, "x must be"),
    ((X, STATE[:1], W), {}, ValueError, "conv_state must have shape"),
    ((X, STATE[..., :1], W), {}, ValueError, "at least 2"),
    ((X, STATE[0], W), {}, ValueError, "conv_state must be"),
    ((X, STATE.int(), W), {}, TypeError, "conv_state must be one of"),
    ((X, STATE.to("meta"), W), {}, ValueError, "conv_state is on meta"),
    ((X, torch.zeros(1, 4, 2).expand(2, 4, 2), W), {}, ValueError, "expanded view"),
    ((X, STATE, W), {"activation": "gelu"}, NotImplementedError, "'gelu'"),
    ((X, STATE, W), {"conv_state_indices": numbers(0, 2)}, IndexError, "holds 2"),
    ((X, STATE, W), {"conv_state_indices": numbers(0)}, ValueError, "conv_state_indices must have"),
    (
        (X, STATE, W),
        {"conv_state_indices": torch.zeros(2)},
        TypeError,
        "conv_state_indices must be",
    ),
    ((X, STATE, W), {"cache_seqlens": numbers(0)}, ValueError, "cache_seqlens must have shape"),
    ((X, STATE, W), {"cache_seqlens": torch.zeros(2)}, TypeError, "cache_seqlens must be one of"),
]


@pytest.mark.parametrize("args,kwargs,error,message", WRONG_UPDATES, ids=lambda v: str(v)[:30])
def test_wrong_updates_change_nothing(args, kwargs, error, message):
    before = args[1].clone()
    with pytest.raises(error, match=message):
        causal_conv1d_update(*args, **kwargs)
    assert before.is_meta or torch.equal(args[1], before)


def test_wrong_varlen_states():
    x, bounds = torch.zeros(5, 3), numbers(0, 5)
    with pytest.raises(ValueError, match="x must be"):
        causal_conv1d_varlen_states(x[None], bounds, 3)
    with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
        causal_conv1d_varlen_states(x, numbers(0, 6), 3)
    with pytest.raises(ValueError, match="state_len must not be negative"):
        causal_conv1d_varlen_states(x, bounds, -1)
