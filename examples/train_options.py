"""Command line of `train_lm.py`: options, presets, and their checks."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpus
import torch

PRESETS: dict[str, dict[str, Any]] = {
    # Seconds on two CPU cores: shows that everything works, learns words at most.
    "smoke": {
        "d_model": 64, "n_layer": 2, "seq_len": 128, "batch_size": 8, "steps": 200, "warmup": 20,
        "lr": 6e-3, "log_every": 10, "eval_every": 100, "save_every": 100, "include_tests": False,
    },
    # The model inside the package; for a GPU.
    "embedded": {
        "d_model": 256, "n_layer": 8, "seq_len": 2048, "batch_size": 16, "steps": 36_000,
        "document_starts": 0.0625, "hidden_bytes": 0.1, "warmup": 200, "lr": 3e-3,
        "min_lr_ratio": 0.02, "weight_decay": 0.3, "log_every": 50, "eval_every": 1000,
        "save_every": 2000, "include_tests": True,
    },
}  # fmt: skip
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# Options that may differ when a run is resumed: they say where, how long and how to report.
FREE_WHEN_RESUMED = {
    "preset", "text", "corpus", "include_tests", "out", "resume", "minutes", "device", "log_every",
    "eval_every", "save_every", "compile", "graph", "loss_curve", "export", "export_dtype",
    "max_bytes", "sample_prompt", "held_out_slice",
}  # fmt: skip


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="smoke", help="defaults for what follows")
    add("--out", required=True, metavar="DIR", help="folder of the run: checkpoint, metrics")
    add("--resume", action="store_true", help="continue the run in --out exactly")
    corpus.add_corpus_options(parser)
    group = parser.add_argument_group("model")
    for name, value in (("--d-model", 64), ("--n-layer", 2), ("--d-state", 16), ("--expand", 2)):
        group.add_argument(name, type=int, default=value)
    group = parser.add_argument_group("training")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--steps", type=int, help="optimizer steps; the schedule's length")
    group.add_argument("--batch-size", type=int)
    group.add_argument("--seq-len", type=int, help="tokens of each training piece")
    group.add_argument(
        "--document-starts", type=float, default=0.0, metavar="FRACTION",
        help="of the pieces of a batch, begin where a document begins",
    )  # fmt: skip
    group.add_argument(
        "--hidden-bytes", type=float, default=0.0, metavar="FRACTION",
        help="of the bytes that the model reads, are the unknown id; it still predicts them",
    )  # fmt: skip
    group.add_argument("--lr", type=float, help="peak; reached after --warmup, then a cosine")
    group.add_argument("--min-lr-ratio", type=float, default=0.05, help="last lr / --lr")
    group.add_argument("--warmup", type=int, help="steps of linear warm-up")
    group.add_argument("--weight-decay", type=float, default=0.1)
    group.add_argument("--grad-clip", type=float, default=1.0, help="norm; 0 means none")
    group.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="autocast")
    group.add_argument("--minutes", type=float, help="stop early after this long")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--compile", action="store_true", help="torch.compile the training step")
    group.add_argument(
        "--graph",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, one CUDA graph for the training step (not with --amp fp16)",
    )
    group = parser.add_argument_group("results")
    group.add_argument("--log-every", type=int, help="steps")
    group.add_argument("--eval-every", type=int, help="steps")
    group.add_argument("--save-every", type=int, help="steps")
    group.add_argument("--loss-curve", metavar="PNG", help="draw one (needs matplotlib)")
    group.add_argument("--export", metavar="DIR", help="final model (default: OUT/model)")
    group.add_argument("--export-dtype", choices=sorted(DTYPES), default="fp16")
    group.add_argument("--max-bytes", type=int, default=8_000_000, help="limit of the export")
    group.add_argument("--sample-prompt", default="import ")
    group.add_argument(
        "--held-out-slice", type=int, default=2048, help="bytes per file scored for the record"
    )
    return parser


def parse_options(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, fill in the preset, check. Exits with status 2 and a message on a bad option."""
    parser = make_parser(description)
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS[preset])
    args = parser.parse_args(argv)
    problem = _first_problem(args)
    if problem:
        parser.error(problem)
    # fp16's loss scaling decides on the host about every step; there is no graph on the CPU.
    args.graph = args.graph and args.amp != "fp16" and torch.device(args.device).type == "cuda"
    return args


def _first_problem(args: argparse.Namespace) -> str | None:
    at_least_one = (
        "d_model", "n_layer", "d_state", "expand", "steps", "batch_size", "log_every",
        "eval_every", "save_every", "max_bytes", "held_out_slice",
    )  # fmt: skip
    for name in at_least_one:
        if getattr(args, name) < 1:
            return f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
    checks = (
        (args.seq_len >= 2, f"--seq-len must be at least 2, got {args.seq_len}"),
        (args.lr > 0, f"--lr must be above 0, got {args.lr}"),
        (0 <= args.min_lr_ratio <= 1, f"--min-lr-ratio must be 0 to 1, got {args.min_lr_ratio}"),
        (
            0 <= args.document_starts <= 1,
            f"--document-starts must be 0 to 1, got {args.document_starts}",
        ),
        (
            0 <= args.hidden_bytes < 1,
            f"--hidden-bytes must be 0 to below 1, got {args.hidden_bytes}",
        ),
        (args.warmup >= 0, f"--warmup must not be negative, got {args.warmup}"),
        (args.weight_decay >= 0, f"--weight-decay must not be negative, got {args.weight_decay}"),
        (args.grad_clip >= 0, f"--grad-clip must not be negative, got {args.grad_clip}"),
        (args.minutes is None or args.minutes > 0, f"--minutes must be above 0: {args.minutes}"),
        (args.sample_prompt, "--sample-prompt must not be empty"),
        (
            not args.loss_curve or importlib.util.find_spec("matplotlib"),
            "--loss-curve needs matplotlib: pip install matplotlib",
        ),
    )
    for good, message in checks:
        if not good:
            return message
    try:
        device = torch.device(args.device)
    except RuntimeError:
        return f"--device: torch knows no device {args.device!r}; use cpu, cuda or cuda:N"
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"--device {args.device}: this torch sees no CUDA device; use --device cpu"
    checkpoint = Path(args.out) / "checkpoint.pt"
    if args.resume and not checkpoint.exists():
        return f"--resume: {checkpoint} does not exist; start the run without --resume"
    if not args.resume and checkpoint.exists():
        return f"{args.out} already holds a run; add --resume, or choose another --out"
    return None


def run_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the numbers of a run; equal ones are needed to resume it."""
    return {key: value for key, value in vars(args).items() if key not in FREE_WHEN_RESUMED}
