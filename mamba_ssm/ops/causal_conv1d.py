"""The short causal convolution before the scan (arXiv 2312.00752, figure 3).

The functions have the names and signatures of the ``causal_conv1d`` package; what is keyword-only
is our addition. Letters: b batch, d channels, l length, w conv width, S number of states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from ._autograd import (
    differentiable_backward,
    needs_grad,
    run,
    transformed,
    wants_double_backward,
)
from ._checks import (
    INTEGERS,
    check_device,
    check_dim,
    check_dtype,
    check_indices,
    check_shape,
    check_writable,
    is_silu,
)
from .dtypes import accumulate_dtype, kernel_dtype
from .packing import check_sequence_numbers, resolve_packing
from .reference.causal_conv1d import causal_conv1d_step
from .reference.state_rows import StateRows

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states",
]


class _CausalConv1dFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_states, seq_idx, num_states, silu):
        ctx.set_materialize_grads(False)
        dtype = kernel_dtype(x, weight, bias, initial_states)
        op = backend.resolve("_causal_conv1d_fwd", x.device.type, dtype)
        ctx.save_for_backward(x, weight, bias, initial_states, seq_idx)
        ctx.num_states, ctx.silu = num_states, silu
        return op(x, weight, bias, initial_states, seq_idx, num_states, silu)

    @staticmethod
    def backward(ctx, dout, dfinal):
        x, weight, bias, initial, seq_idx = ctx.saved_tensors
        if wants_double_backward():
            grads = differentiable_backward(
                lambda x, weight, bias, initial: _plain(
                    x, weight, bias, initial, seq_idx, ctx.num_states, ctx.silu
                ),
                (x, weight, bias, initial),
                (dout, dfinal),
            )
            return *grads, None, None, None
        dtype = kernel_dtype(x, weight, bias, initial)
        op = backend.resolve("_causal_conv1d_bwd", x.device.type, dtype)
        if dout is None:
            dout = torch.zeros_like(x)
        dx, dweight, dbias, dinitial = op(
            dout, dfinal, x, weight, bias, initial, seq_idx, ctx.num_states, ctx.silu
        )
        return (
            dx,
            dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None if initial is None else dinitial.to(initial.dtype),
            None,
            None,
            None,
        )


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_dim("weight", weight, (2,), "(channels, width)")
    d, w = weight.shape
    if x.shape[1] != d:
        raise ValueError(
            f"x has {x.shape[1]} channels (shape {tuple(x.shape)}), but weight has {d}"
        )
    if w < 1:
        raise ValueError("weight must have a width of at least 1, but has width 0")
    check_shape("bias", bias, (d,), "(channels,)")
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        check_dtype(name, value)
        check_device(name, value, x.device, "x")


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution of x (b,d,l) with weight (d,w), then the activation.

    Sums are fp32 (fp64 for fp64); the result is (b,d,l) in x's dtype. weight and bias (d,) may have
    other floating dtypes. Everything is differentiable, the states too.

    seq_idx (b,l) int: the number of the sequence each step belongs to; a window never leaves its
        sequence, and a negative number is padding (output 0, skipped by the windows around it).
        Numbers count over the whole batch when states go in or out. A ``str`` is the activation.
    initial_states (S,d,w-1): the inputs before the first; S is b, or the number of sequences.
    return_final_states: return ``(out, final_states)``, the last w-1 inputs (S,d,w-1) in x's dtype.
    final_states_out: a tensor of that shape that is also filled with them, outside autograd.
    activation: None, "silu" or "swish".
    cu_seqlens (num_sequences + 1,) int: bounds of the sequences in a packed batch of one.
    num_sequences: S with seq_idx; default the rows of initial_states, else b.

    Raises ValueError for shapes and devices, TypeError for dtypes, IndexError for a sequence number
    without a state, NotImplementedError for another activation.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    silu = is_silu(activation)
    check_dim("x", x, (3,), "(batch, channels, length)")
    _check_conv(x, weight, bias)
    batch, d, length = x.shape
    seq_idx, num_states = resolve_packing(
        batch, length, x.device, seq_idx, cu_seqlens, num_sequences, initial_states
    )
    wants_final = return_final_states or final_states_out is not None
    for name, states in (
        ("initial_states", initial_states),
        ("final_states_out", final_states_out),
    ):
        check_shape(
            name, states, (num_states, d, weight.shape[1] - 1), "(states, channels, width - 1)"
        )
        check_dtype(name, states)
        check_device(name, states, x.device, "x")
    if initial_states is not None or wants_final:
        check_sequence_numbers(seq_idx, num_states)
    if final_states_out is not None:
        check_writable("final_states_out", final_states_out)
    args = (x, weight, bias, initial_states, seq_idx, num_states, silu)
    if transformed("a causal convolution"):
        out, final = _plain(*args)
    else:
        out, final = run(_CausalConv1dFn, *args)
    if final_states_out is not None:
        with torch.no_grad():
            final_states_out.copy_(final)
    return (out, final) if return_final_states else out


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    seq_idx: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`causal_conv1d_fn` in plain differentiable torch, one by one: the oracle."""
    seq_idx, num_states = resolve_packing(
        x.shape[0], x.shape[2], x.device, seq_idx, None, num_sequences, initial_states
    )
    silu = is_silu(activation)
    out, final = _plain(x, weight, bias, initial_states, seq_idx, num_states, silu)
    if final_states_out is not None:
        with torch.no_grad():
            final_states_out.copy_(final)
    return (out, final) if return_final_states else out


