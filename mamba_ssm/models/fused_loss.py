"""Cross-entropy of a linear layer's logits, with its gradients in the same pass over the logits.

A chunk of logits becomes its own gradient while it is at hand: one product for the logits, one for
each gradient, and nothing of the size of the logits is kept or computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_ssm.ops import backend
from mamba_ssm.ops._autograd import (
    differentiable_backward,
    transforms_active,
    wants_double_backward,
    without_autocast,
)
from mamba_ssm.ops.client_layers import is_plain
from mamba_ssm.ops.mamba_inner_steps import MM_WITH_DTYPE


@cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of 16-bit matrices to an fp32 one in one step.

    Some versions (2.8 and later, on CUDA) do, others refuse before anything is computed.
    """
    if "dtype_out" not in torch.ops.aten.addmm.overloads():
        return False
    to = torch.ones(8, 8, device=device)
    ones = torch.ones(8, 8, device=device, dtype=dtype)
    try:
        torch.addmm(to, ones, ones, out_dtype=torch.float32, out=to)
    except (RuntimeError, NotImplementedError):
        return False
    return True


# Device types whose results the tests have compared; elsewhere the logits are computed twice.
DEVICES = {"cpu", "cuda"}


def fused_loss_applies(project: Callable, hidden: Tensor) -> bool:
    """Whether :func:`linear_cross_entropy` computes what ``project`` and F.cross_entropy would."""
    return (
        is_plain_linear(project)
        and type(hidden) is Tensor
        and hidden.device.type in DEVICES
        and hidden.dtype != torch.float64
        and project.weight.dtype != torch.float64
        and not torch.compiler.is_compiling()
        and not transforms_active()
    )


def is_plain_linear(project: Callable) -> bool:
    """Whether calling it is the product with its weight, and nothing else."""
    return isinstance(project, nn.Module) and is_plain(project, nn.Linear) and project.bias is None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, size: int
) -> Tensor:
    """Mean cross-entropy, in fp32, of ``hidden @ weight.T`` against ``targets``.

    Args:
        hidden: (t, m); weight: (V, m), one dtype unless autocast says which.
        targets: (t,) int64; those equal to ``ignore_index`` do not count.
        size: how many rows of logits are in memory at a time.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    grad = torch.is_grad_enabled()
    wanted = grad and hidden.requires_grad, grad and weight.requires_grad
    return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, size, dtype, wanted)


def _add_weight_gradient(to: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """to (V, m) fp32 += dlogits^T hidden."""
    if dlogits.dtype == to.dtype:
        to.addmm_(dlogits.t(), hidden)
    elif dlogits.is_cuda and _adds_to_fp32(dlogits.device, dlogits.dtype):
        torch.addmm(to, dlogits.t(), hidden, out_dtype=to.dtype, out=to)
    elif dlogits.is_cuda and MM_WITH_DTYPE:
        to.add_(torch.mm(dlogits.t(), hidden, out_dtype=to.dtype))
    else:
        to.add_(torch.mm(dlogits.t(), hidden))


def _kernel(hidden: Tensor) -> Callable:
    """The op that turns logits into their gradient. Where no library has a kernel for it torch's
    own are what is meant, not a fallback: no choice of a backend forbids them."""
    if backend.runs_native("_cross_entropy", hidden.device.type, hidden.dtype):
        return torch.ops.mamba_ssm._cross_entropy.default
    return torch.ops.mamba_ssm._cross_entropy.reference


def _pass(hidden, weight, targets, ignore_index, size, wanted) -> tuple:
    """(sum of losses, d hidden, d weight in fp32), of sums rather than means."""
    ignored = (targets == ignore_index)[:, None]
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    dhidden = torch.empty_like(hidden) if wanted[0] else None
    dweight = None
    if wanted[1]:
        dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        counted = hidden.masked_fill(ignored, 0)
    op = _kernel(hidden)
    for start in range(0, hidden.shape[0], size):
        rows = slice(start, start + size)
        logits = F.linear(hidden[rows], weight)
        total += op(logits, targets[rows], ignore_index).sum()
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden[rows])
        if dweight is not None:
            _add_weight_gradient(dweight, logits, counted[rows])
    return total, dhidden, dweight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, size, dtype, wanted):
        ctx.ignore_index, ctx.dtype = ignore_index, dtype
        with without_autocast(hidden.device.type):
            count = (targets != ignore_index).sum().clamp(min=1)
            total, dhidden, dweight = _pass(
                hidden if dtype is None else hidden.to(dtype),
                weight if dtype is None else weight.to(dtype),
                targets,
                ignore_index,
                size,
                wanted,
            )
        if any(wanted):
            ctx.save_for_backward(hidden, weight, targets, count, dhidden, dweight)
        return total / count

    @staticmethod
    def backward(ctx, dloss):
        hidden, weight, targets, count, dhidden, dweight = ctx.saved_tensors
        if wants_double_backward():
            grads = differentiable_backward(
                lambda h, w: _plain(h, w, targets, count, ctx.ignore_index, ctx.dtype),
                (hidden, weight),
                (dloss,),
            )
            return *grads, None, None, None, None, None
        with without_autocast(dloss.device.type):
            scale = dloss / count
            dhidden = None if dhidden is None else (dhidden * scale).to(hidden.dtype)
            dweight = None if dweight is None else (dweight * scale).to(weight.dtype)
        return dhidden, dweight, None, None, None, None, None


def _plain(hidden, weight, targets, count, ignore_index, dtype) -> Tensor:
    """The same in differentiable torch, all logits at once: for second derivatives."""
    with torch.autocast(hidden.device.type, enabled=False):
        if dtype is not None:
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        logits = F.linear(hidden, weight).float()
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum") / count
