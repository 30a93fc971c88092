"""One decode step of a whole language model from its pack, in pure PyTorch.

It is the oracle of the fused kernel and computes in fp32 from the packed weights; nothing else
needs it, because a model that is not packed decodes through its modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decode_layout import (
    ABSENT,
    BLOCK,
    KINDS,
    RESIDUAL_DTYPES,
    VERSION,
    Sizes,
    padded,
    unpack_weight,
    visit,
)

_LOG2_E = 1.4426950408889634


class _Linear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Norm:
    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float, is_rms: bool) -> None:
        self.weight, self.bias, self.eps, self.is_rms = weight, bias, eps, is_rms

    def __call__(self, x: Tensor) -> Tensor:
        if not self.is_rms:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class _Reader:
    """Everything in a pack, in fp32: {(layer, name): tensor or callable}."""

    def __init__(self, pack: Tensor, layout: Tensor) -> None:
        self.pack, self.entries, self.next = pack, layout.tolist(), 0
        version = self._number()
        if version != VERSION:
            raise RuntimeError(f"_decode_step: layout says version = {version}, not {VERSION}")
        numbers = [self._number() for _ in range(9)]
        self.sizes = Sizes(*numbers[:7], bool(numbers[7]), RESIDUAL_DTYPES[numbers[8]])
        self.parts: dict[tuple[int | None, str], Any] = {}
        visit(self.sizes, self._norm, self._weight, self._array)

    def _number(self) -> int:
        self.next += 1
        return self.entries[self.next - 1]

    def _place(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        offset = self._number()
        if offset == ABSENT:
            return None
        return self.pack[offset : offset + count * dtype.itemsize].view(dtype)

    def _norm(self, name: str, layer: int | None, width: int) -> None:
        weight, bias, eps = (self._place(n) for n in (padded(width), padded(width), 1))
        bias = None if bias is None else bias[:width]
        norm = _Norm(weight[:width], bias, float(eps), self.sizes.is_rms_norm)
        self.parts[layer, name] = norm

    def _weight(self, name: str, layer: int | None, out: int, inputs: int) -> None:
        kind = KINDS[self._number()]
        out, group = self._number(), self._number()
        width = padded(inputs, 2) if kind == torch.bfloat16 else inputs
        packed = self._place(padded(out) * width, kind)
        scales, bias = self._place(padded(out) * (width // group)), self._place(padded(out))
        weight = unpack_weight(packed, out, inputs).float()
        if scales is not None:
            scale = unpack_weight(scales, out, width // group)
            weight = weight * scale.repeat_interleave(group, dim=1)
        self.parts[layer, name] = _Linear(weight, None if bias is None else bias[:out])

    def _array(self, name: str, layer: int | None, shape: tuple[int, ...]) -> None:
        array = self._place(torch.Size(shape).numel())
        self.parts[layer, name] = None if array is None else array.view(shape)


def _layer_step(parts: Any, sizes: Sizes, x: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
    d_inner, d_state = sizes.d_inner, sizes.d_state
    u, z = parts("in_x")(x), parts("in_z")(x)
    window = torch.cat([conv[..., 1:].float(), u.unsqueeze(-1)], dim=-1)
    conv.copy_(window)
    bias = parts("conv_bias")
    u = (window * parts("conv_weight")[:, :d_inner].t()).sum(-1)
    u = F.silu(u if bias is None else u + bias[:d_inner])
    dt, B, C = parts("x_proj")(u).split([sizes.dt_rank, d_state, d_state], dim=-1)
    dt = F.softplus(parts("dt_proj")(dt))
    A = parts("A")[:d_inner, :d_state] / _LOG2_E
    h = ssm.float() * torch.exp(dt[..., None] * A) + (dt * u)[..., None] * B[:, None]
    ssm.copy_(h)
    y = (h * C[:, None]).sum(-1) + u * parts("D")[:d_inner]
    return parts("out_proj")(y * F.silu(z))


def decode_step(
    ids: Tensor,
    embedding: Tensor,
    pack: Tensor,
    layout: Tensor,
    conv_states: Sequence[Tensor],
    ssm_states: Sequence[Tensor],
) -> Tensor:
    """Internal op ``_decode_step``: see ``ops/schema.py`` for shapes."""
    reader = _Reader(pack, layout)
    sizes, parts = reader.sizes, reader.parts
    residual, hidden = embedding[ids].float(), None
    for i in range(sizes.layers + 1):
        total = residual if hidden is None else residual + hidden
        last = i == sizes.layers
        x = parts[(None, "norm_f") if last else (i, "norm")](total)
        if last:
            return parts[None, "lm_head"](x).to(embedding.dtype)
        residual = total.to(sizes.residual_dtype).float()
        hidden = _layer_step(
            lambda name, i=i: parts[i, name], sizes, x, conv_states[i], ssm_states[i]
        )
    raise AssertionError("a model has a last layer")


def pack_weight(weight: Tensor, into: Tensor) -> None:
    """Internal op ``_pack_weight``: see ``ops/schema.py``."""
    out, inputs = weight.shape
    pairs = 2 if weight.dtype == torch.bfloat16 else 1
    target = into.view(padded(out) // BLOCK, padded(inputs, pairs) // pairs, BLOCK, pairs)
    even = inputs // pairs * pairs
    for begin, end in ((0, out // BLOCK * BLOCK), (out // BLOCK * BLOCK, out)):
        if begin == end:
            continue
        rows = min(BLOCK, end - begin)
        blocks = weight[begin:end].reshape(-1, rows, inputs)
        block = slice(begin // BLOCK, begin // BLOCK + len(blocks))
        whole = blocks[..., :even].unflatten(2, (-1, pairs)).transpose(1, 2)
        target[block, : even // pairs, :rows].copy_(whole)
        if even < inputs:
            target[block, -1, :rows, 0] = blocks[..., -1]
