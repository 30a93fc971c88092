"""Speed of the embedded model's training step on a GPU, as a share of the card's GEMM speed too.

    python benchmarks/training.py --csv benchmarks/results/training.csv

The step is that of `examples/train_lm.py --preset embedded --amp bf16`, on random text, with and
without a CUDA graph. Its arithmetic counts as 6 operations per parameter and token, which leaves
the scan out; the GEMM speed is measured here, with bf16 matrices of 8192 x 8192.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import train_lm
import train_options
from corpus import Document

GEMM_SIZE = 8192


def seconds_per_call(call: Callable[[], Any], calls: int, rounds: int = 5) -> float:
    """Median over rounds of the time of a call, `calls` of them in flight together."""
    for _ in range(6):
        call()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def gemm_tflops() -> float:
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device="cuda").bfloat16() for _ in range(2))
    return 2 * GEMM_SIZE**3 / seconds_per_call(lambda: a @ b, calls=20) / 1e12


def measure(options: Sequence[str], calls: int) -> dict[str, Any]:
    """One row: the training step with these options of train_lm.py."""
    args = train_options.parse_options("", [*options, "--out", "unused"])
    draw = np.random.default_rng(0)
    documents = [
        Document(f"{i}.txt", draw.integers(0, 256, 150_000, dtype=np.uint8).tobytes())
        for i in range(8)
    ]
    trainer = train_lm.Trainer(args, documents)
    torch.cuda.reset_peak_memory_stats()
    seconds = seconds_per_call(trainer.train_step, calls)
    tokens = args.batch_size * args.seq_len
    parameters = sum(p.numel() for p in trainer.model.parameters())
    return {
        "implementation": "CUDA graph" if args.graph else "eager",
        "batch": args.batch_size,
        "length": args.seq_len,
        "parameters": parameters,
        "ms_per_step": f"{seconds * 1e3:.3f}",
        "tokens_per_s": round(tokens / seconds),
        "model_tflops": f"{6 * parameters * tokens / seconds / 1e12:.2f}",
        "peak_mib": torch.cuda.max_memory_allocated() >> 20,
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--csv", metavar="FILE", help="append the rows to this file")
    parser.add_argument("--calls", type=int, default=20, help="steps a round, of five rounds")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device; the benchmark is about GPUs")
    torch.manual_seed(0)
    peak = gemm_tflops()
    about = {
        "date": date.today().isoformat(),
        "commit": measuring.commit(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    rows = []
    for graph in ("--graph", "--no-graph"):
        row = measure(["--preset", "embedded", "--amp", "bf16", graph], args.calls)
        share = float(row["model_tflops"]) / peak
        rows.append(about | row | {"gemm_tflops": f"{peak:.0f}", "of_gemm": f"{share:.4f}"})
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if args.csv:
        path = Path(args.csv)
        new = not path.exists()
        with open(path, "a", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, rows[0].keys())
            if new:
                writer.writeheader()
            writer.writerows(rows)
    return rows


if __name__ == "__main__":
    main()
