"""The ops on a GPU: medians, against a bandwidth floor measured in the same run and the reference.

    python benchmarks/gpu_ops.py                       # everything, less than two minutes
    python benchmarks/gpu_ops.py --cases conv,norm --rounds 50 --csv none

Single calls are timed with CUDA events, on a cold L2 cache (see gpu_measuring.py). The forward runs
without gradients, the backward alone. The reference's figures are those of state-spaces/mamba
2.3.2.post1 and causal-conv1d 1.6.1, taken on one H200 with torch 2.11.0+cu130; so are the targets.
A card with less bandwidth is slower by about the ratio of the floors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import gpu_cases_conv_norm
import gpu_cases_scan
import torch
from gpu_measuring import GpuRow, Timer, facts, table, write_csv

CASES = {
    "conv": gpu_cases_conv_norm.conv,
    "norm": gpu_cases_conv_norm.norm,
    "scan": gpu_cases_scan.scan,
    "million": gpu_cases_scan.million,
}
RESULTS = Path(__file__).resolve().parent / "results"


def _cases(text: str) -> list[str]:
    names = list(CASES) if text == "all" else text.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(unknown)}; there are {', '.join(CASES)}, or all"
        )
    return names


def parser() -> argparse.ArgumentParser:
    """The command line."""
    described = "".join(f"  {name:9} {works.__doc__}\n" for name, works in CASES.items())
    result = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"cases:\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--cases", type=_cases, default=_cases("all"), help="comma-separated, or all"
    )
    result.add_argument("--rounds", type=int, default=25, help="calls of each case (default: 25)")
    result.add_argument(
        "--csv",
        default=str(RESULTS / f"gpu_ops_{date.today().isoformat()}.csv"),
        help="append the rows here, or none (default: %(default)s)",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print the table, write the CSV file; 1 without a GPU."""
    args = parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_ops.py: no CUDA device is available to torch", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    timer = Timer(args.rounds)
    about = facts(timer.bandwidth)
    print("  ".join(f"{key} {value or 'none'}" for key, value in about.items()), flush=True)
    rows: list[GpuRow] = []
    for name in args.cases:
        rows += [timer.row(work) for work in CASES[name]()]
        torch.cuda.empty_cache()
    print(table(rows))
    if args.csv != "none":
        write_csv(Path(args.csv), rows, about)
        print(f"written: {args.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
