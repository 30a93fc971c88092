"""One decode step of a whole language model, from its pack or its weights, in pure PyTorch.

It is the oracle of the fused kernels and computes in fp32; nothing else needs it, because a model
that they do not serve decodes through its modules.
"""

from __future__ import annotations

import math
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
from ..decode_weights import LAYER_INT8, LAYER_WEIGHTS, TAIL_INT8, TAIL_WEIGHTS

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


def _layers_step(
    parts: dict[tuple[int | None, str], Any],
    sizes: Sizes,
    residual: Tensor,
    states: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """All layers and the last norm, from one position's embedding (b, m) in fp32."""
    hidden = None
    for i, (conv, ssm) in enumerate(states):
        total = residual if hidden is None else residual + hidden
        x = parts[i, "norm"](total)
        residual = total.to(sizes.residual_dtype).float()
        hidden = _layer_step(lambda name, i=i: parts[i, name], sizes, x, conv, ssm)
    return parts[None, "norm_f"](residual + hidden)


def _model_step(
    parts: dict[tuple[int | None, str], Any],
    sizes: Sizes,
    ids: Tensor,
    embedding: Tensor,
    states: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    x = _layers_step(parts, sizes, embedding[ids].float(), states)
    return parts[None, "lm_head"](x).to(embedding.dtype)


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
    states = list(zip(conv_states, ssm_states, strict=True))
    return _model_step(reader.parts, reader.sizes, ids, embedding, states)


def _choose(
    x: Tensor, uniform: Tensor, top_k: int, top_p: float, min_p: float, temperature: float
) -> Tensor:
    """Each row's token (b,) at the part ``uniform`` (b,) of its filtered distribution, or -1."""
    x = x.float() / temperature
    ordered, index = x.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < x.shape[1]:
        ordered = ordered.masked_fill(ordered < ordered[:, top_k - 1 : top_k], -torch.inf)
    if 0 < top_p < 1:
        probs = ordered.softmax(-1).double()
        late = probs.cumsum(-1) - probs >= top_p
        late[:, 0] = False
        ordered = ordered.masked_fill(late, -torch.inf)
    if min_p > 0:
        ordered = ordered.masked_fill(ordered < ordered[:, :1] + math.log(min_p), -torch.inf)
    weights = torch.zeros_like(x).scatter(1, index, ordered.softmax(-1)).double()
    sums = weights.cumsum(-1)
    tokens = (sums <= uniform[:, None] * sums[:, -1:]).sum(-1)
    last = torch.where(weights > 0, torch.arange(x.shape[1]), 0).amax(-1)
    return torch.where(sums[:, -1].isfinite(), tokens.minimum(last), -1)


def decode_and_choose(
    ids: Tensor,
    embedding: Tensor,
    pack: Tensor,
    layout: Tensor,
    conv_states: Sequence[Tensor],
    ssm_states: Sequence[Tensor],
    logits: Tensor,
    tokens: Tensor,
    seen: Tensor | None,
    uniform: Tensor | None,
    vocab_size: int,
    top_k: int,
    top_p: float,
    min_p: float,
    temperature: float,
    repetition_penalty: float,
) -> None:
    """Internal op ``_decode_and_choose``: see ``ops/schema.py`` for shapes."""
    logits.copy_(decode_step(ids, embedding, pack, layout, conv_states, ssm_states))
    x = logits[:, :vocab_size]
    if seen is not None:
        penalised = torch.where(x < 0, x * repetition_penalty, x / repetition_penalty)
        x = torch.where(seen[:, :vocab_size], penalised, x)
    if uniform is None:
        tokens.copy_(x.argmax(-1))
    else:
        tokens.copy_(_choose(x, uniform, top_k, top_p, min_p, temperature))


def _layer_parts(weights: Sequence[Tensor], eps: float, is_rms: bool) -> dict[str, Any]:
    w = {name: _given(t) for name, t in zip(LAYER_WEIGHTS, weights, strict=True)}
    d_inner = w["D"].shape[0]
    x, z = slice(0, d_inner), slice(d_inner, None)
    bias = w["in_bias"]
    return {
        "norm": _Norm(w["norm_weight"], w["norm_bias"], eps, is_rms),
        "in_x": _Linear(w["in_proj"][x], None if bias is None else bias[x]),
        "in_z": _Linear(w["in_proj"][z], None if bias is None else bias[z]),
        "conv_weight": w["conv_weight"].squeeze(1).t(),
        "conv_bias": w["conv_bias"],
        "x_proj": _Linear(w["x_proj"], None),
        "dt_proj": _Linear(w["dt_proj"], w["dt_bias"]),
        "A": -torch.exp(w["A_log"]) * _LOG2_E,
        "D": w["D"],
        "out_proj": _Linear(w["out_proj"], w["out_bias"]),
    }


def _given(t: Tensor) -> Tensor | None:
    return t.float() if t.numel() else None


def decode_step_weights(
    ids: Tensor,
    embedding: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    eps: float,
    is_rms_norm: bool,
    residual_dtype: torch.dtype,
    conv_states: Sequence[Tensor],
    ssm_states: Sequence[Tensor],
) -> Tensor:
    """Internal op ``_decode_step_weights``: see ``ops/schema.py`` for shapes."""
    *layers, lm_head = _dequantized(weights, scales, len(conv_states))
    states = list(zip(conv_states, ssm_states, strict=True))
    parts, sizes = _parts_of_weights(layers, eps, is_rms_norm, residual_dtype, states)
    parts[None, "lm_head"] = _Linear(lm_head.float(), None)
    return _model_step(parts, sizes, ids, embedding, states)


def _dequantized(
    weights: Sequence[Tensor], scales: Sequence[Tensor], layers: int
) -> Sequence[Tensor]:
    """The weights as floats; ``scales`` is empty where none are int8."""
    if not scales:
        return weights
    count = len(LAYER_WEIGHTS)
    places = [i * count + LAYER_WEIGHTS.index(name) for i in range(layers) for name in LAYER_INT8]
    places += [layers * count + TAIL_WEIGHTS.index(name) for name in TAIL_INT8]
    floats = list(weights)
    for place, scale in zip(places, scales, strict=True):
        floats[place] = weights[place].float() * scale
    return floats


def _parts_of_weights(
    weights: Sequence[Tensor],
    eps: float,
    is_rms_norm: bool,
    residual_dtype: torch.dtype,
    states: Sequence[tuple[Tensor, Tensor]],
) -> tuple[dict[tuple[int | None, str], Any], Sizes]:
    """Of the layers and the last norm."""
    count = len(LAYER_WEIGHTS)
    parts: dict[tuple[int | None, str], Any] = {}
    for i in range(len(states)):
        layer = _layer_parts(weights[i * count : (i + 1) * count], eps, is_rms_norm)
        parts |= {(i, name): part for name, part in layer.items()}
    norm_weight, norm_bias = (_given(t) for t in weights[len(states) * count :])
    parts[None, "norm_f"] = _Norm(norm_weight, norm_bias, eps, is_rms_norm)
    conv, ssm = states[0]
    sizes = Sizes(
        layers=len(states),
        d_model=norm_weight.shape[0],
        d_inner=conv.shape[1],
        d_state=ssm.shape[-1],
        d_conv=conv.shape[-1],
        dt_rank=weights[LAYER_WEIGHTS.index("dt_proj")].shape[1],
        vocab=0,
        is_rms_norm=is_rms_norm,
        residual_dtype=residual_dtype,
    )
    return parts, sizes


def prefill_layers(
    hidden: Tensor,
    weights: Sequence[Tensor],
    eps: float,
    is_rms_norm: bool,
    residual_dtype: torch.dtype,
    conv_states: Sequence[Tensor],
    ssm_states: Sequence[Tensor],
) -> Tensor:
    """Internal op ``_prefill_layers``: see ``ops/schema.py`` for shapes."""
    states = list(zip(conv_states, ssm_states, strict=True))
    parts, sizes = _parts_of_weights(weights, eps, is_rms_norm, residual_dtype, states)
    for state in (*conv_states, *ssm_states):
        state.zero_()
    for t in range(hidden.shape[1]):
        x = _layers_step(parts, sizes, hidden[:, t].float(), states)
    return x.to(hidden.dtype)


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
