"""Residual addition followed by layer norm or RMS norm, in pure PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype


def add_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    is_rms_norm: bool,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Internal op ``_add_norm_fwd``: see ``ops/schema.py`` for shapes."""
    dtype = accumulate_dtype(x, residual)
    total = x.to(dtype)
    if residual is not None:
        total = total + residual.to(dtype)
    if residual is None and residual_dtype in (None, x.dtype):
        residual_out = x.new_empty((0,))  # it would be x itself
    else:
        residual_out = total.to(residual_dtype or x.dtype, copy=True).contiguous()
    mean = x.new_empty((0,), dtype=dtype)
    if not is_rms_norm:
        mean = total.mean(dim=-1)
        total = total - mean[:, None]
    rstd = torch.rsqrt(total.square().mean(dim=-1) + eps)
    y = total * rstd[:, None] * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype).contiguous(), residual_out, mean, rstd


def add_norm_bwd(
    dy: Tensor,
    dresidual_out: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    is_rms_norm: bool,
    dx_dtype: torch.dtype | None,
    other_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Internal op ``_add_norm_bwd``: see ``ops/schema.py`` for shapes."""
    dtype = accumulate_dtype(x, residual)
    no_other, no_dbias = dy.new_empty((0,)), dy.new_empty((0,))
    total, dy = x.to(dtype), dy.to(dtype)
    if residual is not None:
        total = total + residual.to(dtype)
    if not is_rms_norm:
        total = total - mean[:, None]
    normed = total * rstd[:, None]
    dnormed = dy * weight.to(dtype)
    dx = dnormed - normed * (dnormed * normed).mean(dim=-1, keepdim=True)
    dx = dx * rstd[:, None]
    if not is_rms_norm:  # last, so that dx has mean zero even where the mean above was inexact
        dx = dx - dx.mean(dim=-1, keepdim=True)
    if dresidual_out is not None:
        dx = dx + dresidual_out.to(dtype)
    dbias = no_dbias if bias is None else dy.sum(dim=0)
    other = no_other if other_dtype is None else dx.to(other_dtype, copy=True).contiguous()
    return dx.to(dx_dtype or dtype).contiguous(), other, (dy * normed).sum(dim=0), dbias
