"""Selective copying (arXiv 2312.00752, section 4.1, table 1): selection is what makes it possible.

Trains three two-layer models: Mamba, S6 without gating, and Mamba with a time-invariant state space
model, which cannot tell data from noise. Writes metrics.json and a picture.

    python examples/selective_copying.py --out runs/copying              # a GPU, minutes
    python examples/selective_copying.py --preset ci --out runs/copying  # two CPU cores, a minute

Training goes through lengths that grow to the full one, and each model has the same steps at most.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import synthetic_options as options
import torch
import training_files as files
from synthetic_models import DESCRIPTIONS, LAYERS, build_model
from synthetic_tasks import VOCAB_SIZE, SelectiveCopying
from synthetic_training import NEVER, Recipe, Stage, Trainer, accuracy

# What the paper's table 1 says, in per cent.
PAPER = {"mamba": 99.8, "no_gate": 97.0, "time_invariant": 56.4}
D_MODEL, N_LAYER = 64, 2


def paper_recipe() -> Recipe:
    lengths = ((64, 8000), (256, 6000), (1024, 3000))
    stages = [Stage(SelectiveCopying(length), 64, steps, 0.999) for length, steps in lengths]
    # Of fixed length, so that the learning rate does fall to 0.
    stages.append(Stage(SelectiveCopying(4096), 64, 2000, NEVER))
    return Recipe(tuple(stages), lr=2e-3, last_lr_ratio=0.0)


def ci_recipe() -> Recipe:
    stages = (
        Stage(SelectiveCopying(16, memorize=4), 16, 700, 0.95),
        Stage(SelectiveCopying(128, memorize=4), 16, 500, 0.98),
    )
    return Recipe(stages, lr=5e-3, last_lr_ratio=0.1)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "recipe": paper_recipe,
        "models": ("mamba", "no_gate", "time_invariant"),
        "test": (64, 32),  # batch size, batches
        "stated": {"mamba": ("≥", 0.995), "no_gate": ("≥", 0.97), "time_invariant": ("<", 0.75)},
    },
    "ci": {
        "recipe": ci_recipe,
        "models": ("mamba", "time_invariant"),
        "test": (64, 8),
        "stated": {"mamba": ("≥", 0.90), "time_invariant": ("<", 0.75)},
    },
}


def run_model(kind: str, args: argparse.Namespace, preset: dict[str, Any]) -> dict[str, Any]:
    """Train one model, or take up what is left of its training; its part of the metrics."""
    model = build_model(kind, VOCAB_SIZE, D_MODEL, N_LAYER, args.seed, args.device)
    trainer = Trainer(model, preset["recipe"](), args.seed)
    checkpoint = Path(args.out) / f"{kind}.pt"
    if args.resume and checkpoint.exists():
        trainer.load_state(files.load_checkpoint(checkpoint))
    trainer.run(
        lambda: files.save_checkpoint(checkpoint, trainer.state()), label=DESCRIPTIONS[kind]
    )
    final = trainer.recipe.stages[-1].task
    torch.manual_seed(args.seed + 1_000_003)  # other examples than those of the training
    test = accuracy(model, final, *preset["test"], args.device)
    return {
        "parameters": options.count_parameters(model),
        "length": final.length,
        "memorize": final.memorize,
        "test": test,
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 2),
        "steps_per_second": trainer.speeds(),
        "history": trainer.history,
    }


def draw(metrics: dict[str, Any], path: Path) -> None:
    """Test accuracies beside the paper's, and the accuracy during training."""
    made = options.new_figure(9.5, 3.8, columns=2)
    if made is None:
        return
    figure, (bars, curves) = made
    kinds = list(metrics["models"])
    for shift, label, values in (
        (-0.2, "this library", [100 * metrics["models"][k]["test"]["accuracy"] for k in kinds]),
        (0.2, "the paper (length 4096)", [PAPER[k] for k in kinds]),
    ):
        places = [i + shift for i in range(len(kinds))]
        drawn = bars.bar(places, values, width=0.4, label=label)
        bars.bar_label(drawn, fmt="%.1f", fontsize=8)
    bars.set_xticks(range(len(kinds)), [DESCRIPTIONS[k] for k in kinds], fontsize=8)
    bars.set(ylabel="accuracy, %", ylim=(0, 118))
    bars.legend(fontsize=8, loc="upper right")
    for kind in kinds:
        history = metrics["models"][kind]["history"]
        steps, values = [h["step"] for h in history], [100 * h["accuracy"] for h in history]
        curves.plot(steps, values, label=DESCRIPTIONS[kind], linewidth=1)
    curves.set(xlabel="training step (lengths grow)", ylabel="training accuracy, %")
    curves.grid(alpha=0.3)
    curves.legend(fontsize=8)
    options.save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = options.make_parser(__doc__.split("\n\n")[0], PRESETS)
    parser.add_argument("--models", nargs="+", choices=LAYERS, help="default: the preset's")
    args = options.parse(parser, argv)
    preset = PRESETS[args.preset]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    metrics = {"task": "selective copying", **options.environment(args), "models": {}}
    try:
        for kind in args.models or preset["models"]:
            metrics["models"][kind] = run_model(kind, args, preset)
            files.write_json(out / "metrics.json", metrics)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"selective_copying.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    draw(metrics, out / "selective_copying.png")
    stated = preset["stated"]
    rows = [
        (DESCRIPTIONS[kind], result["test"]["accuracy"], *stated[kind])
        for kind, result in metrics["models"].items()
        if kind in stated
    ]
    if not options.verdict(rows) and args.require:
        sys.exit(1)
    return metrics


if __name__ == "__main__":
    main()
