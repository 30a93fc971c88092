"""Induction heads (arXiv 2312.00752, section 4.1, table 2): trained at 256, right at a million.

Trains a two-layer Mamba to recall the token that followed a special one, then tests it at lengths
up to 2^20, in chunks with the state carried from one to the next, so that memory stays flat. Writes
metrics.json and a picture.

    python examples/induction_heads.py --out runs/induction              # a GPU, minutes
    python examples/induction_heads.py --preset ci --out runs/induction  # two CPU cores, a minute
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import synthetic_options as options
import torch
import training_files as files
from synthetic_models import build_model
from synthetic_tasks import VOCAB_SIZE, InductionHeads
from synthetic_training import NEVER, Recipe, Stage, Trainer
from torch import nn

D_MODEL, N_LAYER = 64, 2
# The step sizes start between these: a state that is to live for a million steps has to be touched
# by each of them as little as that. (The layer's defaults are 1e-3 to 1e-1.)
STEP_SIZES = {"dt_min": 1e-6, "dt_max": 1e-3, "dt_init_floor": 1e-6}


def paper_recipe() -> Recipe:
    # The last stage is of fixed length, so that the learning rate does fall.
    stages = (
        Stage(InductionHeads(64), 64, 4_000, 0.995),
        Stage(InductionHeads(256), 64, 4_000, 1.0),
        Stage(InductionHeads(256), 64, 12_000, NEVER),
    )
    return Recipe(stages, lr=2e-3, head_decay=10.0, sink=2.0, last_lr_ratio=0.02, check_every=500)


def ci_recipe() -> Recipe:
    stages = (Stage(InductionHeads(32), 16, 1500, 0.99), Stage(InductionHeads(64), 16, 1000, 0.999))
    return Recipe(stages, lr=2e-3, head_decay=5.0)


PRESETS: dict[str, dict[str, Any]] = {
    # powers: lengths 2^p to test; examples: at each; watch: (length, examples) to be solved without
    # an error for the training to end early, on examples of their own; fixed_norm: the last norm's
    # weight stays 1, so that with the decayed output projection the logits cannot grow.
    "paper": {
        "recipe": paper_recipe, "powers": range(6, 21), "examples": 1024, "chunk": 4096,
        "watch": (), "stated": 0.999, "fixed_norm": True,
    },
    "ci": {
        "recipe": ci_recipe, "powers": range(6, 11), "examples": 256, "chunk": 256,
        "watch": ((2**10, 128),), "stated": 0.98, "fixed_norm": False,
    },
}  # fmt: skip


@torch.inference_mode()
def streamed_accuracy(
    model: nn.Module, length: int, examples: int, chunk: int, device: torch.device
) -> float:
    """Share of right answers at `length`, reading `chunk` tokens at a time with carried state."""
    state = None
    for ids, targets in InductionHeads(length).stream(examples, chunk, device):
        out = model(ids, num_last_tokens=1, initial_state=state, return_final_state=True)
        state, right = out.final_state, out.logits.argmax(-1) == targets
    return float(right.float().mean())


def test_lengths(
    model: nn.Module, args: argparse.Namespace, preset: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each length: accuracy, time and peak memory."""
    rows = []
    torch.manual_seed(args.seed + 1_000_003)  # other examples than those of the training
    for power in preset["powers"]:
        length, start = 2**power, time.monotonic()
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        right = streamed_accuracy(model, length, preset["examples"], preset["chunk"], args.device)
        row = {"length": length, "examples": preset["examples"], "accuracy": right}
        row["seconds"] = round(time.monotonic() - start, 3)
        if args.device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
        print(f"  2^{power} = {length:,}: {right:.2%}, {row['seconds']:.1f} s", flush=True)
        rows.append(row)
    return rows


def draw(metrics: dict[str, Any], path: Path) -> None:
    """Accuracy over the length of the test, as in the paper's table 2 and figure."""
    made = options.new_figure()
    if made is None:
        return
    figure, axes = made
    rows = metrics["test"]
    axes.plot(
        [row["length"] for row in rows],
        [100 * row["accuracy"] for row in rows],
        marker="o",
        label=f"Mamba, {metrics['parameters']:,} parameters",
    )
    axes.axvline(metrics["trained_at"], linestyle="--", color="grey", label="length of training")
    axes.axhline(100 / (VOCAB_SIZE - 1), linestyle=":", color="grey", label="chance")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="length of the test", ylabel="accuracy, %", ylim=(0, 104))
    axes.legend(loc="center right")
    axes.grid(alpha=0.3)
    options.save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = options.parse(options.make_parser(__doc__.split("\n\n")[0], PRESETS), argv)
    preset = PRESETS[args.preset]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "mamba.pt"
    torch.set_float32_matmul_precision("high")
    model = build_model("mamba", VOCAB_SIZE, D_MODEL, N_LAYER, args.seed, args.device, **STEP_SIZES)
    model.backbone.norm_f.weight.requires_grad_(not preset["fixed_norm"])
    trainer = Trainer(model, preset["recipe"](), args.seed)

    def reached() -> bool:
        """Whether the longer lengths that are watched during training are solved too."""
        for length, examples in preset["watch"]:
            with trainer.own_randomness():
                torch.manual_seed(args.seed + 2_000_003 + trainer.step)
                right = streamed_accuracy(model, length, examples, preset["chunk"], args.device)
            trainer.watched.append({"step": trainer.step, "length": length, "accuracy": right})
            if right < 1:
                return False
        return True

    try:
        if args.resume:
            trainer.load_state(files.load_checkpoint(checkpoint))
        trainer.run(
            lambda: files.save_checkpoint(checkpoint, trainer.state()), reached, label="Mamba"
        )
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"induction_heads.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    metrics = {
        "task": "induction heads",
        **options.environment(args),
        "parameters": options.count_parameters(model),
        "trained_at": trainer.recipe.stages[-1].task.length,
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 2),
        "steps_per_second": trainer.speeds(),
        "watched": trainer.watched,
        "test": test_lengths(model, args, preset),
        "history": trainer.history,
    }
    files.write_json(out / "metrics.json", metrics)
    draw(metrics, out / "induction_heads.png")
    rows = [
        (f"length {r['length']}", r["accuracy"], "≥", preset["stated"]) for r in metrics["test"]
    ]
    if not options.verdict(rows) and args.require:
        sys.exit(1)
    return metrics


if __name__ == "__main__":
    main()
