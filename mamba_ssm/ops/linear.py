"""Linear maps, also where torch's own choice of a library for them is a slow one."""

from __future__ import annotations

import functools
from pathlib import Path

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


@functools.cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster on this CPU than what ``F.linear`` takes.

    That is MKL, which has AVX-512 code for Intel's processors alone.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


def _rows_in_a_row(x: Tensor) -> Tensor:
    """x (b, l, k), copied if time lies innermost.

    Of such an x torch makes one product where the weight needs a gradient and a product for each of
    b where it does not, which round differently: what is asked for must not change the result.
    """
    return x.contiguous() if x.dim() == 3 and x.stride(2) != 1 else x


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    # Compilers, autocast, transforms and other types of weights know only F.linear.
    return (
        weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and type(weight) in (Tensor, torch.nn.Parameter)
        and x.shape[:-1].numel() >= _MANY_ROWS
        and prefers_onednn()
    )


def _goes_wide(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.dtype in (torch.bfloat16, torch.float16)
        and x.shape[:-1].numel() >= _MANY_ROWS
        and is_slow(weight.dtype)
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``; of many rows by way of fp32 or with another library where that is faster.

    On a CPU without 16-bit products the fp32 ones are several times as fast as torch's own code,
    conversions included, and round less. Where autograd records, it stays with ``F.linear``, as
    fp32 copies of the weights would live until the backward, and oneDNN's op has no gradient.
    """
    if x.device.type == "cpu" and x.dtype == weight.dtype and not torch.is_grad_enabled():
        if _takes_onednn(x, weight):
            x = _rows_in_a_row(x)
            return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
        if _goes_wide(x, weight):
            wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
            return wide.to(x.dtype)
    return F.linear(_rows_in_a_row(x), weight, bias)
