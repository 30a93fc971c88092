"""The memory layout rule of the sequence ops: results are laid out as the input is.

A (b, d, l) tensor is *channel-last* when it is a view of (b, l, d) memory, as the linear maps
around the convolution and the scan produce it. Results for such an input are channel-last too, so
that no op of the block has to transpose; all other results are contiguous. csrc/bindings_layout.h
applies the same rule.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_channel_last(x: Tensor) -> bool:
    """Whether the results of an op on x (b,d,l) are channel-last.

    Length 1 is both, and either answer then gives the same memory; d = 1 counts as contiguous. The
    order of the comparisons matters to tracing: for plain contiguous and channel-last tensors they
    are decided without a guard on b or l.
    """
    return x.stride(2) != 1 and x.stride(1) == 1 and x.shape[1] > 1


def empty_like_layout(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Fresh memory of the shape and layout of x (b,d,l), in x's dtype or the one given."""
    if is_channel_last(x):
        b, d, length = x.shape
        return x.new_empty((b, length, d), dtype=dtype).transpose(1, 2)
    return x.new_empty(x.shape, dtype=dtype)


def in_layout_of(values: Tensor, x: Tensor) -> Tensor:
    """``values`` (b,d,l) in the layout of x: itself where it already has it, else a copy."""
    if is_channel_last(x):
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    return values.contiguous()
