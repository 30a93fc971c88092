"""Residual addition fused with layer norm or RMS norm.

The meaning of every function: x times rowscale, dropout, + x1, + residual, all in fp32; then the
norm of that sum before it is rounded. The result is in x's dtype. The sum, which ``prenorm`` also
returns, is in the residual's dtype if there is one, else fp32 with ``residual_in_fp32``, else in
x's dtype; where there is nothing to add it is x itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backend
from ._autograd import differentiable_backward, run, transformed, wants_double_backward
from ._checks import check_device, check_dim, check_dtype, check_shape
from .dtypes import accumulate_dtype, kernel_dtype

__all__ = [
    "RMSNorm",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "rms_norm_fn",
    "rms_norm_forward",
    "rms_norm_ref",
]


def _rows(x: Tensor) -> Tensor:
    """(..., d) as (m, d)."""
    if x.dim() == 2:
        return x
    d = x.shape[-1]
    return x.reshape(-1, d) if d > 0 else x.reshape(x.shape[:-1].numel(), 0)


class _AddNormFn(torch.autograd.Function):
    """(y, residual_out), shaped as x; residual_out is absent where it would be x itself.

    The backward pass needs the unrounded sum. Where residual_out holds it, that one tensor is kept
    instead of x and residual.
    """

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, is_rms_norm, residual_dtype):
        ctx.set_materialize_grads(False)
        ctx.kernel_dtype = kernel_dtype(x, residual, weight, bias)
        if residual_dtype == torch.float64:
            ctx.kernel_dtype = torch.float64
        op = backend.resolve("_add_norm_fwd", x.device.type, ctx.kernel_dtype)
        more = None if residual is None else _rows(residual)
        y, total, mean, rstd = op(_rows(x), more, weight, bias, eps, is_rms_norm, residual_dtype)
        ctx.eps, ctx.is_rms_norm, ctx.residual_dtype = eps, is_rms_norm, residual_dtype
        ctx.dtype, ctx.absent = x.dtype, total.dim() == 1
        y, total = y.view(x.shape), total if ctx.absent else total.view(x.shape)
        ctx.other_dtype = None if residual is None else residual.dtype
        ctx.summed = ctx.absent or total.dtype == accumulate_dtype(x, residual)
        if ctx.summed:
            ctx.save_for_backward(x if ctx.absent else total, None, weight, bias, mean, rstd)
        else:
            ctx.save_for_backward(x, residual, weight, bias, mean, rstd)
        return y, total

    @staticmethod
    def backward(ctx, dy, dtotal):
        x, residual, weight, bias, mean, rstd = ctx.saved_tensors
        dtotal = None if ctx.absent else dtotal
        if wants_double_backward():
            dx, other, dweight, dbias = differentiable_backward(
                lambda *args: _plain(
                    *args, ctx.eps, ctx.is_rms_norm, ctx.dtype, ctx.residual_dtype
                ),
                (x, residual, weight, bias),
                (dy, dtotal),
            )
            other = dx if ctx.summed else other
            dx = None if dx is None else dx.to(ctx.dtype)
            if ctx.other_dtype is not None and other is not None:
                other = other.to(ctx.other_dtype)
        else:
            dy = torch.zeros_like(x, dtype=ctx.dtype) if dy is None else dy
            op = backend.resolve("_add_norm_bwd", x.device.type, ctx.kernel_dtype)
            dtotal, residual = (None if t is None else _rows(t) for t in (dtotal, residual))
            second = None if ctx.other_dtype == ctx.dtype else ctx.other_dtype
            dx, other, dweight, dbias = op(
                _rows(dy), dtotal, _rows(x), residual, weight, bias, mean, rstd, ctx.is_rms_norm,
                ctx.dtype, second,
            )  # fmt: skip
            dx = dx.view(x.shape)
            other, dweight = dx if second is None else other.view(x.shape), dweight.to(weight.dtype)
            dbias = None if bias is None else dbias.to(bias.dtype)
        if ctx.other_dtype is None:
            other = None
        return dx, other, dweight, dbias, None, None, None


def _plain(x, residual, weight, bias, eps, is_rms_norm, dtype, residual_dtype) -> tuple:
    """(y, residual_out) in plain differentiable torch; without residual x may be the whole sum."""
    wide = accumulate_dtype(x, residual)
    total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    y = _norm(total, weight, bias, eps, is_rms_norm)
    return y.to(dtype), total.to(residual_dtype or dtype)


def _norm(
    total: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool
) -> Tensor:
    """The norm itself, in the dtype of ``total``."""
    if not is_rms_norm:
        total = total - total.mean(dim=-1, keepdim=True)
    y = (
        total
        * torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + eps)
        * weight.to(total.dtype)
    )
    return y if bias is None else y + bias.to(total.dtype)


def _add_norm(x, residual, weight, bias, eps, is_rms_norm, residual_dtype) -> tuple[Tensor, Tensor]:
    """(y, the sum) for any number of leading dimensions."""
    if transformed("a norm"):
        return _plain(x, residual, weight, bias, eps, is_rms_norm, x.dtype, residual_dtype)
    if residual_dtype == x.dtype:
        residual_dtype = None  # the same; AOTInductor of torch 2.11 passes a dtype on wrongly
    y, total = run(_AddNormFn, x, residual, weight, bias, eps, is_rms_norm, residual_dtype)
    return y, x if total.dim() != x.dim() or total.numel() != x.numel() else total


def _check(x, weight, bias, residual, x1, weight1, bias1, dropout_p, rowscale) -> None:
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, (..., channels), but is a scalar")
    d = x.shape[-1]
    for name, value in (("weight", weight), ("bias", bias), ("weight1", weight1), ("bias1", bias1)):
        check_shape(name, value, (d,), "(channels,)")
    for name, value in (("residual", residual), ("x1", x1)):
        check_shape(name, value, tuple(x.shape), "x's shape")
    check_shape("rowscale", rowscale, tuple(x.shape[:-1]), "x's shape without the channels")
    if bias1 is not None and weight1 is None:
        raise ValueError("bias1 needs weight1")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), but is {dropout_p}")
    for name, value in (
        ("x", x), ("weight", weight), ("bias", bias), ("residual", residual), ("x1", x1),
        ("weight1", weight1), ("bias1", bias1), ("rowscale", rowscale),
    ):  # fmt: skip
        if value is not None:
            check_dtype(name, value)
            check_device(name, value, x.device, "x")


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """Add and norm of x (..., d); see the module for the meaning.

    weight, bias, weight1, bias1 (d,); residual, x1 of x's shape; rowscale of x's shape without d.
    Returns y; then y1, the same sum with weight1 and bias1, if weight1 is given; then the sum with
    ``prenorm``; then with ``return_dropout_mask`` the masks (bool, True is kept) of x and of x1,
    None where nothing was dropped. Differentiable in every floating argument.
    Raises ValueError for shapes, devices and dropout_p outside [0, 1), TypeError for dtypes.
    """
    _check(x, weight, bias, residual, x1, weight1, bias1, dropout_p, rowscale)
    dtype = accumulate_dtype(x)
    residual_dtype = x.dtype
    if residual is not None:
        residual_dtype = residual.dtype
    elif residual_in_fp32:
        residual_dtype = dtype
    mask = mask1 = None
    if dropout_p == 0.0 and rowscale is None and x1 is None and weight1 is None:
        y, total = _add_norm(x, residual, weight, bias, eps, is_rms_norm, residual_dtype)
        results = [y]
    else:
        dtype = accumulate_dtype(x, residual, x1)
        if dropout_p > 0.0:
            mask = torch.rand(x.shape, device=x.device) >= dropout_p
            mask1 = None if x1 is None else torch.rand(x.shape, device=x.device) >= dropout_p
        total = _added(x, rowscale, x1, residual, dropout_p, mask, mask1, dtype)
        results = [_add_norm(total, None, weight, bias, eps, is_rms_norm, dtype)[0].to(x.dtype)]
        if weight1 is not None:
            y1 = _add_norm(total, None, weight1, bias1, eps, is_rms_norm, dtype)[0]
            results.append(y1.to(x.dtype))
        total = total.to(residual_dtype)
    if prenorm:
        results.append(total)
    if return_dropout_mask:
        results += [mask, mask1]
    return results[0] if len(results) == 1 else tuple(results)


def _added(x, rowscale, x1, residual, dropout_p, mask, mask1, dtype) -> Tensor:
    """The sum before the norm, in ``dtype``."""
    total = x.to(dtype)
    if rowscale is not None:
        total = total * rowscale.to(dtype)[..., None]
    if mask is not None:
        total = total.masked_fill(~mask, 0.0) / (1.0 - dropout_p)
    if x1 is not None:
        x1 = x1.to(dtype)
        total = total + (x1 if mask1 is None else x1.masked_fill(~mask1, 0.0) / (1.0 - dropout_p))
    return total if residual is None else total + residual.to(dtype)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """:func:`layer_norm_fn` with RMS norm: the mean is not subtracted."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        residual_in_fp32, True, return_dropout_mask,
    )  # fmt: skip


