"""Linear maps of 16-bit floats, also on processors that have no instructions for them."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# With fewer rows, reading the weights takes the time.
_MANY_ROWS = 64


@functools.cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this dtype on this CPU without a library for it."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if name is None or not torch.backends.mkldnn.is_available():
        return False
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return supported is not None and not supported()


def _rows_in_a_row(x: Tensor) -> Tensor:
    """x (b, l, k), copied if time lies innermost.

    Of such an x torch makes one product where the weight needs a gradient and a product for each of
    b where it does not, which round differently: what is asked for must not change the result.
    """
    return x.contiguous() if x.dim() == 3 and x.stride(2) != 1 else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``; of many 16-bit rows by way of fp32 where that is faster.

    On a CPU without 16-bit products the fp32 ones are several times as fast as torch's own code,
    conversions included, and round less. Where autograd records, it stays with ``F.linear``, as
    fp32 copies of the weights would live until the backward.
    """
    if (
        x.device.type != "cpu"
        or weight.dtype not in (torch.bfloat16, torch.float16)
        or x.dtype != weight.dtype
        or torch.is_grad_enabled()
        or x.shape[:-1].numel() < _MANY_ROWS
        or not is_slow(weight.dtype)
    ):
        return F.linear(_rows_in_a_row(x), weight, bias)
    wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(x.dtype)
