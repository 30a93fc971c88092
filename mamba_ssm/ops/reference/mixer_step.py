"""One token of the Mamba mixer between in_proj and out_proj, in pure PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import accumulate_dtype
from .causal_conv1d import causal_conv1d_update
from .state_update import state_update


def mixer_step(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
) -> Tensor:
    """Internal op ``_mixer_step``: see ``ops/schema.py`` for shapes."""
    n, rank = A_log.shape[1], dt_proj.shape[1]
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_update(
        x.unsqueeze(-1), conv_state, conv_weight, conv_bias, True, None, None
    ).squeeze(-1)
    low, B, C = F.linear(x, x_proj).split([rank, n, n], dim=1)
    dt = F.linear(low, dt_proj)
    A = -torch.exp(A_log.to(accumulate_dtype(A_log)))

    def one_head(t: Tensor | None, dim: int) -> Tensor | None:
        return None if t is None else t.unsqueeze(dim)

    out = state_update(
        ssm_state.unsqueeze(1), one_head(x, 1), one_head(dt, 1), one_head(A, 0), one_head(B, 1),
        one_head(C, 1), one_head(D, 0), one_head(z, 1), one_head(dt_bias, 0), True, None,
    )  # fmt: skip
    return out.squeeze(1)
