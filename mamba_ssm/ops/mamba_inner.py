"""The fused Mamba block from in_proj to its output (arXiv 2312.00752, figure 3, section 3.4).

``mamba_inner_fn`` runs convolution, projections, scan, gate and out_proj as one autograd function,
so that it decides what is kept for the backward: with ``checkpoint_lvl=1`` the convolution's output
and delta are recomputed (as in section 3.3.2 for the states).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from ._autograd import (
    differentiable_backward,
    needs_grad,
    run,
    transformed,
    wants_double_backward,
    without_autocast,
)
from ._checks import check_device, check_dtype, check_shape
from .causal_conv1d import causal_conv1d_ref
from .chunking import chunk_size_for
from .client_layers import check_calling_mixer
from .dtypes import accumulate_dtype
from .linear import linear
from .mamba_inner_steps import (
    SMALL_WEIGHT,
    Args,
    convolve,
    flat_conv,
    inner_backward,
    project,
    scan_arguments,
)
from .reference.scan_oracle import selective_scan_sequential
from .scan_checks import check_projection_shape


class _Options(NamedTuple):
    """What is not a tensor; the autograd context carries the same names."""

    delta_softplus: bool
    eps: float
    autocast_dtype: torch.dtype | None


def _autocast(args: Args, dtype: torch.dtype | None) -> Args:
    """The projections in the autocast dtype; everything else keeps its own."""
    if dtype is None:
        return args
    return args._replace(
        x_proj=args.x_proj.to(dtype),
        delta_proj=args.delta_proj.to(dtype),
        out_proj=args.out_proj.to(dtype),
    )


def _out_projection(y: Tensor, args: Args) -> Tensor:
    # A client keeps the bias in fp32 beside 16-bit weights; not every device mixes them.
    bias = None if args.out_bias is None else args.out_bias.to(args.out_proj.dtype)
    return linear(y.transpose(1, 2), args.out_proj, bias)


class MambaInnerFn(torch.autograd.Function):
    """Autograd of the fused block. ``apply`` takes mamba_inner_fn's positional arguments."""

    @staticmethod
    def forward(
        ctx,
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        B=None,
        C=None,
        D=None,
        delta_bias=None,
        B_proj_bias=None,
        C_proj_bias=None,
        delta_softplus=True,
        checkpoint_lvl=1,
        b_rms_weight=None,
        c_rms_weight=None,
        dt_rms_weight=None,
        b_c_dt_rms_eps=1e-6,
        keep_states=True,
    ):
        tensors = (
            xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
            out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, b_rms_weight,
            c_rms_weight, dt_rms_weight,
        )  # fmt: skip
        device = xz.device.type
        ctx.delta_softplus, ctx.eps, ctx.autocast_dtype = delta_softplus, b_c_dt_rms_eps, None
        if torch.is_autocast_enabled(device):
            ctx.autocast_dtype = torch.get_autocast_dtype(device)
        with without_autocast(device):
            if A.is_complex():
                backend.only_reference("a block with complex A")
                ctx.save_for_backward(*tensors, *(None,) * 8)
                return _compose(ctx, *tensors)
            args = _autocast(flat_conv(Args(*tensors)), ctx.autocast_dtype)
            conv_out = convolve(args)
            x_dbl = linear(conv_out.transpose(1, 2).to(args.x_proj.dtype), args.x_proj)
            p = project(args, x_dbl, None, ctx.eps)
            op = backend.resolve("_selective_scan_fwd", device, p.delta.dtype)
            ctx.chunk_size = chunk_size_for(xz.shape[2], op, xz.device.type, keep_states)
            y, _, states = op(*scan_arguments(ctx, args, conv_out, p))
            out = _out_projection(y, args)
        kept = (conv_out, p.raw[0]) if checkpoint_lvl == 0 else (None, None)
        # The projections as they were used, if they are small: casting them again would cost time,
        # keeping a large one memory in every layer.
        used = (args.x_proj, args.delta_proj, args.out_proj)
        used = [weight if weight.numel() <= SMALL_WEIGHT else None for weight in used]
        ctx.save_for_backward(*tensors, y, states, x_dbl, *kept, *used)
        return out

    @staticmethod
    def backward(ctx, dout):
        saved = list(ctx.saved_tensors)
        tensors = saved[: len(Args._fields)]
        if torch.compiler.is_compiling():
            # Where a backward first asks for strides, the tracer starts it again, without leaving
            # the contexts that it stands in: so this is asked outside them.
            dout.stride()
        with without_autocast(dout.device.type):
            if saved[len(tensors)] is None or wants_double_backward():
                grads = differentiable_backward(lambda *t: _compose(ctx, *t), tensors, (dout,))
            else:
                if not torch.compiler.is_compiling():
                    ctx.maybe_clear_saved_tensors()  # does nothing where the graph is kept
                grads = [
                    None if g is None or t is None else g.to(t.dtype).reshape(t.shape)
                    for g, t in zip(inner_backward(ctx, saved, dout), tensors, strict=True)
                ]
        return (*grads[:14], None, None, *grads[14:], None, None)


