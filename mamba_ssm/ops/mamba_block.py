"""The whole Mamba mixer, in_proj included, as one autograd function (arXiv 2312.00752, figure 3).

What ``mamba_inner_fn`` computes of in_proj's result, for the layer as it is built: input-dependent
B and C without biases or norms, softplus, real A. Everything is a matrix of rows (b l, channels),
so that there are few steps between the products: in a small model the host's time is the cost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backend
from ._autograd import (
    differentiable_backward,
    needs_grad,
    run,
    transforms_active,
    wants_double_backward,
    without_autocast,
)
from ._checks import check_dtype, check_shape
from .chunking import chunk_size_for
from .dtypes import accumulate_dtype, kernel_dtype, no_wider_than
from .linear import linear
from .mamba_inner import _check_inner, _compose, _Options
from .mamba_inner_steps import SMALL_WEIGHT, Args, _weight_gradient


class BlockArgs(NamedTuple):
    """The tensor arguments of :func:`mamba_block`."""

    hidden: Tensor  # (b, l, m)
    in_proj: Tensor  # (2d, m)
    in_bias: Tensor | None
    conv_weight: Tensor  # (d, 1, w)
    conv_bias: Tensor | None
    x_proj: Tensor  # (r + 2n, d)
    dt_proj: Tensor  # (d, r)
    dt_bias: Tensor | None
    A_log: Tensor  # (d, n)
    D: Tensor
    out_proj: Tensor  # (e, d)
    out_bias: Tensor | None


def _wide(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.float64 else x.float()


class _Sizes(NamedTuple):
    """The sizes of a call, and views of matrices whose rows are (batch, step)."""

    b: int
    length: int
    d: int
    n: int
    rank: int

    def sequences(self, rows: Tensor, start: int = 0) -> Tensor:
        """Columns start … start + d of contiguous rows as (b, d, l)."""
        k = rows.shape[1]
        return rows.as_strided((self.b, self.d, self.length), (self.length * k, 1, k), start)

    def rows(self, sequences: Tensor) -> Tensor:
        """(b, d, l) as (b l, d); a view of a channel-last tensor."""
        return sequences.transpose(1, 2).reshape(self.b * self.length, self.d)

    def selected(self, x_dbl: Tensor, start: int) -> Tensor:
        """n columns of x_proj's result as (b, 1, n, l)."""
        k = x_dbl.shape[1]
        strides = (self.length * k, self.n, 1, k)
        return x_dbl.as_strided((self.b, 1, self.n, self.length), strides, start)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None and bias.dtype != weight.dtype:
        bias = bias.to(weight.dtype)
    return linear(rows, weight, bias)


