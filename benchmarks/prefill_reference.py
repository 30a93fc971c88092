"""Prefill with the pure PyTorch reference against transformers' own path, in one run.

    python benchmarks/prefill_reference.py --threads 2
    python benchmarks/prefill_reference.py --threads 2 --csv prefill.csv

Both models have mamba-130m's shape and the same random weights, fill their caches and give the last
position's logits, which must agree before anything is timed. transformers would take its ops from
any importable mamba_ssm: here they are taken out, so that its own PyTorch code runs. Rounds are
interleaved; on a shared machine only the ratio of the medians means something.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import inspect
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

import mamba_ssm
from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.checkpoint_format import mamba_ssm_to_hf_config, mamba_ssm_to_hf_state_dict
from mamba_ssm.utils.generation import InferenceParams

SHAPE = {"d_model": 768, "n_layer": 24, "vocab_size": 50277}
OWN_PATH = (
    "mamba_inner_fn",
    "mamba_selective_scan",
    "mamba_selective_state_update",
    "causal_conv1d_fn",
    "causal_conv1d_update",
)


def transformers_on_its_own(model: MambaLMHeadModel) -> torch.nn.Module:
    """transformers' model with the same weights, running none of this library's ops."""
    import transformers
    from transformers.models.mamba import modeling_mamba

    for name in OWN_PATH:
        setattr(modeling_mamba, name, inspect.unwrap(getattr(modeling_mamba, name)))
    config = mamba_ssm_to_hf_config(dataclasses.asdict(model.config))
    other = transformers.MambaForCausalLM(transformers.MambaConfig(**config))
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    missing, unexpected = other.load_state_dict(mamba_ssm_to_hf_state_dict(state), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    other.tie_weights()
    return other.eval()


def contestants(length: int, backend: str) -> dict[str, Callable[[], Tensor]]:
    """By name, functions that prefill a prompt and return the last position's logits (1, V)."""
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(**SHAPE)).eval()
    other = transformers_on_its_own(model)
    ids = torch.randint(0, SHAPE["vocab_size"], (1, length))

    def ours() -> Tensor:
        params = InferenceParams(length, 1, key_value_memory_dict={})
        params.key_value_memory_dict = model.allocate_inference_cache(1, length)
        with mamba_ssm.backend(backend):
            return model(ids, inference_params=params, num_last_tokens=1).logits[:, -1]

    def theirs() -> Tensor:
        return other(ids, use_cache=True, logits_to_keep=1).logits[:, -1]

    return {f"mamba_ssm {backend}": ours, "transformers": theirs}


def interleaved(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in every round; who goes first alternates."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in list(runs) if i % 2 == 0 else reversed(list(runs)):
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this checkout, "-dirty" with uncommitted changes, "" outside one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and append rows to the CSV file if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=512, help="prompt tokens (default: 512)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--backend", choices=("reference", "native", "auto"), default="reference")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    import transformers

    with torch.inference_mode():
        runs = contestants(args.length, args.backend)
        logits = [run() for run in runs.values()]  # the warm-up as well
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
        seconds = interleaved(runs, args.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        {
            "date": date.today().isoformat(),
            "commit": commit(),
            "cpu": cpu_model(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "length": args.length,
            "rounds": args.rounds,
            "implementation": name,
            "median_s": f"{median:.3f}",
            "min_s": f"{min(seconds[name]):.3f}",
            "max_s": f"{max(seconds[name]):.3f}",
            "tokens_per_s": f"{args.length / median:.1f}",
            "times_transformers": f"{medians['transformers'] / median:.2f}",
        }
        for name, median in medians.items()
    ]
    for row in rows:
        print(
            f"{row['implementation']:22} {row['median_s']} s ({row['min_s']} to {row['max_s']}), "
            f"{row['tokens_per_s']} tokens/s, {row['times_transformers']} x transformers"
        )
    if args.csv:
        new = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
