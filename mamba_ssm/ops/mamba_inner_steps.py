"""The steps of the fused Mamba block, and its backward (see mamba_inner.py)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend
from .dtypes import accumulate_dtype, kernel_dtype, no_wider_than
from .layout import is_channel_last
from .linear import linear
from .scan_groups import same_groups, sum_groups

# Elements. Beyond, a copy in another dtype is not kept through the backward.
SMALL_WEIGHT = 1 << 22

# Whether a product of 16-bit matrices can be had in fp32 (torch >= 2.8).
MM_WITH_DTYPE = "dtype" in torch.ops.aten.mm.overloads()


class Args(NamedTuple):
    """The tensor arguments, in the order of ``mamba_inner_fn``."""

    xz: Tensor  # (b, 2d, l)
    conv_weight: Tensor  # (d, w)
    conv_bias: Tensor | None
    x_proj: Tensor  # (r + n k, d)
    delta_proj: Tensor  # (d, r)
    out_proj: Tensor  # (e, d)
    out_bias: Tensor | None
    A: Tensor  # (d, n)
    B: Tensor | None
    C: Tensor | None
    D: Tensor | None
    delta_bias: Tensor | None
    B_bias: Tensor | None
    C_bias: Tensor | None
    b_rms: Tensor | None
    c_rms: Tensor | None
    dt_rms: Tensor | None


class Projected(NamedTuple):
    """What x_proj makes of the convolution's output, before and after the optional norms."""

    raw: tuple[Tensor | None, Tensor | None, Tensor | None]  # delta, B, C as rows before their norm
    delta: Tensor  # (b, d, l)
    B: Tensor  # (b, 1, n, l) or (d, n)
    C: Tensor


def flat_conv(args: Args) -> Args:
    """The convolution's weight as (d, w), also when it came as nn.Conv1d's (d, 1, w)."""
    return args._replace(conv_weight=args.conv_weight.flatten(1))


