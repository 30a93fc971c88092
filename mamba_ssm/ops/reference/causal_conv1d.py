"""The depthwise causal convolution in pure PyTorch: w shifted multiply-adds.

    out_t = act(bias + sum_j weight[w-1-j] x_{t-j}),        j = 0 .. w-1

where inputs before the first come from the initial state (the last w-1 inputs of what went before).
Sums are fp32 (fp64 for fp64 inputs). No result aliases an input, and no shape depends on data. The
results of x's shape are laid out as x is (``ops/layout.py``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import accumulate_dtype
from ..layout import in_layout_of
from .conv_packing import PackedConv
from .state_rows import StateRows


def _pre_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None
) -> Tensor:
    """bias + the convolution of x (b,d,l), in the (accumulation) dtype of x."""
    length, last = x.shape[2], weight.shape[1] - 1
    out = x * weight[:, last:]
    if bias is not None:
        out += bias[:, None]
    for j in range(1, last + 1):
        tap = weight[:, last - j, None]
        if j < length:
            out[..., j:].addcmul_(x[..., : length - j], tap)
        if initial is not None:
            n = min(j, length)
            out[..., :n].addcmul_(initial[..., last - j : last - j + n], tap)
    return out


def _final_states(x: Tensor, initial: Tensor | None, size: int) -> Tensor:
    """The last ``size`` of (initial state, x), freshly allocated."""
    length = x.shape[2]
    if length >= size:
        return x[..., length - size :].clone(memory_format=torch.contiguous_format)
    if initial is None:
        return F.pad(x, (size - length, 0)).contiguous()
    return torch.cat([initial[..., length:].to(x.dtype), x], dim=-1).contiguous()


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    num_states: int,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Internal op ``_causal_conv1d_fwd``: see ``ops/schema.py`` for shapes."""
    dtype = accumulate_dtype(x, weight)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    initial = None if initial_states is None else initial_states.to(dtype)
    if seq_idx is not None:
        packed = PackedConv(x, weight, initial, seq_idx, num_states)
        out, final = packed.forward(bias, silu)
        return in_layout_of(out.to(x.dtype), x), final.to(x.dtype).contiguous()
    out = _pre_activation(in_layout_of(x, x).to(dtype), weight, bias, initial)
    if silu:
        F.silu(out, inplace=True)
    final = _final_states(x, initial_states, weight.shape[1] - 1)
    return in_layout_of(out.to(x.dtype), x), final


def causal_conv1d_bwd(
    dout: Tensor,
    dfinal_states: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    num_states: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Internal op ``_causal_conv1d_bwd``: see ``ops/schema.py`` for shapes."""
    dtype = accumulate_dtype(x, weight)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    initial = None if initial_states is None else initial_states.to(dtype)
    dfinal = None if dfinal_states is None else dfinal_states.to(dtype)
    dout = in_layout_of(dout, x).to(dtype)
    if seq_idx is not None:
        packed = PackedConv(x, weight, initial, seq_idx, num_states)
        dx, dweight, dbias, dinitial = packed.backward(dout, dfinal, bias, silu)
    else:
        x_acc = in_layout_of(x, x).to(dtype)
        dpre = dout
        if silu:
            pre = _pre_activation(x_acc, weight, bias, initial)
            dpre = torch.ops.aten.silu_backward(dout, pre)
        dx, dweight, dinitial = _gradients(dpre, dfinal, x_acc, weight, initial)
        dbias = dpre.sum(dim=(0, 2))
    return (
        in_layout_of(dx.to(x.dtype), x),
        dweight.contiguous(),
        x.new_empty((0,)) if bias is None else dbias.contiguous(),
        x.new_empty((0,)) if initial_states is None else dinitial.to(x.dtype).contiguous(),
    )


def _gradients(
    dpre: Tensor, dfinal: Tensor | None, x: Tensor, weight: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and the initial state, given that of the pre-activation."""
    length, last = x.shape[2], weight.shape[1] - 1
    dx = dpre * weight[:, last:]
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dweight[:, last] = (dpre * x).sum(dim=(0, 2))
    dinitial = x.new_zeros((x.shape[0], x.shape[1], last))
    for j in range(1, last + 1):
        tap, n = weight[:, last - j, None], min(j, length)
        dtap = (dpre[..., n:] * x[..., : length - n]).sum(dim=(0, 2))
        dx[..., : length - n].addcmul_(dpre[..., n:], tap)
        if initial is not None:
            columns = slice(last - j, last - j + n)
            dtap += (dpre[..., :n] * initial[..., columns]).sum(dim=(0, 2))
            dinitial[..., columns].addcmul_(dpre[..., :n], tap)
        dweight[:, last - j] = dtap
    if dfinal is not None:
        n = min(last, length)
        dx[..., length - n :] += dfinal[..., last - n :]
        dinitial[..., n:] += dfinal[..., : last - n]
    return dx, dweight, dinitial


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """Internal op ``_causal_conv1d_update``: see ``ops/schema.py`` for shapes."""
    rows = StateRows(conv_state, conv_state_indices)
    state = rows.read()
    out, state = causal_conv1d_step(x, state, weight, bias, silu, cache_seqlens)
    rows.write(state)
    return rows.zero_skipped(out).to(x.dtype).contiguous()


def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out in the accumulation dtype, new state) of a few new inputs x (b,d,l); differentiable.

    state (b,d,s>=w-1). With ``cache_seqlens`` (b,) it is a ring buffer: input number i of a
    sequence lies in column i % s; else its last column is the newest input.
    """
    dtype = accumulate_dtype(x, weight)
    size, length, last = state.shape[2], x.shape[2], weight.shape[1] - 1
    if cache_seqlens is None or size == 0:
        before = state[..., size - last :]
        new_state = torch.cat([state, x.to(state.dtype)], dim=-1)[..., length:]
    else:
        at = cache_seqlens.long()[:, None]
        before = _columns(state, at - torch.arange(last, 0, -1, device=x.device))
        kept = min(length, size)  # of more inputs than columns only the last stay
        where = at + torch.arange(length - kept, length, device=x.device)
        index = where.remainder(size)[:, None, :].expand(-1, x.shape[1], -1)
        new_state = state.scatter(2, index, x[..., length - kept :].to(state.dtype))
    taps = torch.cat([before.to(dtype), x.to(dtype)], dim=-1)
    weight = weight.to(dtype)
    out = taps[..., last : last + length] * weight[:, last:]
    if bias is not None:
        out = out + bias.to(dtype)[:, None]
    for k in range(last):
        out = torch.addcmul(out, taps[..., k : k + length], weight[:, k, None])
    return F.silu(out) if silu else out, new_state


def _columns(state: Tensor, at: Tensor) -> Tensor:
    """Ring buffer columns ``at`` (b,w-1) of state (b,d,s)."""
    index = at.remainder(state.shape[2])[:, None, :].expand(-1, state.shape[1], -1)
    return state.gather(2, index)
