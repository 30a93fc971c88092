"""What a training run leaves on disk: its checkpoint, its metrics, its loss curve, its model.

Every file is written under a temporary name and then renamed, so a run that is killed leaves the
previous version whole.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

FP32_PARAMETERS = ("A_log", "D")  # the recurrence's own parameters lose too much in 16 bits


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then move it there."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=True) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Store a training state: tensors, numbers, strings, and lists and dicts of these."""
    replace_file(path, lambda partial: torch.save(state, partial))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU. ValueError if the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error}") from error


class MetricsLog:
    """JSON lines, one per measurement; each has a "step"."""

    def __init__(self, path: Path, keep_until: int | None = None) -> None:
        """Start an empty log, or continue one after `keep_until`, dropping what came later."""
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if keep_until is not None and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line.endswith("}")]
            self.rows = [row for row in rows if row["step"] <= keep_until]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")


def plot_loss(rows: list[dict[str, Any]], path: Path, baseline: float | None = None) -> None:
    """Draw training and held-out bits per byte over the steps as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for key, label, style in (
        ("train_bits_per_byte", "training", {"linewidth": 0.8, "alpha": 0.7}),
        ("heldout_bits_per_byte", "held out", {"marker": "o", "markersize": 3}),
    ):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    if baseline is not None:
        axes.axhline(baseline, linestyle="--", color="grey", label="5-gram, held out")
        axes.set_ylim(0, 2.5 * baseline)
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    replace_file(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
    pyplot.close(figure)


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an exported checkpoint holds the parameter `name`."""
    return torch.float32 if name.rsplit(".", 1)[-1] in FP32_PARAMETERS else dtype


def check_export_size(model: nn.Module, dtype: torch.dtype, limit: int) -> int:
    """Bytes of the exported parameters (tied ones once). ValueError if above `limit`."""
    size = sum(p.numel() * stored_dtype(n, dtype).itemsize for n, p in model.named_parameters())
    size += 8_192 + 128 * sum(1 for _ in model.parameters())  # room for the file's header
    if size > limit:
        raise ValueError(
            f"the exported model would take about {size:,} bytes, above the limit of {limit:,}; "
            "choose a smaller --d-model or --n-layer, or raise --max-bytes"
        )
    return size


def export_model(
    model: nn.Module, directory: Path, dtype: torch.dtype, limit: int
) -> dict[str, Any]:
    """Write `model` in `dtype` as a checkpoint directory that `from_pretrained` loads.

    A_log and D stay in float32. Returns the facts to record. ValueError if a weight does not fit
    `dtype`, or if the file is above `limit` bytes.
    """
    check_export_size(model, dtype, limit)
    small = copy.deepcopy(model).cpu()
    for name, parameter in small.named_parameters():
        parameter.data = parameter.data.to(stored_dtype(name, dtype))
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} has values that {dtype} cannot hold; export in bf16")
    small.save_pretrained(str(directory))
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
    size = (directory / "model.safetensors").stat().st_size
    if size > limit:
        raise ValueError(f"{directory / 'model.safetensors'} has {size:,} bytes, limit {limit:,}")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "safetensors_bytes": size,
    }
