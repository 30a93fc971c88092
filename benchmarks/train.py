"""Blocks, a training step and a prefill on a GPU: time, host time and memory.

    python benchmarks/train.py                        # everything, about a minute
    python benchmarks/train.py --cases block,host --csv none

Block rows are a forward and a backward under bf16 autocast of a layer with fp32 parameters, whose
input requires a gradient. GPU times are CUDA events around whole steps (their data is larger than
the L2 cache); host times are what the calls take until they return, on an idle GPU. Memory is the
peak of allocated memory beyond what is there before the step (for the language model: all of it).
The reference's figures and the targets are an H200's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from gpu_measuring import GpuRow, Timer, facts, judged, table, write_csv
from torch import Tensor

from mamba_ssm import Mamba, MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.generation import InferenceParams
from mamba_ssm.utils.graphed_step import GraphedStep
from mamba_ssm.utils.optim import param_groups

RESULTS = Path(__file__).resolve().parent / "results"


def _peak_mib(step: Callable[[], Any]) -> tuple[float, float]:
    """(peak beyond the start, peak) of allocated memory in MiB."""
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return (peak - start) / 2**20, peak / 2**20


def _step_of_block(d_model: int, batch: int, length: int, dtype: torch.dtype) -> Callable[[], None]:
    layer = Mamba(d_model, device="cuda")
    x = torch.randn(batch, length, d_model, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(batch, length, d_model, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            out = layer(x)
        out.backward(grad)
        x.grad = None
        layer.zero_grad(set_to_none=True)

    return step


def block(timer: Timer) -> Iterator[GpuRow]:
    """A block, forward + backward under autocast: d_model 768 b8 l2048, 2560 b2 l2048"""
    for d_model, batch, reference, target, memory in (
        (768, 8, 3460, 1500, 619),
        (2560, 2, 3660, 1700, 614),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            step = _step_of_block(d_model, batch, 2048, dtype)
            name = f"block d_model {d_model} b{batch} l2048, input {str(dtype).split('.')[1]}"
            times = sorted(timer.times(step))
            yield judged(
                GpuRow(
                    name,
                    statistics.median(times),
                    low=times[0],
                    high=times[-1],
                    rounds=len(times),
                    reference=reference,
                    target=target,
                )
            )
            peak = _peak_mib(step)[0]
            yield judged(
                GpuRow(f"{name}, memory", peak, "MiB", reference=memory, target=0.8 * memory)
            )


def kernels(timer: Timer) -> Iterator[GpuRow]:
    """Every kernel of a block's forward + backward in its order, from torch.profiler"""
    for d_model, batch in ((768, 8), (2560, 2)):
        step = _step_of_block(d_model, batch, 2048, torch.float32)
        for _ in range(3):
            step()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profile:
            step()
            torch.cuda.synchronize()
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        for event in sorted(events, key=lambda e: e.time_range.start):
            case = f"block d_model {d_model} b{batch} l2048, kernel {event.name[:80]}"
            yield GpuRow(case, event.time_range.elapsed_us(), rounds=1)


