"""How many steps lie between the states that a scan keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .backend import is_native
from .chunk_size import balanced_chunk_size

# By device: on the CPU the steps whose inputs and states fit a core's cache; on CUDA what a block
# stages at once (the kernels take its multiples only).
_NATIVE_CHUNKS = {"cpu": 32, "cuda": 64}
# A compiled graph serves every length, so its chunk size must not depend on the length's range.
_TRACED_REFERENCE_CHUNK = 64


def chunk_size_for(length: int, op: Callable, device_type: str, keep: bool = True) -> int:
    """The chunk size for a scan of ``length`` steps by the op that ``backend.resolve`` gave.

    The reference works best with about the root of the length, which balances its two levels. The
    compiled kernels keep states only for the backward: with ``keep=False`` none but the first, and
    so does a traced reference, which then chooses its chunks itself.
    """
    if is_native(op):
        return _NATIVE_CHUNKS[device_type] if keep else max(1, length)
    if torch.compiler.is_compiling():
        return _TRACED_REFERENCE_CHUNK if keep else max(1, length)
    return balanced_chunk_size(length)
