"""What the scripts of the two synthetic tasks share: options, records and pictures."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import training_files as files
from torch import nn

import mamba_ssm


def make_parser(description: str, presets: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=sorted(presets), default="paper", help="ci: small, for two CPU cores")
    add("--out", required=True, metavar="DIR", help="folder of checkpoints, metrics.json, picture")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--require", action="store_true", help="exit with status 1 if a stated accuracy is missed")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check. Exits with status 2 and a message on a bad option."""
    args = parser.parse_args(argv)
    try:
        args.device = torch.device(args.device)
    except RuntimeError:
        parser.error(f"--device: torch knows no device {args.device!r}; use cpu, cuda or cuda:N")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this torch sees no CUDA device; use --device cpu")
    present = sorted(Path(args.out).glob("*.pt")) if Path(args.out).is_dir() else []
    if args.resume and not present:
        parser.error(f"--resume: {args.out} holds no checkpoint; start the run without --resume")
    if present and not args.resume:
        parser.error(f"{args.out} already holds a run; add --resume, or choose another --out")
    words = list(sys.argv[1:] if argv is None else argv)
    args.command = shlex.join(["python", f"examples/{parser.prog}", *words])
    return args


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader of metrics.json needs to know about how the figures came about."""
    on_gpu = args.device.type == "cuda"
    return {
        "command": args.command,
        "seed": args.seed,
        "device": torch.cuda.get_device_name(args.device) if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mamba_ssm": mamba_ssm.__version__,
        "backends": {
            row["op"]: row["backend"]
            for row in mamba_ssm.ops.backend.report()
            if row["device"] == args.device.type and row["dtype"] == "float32"
        },
    }


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def save_figure(figure: Any, path: Path) -> None:
    figure.tight_layout()
    files.replace_file(path, lambda partial: figure.savefig(partial, format="png", dpi=110))


def new_figure(width: float = 7.0, height: float = 4.0, columns: int = 1) -> tuple[Any, Any] | None:
    """(figure, axes), or None with a message where matplotlib is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no picture: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(ncols=columns, figsize=(width, height))


def verdict(rows: Sequence[tuple[str, float, str, float]]) -> bool:
    """Print (what, measured, "≥" or "<", bound) lines; whether all of them hold."""
    good = True
    for what, measured, relation, bound in rows:
        holds = measured >= bound if relation == "≥" else measured < bound
        good &= holds
        print(f"{what}: {measured:.2%}, stated {relation} {bound:.2%}: {'yes' if holds else 'NO'}")
    return good
