"""The dtype rule shared by every op: fp32 inside whatever comes in, fp64 when fp64 comes in."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any input is fp64, else fp32: the dtype of the recurrence, of states and of sums."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.float32
