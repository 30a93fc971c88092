"""Fair timing on a shared machine: interleaved rounds, paired ratios, targets, tables, CSV files.

Clock rates and memory bandwidth drift by tens of per cent within minutes, so a figure alone says
little. Contestants of one window run in turn, round after round, who goes first alternating; a
ratio is the median over the rounds of (peer's time / our time).
"""

from __future__ import annotations

import csv
import ctypes
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

OURS = "mamba_ssm"
# Threads of other libraries' pools spin for a while after their work; they end before the next run.
_SETTLE = 0.02


@dataclass
class Contestant:
    """One implementation of the work of a contest.

    ``run`` does the work once; it may return the seconds that count (setup excluded), else the
    whole call counts. ``warm`` is a shorter run that loads everything (default: ``run`` itself).
    """

    name: str
    run: Callable[[], float | None]
    warm: Callable[[], Any] | None = None
    max_rounds: int | None = None
    seconds: list[float] = field(default_factory=list)
    peak_mb: float | None = None


@dataclass
class Target:
    """``ours`` must be ``factor`` times as fast as ``peer``; without a peer, the value is bounded.

    ``at_most`` bounds the value in the contest's unit; ``absent`` peers give no verdict.
    """

    peer: str | None = None
    factor: float | None = None
    at_most: float | None = None


@dataclass
class Contest:
    """The same work by several contestants; ``amount`` units of it per run; ``ours`` is our name.

    ``unit`` is "tokens/s" (more is better), or "ms" and "ns/update" (less is better, per run and
    per unit of work).
    """

    case: str
    unit: str
    amount: float
    contestants: list[Contestant]
    targets: list[Target] = field(default_factory=list)
    absent: list[tuple[str, str]] = field(default_factory=list)
    memory: bool = False
    ours: str = OURS


@dataclass
class Row:
    """A line of the result table."""

    case: str
    implementation: str
    value: float | None = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    ours_is_times: float | None = None
    target: str = ""
    verdict: str = ""
    peak_mb: float | None = None
    note: str = ""


def settle() -> None:
    """Let the threads of whoever ran before go to sleep."""
    time.sleep(_SETTLE)


def _timed(contestant: Contestant) -> float:
    settle()
    start = time.perf_counter()
    inner = contestant.run()
    elapsed = time.perf_counter() - start
    return elapsed if inner is None else inner


def interleave(contests: Iterable[Contest], rounds: int, budget: float) -> None:
    """Run all contestants of a window in turn, into their ``seconds``.

    The first round always runs; no further round starts that would not fit in ``budget`` seconds.
    """
    runners = [c for contest in contests for c in contest.contestants]
    for contestant in runners:
        (contestant.warm or contestant.run)()
    start = time.perf_counter()
    longest = 0.0
    for i in range(rounds):
        began = time.perf_counter()
        if i and began - start + longest > budget:
            break
        for contestant in runners if i % 2 == 0 else reversed(runners):
            if i < (contestant.max_rounds or rounds):
                contestant.seconds.append(_timed(contestant))
        longest = max(longest if i > 1 else 0.0, time.perf_counter() - began)


def _status_kb(name: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(name + ":")]
    return float(found[0]) if found else None


