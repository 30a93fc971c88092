"""transformers' Mamba models: their own path, this library's ops, and its convolution as well.

    python benchmarks/clients.py --threads 2
    python benchmarks/clients.py --device cuda --dtype bfloat16 --csv clients.csv

Random weights. Each case's results must agree before anything is timed; rounds are interleaved, and
the ratio of the medians is what counts. Needs transformers 5.16 or newer, whose files are switched
from one path to the other.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import inspect
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
from measuring import commit, cpu_model
from torch import Tensor, nn

import mamba_ssm.compat

KINDS = {"Mamba": "mamba", "FalconMamba": "falcon_mamba", "Jamba": "jamba"}
SCAN_OPS = ("mamba_inner_fn", "mamba_selective_scan", "mamba_selective_state_update")
CONV_OPS = ("causal_conv1d_fn", "causal_conv1d_update")
PATHS = ("transformers", "ours", "ours + conv")
VOCAB = 1024


class Client:
    """One model and the functions that its file may use."""

    def __init__(self, kind: str, layers: int, width: int, device: str, dtype: torch.dtype) -> None:
        import transformers

        # Before the models' files are imported, which decide then.
        mamba_ssm.compat.causal_conv1d()
        name = KINDS[kind]
        self.file = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        self.functions = {n: getattr(self.file, n) for n in (*SCAN_OPS, *CONV_OPS)}
        if not all(hasattr(function, "__wrapped__") for function in self.functions.values()):
            sys.exit(f"clients.py: error: transformers {transformers.__version__} is too old: 5.16")
        options = {"hidden_size": width, "num_hidden_layers": layers}
        if kind == "Jamba":
            options |= {
                "intermediate_size": 2 * width, "num_attention_heads": 8, "num_key_value_heads": 8,
                "num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 4,
                "attn_layer_offset": 1,
            }  # fmt: skip
        ids = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**ids | options)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        self.model: nn.Module = model.to(device, dtype)

    def use(self, path: str) -> None:
        """Switch the model's file to one of PATHS."""
        for name, function in self.functions.items():
            own = path == "transformers" or (name in CONV_OPS and path == "ours")
            setattr(self.file, name, inspect.unwrap(function) if own else function)

    def forward(self, x: Tensor) -> Tensor:
        """Logits without gradients."""
        with torch.no_grad():
            return self.model.eval()(x, use_cache=False).logits

    def train(self, x: Tensor) -> Tensor:
        """Loss and a whole backward pass."""
        self.model.zero_grad(set_to_none=True)
        loss = self.model.train()(x, labels=x, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def generate(self, x: Tensor) -> Tensor:
        """32 greedy tokens after the first 32 of x."""
        x = x[:, :32]
        options = {"attention_mask": torch.ones_like(x), "do_sample": False}
        return self.model.eval().generate(x, max_new_tokens=32, min_new_tokens=32, **options)


def timed(work: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Seconds of one call."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative, of the whole tensor."""
    difference = actual.float() - expected.float()
    return (difference.norm() / expected.float().norm()).item()


def check(kind: str, work: str, path: str, result: Tensor, own: Tensor, exact: Tensor) -> None:
    """The result of a path is as near the exact one as transformers' own is.

    `exact` is transformers' own in fp32; of a model in fp32 that is `own` itself. Raises
    AssertionError where it is not. FalconMamba's training is left out: with the fused op it is
    another function in transformers itself; so is bf16 text, where one rounding changes it.
    """
    if (kind, work) == ("FalconMamba", "train"):
        return
    if work == "generate":
        assert result.shape == own.shape
        assert result.dtype == torch.int64
        return
    rounding = 1e-3 if own is exact else 2.0**-8
    off, bound = error(result, exact), 2 * error(own, exact) + rounding
    assert off < bound, f"{kind}, {work}, {path}: relative error {off:.1e}, allowed {bound:.1e}"


def measure(args: argparse.Namespace, kind: str) -> list[dict[str, str]]:
    """Rows of one model."""
    dtype = getattr(torch, args.dtype)
    client = Client(kind, args.layers, args.width, args.device, dtype)
    x = torch.randint(2, VOCAB, (args.batch, args.length), device=args.device)
    rows = []
    for work in args.work.split(","):
        call, seconds = getattr(client, work), {path: [] for path in PATHS}
        client.use("transformers")
        own = exact = call(x)
        if dtype != torch.float32 and work != "generate":
            client.model.float()
            exact = call(x)
            client.model.to(dtype)
        for path in PATHS:  # the warm-up as well
            client.use(path)
            check(kind, work, path, call(x), own, exact)
        for _ in range(args.rounds):
            for path in PATHS:
                client.use(path)
                seconds[path].append(timed(call, x))
        own = statistics.median(seconds["transformers"])
        for path in PATHS:
            median = statistics.median(seconds[path])
            rows.append(
                {
                    "model": kind, "work": work, "path": path, "median_ms": f"{1e3 * median:.1f}",
                    "min_ms": f"{1e3 * min(seconds[path]):.1f}",
                    "times_transformers": f"{own / median:.2f}",
                }
            )  # fmt: skip
            print(*rows[-1].values(), sep="\t", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the rows to a CSV file if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--models", default=",".join(KINDS), help="default: all three")
    parser.add_argument("--work", default="forward,train,generate")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="hidden_size (default: 256)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [row for kind in args.models.split(",") for row in measure(args, kind)]
    if args.csv:
        import transformers

        about = {
            "date": date.today().isoformat(),
            "commit": commit(),
            "device": torch.cuda.get_device_name() if args.device != "cpu" else cpu_model(),
            "threads": str(torch.get_num_threads()),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "shape": f"{args.layers} x {args.width}, batch {args.batch} x {args.length}",
            "dtype": args.dtype,
            "rounds": str(args.rounds),
        }
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*about, *rows[0]])
            writer.writeheader()
            writer.writerows(about | row for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
