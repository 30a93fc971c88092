"""One Mamba block trained, and the scan op alone."""

from __future__ import annotations

from collections.abc import Callable

import peers_torch
import torch
import torch.nn.functional as F
from measuring import OURS, Contest, Contestant, Row, Target, measure
from models import say
from torch import Tensor, nn

from mamba_ssm import Mamba, selective_scan_fn

PRODUCTS = "matrix products alone"
_TOLERANCE = 1e-3


def _trainer(block: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    def run() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        block(x).backward(grad)

    return run


def _products(block: Mamba, x: Tensor) -> Callable[[], None]:
    """The block's four projections forward, and their two products each backward."""
    rows = x.shape[0] * x.shape[1]
    layers = [block.in_proj, block.x_proj, block.dt_proj, block.out_proj]
    weights = [layer.weight.detach() for layer in layers]
    inputs = [torch.randn(rows, w.shape[1]) for w in weights]
    grads = [torch.randn(rows, w.shape[0]) for w in weights]

    def run() -> None:
        for weight, value, grad in zip(weights, inputs, grads, strict=True):
            F.linear(value, weight)
            grad @ weight
            grad.t() @ value

    return run


def _differences(block: nn.Module, other: nn.Module, x: Tensor, grad: Tensor) -> float:
    """Largest relative difference of outputs and of all gradients."""
    results = []
    for module in (block, other):
        module.zero_grad(set_to_none=True)
        x.grad = None
        out = module(x)
        out.backward(grad)
        gradients = {name: p.grad for name, p in module.named_parameters()}
        results.append({"out": out.detach(), "x": x.grad, **gradients})
    return max(((results[0][k] - v).norm() / v.norm()).item() for k, v in results[1].items())


def block(bench) -> list[Row]:
    """A Mamba block, d_model 768, batch 2, length 512, fp32: forward and backward."""
    torch.manual_seed(0)
    ours = Mamba(768)
    x = torch.randn(2, 512, 768, requires_grad=True)
    grad = torch.randn(2, 512, 768)
    case = "block forward + backward, 768, 2 x 512, fp32"
    contest = Contest(case, "ms", 1, [Contestant(OURS, _trainer(ours, x, grad))], memory=True)
    contest.targets = [Target(at_most=250)]
    peers = {
        "mamba.py parallel scan": (["mambapy"], peers_torch.mambapy_block),
        "transformers + mambapy": (["transformers", "mambapy"], peers_torch.transformers_block),
    }
    for name, (packages, make) in peers.items():
        contest.targets.append(Target(name, 5.6))
        reason = next(filter(None, map(peers_torch.why_absent, packages)), None)
        if reason is not None:
            contest.absent.append((name, reason))
            continue
        other = make(ours)
        run = _trainer(other, x, grad)

        def own(run: Callable[[], None] = run) -> None:
            with peers_torch.own_code():
                run()

        guarded = own if "transformers" in packages else run
        with peers_torch.own_code("transformers" in packages):
            worst = _differences(ours, other, x, grad)
        say(f"    {name}: outputs and gradients differ by {worst:.2g} at most")
        if not worst < _TOLERANCE:
            bench.problems.append(f"{case}: {name} differs by {worst:.2g}")
        contest.contestants.append(Contestant(name, guarded))
    contest.contestants.append(Contestant(PRODUCTS, _products(ours, x)))
    rows = measure([contest], bench.rounds, bench.budget)
    return rows + _least_memory(rows)


def _least_memory(rows: list[Row]) -> list[Row]:
    memory = {row.implementation: row.peak_mb for row in rows if row.peak_mb is not None}
    peers = [v for k, v in memory.items() if k not in (OURS, PRODUCTS)]
    if OURS not in memory or not peers:
        return []
    row = Row(rows[0].case, f"{OURS} peak memory", memory[OURS], "MB")
    row.target = f"< {min(peers):.0f} MB"
    row.verdict = "met" if memory[OURS] < min(peers) else "MISSED"
    return [row]


def scan(bench) -> list[Row]:
    """The scan op alone, fp32, b 2, d 1536, l 1024, n 16: ns per state update."""
    generator = torch.Generator().manual_seed(0)
    batch, dim, length, n = 2, 1536, 1024, 16

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    u, z, B, C = (normal(batch, size, length) for size in (dim, dim, n, n))
    delta = 0.5 * torch.rand(batch, dim, length, generator=generator)
    A = -0.5 * torch.rand(dim, n, generator=generator)
    D, bias = normal(dim), 0.5 * torch.rand(dim, generator=generator)
    arguments = [u, delta, A, B, C, D, z, bias]
    leaves = [t.clone().requires_grad_() for t in arguments]
    out = selective_scan_fn(*leaves, delta_softplus=True)
    grad = torch.randn_like(out)

    def forward() -> None:
        with torch.inference_mode():
            selective_scan_fn(*arguments, delta_softplus=True)

    def backward() -> None:
        torch.autograd.grad(out, leaves, grad, retain_graph=True)

    shape = f"{batch} x {dim} x {length}, n {n}, fp32"
    updates = batch * dim * length * n
    contests = [
        Contest(
            f"scan {name}, {shape}",
            "ns/update",
            updates,
            [Contestant(OURS, run)],
            [Target(at_most=bound)],
        )
        for name, run, bound in (("forward", forward, 0.20), ("backward", backward, 0.60))
    ]
    return measure(contests, max(bench.rounds, 9), bench.budget / 2)
