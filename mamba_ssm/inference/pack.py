"""Writes a model's weights into the one stream that the fused decode step reads.

See ``mamba_ssm/ops/decode_layout.py`` for the layout. The pack is a second copy of the weights: it
doubles their memory for as long as it lives.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mamba_ssm.inference.int8 import Int8Linear
from mamba_ssm.ops.decode_layout import (
    ABSENT,
    ALIGNMENT,
    KINDS,
    Sizes,
    padded,
    visit,
)

_LOG2_E = 1.4426950408889634
_HUGE_PAGE = 2 << 20
_POSIX = hasattr(mmap, "MAP_PRIVATE")


def zeroed_buffer(size: int) -> Tensor:
    """``size`` zero bytes (uint8), on huge pages where the system has them.

    A decode step touches every page of a pack once: with 4 KiB pages it would spend a good part of
    its time on looking addresses up.
    """
    if size < _HUGE_PAGE:
        return torch.zeros(padded(size, ALIGNMENT), dtype=torch.uint8)
    # Shared memory, the default, gets no huge pages unless the system says so for all of it.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if _POSIX else {}
    memory = mmap.mmap(-1, padded(size, _HUGE_PAGE) + _HUGE_PAGE, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: slower, not wrong
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping alive
    start = -whole.data_ptr() % _HUGE_PAGE
    return whole[start : start + size]


def _pack(weight: Tensor, into: Tensor) -> None:
    torch.ops.mamba_ssm._pack_weight.default(weight.to(into.dtype).contiguous(), into)


class PackWriter:
    """Collects the parts of a pack in the order of the layout, then writes them in one go."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.entries = sizes.entries()
        self.size = 0
        self._writes: list[tuple[int, int, Callable[[Tensor], Any]]] = []

    def _place(self, count: int, dtype: torch.dtype, write: Callable[[Tensor], Any]) -> None:
        self.entries.append(self.size)
        nbytes = count * dtype.itemsize
        self._writes.append((self.size, nbytes, lambda piece: write(piece.view(dtype))))
        self.size += padded(nbytes, ALIGNMENT)

    def floats(self, values: Tensor | None, shape: tuple[int, ...]) -> None:
        """An fp32 array, zero-padded to ``shape``, or its absence."""
        if values is None:
            self.entries.append(ABSENT)
            return
        region = tuple(slice(0, n) for n in values.shape)

        def write(piece: Tensor) -> None:
            piece.view(shape)[region].copy_(values)

        self._place(torch.Size(shape).numel(), torch.float32, write)

    def norm(self, norm: nn.Module) -> None:
        """A norm: weight, bias and eps, each in whole blocks."""
        width = padded(norm.weight.shape[0])
        self.floats(norm.weight, (width,))
        self.floats(norm.bias, (width,))
        self.floats(torch.tensor([norm.eps]), (1,))

    def weight(self, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None) -> None:
        """A linear weight (out, in); int8 ones come with ``scales`` (out, groups)."""
        out, inputs = weight.shape
        width = padded(inputs, 2) if weight.dtype == torch.bfloat16 else inputs
        groups = 1 if scales is None else scales.shape[1]
        self.entries += [
            KINDS.index(weight.dtype),
            out,
            inputs // groups if scales is not None else width,
        ]
        self._place(padded(out) * width, weight.dtype, lambda piece: _pack(weight, piece))
        if scales is None:
            self.entries.append(ABSENT)
        else:
            count = padded(out) * groups
            self._place(count, torch.float32, lambda piece: _pack(scales, piece))
        self.floats(bias, (padded(out),))

    def finish(self) -> tuple[Tensor, Tensor]:
        """(pack, layout)."""
        pack = zeroed_buffer(self.size)
        for start, nbytes, write in self._writes:
            write(pack[start : start + nbytes])
        return pack, torch.tensor(self.entries, dtype=torch.int64)


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(weight, bias, scales or None) of a linear layer, int8 or not."""
    if isinstance(module, Int8Linear):
        return module.quantized, module.bias, module.scales
    return module.weight, module.bias, None


def pack_model(model: nn.Module) -> tuple[Tensor, Tensor]:
    """(pack, layout) of a MambaLMHeadModel that ``cpu_decoder.why_not`` has no objection to."""
    backbone = model.backbone
    mixer = backbone.layers[0].mixer
    weight = backbone.embedding.weight
    sizes = Sizes(
        layers=len(backbone.layers),
        d_model=weight.shape[1],
        d_inner=mixer.d_inner,
        d_state=mixer.d_state,
        d_conv=mixer.d_conv,
        dt_rank=mixer.dt_rank,
        vocab=weight.shape[0],
        is_rms_norm=not isinstance(backbone.norm_f, nn.LayerNorm),
        residual_dtype=torch.float32 if backbone.residual_in_fp32 else weight.dtype,
    )
    writer = PackWriter(sizes)

    def module_of(name: str, layer: int | None) -> nn.Module:
        if layer is None:
            return model.lm_head if name == "lm_head" else backbone.norm_f
        block = backbone.layers[layer]
        return block.norm if name == "norm" else getattr(block.mixer, name)

    def write_weight(name: str, layer: int | None, out: int, inputs: int) -> None:
        if name not in ("in_x", "in_z"):
            return writer.weight(*_linear(module_of(name, layer)))
        half = slice(0, sizes.d_inner) if name == "in_x" else slice(sizes.d_inner, None)
        parts = _linear(module_of("in_proj", layer))
        return writer.weight(*(None if part is None else part[half] for part in parts))

    def write_array(name: str, layer: int | None, shape: tuple[int, ...]) -> None:
        mixer = module_of("mixer", None) if layer is None else backbone.layers[layer].mixer
        values = {
            "conv_weight": lambda: mixer.conv1d.weight.squeeze(1).t(),
            "conv_bias": lambda: mixer.conv1d.bias,
            "A": lambda: -torch.exp(mixer.A_log.float()) * _LOG2_E,
            "D": lambda: mixer.D,
        }[name]()
        writer.floats(values, shape)

    with torch.no_grad():
        visit(
            sizes,
            lambda name, layer, _: writer.norm(module_of(name, layer)),
            write_weight,
            write_array,
        )
        return writer.finish()
