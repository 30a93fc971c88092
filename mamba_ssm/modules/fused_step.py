"""One token of the Mamba mixer in as few kernels as its layers allow, without gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mamba_ssm.modules.dt_projection import DtProjection
from mamba_ssm.modules.sequence_args import is_plain
from mamba_ssm.ops import backend
from mamba_ssm.ops._autograd import transforms_active
from mamba_ssm.ops.causal_conv1d import causal_conv1d_update
from mamba_ssm.ops.mixer_step import mixer_step, mixer_step_serves
from mamba_ssm.ops.selective_state_update import selective_state_update

_OPS = (causal_conv1d_update, selective_state_update)


def inner_step(
    layer: nn.Module,
    xz: torch.Tensor,
    conv_state: torch.Tensor,
    ssm_state: torch.Tensor,
    ops: tuple[Callable, Callable],
) -> torch.Tensor | None:
    """in_proj's result xz (b, 2 d_inner) to out_proj's input (b, d_inner), the states moved on in
    place; None where one op does not do what the layer's parts do. ``ops``: what the layer would
    call for the convolution and the state."""
    if type(xz) is not torch.Tensor or not xz.is_cuda or torch.compiler.is_compiling():
        return None
    if transforms_active() or not backend.runs_native("_mixer_step", "cuda", xz.dtype):
        return None
    parts = layer._modules
    conv1d, x_proj, dt_proj = parts["conv1d"], parts["x_proj"], parts["dt_proj"]
    if (
        ops != _OPS
        or not is_plain(x_proj, nn.Linear)
        or not is_plain(dt_proj, nn.Linear, DtProjection)
        or x_proj.bias is not None
    ):
        return None
    arguments = (
        xz, conv1d.weight.squeeze(1), conv1d.bias, x_proj.weight, dt_proj.weight, dt_proj.bias,
        layer.A_log, layer.D, conv_state, ssm_state,
    )  # fmt: skip
    return mixer_step(*arguments) if mixer_step_serves(*arguments) else None
