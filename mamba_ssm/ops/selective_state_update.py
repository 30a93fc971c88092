"""The decode step of the selective scan: one new input a sequence, the state changed in place.

Letters: b batch, d channels, n state size, g groups, h heads of p channels, S rows of the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from ._autograd import needs_grad, transformed
from ._checks import (
    check_device,
    check_dim,
    check_dtype,
    check_indices,
    check_shape,
    check_writable,
)
from .dtypes import accumulate_dtype, kernel_dtype
from .reference.state_rows import StateRows
from .reference.state_update import state_step

__all__ = ["selective_state_update", "selective_state_update_ref"]


def _canonical(state, x, dt, A, B, C, D, z, dt_bias) -> tuple:
    """The arguments as views in the form of heads: state (S,h,p,n), B and C (b,g,n).

    Without heads, g groups are g heads: the channels of one group share its B and C.
    """
    if state.dim() == 4:
        if B.dim() == 2:
            B, C = B.unsqueeze(1), C.unsqueeze(1)
        return state, x, dt, A, B, C, D, z, dt_bias
    if B.dim() == 2:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    heads = (B.shape[1], -1)

    def split(t: Tensor | None, dim: int) -> Tensor | None:
        return None if t is None else t.unflatten(dim, heads)

    return (
        split(state, 1), split(x, 1), split(dt, 1), split(A, 0), B, C,
        split(D, 0), split(z, 1), split(dt_bias, 0),
    )  # fmt: skip


def _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices) -> None:
    check_dim("state", state, (3, 4), "(states, channels, n) or (states, heads, channels, n)")
    check_dim("B", B, (2, 3), "(batch, n) or (batch, groups, n)")
    rows, *inner, n = state.shape
    check_dim("x", x, (state.dim() - 1,), f"{state.dim() - 1}-D, as state is {state.dim()}-D")
    batch, heads = x.shape[0], inner[0]
    if state_batch_indices is None and rows != batch:
        raise ValueError(
            f"state has {rows} rows, but x has a batch of {batch}; give state_batch_indices to "
            "choose rows"
        )
    axes = "channels" if len(inner) == 1 else "heads, channels"
    for name, value in (("x", x), ("dt", dt), ("z", z)):
        check_shape(name, value, (batch, *inner), f"(batch, {axes})")
    check_shape("A", A, (*inner, n), f"({axes}, n)")
    for name, value in (("D", D), ("dt_bias", dt_bias)):
        check_shape(name, value, tuple(inner), f"({axes})")
    middle = B.shape[1:-1]
    for name, value in (("B", B), ("C", C)):
        check_shape(name, value, (batch, *middle, n), "(batch, n) or (batch, groups, n)")
    groups = middle[0] if middle else 1
    if groups < 1 or heads % groups != 0:
        raise ValueError(
            f"B has {groups} groups, which do not divide the {heads} {axes.split(',')[0]}"
        )
    for name, value in (
        ("state", state), ("x", x), ("dt", dt), ("A", A), ("B", B), ("C", C), ("D", D), ("z", z),
        ("dt_bias", dt_bias),
    ):  # fmt: skip
        check_dtype(name, value)
        check_device(name, value, x.device, "x")
    check_device("state_batch_indices", state_batch_indices, x.device, "x")
    check_indices("state_batch_indices", state_batch_indices, batch, rows, "state")
    check_writable("state", state)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step h <- exp(dt A) h + dt B x, y = C h + D x, times silu(z) (arXiv 2312.00752, eq. 2a).

    state (S,d,n) or (S,h,p,n), changed in place, in its own dtype and whatever its strides; S is b
        unless ``state_batch_indices`` is given.
    x, dt, z (b,d) or (b,h,p); A (d,n) or (h,p,n); B, C (b,n) or (b,g,n) with g dividing d (or h);
    D, dt_bias (d,) or (h,p).
    dt_softplus: dt <- softplus(dt + dt_bias).
    state_batch_indices (b,) int: the row of state of each row of x; negative: skip, output 0. No
        two rows of x may use the same row of state.

    Floating dtypes mix freely and expanded (stride 0) arguments are fine, state excepted; sums are
    fp32 (fp64 with fp64 inputs). Returns x's shape and dtype. Differentiable: where autograd
    records, the new state carries its history, so gradients flow through several steps (detach the
    state to stop that). Raises ValueError for shapes and devices, TypeError for dtypes, IndexError
    for an index without a row.
    """
    _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    args = _canonical(state, x, dt, A, B, C, D, z, dt_bias)
    if transformed("a decode step") or needs_grad(state, x, dt, A, B, C, D, z, dt_bias):
        backend.only_reference("a decode step that records gradients")
        out = _differentiable(args, dt_softplus, state, state_batch_indices)
    else:
        op = backend.resolve("_state_update", x.device.type, kernel_dtype(*args[1:], args[0]))
        out = op(*args, dt_softplus, state_batch_indices)
    return out.view(x.shape)


def _differentiable(args, dt_softplus: bool, state: Tensor, indices: Tensor | None) -> Tensor:
    rows = StateRows(state, indices)
    # A copy: autograd keeps the old state, which is overwritten below.
    before = rows.read().clone().view(-1, *args[0].shape[1:])
    out, after = state_step(before, *args[1:], dt_softplus)
    rows.write(after.reshape(-1, *state.shape[1:]))
    return rows.zero_skipped(out).to(args[1].dtype)


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """:func:`selective_state_update` in plain differentiable torch, row by row: the oracle."""
    dtype, old, outs = accumulate_dtype(state, x, dt, A), state.clone(), []
    heads = state.shape[1]

    def per_head(t: Tensor) -> Tensor:  # (n,) or (g,n) to something that broadcasts with (h,..,n)
        t = t.to(dtype)
        if t.dim() == 2:
            t = t.repeat_interleave(heads // t.shape[0], dim=0)
            t = t if state.dim() == 3 else t[:, None, :]
        return t

    for i in range(x.shape[0]):
        row = i if state_batch_indices is None else int(state_batch_indices[i])
        if row < 0:
            outs.append(torch.zeros_like(x[i]))
            continue
        u, delta = x[i].to(dtype), dt[i].to(dtype)
        delta = delta if dt_bias is None else delta + dt_bias.to(dtype)
        delta = F.softplus(delta) if dt_softplus else delta
        decay = torch.exp(delta[..., None] * A.to(dtype))
        h = decay * old[row].to(dtype) + (delta * u)[..., None] * per_head(B[i])
        y = (h * per_head(C[i])).sum(dim=-1)
        y = y if D is None else y + D.to(dtype) * u
        y = y if z is None else y * F.silu(z[i].to(dtype))
        outs.append(y.to(x.dtype))
        state[row] = h.to(state.dtype)
    return torch.stack(outs) if outs else torch.zeros_like(x)
