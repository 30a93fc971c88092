"""One step of the selective recurrence (arXiv 2312.00752, eq. 2a) in pure PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import accumulate_dtype
from .state_rows import StateRows


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
) -> Tensor:
    """Internal op ``_state_update``: see ``ops/schema.py`` for shapes."""
    rows = StateRows(state, state_batch_indices)
    out, new_state = state_step(rows.read(), x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    rows.write(new_state)
    return rows.zero_skipped(out).to(x.dtype).contiguous()


def state_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """(out (b,h,p), new state (b,h,p,n)), both in the accumulation dtype; differentiable.

    The output is taken from the unrounded new state.
    """
    dtype = accumulate_dtype(state, x, dt, A)
    heads, groups = x.shape[1], B.shape[1]
    dt, x_acc = dt.to(dtype), x.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)  # the identity above 20
    B, C = B.to(dtype), C.to(dtype)
    if groups != heads:
        B, C = (t.repeat_interleave(heads // groups, dim=1) for t in (B, C))
    decay = torch.exp(dt[..., None] * A.to(dtype))
    new_state = torch.addcmul(state.to(dtype) * decay, (dt * x_acc)[..., None], B[:, :, None, :])
    # Not a matmul: autocast would run it in a lower precision.
    out = (new_state * C[:, :, None, :]).sum(dim=-1)
    if D is not None:
        out = torch.addcmul(out, x_acc, D.to(dtype))
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out, new_state
