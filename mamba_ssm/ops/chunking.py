"""How many steps lie between the states that a scan keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable

from .backend import is_native

# By device: on the CPU the steps whose inputs and states fit a core's cache; on CUDA what a block
# stages at once (the kernels take its multiples only).
_NATIVE_CHUNKS = {"cpu": 32, "cuda": 64}


def chunk_size_for(length: int, op: Callable, device_type: str, keep: bool = True) -> int:
    """The chunk size for a scan of ``length`` steps by the op that ``backend.resolve`` gave.

    The reference works best with about the root of the length, which balances its two levels. The
    compiled kernels keep states only for the backward: with ``keep=False`` none but the first.
    """
    if is_native(op):
        return _NATIVE_CHUNKS[device_type] if keep else max(1, length)
    size = 16
    while size * size < length:
        size *= 2
    return size
