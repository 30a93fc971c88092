"""How many steps lie between the states that a scan keeps for its backward."""


def chunk_size_for(length: int) -> int:
    """About the root of the length, which balances the work of the scan's two levels."""
    size = 16
    while size * size < length:
        size *= 2
    return size
