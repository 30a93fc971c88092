"""B and C of the scan may come with different numbers of groups; the internal ops take one."""

from __future__ import annotations

from torch import Tensor


def same_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """B and C as (d, n) or (b, g, n, l) with one g; (b, n, l) counts as one group."""
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))
    if B.dim() == 4 and C.dim() == 4 and B.shape[1] != C.shape[1]:
        groups = B.shape[1]
        while groups % C.shape[1]:  # their least common multiple; torch.compile knows no math.lcm
            groups += B.shape[1]
        B = B.repeat_interleave(groups // B.shape[1], dim=1)
        C = C.repeat_interleave(groups // C.shape[1], dim=1)
    return B, C


def sum_groups(gradient: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`same_groups` on a gradient: the shape of ``like`` again."""
    if like.dim() == 4 and gradient.shape != like.shape:
        gradient = gradient.unflatten(1, (like.shape[1], -1)).sum(dim=2)
    return gradient.reshape(like.shape)
