"""The selective scan, one step after the other: the oracle that every backend is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import accumulate_dtype


def _expand_projection(x: Tensor, b: int, d: int, length: int, is_complex: bool, dtype) -> Tensor:
    """B or C as (b, d, n, l) or, constant, (1, d, n, 1)."""
    if x.dim() == 2:
        return x.to(dtype)[None, :, :, None]
    if x.dim() == 3:
        x = x.unsqueeze(1)
    if is_complex:
        real = dtype.to_real() if dtype.is_complex else dtype
        x = torch.view_as_complex(x.to(real).unflatten(-1, (length, 2)).contiguous())
    return x.to(dtype).repeat_interleave(d // x.shape[1], dim=1)


def _run_flags(seq_idx: Tensor) -> tuple[list[list[int]], list[list[bool]]]:
    """For each row the ids, and whether each step starts a run (padding does not end one)."""
    ids = seq_idx.tolist()
    starts = []
    for row in ids:
        previous, flags = None, []
        for i in row:
            flags.append(i >= 0 and i != previous)
            previous = i if i >= 0 else previous
        starts.append(flags)
    return ids, starts


def _scan_row(decay, inputs, state, ids=None, starts=None, initial=None, finals=None):
    """States after every step of one row; ``initial`` and ``finals`` are lists by id."""
    history = []
    for t, (a, x) in enumerate(zip(decay.unbind(-1), inputs.unbind(-1), strict=True)):
        if ids is not None:
            if ids[t] < 0:
                history.append(state)
                continue
            if starts[t]:
                state = initial[ids[t]]
        state = a * state + x
        history.append(state)
        if ids is not None:
            finals[ids[t]] = state
    return history, state


def selective_scan_sequential(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    num_states: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, final_state) of the recurrence (arXiv 2312.00752, section 3), plain differentiable.

    Serves real and complex A, fp32 and fp64, and the whole state contract. Its cost is l Python
    steps and its autograd graph holds (b, d, l, n).
    """
    b, d, length = u.shape
    real = accumulate_dtype(u, delta, initial_state)
    real = torch.float64 if A.dtype in (torch.float64, torch.complex128) else real
    state_dtype = real.to_complex() if A.is_complex() else real
    A = A.to(state_dtype)
    padding = None if seq_idx is None else (seq_idx < 0)[:, None, :]
    u_, dt = u.to(real), delta.to(real)
    if delta_bias is not None:
        dt = dt + delta_bias.to(real)[:, None]
    if delta_softplus:
        dt = F.softplus(dt, threshold=20.0)
    B_ = _expand_projection(B, b, d, length, A.is_complex(), state_dtype)
    C_ = _expand_projection(C, b, d, length, A.is_complex(), state_dtype)
    if padding is not None:
        u_, dt = u_.masked_fill(padding, 0.0), dt.masked_fill(padding, 0.0)
        B_ = B_ if B.dim() == 2 else B_.masked_fill(padding[:, None], 0.0)
        C_ = C_ if C.dim() == 2 else C_.masked_fill(padding[:, None], 0.0)
    decay = torch.exp(dt[:, :, None, :] * A[:, :, None])
    inputs = (dt * u_)[:, :, None, :] * B_

    if seq_idx is None:
        first = (
            A.new_zeros((b, *A.shape)) if initial_state is None else initial_state.to(state_dtype)
        )
        history, final = _scan_row(decay, inputs, first)
        states = torch.stack(history, dim=-1) if history else decay
    else:
        zero = torch.zeros_like(A)
        ids, starts = _run_flags(seq_idx)
        numbers = range(max(num_states, 1 + max((i for row in ids for i in row), default=-1)))
        # Every run starts from its initial state, also where a number comes back; the last one of
        # a number makes its final state.
        if initial_state is None:
            initial = [zero for _ in numbers]
        else:
            initial = list(initial_state.to(state_dtype))
        finals = list(initial)
        rows = [
            _scan_row(decay[i], inputs[i], zero, ids[i], starts[i], initial, finals)[0]
            for i in range(b)
        ]
        states = torch.stack([torch.stack(row, dim=-1) for row in rows]) if b and length else decay
        final = torch.stack(finals[:num_states]) if num_states else A.new_zeros((0, *A.shape))
    y = (states * C_).sum(dim=2)
    y = 2 * y.real if A.is_complex() else y
    if D is not None:
        y = y + u_ * D.to(real)[:, None]
    if z is not None:
        y = y * F.silu(z.to(real))
    if padding is not None:
        y = y.masked_fill(padding, 0.0)
    return y.to(u.dtype), final
