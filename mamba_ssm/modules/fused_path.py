"""The fused forward of the Mamba mixer, where its layers are what their weights say."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mamba_ssm.modules.sequence_args import is_plain
from mamba_ssm.ops import mamba_inner
from mamba_ssm.ops.client_layers import tensor_of
from mamba_ssm.ops.linear import linear
from mamba_ssm.ops.mamba_block import block_applies, mamba_block, mamba_block_with_state


def at_least_fp32(x: torch.Tensor | None) -> torch.Tensor | None:
    """x in fp32, or as it is where it is fp64 or None."""
    return x if x is None or x.dtype == torch.float64 else x.float()


def project(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """layer(x); see ``linear`` for what is gained where the layer is plain."""
    if is_plain(layer, nn.Linear):
        return linear(x, layer.weight, layer.bias)
    return layer(x)


def _weights(layer: nn.Module) -> tuple[torch.Tensor | None, ...]:
    # Past Module.__getattr__: the host's time counts in a small model.
    part = layer._modules
    in_proj, conv1d, dt_proj, out_proj = (
        part["in_proj"], part["conv1d"], part["dt_proj"], part["out_proj"]
    )  # fmt: skip
    return (
        tensor_of(in_proj, "weight"),
        tensor_of(in_proj, "bias"),
        tensor_of(conv1d, "weight"),
        tensor_of(conv1d, "bias"),
        tensor_of(part["x_proj"], "weight"),
        tensor_of(dt_proj, "weight"),
        tensor_of(dt_proj, "bias"),
        tensor_of(layer, "A_log"),
        tensor_of(layer, "D"),
        tensor_of(out_proj, "weight"),
        tensor_of(out_proj, "bias"),
    )


def fused_prefill(
    layer: nn.Module, hidden_states: torch.Tensor, inner: Callable
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(out, the convolution's input (b, d, l), state (b, d, n)) of such a mixer, or None where one
    call of the compiled kernels does not serve."""
    if inner is not mamba_inner.mamba_inner_fn or not is_plain(layer.in_proj, nn.Linear):
        return None
    return mamba_block_with_state(hidden_states, *_weights(layer))


def fused_forward(layer: nn.Module, hidden_states: torch.Tensor, inner: Callable) -> torch.Tensor:
    """(b, l, d_model) → (b, l, d_model) of a Mamba mixer whose conv1d and projections are plain.

    With a plain in_proj everything is one autograd function; else ``inner``, mamba_inner_fn or
    whatever took its name in the caller, gets in_proj's result.
    """
    whole = inner is mamba_inner.mamba_inner_fn and is_plain(layer.in_proj, nn.Linear)
    if whole and block_applies(hidden_states):
        return mamba_block(hidden_states, *_weights(layer))
    return inner(
        layer.in_proj(hidden_states).transpose(1, 2),
        layer.conv1d.weight,
        layer.conv1d.bias,
        layer.x_proj.weight,
        layer.dt_proj.weight,
        layer.out_proj.weight,
        layer.out_proj.bias,
        -torch.exp(at_least_fp32(layer.A_log)),
        None,  # B and C depend on the input
        None,
        at_least_fp32(layer.D),
        delta_bias=at_least_fp32(layer.dt_proj.bias),
        delta_softplus=True,
    )