def _rms_plain(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    acc = x.to(accumulate_dtype(x))
    return (acc * torch.rsqrt(acc.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _compose(ctx, *tensors: Tensor | None) -> Tensor:
    """The block in plain differentiable torch, for complex A and for second derivatives."""
    args = _autocast(flat_conv(Args(*tensors)), ctx.autocast_dtype)
    x, z = args.xz.chunk(2, dim=1)
    conv_out = causal_conv1d_ref(x, args.conv_weight, args.conv_bias, activation="silu")
    x_dbl = F.linear(conv_out.transpose(1, 2).to(args.x_proj.dtype), args.x_proj)
    rank = args.delta_proj.shape[1]
    n = args.A.shape[1] * (2 if args.A.is_complex() else 1)
    delta = F.linear(x_dbl[..., :rank], args.delta_proj)
    delta = _rms_plain(delta, args.dt_rms, ctx.eps).transpose(1, 2)
    offset, values = rank, []
    for given, bias, weight in (
        (args.B, args.B_bias, args.b_rms),
        (args.C, args.C_bias, args.c_rms),
    ):
        if given is not None:
            values.append(given)
            continue
        rows = x_dbl[..., offset : offset + n]
        offset += n
        rows = rows if bias is None else rows + bias.to(rows.dtype)
        rows = _rms_plain(rows, weight, ctx.eps)
        if args.A.is_complex():
            # (b, l, 2n) holds (re, im) pairs; the scan wants (b, 1, n, 2l).
            rows = rows.unflatten(-1, (-1, 2)).permute(0, 2, 1, 3).flatten(2)
            values.append(rows.unsqueeze(1))
        else:
            values.append(rows.transpose(1, 2).unsqueeze(1))
    y, _ = selective_scan_sequential(
        conv_out.to(delta.dtype), delta, args.A, *values, args.D, z.to(delta.dtype),
        args.delta_bias, ctx.delta_softplus,
    )  # fmt: skip
    return _out_projection(y, args)


def _composed(tensors: tuple, delta_softplus: bool, eps: float) -> Tensor:
    """:func:`_compose` outside the autograd function, which looks at autocast itself."""
    device = tensors[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with torch.autocast(device, enabled=False):
        return _compose(_Options(delta_softplus, eps, autocast), *tensors)


# The public names of the arguments, in the order of Args.
_NAMES = (
    "xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight", "out_proj_weight",
    "out_proj_bias", "A", "B", "C", "D", "delta_bias", "B_proj_bias", "C_proj_bias", "b_rms_weight",
    "c_rms_weight", "dt_rms_weight",
)  # fmt: skip


def _check_inner(args: Args, checkpoint_lvl: int) -> None:
    """Shapes, dtypes and devices that do not belong together, named before anything runs."""
    given = dict(zip(_NAMES, args, strict=True))
    if args.xz.dim() != 3 or args.xz.shape[1] % 2:
        raise ValueError(f"xz must have shape (b, 2 d, l), but has {tuple(args.xz.shape)}")
    b, d, length = args.xz.shape[0], args.xz.shape[1] // 2, args.xz.shape[2]
    if args.A.dim() != 2 or args.A.shape[0] != d:
        raise ValueError(f"A must have shape (d, n) = ({d}, n), but has {tuple(args.A.shape)}")
    w = args.conv_weight.shape[-1] if args.conv_weight.dim() else 0
    if tuple(args.conv_weight.shape) not in ((d, w), (d, 1, w)):
        found = tuple(args.conv_weight.shape)
        raise ValueError(f"conv1d_weight must have shape (d, w) = ({d}, w), but has {found}")
    if args.delta_proj.dim() != 2 or args.delta_proj.shape[0] != d:
        found = tuple(args.delta_proj.shape)
        raise ValueError(f"delta_proj_weight must have shape (d, r) = ({d}, r), but has {found}")
    n = args.A.shape[1] * (2 if args.A.is_complex() else 1)
    rows = args.delta_proj.shape[1] + n * ((args.B is None) + (args.C is None))
    if tuple(args.x_proj.shape) != (rows, d):
        found = tuple(args.x_proj.shape)
        raise ValueError(
            f"x_proj_weight must have shape (r + n k, d) = {(rows, d)}, but has {found}"
        )
    if args.out_proj.dim() != 2 or args.out_proj.shape[1] != d:
        found = tuple(args.out_proj.shape)
        raise ValueError(f"out_proj_weight must have shape (e, d) = (e, {d}), but has {found}")
    for names, axis, size in (
        (("conv1d_bias", "D", "delta_bias", "dt_rms_weight"), "d", d),
        (("B_proj_bias", "C_proj_bias", "b_rms_weight", "c_rms_weight"), "n", n),
        (("out_proj_bias",), "e", args.out_proj.shape[0]),
    ):
        for name in names:
            check_shape(name, given[name], (size,), f"({axis},)")
    for name in ("B", "C"):
        if given[name] is not None:
            check_projection_shape(name, given[name], args.A, (b, d, length))
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl must be 0 or 1, but is {checkpoint_lvl!r}")
    for name, value in given.items():
        check_device(name, value, args.xz.device, "xz")
        complex_too = name in ("A", "B", "C") and value is not None and value.is_complex()
        if not complex_too:
            check_dtype(name, value)
    dtypes = {name: given[name].dtype for name in _NAMES[3:6]}
    if len(set(dtypes.values())) > 1 and not torch.is_autocast_enabled(args.xz.device.type):
        found = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"the projections must have one dtype outside autocast, but have: {found}")


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """The Mamba block from xz (what in_proj gives) to its output, as one autograd function.

    Source: arXiv 2312.00752, section 3.4 and figure 3.

    Args:
        xz: (b, 2 d, l), the rows of x before those of z; any strides.
        conv1d_weight: (d, w) or nn.Conv1d's (d, 1, w); conv1d_bias: (d,).
        x_proj_weight: (r + n k, d), rows [delta; B; C], k how many of B and C are variable; complex
            A doubles n. delta_proj_weight: (d, r). out_proj_weight: (e, d); out_proj_bias: (e,).
        A: (d, n) fp32 or complex64. B, C: None (input-dependent) or as in selective_scan_fn.
        D, delta_bias: (d,) fp32. B_proj_bias, C_proj_bias: added to B and C.
        b_rms_weight, c_rms_weight, dt_rms_weight: (n,), (n,), (d,): RMS norms of B, C and the
            projected delta, with ``b_c_dt_rms_eps``.
        checkpoint_lvl: 1 recomputes the convolution's output and delta in the backward, 0 keeps
            them.

    Returns:
        (b, l, e), in the projections' dtype; under autocast that is the autocast dtype.

    Raises:
        ValueError: shapes or devices that do not belong together.
        TypeError: dtypes that do not.
        RuntimeError: the weights are those of a client's replaced layers (an adapter, say), which
            would be left out.
    """
    if not torch.compiler.is_compiling():
        check_calling_mixer()
    tensors = (
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
        out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight,
        dt_rms_weight,
    )  # fmt: skip
    _check_inner(Args(*tensors), checkpoint_lvl)
    if transformed("a Mamba block"):
        return _composed(tensors, delta_softplus, b_c_dt_rms_eps)
    return run(
        MambaInnerFn,
        *tensors[:14],
        delta_softplus,
        checkpoint_lvl,
        *tensors[14:],
        b_c_dt_rms_eps,
        needs_grad(*tensors),
    )


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """:func:`mamba_inner_fn` in plain differentiable torch, step after step: the oracle."""
    tensors = (
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
        out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, None, None, None,
    )  # fmt: skip
    _check_inner(Args(*tensors), checkpoint_lvl=1)
    return _composed(tensors, delta_softplus, 0.0)