def _plain(x, weight, bias, initial_states, seq_idx, num_states, silu) -> tuple[Tensor, Tensor]:
    """(out, final states) of a whole batch, packed or not; differentiable as often as one likes."""
    states = initial_states
    if states is None:
        states = x.new_zeros((num_states, x.shape[1], weight.shape[1] - 1))
    if seq_idx is None:
        return _plain_sequence(x, states, weight, bias, silu)
    columns = [x.new_zeros(x.shape[1])] * (x.shape[0] * x.shape[2])
    final = list(states.to(x.dtype).unbind(0))
    for row, ids in enumerate(seq_idx.tolist()):
        for number, steps in _runs(ids):
            if initial_states is None or number >= num_states:
                state = x.new_zeros((1, x.shape[1], weight.shape[1] - 1))
            else:
                state = initial_states[number : number + 1]
            out, state = _plain_sequence(x[row : row + 1, :, steps], state, weight, bias, silu)
            for step, column in zip(steps, out[0].unbind(-1), strict=True):
                columns[row * x.shape[2] + step] = column
            if number < num_states:
                final[number] = state[0]
    out = torch.stack(columns) if columns else x.new_zeros((0, x.shape[1]))
    out = out.view(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)
    return out, torch.stack(final) if final else states.to(x.dtype)


def _runs(ids: list[int]) -> list[tuple[int, list[int]]]:
    """(sequence number, its steps) for every maximal run of one number, padding skipped."""
    runs: list[tuple[int, list[int]]] = []
    for step, number in enumerate(ids):
        if number < 0:
            continue
        if not runs or runs[-1][0] != number:
            runs.append((number, []))
        runs[-1][1].append(step)
    return runs