def resident_mb() -> float | None:
    """Resident memory of this process in MB, after giving freed memory back (Linux only)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return None
    kb = _status_kb("VmRSS")
    return None if kb is None else kb * 1024 / 1e6


def peak_memory_mb(run: Callable[[], Any]) -> float | None:
    """Peak resident memory of one call beyond the start, in MB; None where it cannot be told."""
    start = resident_mb()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        run()
        return None
    run()
    peak = _status_kb("VmHWM")
    return None if start is None or peak is None else peak * 1024 / 1e6 - start


def _value(contest: Contest, seconds: float) -> float:
    if contest.unit == "tokens/s":
        return contest.amount / seconds
    return seconds * (1e3 if contest.unit == "ms" else 1e9) / contest.amount


def _paired_ratio(peer: Contestant, ours: Contestant) -> float | None:
    pairs = list(zip(peer.seconds, ours.seconds, strict=False))
    return statistics.median(p / o for p, o in pairs) if pairs else None


def _row(contest: Contest, contestant: Contestant) -> Row:
    values = sorted(_value(contest, s) for s in contestant.seconds)
    return Row(
        contest.case,
        contestant.name,
        statistics.median(values),
        contest.unit,
        values[0],
        values[-1],
        len(values),
        peak_mb=contestant.peak_mb,
    )


def _judge_value(row: Row, bound: float) -> None:
    row.target, row.note = f"<= {bound:g} {row.unit}", "bound set for 2 Zen 4 cores"
    row.verdict = "met" if row.value is not None and row.value <= bound else "MISSED"


def rows_of(contest: Contest) -> list[Row]:
    """The result: our row, then the peers' with our ratio and the verdict on the target."""
    ours = next((c for c in contest.contestants if c.name == contest.ours), None)
    wanted = {t.peer: t for t in contest.targets}
    rows = []
    for contestant in contest.contestants:
        row = _row(contest, contestant)
        target = wanted.get(None if contestant is ours else contestant.name)
        if contestant is not ours and ours is not None:
            row.ours_is_times = _paired_ratio(contestant, ours)
            if target is not None and target.factor is not None:
                row.target = f">= {target.factor:g} x"
                row.verdict = "met" if row.ours_is_times >= target.factor else "MISSED"
        elif target is not None and target.at_most is not None:
            _judge_value(row, target.at_most)
        rows.append(row)
    for name, reason in contest.absent:
        target = wanted.get(name)
        text = "" if target is None or target.factor is None else f">= {target.factor:g} x"
        rows.append(
            Row(contest.case, name, note=reason, target=text, verdict="no verdict" * bool(text))
        )
    return rows


def measure(contests: list[Contest], rounds: int, budget: float) -> list[Row]:
    """Time one window's contests together; memory, where asked for, in runs of its own."""
    interleave(contests, rounds, budget)
    for contest in contests:
        if contest.memory:
            for contestant in contest.contestants:
                settle()
                contestant.peak_mb = peak_memory_mb(contestant.run)
    return [row for contest in contests for row in rows_of(contest)]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    head = ("case", "implementation", "median", "low-high", "unit", "ours is", "target", "", "note")
    lines = [head]
    for row in rows:
        spread = "" if row.low is None else f"{_number(row.low)}-{_number(row.high)}"
        ratio = "" if row.ours_is_times is None else f"{row.ours_is_times:.2f} x"
        memory = "" if row.peak_mb is None else f"peak +{row.peak_mb:.0f} MB"
        few = f"{row.rounds} round{'s' * (row.rounds > 1)} only" if 0 < row.rounds < 3 else ""
        note = "; ".join(filter(None, [memory, few, row.note]))
        cells = (row.case, row.implementation, _number(row.value), spread, row.unit, ratio)
        lines.append((*cells, row.target, row.verdict, note))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    text = []
    previous = None
    for line in lines:
        shown = line if line[0] != previous else ("", *line[1:])
        previous = line[0]
        padded = [cell.ljust(width) for cell, width in zip(shown, widths, strict=False)]
        text.append("  ".join([*padded, line[-1]]).rstrip())
    return "\n".join(text)


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(name: str) -> str:
    """The installed version of a distribution, "" without one."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit of this checkout, "-dirty" with uncommitted changes, "" outside one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip()


def facts() -> dict[str, str]:
    """What a figure depends on: machine, versions, threads, commit."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load_before": f"{load:.2f}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "mamba_ssm": version("mamba_ssm"),
        "transformers": version("transformers"),
        "mambapy": version("mambapy"),
        "llama_cpp_python": version("llama-cpp-python"),
    }


def write_csv(path: Path, rows: list[Row], about: dict[str, str]) -> None:
    """Append the rows, each with the facts, to a CSV file; a new file starts with the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        fields = [*asdict(rows[0]), *about]
        writer = csv.DictWriter(file, fields)
        if new:
            writer.writeheader()
        for row in rows:
            cells = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(cells | about)