def _convolve(s: _Sizes, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    op = backend.resolve("_causal_conv1d_fwd", x.device.type, kernel_dtype(x, weight, bias))
    return op(x, weight, bias, None, None, s.b, True)[0]


def _scan_inputs(s: _Sizes, conv: Tensor, xz: Tensor, x_dbl: Tensor, dt_proj: Tensor, small):
    """What forward and backward of the scan share; ``small`` is (A, D, delta_bias)."""
    delta = s.sequences(linear(x_dbl[:, : s.rank], dt_proj))
    B, C = s.selected(x_dbl, s.rank), s.selected(x_dbl, s.rank + s.n)
    A, D, bias = small
    return conv, delta, A, B, C, D, s.sequences(xz, s.d), bias, True, None, None, s.b


class MambaBlockFn(torch.autograd.Function):
    """Autograd of :func:`mamba_block`."""

    @staticmethod
    def forward(ctx, autocast, keep_states, in_one, *tensors):
        t = BlockArgs(*tensors)
        b, length, m = t.hidden.shape
        d, n = t.A_log.shape
        ctx.sizes = s = _Sizes(b, length, d, n, t.dt_proj.shape[1])
        ctx.autocast, ctx.in_one = autocast, in_one
        if in_one:
            return _forward_in_one(ctx, t, keep_states)
        device = t.hidden.device.type
        with without_autocast(device):
            rows = t.hidden.reshape(b * length, m)
            weights = (t.in_proj, t.x_proj, t.dt_proj, t.out_proj)
            if autocast is not None:
                rows = rows.to(autocast)
                weights = tuple(weight.to(autocast) for weight in weights)
            in_proj, x_proj, dt_proj, out_proj = weights
            xz = _linear(rows, in_proj, t.in_bias)
            conv = _convolve(s, s.sequences(xz), t.conv_weight.flatten(1), t.conv_bias)
            x_dbl = linear(s.rows(conv), x_proj)
            acc = accumulate_dtype(xz)
            A = torch.exp(t.A_log.to(acc)).neg_()
            small = A, no_wider_than(_wide(t.D), acc), no_wider_than(_wide(t.dt_bias), acc)
            op = backend.resolve("_selective_scan_fwd", device, xz.dtype)
            ctx.chunk_size = chunk_size_for(length, op, device, keep_states)
            y, _, states = op(
                *_scan_inputs(s, conv, xz, x_dbl, dt_proj, small),
                ctx.chunk_size,
            )
            y = s.rows(y)
            out = _linear(y, out_proj, t.out_bias)
        if keep_states:
            # Weights as they were used, where they are small: casting them again would cost time,
            # keeping a large one memory in every layer.
            used = [weight if weight.numel() <= SMALL_WEIGHT else None for weight in weights]
            ctx.save_for_backward(*tensors, rows, xz, x_dbl, A, y, states, *used)
        return out.view(b, length, out.shape[1])

    @staticmethod
    def backward(ctx, dout):
        saved = list(ctx.saved_tensors)
        tensors = saved[: len(BlockArgs._fields)]
        with without_autocast(dout.device.type):
            if wants_double_backward():
                grads = differentiable_backward(
                    lambda *t: _composed(ctx.autocast, BlockArgs(*t)), tensors, (dout,)
                )
            else:
                ctx.maybe_clear_saved_tensors()  # does nothing where the graph is kept
                found = (_backward_in_one if ctx.in_one else _backward)(ctx, saved, dout)
                grads = [
                    _matching(found.get(name), like) if want else None
                    for name, like, want in zip(
                        BlockArgs._fields, tensors, ctx.needs_input_grad[3:], strict=True
                    )
                ]
        return (None, None, None, *grads)


def _forward_in_one(ctx, t: BlockArgs, keep_states: bool) -> Tensor:
    """The forward as one call of the compiled kernels."""
    op = backend.resolve("_mamba_block_fwd", t.hidden.device.type, ctx.in_one)
    ctx.chunk_size = chunk_size_for(t.hidden.shape[1], op, t.hidden.device.type, keep_states)
    out, rows, *saved = op(
        t.hidden, t.in_proj, t.conv_weight, t.conv_bias, t.x_proj, t.dt_proj, t.dt_bias, t.A_log,
        t.D, t.out_proj, ctx.in_one, ctx.chunk_size,
    )  # fmt: skip
    if keep_states:
        saved, used, again = saved[:5], saved[6:10], saved[10:]
        rows = rows if rows.dim() == 2 else None  # None: hidden itself
        # Absent ones came in the dtype they were used in.
        used = [u if 0 < u.numel() <= SMALL_WEIGHT else None for u in used]
        again = again if _bytes(saved[0]) <= KEPT_BYTES else (None, None)
        ctx.save_for_backward(*t, rows, *saved, *used, *again)
    return out


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


# Bytes of xz up to which a backward gets delta and the convolution's output. Beyond, computing them
# again costs less than their memory; below, the host's time for that is the cost.
KEPT_BYTES = 1 << 20


# Bytes of xz up to which a backward is one call. Beyond, the host's time is hidden behind the
# kernels', and memory counts: what was used last is let go between the steps.
ONE_CALL_BYTES = 1 << 25


def _gradient_dtype(like: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In what a product of ``dtype`` gives the gradient of ``like``."""
    narrow = dtype in (torch.float16, torch.bfloat16) and like.dtype == torch.float32
    return torch.float32 if narrow else dtype


def _product(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    if _gradient_dtype(like, a.dtype) == a.dtype:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32)


def _backward_in_one(ctx, saved: list[Tensor | None], dout: Tensor) -> dict[str, Tensor]:
    """Gradients of BlockArgs by name. ``saved`` is emptied."""
    wanted = BlockArgs(*ctx.needs_input_grad[3:])
    t = BlockArgs(*saved[: len(BlockArgs._fields)])
    rows, xz, x_dbl, A, y, states, in_proj, x_proj, dt_proj, out_proj, *again = saved[len(t) :]
    saved.clear()
    dtype, d = xz.dtype, {}
    staged = _bytes(xz) > ONE_CALL_BYTES
    rows = t.hidden.view(xz.shape[0], -1) if rows is None else rows
    d_rows = dout.reshape(xz.shape[0], dout.shape[2])
    d_rows = d_rows if d_rows.dtype == dtype else d_rows.to(dtype)
    bits = 4 * wanted.x_proj + 8 * wanted.dt_proj
    if staged:
        bits += 32
        if wanted.out_proj:
            # Before any product: torch warns where a thread's first work on a GPU is one.
            torch.zeros((), device=xz.device)
            d["out_proj"] = _product(d_rows.t(), y, t.out_proj)
        y = None
    else:
        bits += wanted.hidden + 2 * wanted.in_proj + 16 * wanted.out_proj
        in_proj = t.in_proj.to(dtype) if in_proj is None else in_proj
    # A weight that was not kept is cast again, in_proj's after the peak of memory.
    x_proj = t.x_proj.to(dtype) if x_proj is None else x_proj
    dt_proj = t.dt_proj.to(dtype) if dt_proj is None else dt_proj
    out_proj = t.out_proj.to(dtype) if out_proj is None else out_proj
    op = backend.resolve("_mamba_block_bwd", xz.device.type, dtype)
    (
        d["hidden"], d["in_proj"], d["conv_weight"], d["conv_bias"], d["x_proj"], d["dt_proj"],
        d["dt_bias"], d["A_log"], d["D"], d_out, dxz,
    ) = op(
        d_rows, y, out_proj, rows, xz, x_dbl, *again, A, states, in_proj, t.conv_weight,
        t.conv_bias, x_proj, dt_proj, t.dt_bias, t.D,
        t.hidden.dtype, _gradient_dtype(t.in_proj, dtype),
        _gradient_dtype(t.x_proj, dtype), _gradient_dtype(t.dt_proj, dtype),
        _gradient_dtype(t.out_proj, dtype), bits, ctx.chunk_size,
    )  # fmt: skip
    if not staged:
        d["out_proj"] = d_out
        return d
    del d_rows, out_proj, xz, x_dbl, A, states, x_proj, dt_proj
    if wanted.in_proj:
        d["in_proj"] = _product(dxz.t(), rows, t.in_proj)
    if wanted.hidden:
        in_proj = t.in_proj.to(dtype) if in_proj is None else in_proj
        d["hidden"] = _product(dxz, in_proj, t.hidden)
    return d


def _matching(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    if grad is None or like is None:
        return None
    grad = grad if grad.dtype == like.dtype else grad.to(like.dtype)
    # Equal dimensions mean equal shapes here, and are found out in a tenth of the time.
    return grad if grad.dim() == like.dim() else grad.view(like.shape)


def _backward(ctx, saved: list[Tensor | None], dout: Tensor) -> dict[str, Tensor | None]:
    """Gradients of BlockArgs by name. ``saved`` is emptied: what is large goes after its use."""
    s, wanted = ctx.sizes, BlockArgs(*ctx.needs_input_grad[3:])
    t = BlockArgs(*saved[: len(BlockArgs._fields)])
    rows, xz, x_dbl, A, y, states, *used = saved[len(BlockArgs._fields) :]
    saved.clear()
    rows = t.hidden.view(s.b * s.length, -1) if rows is None else rows
    in_proj, x_proj, dt_proj, out_proj = (
        weight.to(xz.dtype) if kept is None else kept
        for weight, kept in zip((t.in_proj, t.x_proj, t.dt_proj, t.out_proj), used, strict=True)
    )
    del used
    # Before any product: torch warns where a thread's first work on a GPU is a matrix product.
    conv = _convolve(s, s.sequences(xz), t.conv_weight.flatten(1), t.conv_bias)
    d_rows = dout.reshape(s.b * s.length, dout.shape[2])
    d_rows = d_rows if d_rows.dtype == xz.dtype else d_rows.to(xz.dtype)
    d = dict.fromkeys(BlockArgs._fields)
    if wanted.out_proj:
        d["out_proj"] = _weight_gradient(d_rows, y, t.out_proj)
    if wanted.out_bias:
        d["out_bias"] = d_rows.sum(dim=0, dtype=accumulate_dtype(dout))
    rest = [d_rows, out_proj, conv, rows, xz, x_dbl, A, states, in_proj, x_proj, dt_proj]
    del y, d_rows, out_proj, conv, rows, xz, x_dbl, A, states, in_proj, x_proj, dt_proj
    _backward_by_op(ctx, t, wanted, rest, d)
    return d


def _backward_by_op(ctx, t: BlockArgs, wanted: BlockArgs, rest: list, d: dict) -> None:
    """Fills ``d`` with what is left after out_proj's gradients. ``rest`` is emptied."""
    s = ctx.sizes
    d_rows, out_proj, conv, rows, xz, x_dbl, A, states, in_proj, x_proj, dt_proj = rest
    rest.clear()
    x, conv_weight = s.sequences(xz), t.conv_weight.flatten(1)
    dy = s.sequences(torch.mm(d_rows, out_proj))
    del d_rows, out_proj
    acc = accumulate_dtype(xz)
    small = A, no_wider_than(_wide(t.D), acc), no_wider_than(_wide(t.dt_bias), acc)
    op = backend.resolve("_selective_scan_bwd", xz.device.type, xz.dtype)
    inputs = _scan_inputs(s, conv, xz, x_dbl, dt_proj, small)
    du, ddelta, dA, dB, dC, d["D"], dz, d["dt_bias"], _ = op(
        dy, None, *inputs, ctx.chunk_size, states
    )
    del dy, states, inputs
    d["A_log"] = dA.mul_(A)
    ddelta = s.rows(ddelta)
    if wanted.dt_proj:
        d["dt_proj"] = _weight_gradient(ddelta, x_dbl[:, : s.rank], t.dt_proj)
    parts = [torch.mm(ddelta, dt_proj).view(s.b, s.length, s.rank)]
    parts += [dB.squeeze(1).transpose(1, 2), dC.squeeze(1).transpose(1, 2)]
    dx_dbl = torch.cat(parts, dim=2).view(s.b * s.length, s.rank + 2 * s.n)
    del parts, dB, dC
    del ddelta, x_dbl
    if wanted.x_proj:
        d["x_proj"] = _weight_gradient(dx_dbl, s.rows(conv), t.x_proj)
    del conv
    d_conv = s.rows(du).addmm_(dx_dbl, x_proj)
    del du, dx_dbl

    op = backend.resolve(
        "_causal_conv1d_bwd", xz.device.type, kernel_dtype(xz, conv_weight, t.conv_bias)
    )
    dx, d["conv_weight"], d["conv_bias"], _ = op(
        s.sequences(d_conv), None, x, conv_weight, t.conv_bias, None, None, s.b, True
    )
    del d_conv, x, xz
    dxz = torch.cat([s.rows(dx), s.rows(dz)], dim=1)
    del dx, dz
    if wanted.in_proj:
        d["in_proj"] = _weight_gradient(dxz, rows, t.in_proj)
    if wanted.in_bias:
        d["in_bias"] = dxz.sum(dim=0, dtype=acc)
    if wanted.hidden:
        d["hidden"] = torch.mm(dxz, in_proj)


def _inner_args(t: BlockArgs, xz: Tensor, A: Tensor) -> Args:
    return Args(
        xz, t.conv_weight, t.conv_bias, t.x_proj, t.dt_proj, t.out_proj, t.out_bias,
        A, None, None, _wide(t.D), _wide(t.dt_bias),
        None, None, None, None, None,
    )  # fmt: skip


def _composed(autocast: torch.dtype | None, t: BlockArgs) -> Tensor:
    """The block in plain differentiable torch, for second derivatives."""
    dtype = autocast or t.in_proj.dtype
    xz = _linear(t.hidden.to(dtype), t.in_proj.to(dtype), t.in_bias).transpose(1, 2)
    options = _Options(delta_softplus=True, eps=1e-6, autocast_dtype=autocast)
    return _compose(options, *_inner_args(t, xz, -torch.exp(_wide(t.A_log))))


# Shapes, dtypes and devices that were found to belong together: a layer is checked once.
_checked: set[tuple] = set()
_MOST_CHECKED = 1024


def _check(t: BlockArgs) -> None:
    key = tuple([None if x is None else (x.shape, x.dtype, x.device) for x in t[1:]])
    hidden, width = t.hidden, t.hidden.shape[-1:]
    autocast = torch.is_autocast_enabled(hidden.device.type)
    key = (key, hidden.dim(), width, hidden.dtype, hidden.device, autocast)
    if key in _checked:
        return
    if hidden.dim() != 3 or t.in_proj.dim() != 2 or width != t.in_proj.shape[1:]:
        raise ValueError(
            f"hidden must have shape (b, l, m) and in_proj (2d, m), but they have "
            f"{tuple(hidden.shape)} and {tuple(t.in_proj.shape)}"
        )
    check_shape("in_bias", t.in_bias, t.in_proj.shape[:1], "(2d,)")
    for name in ("hidden", "in_proj", "in_bias"):
        check_dtype(name, getattr(t, name))
    if not autocast and hidden.dtype != t.in_proj.dtype:
        raise TypeError(
            f"hidden and in_proj must have one dtype outside autocast, but have {hidden.dtype} and "
            f"{t.in_proj.dtype}"
        )
    xz = hidden.new_empty((1, t.in_proj.shape[0], 0), dtype=t.in_proj.dtype)
    with torch.no_grad():  # a recomputed forward must save what the first one saved
        _check_inner(_inner_args(t, xz, _wide(t.A_log)), 1)
    if len(_checked) >= _MOST_CHECKED:
        _checked.clear()
    _checked.add(key)


def _dtype_in_one(t: BlockArgs, autocast: torch.dtype | None) -> torch.dtype | None:
    """The dtype of the projections where one call of the compiled kernels serves, else None."""
    dtype = autocast or t.in_proj.dtype
    if not backend.runs_native("_mamba_block_fwd", t.hidden.device.type, dtype):
        return None
    if t.in_bias is not None or t.out_bias is not None or t.hidden.numel() == 0:
        return None
    return None if accumulate_dtype(*t) == torch.float64 else dtype


# Device types whose results the tests have compared; mamba_inner_fn serves the others.
DEVICES = {"cpu", "cuda"}


def block_applies(hidden: Tensor) -> bool:
    """Whether :func:`mamba_block` serves this call: it is neither traced nor transformed."""
    return (
        type(hidden) is Tensor
        and hidden.device.type in DEVICES
        and not torch.compiler.is_compiling()
        and not transforms_active()
    )


def mamba_block(
    hidden: Tensor,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    out_bias: Tensor | None,
) -> Tensor:
    """The Mamba mixer of hidden (b, l, m): (b, l, e), in the projections' (or autocast's) dtype.

    Source: arXiv 2312.00752, section 3.4 and figure 3. Shapes: see :class:`BlockArgs`; A is
    ``-exp(A_log)``. Not for graphs of torch.compile, nor for torch.func's transforms.

    Raises ValueError and TypeError as :func:`mamba_inner_fn` does.
    """
    t = BlockArgs(
        hidden, in_proj, in_bias, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D,
        out_proj, out_bias,
    )  # fmt: skip
    _check(t)
    device = hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return run(MambaBlockFn, autocast, needs_grad(*t), _dtype_in_one(t, autocast), *t)


def mamba_block_with_state(*args: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """:func:`mamba_block` for prefill: (out, the convolution's input (b, d, l), state (b, d, n)).

    None where one call of the compiled kernels does not serve, or where autograd records.
    """
    t = BlockArgs(*args)
    device = t.hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    dtype = _dtype_in_one(t, autocast)
    if dtype is None or not block_applies(t.hidden) or needs_grad(*t):
        return None
    _check(t)
    op = backend.resolve("_mamba_block_fwd", device, dtype)
    out, _, xz, _, _, _, _, state, *_ = op(
        t.hidden, t.in_proj, t.conv_weight, t.conv_bias, t.x_proj, t.dt_proj, t.dt_bias,
        t.A_log, t.D, t.out_proj, dtype, chunk_size_for(t.hidden.shape[1], op, device, False),
    )  # fmt: skip
    d, n = t.A_log.shape
    sizes = _Sizes(*t.hidden.shape[:2], d, n, t.dt_proj.shape[1])
    return out, sizes.sequences(xz), state