def _plain_sequence(x, state, weight, bias, silu) -> tuple[Tensor, Tensor]:
    dtype, length = accumulate_dtype(x, weight), x.shape[2]
    taps = torch.cat([state.to(dtype), x.to(dtype)], dim=-1)
    out = torch.zeros_like(x, dtype=dtype)
    for k in range(weight.shape[1]):
        out = out + taps[..., k : k + length] * weight[:, k, None].to(dtype)
    if bias is not None:
        out = out + bias.to(dtype)[:, None]
    return (F.silu(out) if silu else out).to(x.dtype), taps[..., length:].to(x.dtype)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution of the next inputs x (b,d) or (b,d,l), after those kept in ``conv_state``.

    conv_state (S,d,s), s >= w-1: the last s inputs, the newest last; moved on in place, in its own
        dtype and whatever its strides. S is b unless ``conv_state_indices`` is given.
    cache_seqlens (b,) int: conv_state is a ring buffer, and input number i of a sequence lies in
        column i % s; x starts at input number cache_seqlens.
    conv_state_indices (b,) int: the row of conv_state of each row of x; negative: skip, output 0.
        No two rows of x may use the same row of conv_state.

    Returns x's shape and dtype. Differentiable: where autograd records, the new state carries its
    history, so gradients flow through several steps (detach the state to stop that).
    Raises ValueError, TypeError, IndexError, NotImplementedError as :func:`causal_conv1d_fn`.
    """
    silu = is_silu(activation)
    check_dim("x", x, (2, 3), "(batch, channels) or (batch, channels, length)")
    _check_update(x, conv_state, weight, bias, cache_seqlens, conv_state_indices)
    single = x.dim() == 2
    if single:
        x = x.unsqueeze(-1)
    if transformed("a convolution update") or needs_grad(x, conv_state, weight, bias):
        backend.only_reference("a convolution update that records gradients")
        rows = StateRows(conv_state, conv_state_indices)
        # A copy: autograd keeps the old state, which is overwritten below.
        before = rows.read().clone()
        out, state = causal_conv1d_step(x, before, weight, bias, silu, cache_seqlens)
        rows.write(state)
        out = rows.zero_skipped(out).to(x.dtype)
    else:
        dtype = kernel_dtype(x, conv_state, weight, bias)
        op = backend.resolve("_causal_conv1d_update", x.device.type, dtype)
        out = op(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
    return out.squeeze(-1) if single else out


def _check_update(x, conv_state, weight, bias, cache_seqlens, conv_state_indices) -> None:
    _check_conv(x, weight, bias)
    check_dim("conv_state", conv_state, (3,), "(states, channels, columns)")
    check_dtype("conv_state", conv_state)
    rows, _, size = conv_state.shape
    if conv_state_indices is None:
        rows = x.shape[0]
    check_shape("conv_state", conv_state, (rows, x.shape[1], size), "(states, channels, columns)")
    if size < weight.shape[1] - 1:
        raise ValueError(
            f"conv_state has {size} columns, but a convolution of width {weight.shape[1]} needs at "
            f"least {weight.shape[1] - 1}"
        )
    check_writable("conv_state", conv_state)
    check_indices("conv_state_indices", conv_state_indices, x.shape[0], rows, "conv_state")
    if cache_seqlens is not None:
        check_shape("cache_seqlens", cache_seqlens, (x.shape[0],), "(batch,)")
        check_dtype("cache_seqlens", cache_seqlens, INTEGERS)
    for name, value in (
        ("conv_state", conv_state),
        ("cache_seqlens", cache_seqlens),
        ("conv_state_indices", conv_state_indices),
    ):
        check_device(name, value, x.device, "x")


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """:func:`causal_conv1d_update` in plain differentiable torch, row by row: the oracle."""
    silu, size = is_silu(activation), conv_state.shape[2]
    inputs = x.unsqueeze(-1) if x.dim() == 2 else x
    states, outs = conv_state.clone(), []
    for i in range(x.shape[0]):
        row = i if conv_state_indices is None else int(conv_state_indices[i])
        if row < 0:
            outs.append(torch.zeros_like(inputs[i]))
            continue
        start = 0 if cache_seqlens is None else int(cache_seqlens[i])
        state = states[row] if cache_seqlens is None else states[row].roll(-start, dims=-1)
        taps = state[None, :, size - weight.shape[1] + 1 :]
        outs.append(_plain_sequence(inputs[i : i + 1], taps, weight, bias, silu)[0][0])
        state = torch.cat([state, inputs[i].to(state.dtype)], dim=-1)[..., inputs.shape[2] :]
        if cache_seqlens is not None:
            state = state.roll(start + inputs.shape[2], dims=-1)
        conv_state[row] = state
    return torch.stack(outs).view(x.shape) if outs else torch.zeros_like(x)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last ``state_len`` inputs of every packed sequence: (num_sequences, d, state_len).

    x (total_length, d) holds the sequences one after the other, ``cu_seqlens`` (num_sequences + 1,)
    int their bounds. Shorter sequences have zeros in front. Differentiable; no synchronisation.
    """
    check_dim("x", x, (2,), "(total_length, channels)")
    check_dim("cu_seqlens", cu_seqlens, (1,), "(num_sequences + 1,)")
    check_dtype("cu_seqlens", cu_seqlens, INTEGERS)
    check_device("cu_seqlens", cu_seqlens, x.device, "x")
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens must hold num_sequences + 1 bounds, but is empty")
    if state_len < 0:
        raise ValueError(f"state_len must not be negative, but is {state_len}")
    resolve_packing(1, x.shape[0], x.device, None, cu_seqlens, None, None)
    bounds = cu_seqlens.long()
    source = bounds[1:, None] - state_len + torch.arange(state_len, device=x.device)
    inside = source >= bounds[:-1, None]
    if x.shape[0] == 0:
        return x.new_zeros((bounds.shape[0] - 1, x.shape[1], state_len))
    rows = x[source.clamp(0, x.shape[0] - 1)].masked_fill(~inside[..., None], 0.0)
    return rows.transpose(1, 2).contiguous()
