"""How a model is laid out in the pack that the fused decode step streams through.

A pack is one uint8 vector; its layout, an int64 vector, is the table of contents. Everything in the
pack starts at a multiple of 64 bytes. Linear weights are stored in blocks of 16 outputs,
(blocks, in, 16), so that a product with a few rows reads them once from end to end; bf16 in pairs
along the (even, zero-padded) input, (blocks, in / 2, 16, 2). Channels and norms are zero-padded to
whole blocks too. ``csrc/bindings_cpu_decode.cpp`` reads the same layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

VERSION = 1
BLOCK = 16
ALIGNMENT = 64
KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
RESIDUAL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ABSENT = -1


def padded(n: int, multiple: int = BLOCK) -> int:
    """n rounded up to a multiple."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Sizes:
    """The header of a layout."""

    layers: int
    d_model: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    vocab: int
    is_rms_norm: bool
    residual_dtype: torch.dtype

    def entries(self) -> list[int]:
        """The header as it stands at the front of a layout."""
        sizes = (self.layers, self.d_model, self.d_inner, self.d_state, self.d_conv)
        sizes += (self.dt_rank, self.vocab, int(self.is_rms_norm))
        return [VERSION, *sizes, RESIDUAL_DTYPES.index(self.residual_dtype)]

    def layer_parts(self) -> list[tuple[str, tuple[int, ...]]]:
        """What the layout says of one layer, in order: (name, size). Norms have the size (width,),
        linear weights (out, in), the rest their shape in the pack."""
        channels = padded(self.d_inner)
        return [
            ("norm", (self.d_model,)),
            ("in_x", (self.d_inner, self.d_model)),
            ("in_z", (self.d_inner, self.d_model)),
            ("conv_weight", (self.d_conv, channels)),
            ("conv_bias", (channels,)),
            ("x_proj", (self.dt_rank + 2 * self.d_state, self.d_inner)),
            ("dt_proj", (self.d_inner, self.dt_rank)),
            ("A", (channels, padded(self.d_state))),
            ("D", (channels,)),
            ("out_proj", (self.d_model, self.d_inner)),
        ]

    def tail_parts(self) -> list[tuple[str, tuple[int, ...]]]:
        """The same for what follows the layers."""
        return [("norm_f", (self.d_model,)), ("lm_head", (self.vocab, self.d_model))]


NORMS = ("norm", "norm_f")
ARRAYS = ("conv_weight", "conv_bias", "A", "D")


def visit(sizes: Sizes, norm: Callable, weight: Callable, array: Callable) -> None:
    """Call norm(name, layer, width), weight(name, layer, out, in) or array(name, layer, shape) for
    every part in the order of the layout; layer is None after the layers."""
    parts = [(i, *part) for i in range(sizes.layers) for part in sizes.layer_parts()]
    parts += [(None, *part) for part in sizes.tail_parts()]
    for layer, name, size in parts:
        if name in NORMS:
            norm(name, layer, *size)
        elif name in ARRAYS:
            array(name, layer, size)
        else:
            weight(name, layer, *size)


def unpack_weight(packed: Tensor, out: int, inputs: int) -> Tensor:
    """The linear weight (out, in) that a flat piece of a pack holds, in its dtype."""
    pairs = 2 if packed.dtype == torch.bfloat16 else 1
    blocks = packed.view(padded(out) // BLOCK, -1, BLOCK, pairs)
    return blocks.permute(0, 2, 1, 3).reshape(padded(out), -1)[:out, :inputs]
