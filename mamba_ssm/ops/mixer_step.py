"""One token of the Mamba mixer between in_proj and out_proj, where a compiled kernel serves it."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDTH, _STATES = 4, 16
_MOST_PROJECTED, _MOST_STATES = 512, 2**31
_op = torch.ops.mamba_ssm._mixer_step.default


def mixer_step_serves(
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
) -> bool:
    """Whether :func:`mixer_step` serves these arguments of a loaded CUDA library's op."""
    dtype, (channels, rank) = xz.dtype, dt_proj.shape
    matrices = (x_proj, dt_proj, conv_state)
    others = (conv_weight, conv_bias, dt_bias, A_log, D)
    return (
        dtype in (torch.float16, torch.bfloat16)
        and channels % 64 == 0
        and xz.shape[0] * channels * _STATES < _MOST_STATES
        and rank % 16 == 0
        and 0 < rank <= _MOST_PROJECTED - 2 * _STATES
        and conv_weight.shape[-1] == _WIDTH
        and A_log.shape[-1] == _STATES
        and D.dim() == 1
        and all(t.dtype == dtype for t in matrices)
        and ssm_state.dtype in (dtype, torch.float32)
        and all(t is None or t.dtype in (dtype, torch.float32) for t in others)
        and all(
            t is None or (t.is_contiguous() and t.data_ptr() % 16 == 0 and t.device == xz.device)
            for t in (xz, *matrices, *others, ssm_state)
        )
    )


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
    """xz (b, 2 d) -> (b, d): the convolution's step with SiLU, x_proj, dt_proj, the recurrence's
    step and the gate. conv_state (b, d, w) and ssm_state (b, d, n) are moved on in place.

    conv_weight (d, w), x_proj (r + 2 n, d), dt_proj (d, r), A_log (d, n), D and biases (d,).
    Without gradients; RuntimeError where :func:`mixer_step_serves` says no.
    """
    return _op(
        xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, conv_state, ssm_state
    )
