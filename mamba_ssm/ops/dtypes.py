"""The dtype rule shared by every op: fp32 inside whatever comes in, fp64 when fp64 comes in."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any input is fp64, else fp32: the dtype of the recurrence, of states and of sums."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.float32


def no_wider_than(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x, in ``dtype`` if it is fp64 and that is not: a parameter does not widen the computation."""
    if x is None or x.dtype != torch.float64 or dtype == torch.float64:
        return x
    return x.to(dtype)


def kernel_dtype(x: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype by which a call of an op chooses its backend: x's, but fp64 if any tensor is fp64.

    Compiled kernels mix the narrower dtypes freely and take no fp64 at all.
    """
    wide = accumulate_dtype(x, *others) == torch.float64
    return torch.float64 if wide else x.dtype
