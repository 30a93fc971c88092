"""Timing on a GPU: CUDA events around single calls on a cold L2 cache, and what the card reaches.

Between two timed calls a buffer larger than the L2 cache is written, and a spinning kernel gives
the host time to queue the call, so that an interval holds the GPU's work and nothing of the host's.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from measuring import commit, version

import mamba_ssm

_FLUSHED = 256 << 20
# Clock cycles: longer than the host needs to queue what is timed.
_HEAD_START = 600_000


@dataclass
class GpuRow:
    """A line of the result: medians of single calls, in µs unless the unit says otherwise.

    ``floor`` is the time in which this card copies the bytes that must move, at the bandwidth
    measured in the same run; ``reference`` and ``target`` are an H200's (issue tracker's table).
    """

    case: str
    value: float
    unit: str = "us"
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    floor: float | None = None
    times_floor: float | None = None
    reference: float | None = None
    faster_than_reference: float | None = None
    target: float | None = None
    verdict: str = ""
    note: str = ""


@dataclass
class Work:
    """What to time: ``call`` does it once; ``bytes`` must be read or written for it."""

    case: str
    call: Callable[[], Any]
    bytes: int | None = None
    reference: float | None = None
    target: float | None = None
    note: str = ""


class Timer:
    """Holds the flush buffer and the measured copy bandwidth (bytes read + written per second)."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self._flush = torch.empty(_FLUSHED, dtype=torch.uint8, device="cuda")
        self.bandwidth = self._copy_bandwidth()

    def _copy_bandwidth(self) -> float:
        source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        times = self.times(lambda: target.copy_(source))
        return 2 * source.numel() / (statistics.median(times) * 1e-6)

    def times(self, call: Callable[[], Any]) -> list[float]:
        """Microseconds of each of ``rounds`` calls."""
        for _ in range(3):
            call()
        spans = []
        for _ in range(self.rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            torch.cuda._sleep(_HEAD_START)
            start.record()
            call()
            end.record()
            spans.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in spans]

    def row(self, work: Work) -> GpuRow:
        """Time it and judge it."""
        times = sorted(self.times(work.call))
        floor = None if work.bytes is None else work.bytes / self.bandwidth * 1e6
        return judged(
            GpuRow(
                work.case,
                statistics.median(times),
                low=times[0],
                high=times[-1],
                rounds=len(times),
                floor=floor,
                reference=work.reference,
                target=work.target,
                note=work.note,
            )
        )


def judged(row: GpuRow) -> GpuRow:
    """The row with its ratios and its verdict, which only an H200 can give."""
    row.times_floor = None if row.floor is None else row.value / row.floor
    row.faster_than_reference = None if row.reference is None else row.reference / row.value
    if row.target is not None:
        row.verdict = "met" if row.value <= row.target else "MISSED"
        if "H200" not in torch.cuda.get_device_name():
            row.verdict += " on another card"
    return row


def facts(bandwidth: float) -> dict[str, str]:
    """What a figure depends on."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "copy_TB_per_s": f"{bandwidth / 1e12:.2f}",
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "mamba_ssm": version("mamba_ssm") or mamba_ssm.__version__,
        "backend": "native" if mamba_ssm.ops.native.status()["cuda"][0] else "reference",
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def table(rows: list[GpuRow]) -> str:
    """The rows as aligned text."""
    head = list(GpuRow.__dataclass_fields__)
    lines = [head, *[[_cell(value) for value in asdict(row).values()] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def write_csv(path: Path, rows: list[GpuRow], about: dict[str, str]) -> None:
    """Append the rows, each with the facts, to a CSV file; a new file starts with the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*GpuRow.__dataclass_fields__, *about])
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: _cell(v) for k, v in asdict(row).items()} | about)