def host(timer: Timer) -> Iterator[GpuRow]:
    """Host time of a tiny block, forward + backward under autocast (d_model 64, b2 l64)"""
    step = _step_of_block(64, 2, 64, torch.float32)
    times = []
    for i in range(8 * timer.rounds + 20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if i >= 20:
            times.append((time.perf_counter() - start) * 1e6)
    times.sort()
    yield judged(
        GpuRow(
            "block tiny, host time",
            statistics.median(times),
            low=times[0],
            high=times[-1],
            rounds=len(times),
            reference=2763,
            target=900,
        )
    )


# Kernels by what they do, from parts of their names.
_KINDS = {
    "matrix products": ("nvjet", "gemm", "splitKreduce", "cutlass"),
    "scan": ("scan_backward", "sequential", "stream_kernel", "sum_backward"),
    "convolution": ("_channels_kernel", "_steps_kernel", "final_states"),
    "norm": ("add_norm",),
    "loss": ("SoftMax", "CrossEntropy"),
    "optimizer": ("multi_tensor_apply",),
}


def _lm_step() -> Callable[[], None]:
    config = MambaConfig(d_model=768, n_layer=24, vocab_size=50280)
    model = MambaLMHeadModel(config, device="cuda")
    optimizer = torch.optim.AdamW(
        param_groups(model, weight_decay=0.1),
        lr=torch.tensor(1e-4, device="cuda"),
        fused=True,
        capturable=True,
    )
    ids = torch.randint(config.vocab_size, (8, 2048), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def lm(timer: Timer) -> Iterator[GpuRow]:
    """A training step of the 130M language model, autocast bf16, b8 l2048, fused AdamW"""
    step = _lm_step()
    graphed = GraphedStep(step, "cuda")
    for name, call in (("", step), (", one CUDA graph", graphed)):
        name = f"LM 130M training step b8 l2048{name}"
        for _ in range(5):
            call()
        times = sorted(timer.times(call)[: timer.rounds])
        yield judged(
            GpuRow(
                name,
                statistics.median(times) / 1e3,
                "ms",
                times[0] / 1e3,
                times[-1] / 1e3,
                len(times),
                reference=114.9,
                target=50.0,
            )
        )
        if call is step:  # a graph's memory is a pool of its own
            peak = _peak_mib(step)[1] / 1024
            yield judged(GpuRow(f"{name}, memory", peak, "GiB", reference=16.6, target=11.0))


def lm_kernels(timer: Timer) -> Iterator[GpuRow]:
    """Kernels of that training step, summed by what they do: products, scan, the rest by name"""
    step = _lm_step()
    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    sums: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and "#" not in event.name:
            kind = next(
                (k for k, words in _KINDS.items() if any(w in event.name for w in words)), ""
            )
            entry = sums.setdefault(kind or event.name[:80], [0.0, 0.0])
            entry[0] += event.time_range.elapsed_us() / 1e3
            entry[1] += 1
    total = sum(value for value, _ in sums.values())
    case = "LM 130M training step b8 l2048, kernels"
    yield GpuRow(f"{case}: all", total, "ms", rounds=1)
    for kind, (value, count) in sorted(sums.items(), key=lambda item: -item[1][0]):
        if value > 0.002 * total:
            share = f"{value / total:.1%} of the kernels' time, {count:.0f} kernels"
            yield GpuRow(f"{case}: {kind}", value, "ms", rounds=1, note=share)


def prefill(timer: Timer) -> Iterator[GpuRow]:
    """Prefill, fp16, 2048 tokens, batch 1: the 130M and the 2.8B model"""
    for name, d_model, layers, reference, target in (
        ("130M", 768, 24, 14.8, None),
        ("2.8B", 2560, 64, 64.9, 30.0),
    ):
        config = MambaConfig(d_model=d_model, n_layer=layers, vocab_size=50280)
        model = MambaLMHeadModel(config, device="cuda", dtype=torch.float16).eval()
        ids = torch.randint(config.vocab_size, (1, 2048), device="cuda")
        cache = model.allocate_inference_cache(1, 2048)

        def run(model=model, ids=ids, cache=cache) -> Tensor:
            params = InferenceParams(2048, 1, key_value_memory_dict=cache)
            with torch.inference_mode():
                return model(ids, inference_params=params, num_last_tokens=1).logits

        times = []
        for i in range(timer.rounds + 3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            if i >= 3:
                times.append((time.perf_counter() - start) * 1e3)
        times.sort()
        yield judged(
            GpuRow(
                f"prefill fp16 {name} 2048 tokens b1",
                statistics.median(times),
                "ms",
                times[0],
                times[-1],
                len(times),
                reference=reference,
                target=target,
                note="wall time, host included",
            )
        )
        del model, cache, run


CASES = {
    "block": block,
    "kernels": kernels,
    "host": host,
    "lm": lm,
    "lm_kernels": lm_kernels,
    "prefill": prefill,
}


def _cases(text: str) -> list[str]:
    names = list(CASES) if text == "all" else text.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(unknown)}; there are {', '.join(CASES)}, or all"
        )
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print the table, write the CSV file; 1 without a GPU."""
    described = "".join(f"  {name:10} {rows.__doc__}\n" for name, rows in CASES.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"cases:\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=_cases, default=list(CASES), help="comma-separated, or all")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each case (default: 15)")
    parser.add_argument(
        "--csv",
        default=str(RESULTS / f"train_{date.today().isoformat()}.csv"),
        help="append the rows here, or none (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("train.py: no CUDA device is available to torch", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    timer = Timer(args.rounds)
    about = facts(timer.bandwidth)
    print("  ".join(f"{key} {value or 'none'}" for key, value in about.items()), flush=True)
    rows: list[GpuRow] = []
    for name in args.cases:
        rows += CASES[name](timer)
        torch.cuda.empty_cache()
    print(table(rows))
    if args.csv != "none":
        write_csv(Path(args.csv), rows, about)
        print(f"written: {args.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