def _rms_rows(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x (b, l, m) normalised over m, if there is a weight."""
    if weight is None:
        return x
    op = backend.resolve("_add_norm_fwd", x.device.type, kernel_dtype(x, weight))
    return op(x.flatten(0, 1), None, weight, None, eps, True, None)[0].view(x.shape)


def _rms_rows_backward(dy: Tensor, x: Tensor | None, weight: Tensor | None, eps: float):
    """(dx, dweight) of :func:`_rms_rows`."""
    if weight is None:
        return dy, None
    rows = x.flatten(0, 1)
    rstd = torch.rsqrt(rows.to(accumulate_dtype(x)).square().mean(dim=1) + eps)
    op = backend.resolve("_add_norm_bwd", x.device.type, kernel_dtype(x, weight))
    dx, _, dweight, _ = op(
        dy.flatten(0, 1), None, rows, None, weight, None, rstd.new_empty((0,)), rstd, True,
        x.dtype, None,
    )  # fmt: skip
    return dx.view(x.shape), dweight


def project(args: Args, x_dbl: Tensor, delta_raw: Tensor | None, eps: float) -> Projected:
    """delta, B and C out of x_proj's result x_dbl (b, l, r + n k)."""
    rank, n = args.delta_proj.shape[1], args.A.shape[1]
    if delta_raw is None:
        delta_raw = linear(x_dbl[..., :rank], args.delta_proj)
    delta = _rms_rows(delta_raw, args.dt_rms, eps).transpose(1, 2)
    offset, values, raws = rank, [], []
    for given, bias, weight in (
        (args.B, args.B_bias, args.b_rms),
        (args.C, args.C_bias, args.c_rms),
    ):
        if given is not None:
            values.append(given if given.dim() == 2 else given.to(delta.dtype))
            raws.append(None)
            continue
        raw = x_dbl[..., offset : offset + n]
        offset += n
        if bias is not None:
            raw = raw + bias.to(raw.dtype)
        raws.append(raw)
        values.append(_rms_rows(raw, weight, eps).transpose(1, 2).unsqueeze(1))
    return Projected((delta_raw, *raws), delta, *values)


def convolve(args: Args) -> Tensor:
    """The convolution's output (b, d, l), silu included."""
    x = args.xz.chunk(2, dim=1)[0]
    dtype = kernel_dtype(x, args.conv_weight, args.conv_bias)
    op = backend.resolve("_causal_conv1d_fwd", x.device.type, dtype)
    return op(x, args.conv_weight, args.conv_bias, None, None, x.shape[0], True)[0]


def scan_arguments(ctx: Any, args: Args, conv_out: Tensor, p: Projected) -> tuple:
    """What forward and backward of the scan share; u and z in delta's dtype, the projections'."""
    dtype = p.delta.dtype
    acc = accumulate_dtype(p.delta)
    D, delta_bias = no_wider_than(args.D, acc), no_wider_than(args.delta_bias, acc)
    z = args.xz.chunk(2, dim=1)[1].to(dtype)
    return (
        conv_out.to(dtype), p.delta, args.A.to(acc), *same_groups(p.B, p.C), D, z, delta_bias,
        ctx.delta_softplus, None, None, conv_out.shape[0], ctx.chunk_size,
    )  # fmt: skip


def _cat_channels(x: Tensor, z: Tensor, like: Tensor) -> Tensor:
    """[x; z] along the channels, in the memory layout of ``like``."""
    if is_channel_last(like):
        return torch.cat([x.transpose(1, 2), z.transpose(1, 2)], dim=2).transpose(1, 2)
    return torch.cat([x, z], dim=1)


def gradient_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In what a product of ``dtype`` gives a weight's gradient: fp32 at once where the weight is.

    Not of a large weight: its gradient is made before the backward's peak of memory.
    """
    narrow = dtype in (torch.float16, torch.bfloat16) and weight.dtype == torch.float32
    return torch.float32 if narrow and weight.numel() <= SMALL_WEIGHT else dtype


def _weight_gradient(dy: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """dy^T x of rows (m, o) and (m, i), in :func:`gradient_dtype` where torch can."""
    narrow = gradient_dtype(like, dy.dtype) != dy.dtype
    if narrow and dy.is_cuda and MM_WITH_DTYPE and not torch.compiler.is_compiling():
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return dy.t() @ x


def _projections_backward(
    ctx, args: Args, weight_like: Tensor, p: Projected, x_dbl, ddelta, dB, dC
) -> tuple:
    """(dx_dbl (b l, r + n k), d delta_proj, (dB_bias, dC_bias), (d b_rms, d c_rms), d dt_rms)."""
    rank = args.delta_proj.shape[1]
    d_delta, d_dt_rms = _rms_rows_backward(ddelta.transpose(1, 2), p.raw[0], args.dt_rms, ctx.eps)
    d_rows = d_delta.flatten(0, 1)
    d_delta_proj = None
    if ctx.needs_input_grad[4]:
        d_delta_proj = _weight_gradient(d_rows, x_dbl[..., :rank].flatten(0, 1), weight_like)
    biases, norms = [None, None], [None, None]
    parts = [(d_rows @ args.delta_proj).view(*x_dbl.shape[:2], rank)]
    for i, (grad, bias, weight) in enumerate(
        ((dB, args.B_bias, args.b_rms), (dC, args.C_bias, args.c_rms))
    ):
        raw = p.raw[1 + i]
        if raw is None:
            continue
        d_raw, norms[i] = _rms_rows_backward(grad.squeeze(1).transpose(1, 2), raw, weight, ctx.eps)
        if bias is not None:
            biases[i] = d_raw.sum(dim=(0, 1), dtype=accumulate_dtype(d_raw))
        parts.append(d_raw)
    return torch.cat(parts, dim=-1).flatten(0, 1), d_delta_proj, biases, norms, d_dt_rms


def _add_product(du: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """du (b, d, l), which is overwritten, + (rows (b l, k) @ weight (k, d)) in its layout."""
    if is_channel_last(du):
        du.transpose(1, 2).flatten(0, 1).addmm_(rows, weight)
        return du
    return du + (rows @ weight).unflatten(0, (du.shape[0], du.shape[2])).transpose(1, 2)


def inner_backward(ctx: Any, saved: list[Tensor | None], dout: Tensor) -> tuple:
    """Gradients of every tensor of ``Args``, in its order, in whatever dtype they come.

    ``saved`` is emptied, and every large tensor is let go after its last use: the peak of memory
    lies in here.
    """
    *tensors, y, states, x_dbl, conv_out, delta_raw, x_proj, delta_proj, out_proj = saved
    saved.clear()
    given = Args(*tensors)
    # Those that were too large to keep are cast again.
    x_proj, delta_proj, out_proj = (
        weight.to(ctx.autocast_dtype or weight.dtype) if used is None else used
        for weight, used in zip(given[3:6], (x_proj, delta_proj, out_proj), strict=True)
    )
    args = flat_conv(given)._replace(x_proj=x_proj, delta_proj=delta_proj)
    x = args.xz.chunk(2, dim=1)[0]
    b, _, length = x.shape
    # Before any product: torch warns where a thread's first work on a GPU is a matrix product.
    conv_out = convolve(args) if conv_out is None else conv_out
    rows_out = dout.to(out_proj.dtype).flatten(0, 1)
    d_out_proj = d_out_bias = d_x_proj = None
    if ctx.needs_input_grad[5]:
        d_out_proj = _weight_gradient(rows_out, y.transpose(1, 2).flatten(0, 1), given.out_proj)
    if args.out_bias is not None:
        d_out_bias = rows_out.sum(dim=0, dtype=accumulate_dtype(dout))
    del y
    dy = (rows_out @ out_proj).unflatten(0, (b, length)).transpose(1, 2)
    del out_proj

    p = project(args, x_dbl, delta_raw, ctx.eps)
    op = backend.resolve("_selective_scan_bwd", x.device.type, p.delta.dtype)
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, _ = op(
        dy, None, *scan_arguments(ctx, args, conv_out, p), states
    )
    del dy, states
    dB, dC = sum_groups(dB, p.B), sum_groups(dC, p.C)
    dx_dbl, d_delta_proj, biases, norms, d_dt_rms = _projections_backward(
        ctx, args, given.delta_proj, p, x_dbl, ddelta, dB, dC
    )
    p = p._replace(raw=(), delta=None)
    del ddelta, delta_raw
    if ctx.needs_input_grad[3]:
        rows_conv = conv_out.transpose(1, 2).flatten(0, 1).to(dx_dbl.dtype)
        d_x_proj = _weight_gradient(dx_dbl, rows_conv, given.x_proj)
        del rows_conv
    del conv_out
    d_conv_out = _add_product(du, dx_dbl, x_proj).to(x.dtype)
    del du

    op = backend.resolve(
        "_causal_conv1d_bwd", x.device.type, kernel_dtype(x, args.conv_weight, args.conv_bias)
    )
    dx, d_conv_weight, d_conv_bias, _ = op(
        d_conv_out, None, x, args.conv_weight, args.conv_bias, None, None, b, True
    )
    del d_conv_out
    dB = dB if args.B is not None else None
    dC = dC if args.C is not None else None
    return (
        _cat_channels(dx, dz.to(dx.dtype), args.xz), d_conv_weight, d_conv_bias, d_x_proj,
        d_delta_proj, d_out_proj, d_out_bias, dA, dB, dC, dD, ddelta_bias, *biases, *norms,
        d_dt_rms,
    )  # fmt: skip
