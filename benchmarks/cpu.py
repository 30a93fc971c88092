"""This library on a CPU against transformers, mamba.py and llama.cpp, on the same random weights.

    python benchmarks/cpu.py                                  # everything, less than ten minutes
    python benchmarks/cpu.py --cases decode,prefill --rounds 9 --threads 2
    python benchmarks/cpu.py --cases scan --csv none

Peers, none of which is needed: pip install transformers mambapy llama-cpp-python gguf
(llama-cpp-python compiles llama.cpp for this very machine, in minutes).

Before a model is timed its logits are compared with ours. All contestants of a window run in turn,
round after round; ratios are medians over the rounds of (peer's time / our time), because memory
bandwidth and clocks drift. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import cases_lm
import cases_op
import cases_parts
import torch
from cases_lm import Bench
from measuring import Row, facts, table, write_csv
from models import say

import mamba_ssm

CASES: dict[str, Callable[[Bench], list[Row]]] = {
    "decode": cases_lm.decode,
    "decode16": cases_lm.decode16,
    "prefill": cases_lm.prefill,
    "long": cases_lm.long,
    "client": cases_lm.client,
    "370m": cases_lm.larger,
    "block": cases_op.block,
    "scan": cases_op.scan,
    "million": cases_lm.million,
    "choice": cases_parts.choice,
    "integers": cases_parts.integers,
    "segments": cases_parts.segments,
    "linears": cases_parts.linears,
}
# These run on the shape that was asked for; their targets are those of the 130m shape.
OF_THE_SHAPE = ("decode", "decode16", "prefill")
RESULTS = Path(__file__).resolve().parent / "results"


def _cases(text: str) -> list[str]:
    names = list(CASES) if text == "all" else text.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(unknown)}; there are {', '.join(CASES)}, or all"
        )
    return names


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    described = "".join(
        f"  {name:9} {run.__doc__.splitlines()[0]}\n" for name, run in CASES.items()
    )
    result = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"cases:\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--cases", type=_cases, default=_cases("all"), help="comma-separated, or all"
    )
    result.add_argument("--rounds", type=_positive, default=7, help="most rounds (default: 7)")
    result.add_argument(
        "--threads", type=_positive, default=os.cpu_count(), help="default: all cores"
    )
    result.add_argument("--shape", choices=("130m", "370m", "tiny"), default="130m")
    result.add_argument(
        "--budget",
        type=float,
        default=40,
        help="seconds for the rounds of one window (default: 40)",
    )
    result.add_argument("--json", type=Path, help="write the rows and the facts here as well")
    result.add_argument(
        "--csv",
        default=str(RESULTS / f"cpu_{date.today().isoformat()}.csv"),
        help="append the rows here, or none (default: %(default)s)",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print the table; 1 if a contestant's results are not ours."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    about = facts()
    print("  ".join(f"{key} {value or 'none'}" for key, value in about.items()), flush=True)
    if float(about["load_before"]) > 0.5:
        print(f"WARNING: the machine is busy (load {about['load_before']}): verdicts mean little")
    bench = Bench(args.threads, args.rounds, args.shape, args.budget)
    rows: list[Row] = []
    with mamba_ssm.backend("auto"):
        for name in args.cases:
            start = time.perf_counter()
            say(f"{name}: {CASES[name].__doc__.splitlines()[0]}")
            found = CASES[name](bench)
            if name in OF_THE_SHAPE and args.shape != "130m":
                found = [replace(row, target="", verdict="") for row in found]
            rows += found
            print(f"\n{table(found)}\n({name}: {time.perf_counter() - start:.0f} s)", flush=True)
    for shape in list(bench.labs):
        bench.free(shape)
    print(f"\n{table(rows)}")
    judged = [row.verdict for row in rows if row.target]
    print(f"\ntargets: {judged.count('met')} met, {judged.count('MISSED')} missed", end="")
    print(f", {len(judged) - judged.count('met') - judged.count('MISSED')} without a verdict")
    for problem in bench.problems:
        print(f"WRONG: {problem}")
    if args.csv != "none":
        write_csv(Path(args.csv), rows, about)
        print(f"written: {args.csv}")
    if args.json:
        args.json.write_text(
            json.dumps({"facts": about, "rows": [asdict(r) for r in rows]}, indent=1)
        )
    return 1 if bench.problems else 0


if __name__ == "__main__":
    sys.exit(main())
