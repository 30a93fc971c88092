"""The chunk size that balances the two levels of the reference's scan."""

from __future__ import annotations


def balanced_chunk_size(length: int) -> int:
    """A power of two, at least 16 and about the root of ``length``."""
    size = 16
    while size * size < length:
        size *= 2
    return size
