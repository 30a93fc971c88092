"""Rotary position embedding (arXiv 2104.09864)."""

from __future__ import annotations

import torch


def apply_rotary(
    x: torch.Tensor, positions: torch.Tensor, dim: int, base: float, interleaved: bool
) -> torch.Tensor:
    """Rotate the first ``dim`` features of every head by the token's position.

    ``x`` (b, l, heads, head_dim), ``positions`` (l,) or (b, l) integers → x's shape and dtype,
    computed in fp32. Pairs are (i, i + dim/2), or (2i, 2i + 1) when ``interleaved``.
    """
    if dim == 0:
        return x
    exponent = torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim
    angle = positions.to(torch.float32)[..., None] * torch.pow(base, -exponent)
    if angle.dim() == 2:
        angle = angle.unsqueeze(0)
    cos, sin = angle.cos().unsqueeze(2), angle.sin().unsqueeze(2)  # (b or 1, l, 1, dim/2)
    rotated, rest = x[..., :dim].float(), x[..., dim:]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    pair = (first * cos - second * sin, first * sin + second * cos)
    out = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([out.to(x.dtype), rest], dim=-1)
