"""Design decisions of the CPU kernels, each against what it was preferred to."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from measuring import OURS, Contest, Contestant, Row, measure
from models import Lab
from torch import Tensor

from mamba_ssm import selective_scan_fn
from mamba_ssm.ops import native
from mamba_ssm.utils import sampling

_CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {"top_k": 1},
    "top-k 50": {"top_k": 50, "temperature": 0.8},
    "top-p 0.9": {"top_k": 0, "top_p": 0.9, "temperature": 0.8},
}


def _multinomial(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.multinomial(probs, num_samples=1, generator=generator).squeeze(-1)


def _decoders(lab: Lab, batch: int, steps: int, options: dict[str, Any]) -> list[Contestant]:
    """The same generation with the token chosen in the native call, in Python, by multinomial."""
    inside = lab.ours("bf16")
    outside = copy.copy(inside)
    outside.model = copy.copy(inside.model)
    prompt = lab.ids(batch, 4)
    # The step alone, without what chooses.
    outside.model.decode_step = lambda rows=1: inside.model.decode_step(rows).step

    def timed(ours: Any, draw: Callable) -> Callable[[], float]:
        def run() -> float:
            with mock.patch.object(sampling, "_draw", draw):
                return ours.decode(prompt, steps, seed=0, **options)

        return run

    contestants = [
        Contestant(OURS, timed(inside, sampling._draw)),
        Contestant("chosen in Python", timed(outside, sampling._draw)),
    ]
    if options["top_k"] != 1:
        contestants.append(Contestant("chosen by multinomial", timed(outside, _multinomial)))
    return contestants


def choice(bench) -> list[Row]:
    """Decoding bf16, batch 1 and 16: the next token chosen in the step's call or in Python."""
    lab = bench.lab()
    rows = []
    for batch, steps in ((1, 12), (16, 4)):
        contests = [
            Contest(
                f"{lab.shape} decode batch {batch} bf16, {name}",
                "tokens/s",
                batch * steps,
                _decoders(lab, batch, steps, options),
            )
            for name, options in _CHOICES.items()
        ]
        rows += measure(contests, bench.rounds, bench.budget)
    return rows


def integers(bench) -> list[Row]:
    """Decoding int8, batch 1, 4 and 12: products summed in integers, or in floats."""
    if "avx512_bf16" not in native.available_cpu_isas():
        print("nothing to compare: sums in integers need avx512_bf16 and avx512_vnni")
        return []
    lab = bench.lab()
    ours = lab.ours("int8")

    def on(isa: str, batch: int, steps: int) -> Callable[[], float]:
        def run() -> float:
            native.force_cpu_isa(isa)
            try:
                return ours.decode(lab.ids(batch, 4), steps)
            finally:
                native.force_cpu_isa("auto")

        return run

    contests = []
    for batch, steps in ((1, 24), (4, 12), (12, 6)):
        case = f"{lab.shape} decode batch {batch} int8"
        contest = Contest(case, "tokens/s", batch * steps, [])
        contest.contestants += [
            Contestant(OURS, on("auto", batch, steps)),
            Contestant("summed in floats", on("avx512", batch, steps)),
        ]
        contests.append(contest)
    return measure(contests, max(bench.rounds, 9), bench.budget)


def _scan_inputs(batch: int, dim: int, length: int, n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    u, z, B, C = (normal(batch, size, length) for size in (dim, dim, n, n))
    delta = 0.5 * torch.rand(batch, dim, length, generator=generator)
    A = -0.5 * torch.rand(dim, n, generator=generator)
    return [u, delta, A, B, C, normal(dim), z, normal(dim)]


def _walks(batch: int, dim: int, length: int, n: int) -> dict[str, Callable[[], Any]]:
    inputs = _scan_inputs(batch, dim, length, n)
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = selective_scan_fn(*leaves, delta_softplus=True)
    grad = torch.randn_like(out)

    def forward() -> None:
        with torch.inference_mode():
            selective_scan_fn(*inputs, delta_softplus=True)

    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
    }


def segments(bench) -> list[Row]:
    """The scan of one row of 32 channels, 16,384 steps: threads over the length, or one walk."""
    dim, length, n = 32, 16_384, 16
    # A batch of two rows is two walks.
    one, two = _walks(1, dim, length, n), _walks(2, dim, length, n)
    before = torch.get_num_threads()

    def on(threads: int, run: Callable[[], Any], rows: int = 1) -> Callable[[], float]:
        def timed() -> float:
            torch.set_num_threads(threads)
            run()  # lets the threads start
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            torch.set_num_threads(before)
            return elapsed / rows

        return timed

    contests = []
    for name in ("forward", "backward"):
        case = f"scan {name}, 1 x {dim} x {length}, n {n}, fp32"
        contest = Contest(case, "ms", 1, [], ours=f"{OURS}, {bench.threads} threads")
        contest.contestants.append(Contestant("one walk", on(1, two[name], 2)))
        for threads in sorted({t for t in (1, 2, 4, 8) if t < bench.threads} | {bench.threads}):
            runner = Contestant(f"{OURS}, {threads} threads", on(threads, one[name]))
            contest.contestants.append(runner)
        contests.append(contest)
    return measure(contests, max(bench.rounds, 9), bench.budget / 2)


_LINEARS = {  # (inputs, outputs) of the largest projections, by model
    "130m": {"in_proj": (768, 3072), "out_proj": (1536, 768)},
    "370m": {"in_proj": (1024, 4096), "out_proj": (2048, 1024)},
}


def linears(bench) -> list[Row]:
    """Linear layers of 512 rows: torch's, and oneDNN's, the weights packed or as they are."""
    contests = []
    for dtype, kind in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for shape, layers in _LINEARS.items():
            for name, (inputs, outputs) in layers.items():
                x, weight = torch.randn(512, inputs, dtype=dtype), torch.randn(outputs, inputs)
                weight = weight.to(dtype)
                case = f"{shape} {name}, 512 rows, {kind}"
                contest = Contest(case, "ms", 1, [], ours="F.linear")
                contest.contestants.append(
                    Contestant("F.linear", _repeated(F.linear, x, weight, None))
                )
                try:
                    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 512)
                    pointwise = torch.ops.mkldnn._linear_pointwise
                    ours = _repeated(pointwise, x, packed, None, "none", [], "")
                    ours()
                except (RuntimeError, AttributeError) as error:
                    contest.absent.append(("packed once", str(error)[:80]))
                else:
                    contest.contestants.append(Contestant("packed once", ours))
                    plain = _repeated(pointwise, x, weight, None, "none", [], "")
                    contest.contestants.append(Contestant("oneDNN, not packed", plain))
                contests.append(contest)
    with torch.inference_mode():
        return measure(contests, max(bench.rounds, 9), bench.budget)


def _repeated(function: Callable, *arguments: Any) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        for _ in range(5):
            function(*arguments)
        return (time.perf_counter() - start) / 5

    return run
