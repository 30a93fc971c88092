"""The table of cases of the selective scan: a base row, and rows that vary one thing each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScanCase:
    """One row. ``groups`` 0 means constant B or C; ``packing`` names a seq_idx, "" none."""

    b: int = 2
    d: int = 6
    length: int = 65
    n: int = 16
    groups_B: int = 1
    groups_C: int = 1
    three_dims: bool = False
    dtype: torch.dtype = torch.float32
    D: bool = True
    z: bool = True
    delta_bias: bool = True
    softplus: bool = True
    initial_state: bool = False
    packing: str = ""
    layout: str = "contiguous"
    positive_A: bool = False
    complex_A: bool = False


BASE = ScanCase()
_PACKED = replace(BASE, length=37, d=4, n=3, packing="packed")
_TILES = replace(BASE, d=96, length=200)  # whole tiles of the CUDA kernels, and a part of one

CASES: dict[str, ScanCase] = {
    "base": BASE,
    **{f"l={i}": replace(BASE, length=i, n=4) for i in (0, 1, 2, 3, 63, 64, 127, 257, 1000)},
    "l=2049": replace(BASE, b=1, d=2, length=2049, n=2),
    "long, initial state": replace(BASE, b=1, d=40, length=1100, initial_state=True),
    "long, packed": replace(_PACKED, length=1200, initial_state=True),
    "b=0": replace(BASE, b=0),
    **{f"n={i}": replace(BASE, n=i, length=33) for i in (1, 3, 17, 64, 256)},
    **{f"d={i}": replace(BASE, d=i, length=33) for i in (1, 5, 67)},
    "many channels": replace(BASE, b=3, d=1030, length=40, n=8),
    "three dims": replace(BASE, three_dims=True),
    "groups": replace(BASE, groups_B=3, groups_C=3),
    "a group per channel": replace(BASE, groups_B=6, groups_C=6, length=20),
    "vision": replace(BASE, d=8, groups_B=4, groups_C=4, length=197),
    "groups differ": replace(BASE, groups_B=2, groups_C=3),
    "constant B": replace(BASE, groups_B=0),
    "constant C": replace(BASE, groups_C=0, groups_B=2),
    "constant B, C": replace(BASE, groups_B=0, groups_C=0),
    "constant, one channel": replace(BASE, d=1, n=1, groups_B=0, groups_C=0),
    "no D": replace(BASE, D=False),
    "no z": replace(BASE, z=False),
    "no bias": replace(BASE, delta_bias=False),
    "no softplus": replace(BASE, softplus=False),
    "nothing optional": replace(BASE, D=False, z=False, delta_bias=False, softplus=False),
    "initial state": replace(BASE, initial_state=True),
    "growing states": replace(BASE, positive_A=True, length=20),
    "bf16": replace(BASE, dtype=torch.bfloat16),
    "fp16": replace(BASE, dtype=torch.float16),
    "bf16, all": replace(_PACKED, dtype=torch.bfloat16, initial_state=True),
    "tiles": _TILES,
    "tiles, bf16": replace(_TILES, dtype=torch.bfloat16),
    "tiles, not aligned": replace(_TILES, dtype=torch.bfloat16, length=197),
    "tiles, n=8": replace(_TILES, dtype=torch.float16, n=8),
    "tiles, n=40": replace(_TILES, dtype=torch.bfloat16, n=40, initial_state=True),
    "tiles, channel last": replace(_TILES, layout="channel last"),
    "tiles, bf16, channel last": replace(_TILES, layout="channel last", dtype=torch.bfloat16),
    "tiles, n=8, channel last": replace(_TILES, layout="channel last", dtype=torch.float16, n=8),
    "channel last": replace(BASE, layout="channel last"),
    "stride 0": replace(BASE, layout="stride 0"),
    "sliced": replace(BASE, layout="sliced"),
    "packed": _PACKED,
    "packed, initial state": replace(_PACKED, initial_state=True),
    "packed, groups": replace(_PACKED, groups_B=2, groups_C=2, initial_state=True),
    "packed, constant B": replace(_PACKED, groups_B=0, initial_state=True),
    "holes": replace(_PACKED, packing="holes", initial_state=True),
    "masked": replace(_PACKED, packing="masked", initial_state=True),
    "returning": replace(_PACKED, packing="returning", initial_state=True),
    "shared by rows": replace(_PACKED, packing="shared", initial_state=True, b=3, d=70),
    "all padding": replace(_PACKED, packing="padding", initial_state=True),
    "complex": replace(BASE, complex_A=True, length=17, d=4, n=3),
    "complex, constant": replace(BASE, complex_A=True, groups_B=0, groups_C=0, length=9, d=4, n=3),
    "complex, states": replace(_PACKED, complex_A=True, initial_state=True, length=17),
}


def make_seq_idx(kind: str, b: int, length: int) -> tuple[Tensor, int]:
    """(seq_idx, number of states) of each named kind of packing."""
    steps = torch.arange(length)
    if kind == "packed":
        ids = torch.stack([steps * 3 // max(1, length) + 3 * i for i in range(b)])
        return ids.int(), 3 * b + 1  # the last state belongs to an empty sequence
    if kind == "holes":
        ids, states = make_seq_idx("packed", b, length)
        ids[:, ::4] = -1
        ids[:, -3:] = -7
        return ids, states
    if kind == "returning":  # 0 1 0 1 in one row, 2 3 2 3 in the next: each run starts anew
        return ((steps // 7 % 2).expand(b, -1) + 2 * torch.arange(b)[:, None]).int(), 2 * b
    if kind == "shared":  # every row has the same numbers
        return (steps // 10).expand(b, -1).int(), length // 10 + 1
    if kind == "masked":
        rows = [torch.where((steps >= 2 * i) & (steps < length - i), i, -1) for i in range(b)]
        return torch.stack(rows).int(), b
    return torch.full((b, length), -1, dtype=torch.int32), b


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channel last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "stride 0":
        return x[:, :1].expand(x.shape)
    if layout == "sliced":
        return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    return x


def make_inputs(case: ScanCase, device: str = "cpu") -> dict:
    """Keyword arguments of selective_scan_fn for a row, the same numbers every time."""
    g = torch.Generator().manual_seed(0)
    b, d, length, n = case.b, case.d, case.length, case.n

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g)

    real = torch.float64 if case.dtype == torch.float64 else torch.float32
    A = 0.2 * uniform(d, n) if case.positive_A else -0.05 - uniform(d, n)
    A = torch.complex(A, normal(d, n)) if case.complex_A else A.to(real)

    def projection(groups: int) -> Tensor:
        if groups == 0:
            return (
                torch.complex(normal(d, n), normal(d, n))
                if case.complex_A
                else normal(d, n).to(real)
            )
        last = 2 * length if case.complex_A else length
        shape = (b, n, last) if case.three_dims else (b, groups, n, last)
        x = normal(*shape).to(case.dtype)
        return (
            x
            if case.layout == "contiguous" or case.three_dims
            else _laid_out(x.flatten(0, 1), case.layout).unflatten(0, (b, groups))
        )

    inputs = {
        "u": _laid_out(normal(b, d, length).to(case.dtype), case.layout),
        "delta": _laid_out((0.5 * uniform(b, d, length)).to(case.dtype), case.layout),
        "A": A,
        "B": projection(case.groups_B),
        "C": projection(case.groups_C),
        "D": normal(d).to(real) if case.D else None,
        "z": _laid_out(normal(b, d, length).to(case.dtype), case.layout) if case.z else None,
        # Without softplus a negative delta would make states grow, and with them every error.
        "delta_bias": uniform(d).to(real) - 0.5 * case.softplus if case.delta_bias else None,
        "delta_softplus": case.softplus,
    }
    states = b
    if case.packing:
        inputs["seq_idx"], states = make_seq_idx(case.packing, b, length)
        inputs["num_sequences"] = states
    if case.initial_state:
        state = normal(states, d, n).to(real)
        inputs["initial_state"] = (
            torch.complex(state, normal(states, d, n)) if case.complex_A else state
        )
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