def rms_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6, is_rms_norm: bool = True
) -> Tensor:
    """The norm alone of rows x (m,d), in x's dtype; raises as layer_norm_fn does."""
    check_dim("x", x, (2,), "(rows, channels)")
    return layer_norm_fn(x, weight, bias, eps=eps, is_rms_norm=is_rms_norm)


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear map of the norm: linear_weight (e,d), linear_bias (e,); returns (..., e).

    The product is in the autocast dtype under autocast, else in x's. With ``prenorm`` the sum is
    returned as well. Raises as :func:`layer_norm_fn` does.
    """
    check_shape(
        "linear_weight", linear_weight, (linear_weight.shape[0], x.shape[-1]), "(out, channels)"
    )
    y, total = layer_norm_fn(
        x, norm_weight, norm_bias, residual, eps=eps, prenorm=True,
        residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm,
    )  # fmt: skip
    linear_bias = None if linear_bias is None else linear_bias.to(y.dtype)
    out = F.linear(y, linear_weight.to(y.dtype), linear_bias)
    return (out, total) if prenorm else out


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`layer_norm_fn` in plain differentiable torch, adding in the tensors' own dtypes.

    ``upcast`` adds in fp32 and returns the sum in it. ``dropout_mask``, ``dropout_mask1`` (bool,
    True is kept) take the place of random masks.
    """
    return _plain_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        dropout_mask, dropout_mask1, upcast, False,
    )  # fmt: skip


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`layer_norm_ref` with RMS norm."""
    return _plain_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        dropout_mask, dropout_mask1, upcast, True,
    )  # fmt: skip


def _dropped(x: Tensor, p: float, mask: Tensor | None) -> Tensor:
    if p == 0.0:
        return x
    return F.dropout(x, p) if mask is None else x.masked_fill(~mask, 0.0) / (1.0 - p)


def _plain_fn(
    x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
    dropout_mask, dropout_mask1, upcast, is_rms_norm,
):  # fmt: skip
    dtype, wide = x.dtype, accumulate_dtype(x, residual, x1)
    if upcast:
        x, residual, x1 = (t if t is None else t.to(wide) for t in (x, residual, x1))
    total = x if rowscale is None else x * rowscale[..., None].to(x.dtype)
    total = _dropped(total, dropout_p, dropout_mask)
    if x1 is not None:
        total = total + _dropped(x1, dropout_p, dropout_mask1)
    if residual is not None:
        total = total + residual
    results = [_norm(total.to(wide), weight, bias, eps, is_rms_norm).to(dtype)]
    if weight1 is not None:
        results.append(_norm(total.to(wide), weight1, bias1, eps, is_rms_norm).to(dtype))
    if prenorm:
        results.append(total)
    return results[0] if len(results) == 1 else tuple(results)


class RMSNorm(nn.Module):
    """RMS norm with a learned scale ``weight`` (hidden_size,), optionally adding a residual first.

    ``forward(x, residual, prenorm, residual_in_fp32)`` is :func:`rms_norm_fn`; while training, x is
    dropped out with probability ``dropout_p`` before it is added.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to ones."""
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x + residual, in x's dtype; with ``prenorm`` also the sum."""
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
