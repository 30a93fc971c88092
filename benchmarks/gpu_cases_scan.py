"""The scan's cases of benchmarks/gpu_ops.py: the inputs are those of the reference's figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from gpu_cases_conv_norm import forward_and_backward
from gpu_measuring import Work

from mamba_ssm import selective_scan_fn


class Case(NamedTuple):
    """Sizes, dtype, (forward, backward) of the reference package and of the target, in µs."""

    b: int
    d: int
    length: int
    n: int = 16
    dtype: torch.dtype = torch.bfloat16
    reference: tuple[float | None, float | None] = (None, None)
    target: tuple[float | None, float | None] = (None, None)


FP32, FP16 = torch.float32, torch.float16
CASES = (
    Case(8, 1536, 2048, reference=(447, 1742), target=(150, 440)),
    Case(2, 5120, 2048, reference=(379, 1488)),
    Case(1, 1536, 65536, reference=(2199, 7599), target=(750, 2000)),
    Case(64, 1536, 128, reference=(309, 1190), target=(110, 330)),
    Case(1, 5120, 512, reference=(58, 247)),
    Case(32, 384, 197, reference=(110, 328), target=(40, 110)),
    Case(8, 1536, 2048, dtype=FP32, reference=(878, 2038), target=(230, 600)),
    Case(8, 1536, 2048, dtype=FP16, reference=(442, 1717)),
    Case(8, 1536, 2048, n=8, reference=(273, 958)),
    Case(8, 1536, 2048, n=64, reference=(1493, 6629), target=(650, 2200)),
    Case(8, 1536, 2048, n=128, reference=(2890, 13140)),
)
MILLION = Case(1, 1536, 1 << 20, reference=(34440, None), target=(11000, None))


def _inputs(case: Case, layout: str) -> dict[str, torch.Tensor]:
    b, d, length, n, dtype = case[:5]

    def sequence(values):
        values = values.to(dtype)
        if layout == "(b,l,d)":
            values = values.transpose(1, 2).contiguous().transpose(1, 2)
        return values.requires_grad_()

    def leaf(values):
        return values.requires_grad_()

    with torch.device("cuda"):
        return {
            "u": sequence(torch.randn(b, d, length)),
            "delta": sequence(0.5 * torch.rand(b, d, length)),
            "A": leaf(-0.5 * torch.rand(d, n)),
            "B": sequence(torch.randn(b, n, length)),
            "C": sequence(torch.randn(b, n, length)),
            "D": leaf(torch.randn(d)),
            "z": sequence(torch.randn(b, d, length)),
            "delta_bias": leaf(0.5 * torch.rand(d)),
        }


def _works(case: Case, layout: str) -> Iterator[Work]:
    tensors = _inputs(case, layout)
    name = str(case.dtype).removeprefix("torch.")
    sequence = tensors["u"].numel() * tensors["u"].element_size()
    small = 2 * tensors["B"].numel() * tensors["B"].element_size()
    clock = getattr(torch.cuda.get_device_properties(0), "clock_rate", 0) * 1e3
    units = 16 * torch.cuda.get_device_properties(0).multi_processor_count
    updates = case.b * case.d * case.length * case.n
    note = f"special-function floor {updates / units / clock * 1e6:.0f} us" if clock else ""
    works = forward_and_backward(
        f"scan {name} b{case.b} d{case.d} l{case.length} n{case.n} {layout}",
        lambda: selective_scan_fn(**tensors, delta_softplus=True),
        tuple(tensors.values()),
        (torch.randn_like(tensors["u"]),),
        # u, delta, z → out; dout, u, delta, z → du, ddelta, dz
        (4 * sequence + small, 7 * sequence + 2 * small),
        case.reference,
        case.target,
        note,
    )
    yield from works


def scan() -> Iterator[Work]:
    """Selective scan with z, D, delta_bias and softplus, forward and backward"""
    for case in CASES:
        for layout in ("(b,d,l)", "(b,l,d)"):
            yield from _works(case, layout)


def million() -> Iterator[Work]:
    """Selective scan over 1,048,576 steps, forward (10 GiB of inputs)"""
    with torch.no_grad():
        tensors = _inputs(MILLION, "(b,d,l)")
    for tensor in tensors.values():
        tensor.requires_grad_(False)
    size = 2 * (4 * tensors["u"].numel() + 2 * tensors["B"].numel())
    yield Work(
        f"scan bfloat16 b1 d{MILLION.d} l{MILLION.length} n16 (b,d,l), forward",
        lambda: selective_scan_fn(**tensors, delta_softplus=True),
        size,
        MILLION.reference[0],
        MILLION.target[0],
    )
