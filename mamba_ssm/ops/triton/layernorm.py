"""The norms under their first name and with their first positional order."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from .. import layer_norm as _new
from ..dtypes import kernel_dtype
from ..layer_norm import RMSNorm, layer_norm_linear_fn, layer_norm_ref, rms_norm_ref

__all__ = [
    "RMSNorm",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "rms_norm_fn",
    "rms_norm_ref",
]


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`mamba_ssm.ops.layer_norm.layer_norm_fn` in the argument order of version 1."""
    return _new.layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        eps=eps,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`mamba_ssm.ops.layer_norm.rms_norm_fn` in the argument order of version 1."""
    return _new.rms_norm_fn(
        x,
        weight,
        bias,
        residual,
        eps=eps,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
    )


def _layer_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    is_rms_norm: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, mean, rstd, residual_out) of rows x (m, d), without autograd.

    Private in name, but transformers 4.x imports it for FalconMamba's fused function.
    """
    op = backend.resolve("_add_norm_fwd", x.device.type, kernel_dtype(x, residual, weight, bias))
    y, total, mean, rstd = op(x, residual, weight, bias, eps, is_rms_norm, residual_dtype)
    if residual is None and residual_dtype in (None, x.dtype):
        total = x  # the op leaves out what would be x itself
    y = y if out_dtype is None else y.to(out_dtype)
    return y, None if is_rms_norm else mean, rstd, total
