"""The compiled CPU kernels in training: memory, several Python threads, forked processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from mamba_ssm.ops import native
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.layer_norm import rms_norm_fn
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

pytestmark = pytest.mark.skipif(
    not native.has_kernel("_selective_scan_bwd", "cpu"),
    reason=f"no compiled CPU kernels: {native.status()['cpu'][1]}",
)

# Peak resident memory of a scan's forward and backward beyond its inputs, results and gradients.
MEMORY = """
from pathlib import Path
import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

def status_kb(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

def run(b, d, l, n):
    u, delta = (torch.randn(b, d, l, requires_grad=True) for _ in range(2))
    A = (-torch.rand(d, n)).requires_grad_()
    B, C = (torch.randn(b, n, l, requires_grad=True) for _ in range(2))
    dout = torch.randn(b, d, l)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kb("VmRSS")
    out = selective_scan_fn(u, delta, A, B, C, delta_softplus=True)
    gradients = torch.autograd.grad(out, (u, delta, A, B, C), dout)
    kept = sum(t.numel() * t.element_size() for t in (out, *gradients))
    return (status_kb("VmHWM") - before) * 1024 - kept

torch.set_num_threads(2)
run(1, 64, 64, 16)
b, d, l, n = 1, 256, 4096, {n}
print(run(b, d, l, n), b * d * l * n * 4)
"""


@pytest.mark.parametrize("n", [16, 64])
def test_backward_needs_an_eighth_of_the_states_at_most(n):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not reset a process's peak memory")
    code = MEMORY.replace("{n}", str(n))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    extra, states = map(int, done.stdout.split())
    assert extra <= states / 8, f"{extra / 1e6:.1f} MB beside {states / 1e6:.1f} MB of states"


@pytest.mark.parametrize("channels_inside", [False, True])
def test_results_written_around_the_caches_are_those_written_through_them(
    channels_inside, two_threads
):
    """Results of 8 MiB and more, whose rows are whole lines, against their halves."""
    g = torch.Generator().manual_seed(0)
    b, d, l, n = 1, 80, 26_624, 2

    def draw(c):
        shape = (b, l, c) if channels_inside else (b, c, l)
        x = torch.randn(shape, generator=g)
        return x.transpose(1, 2) if channels_inside else x

    A, D = -torch.rand(d, n, generator=g), torch.randn(d, generator=g)
    inputs = [draw(d).requires_grad_() for _ in range(3)]
    B, C, dout = draw(n), draw(n), draw(d)
    assert dout.numel() * 4 >= 8 << 20

    def run(part, state):
        u, delta, z = (x[..., part] for x in inputs)
        return selective_scan_fn(
            u, delta, A, B[..., part], C[..., part], D, z, delta_softplus=True,
            initial_state=state, return_last_state=True,
        )  # fmt: skip

    whole, _ = run(slice(None), None)
    first, state = run(slice(0, l // 2), None)
    halves = torch.cat([first, run(slice(l // 2, l), state)[0]], -1)
    assert torch.equal(whole, halves)
    for x, y in zip(
        torch.autograd.grad(whole, inputs, dout),
        torch.autograd.grad(halves, inputs, dout),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _train(seed: int) -> list[torch.Tensor]:
    """Gradients of norm, convolution and scan in a row: (2, 40, 130) in, two slices of channels."""
    g = torch.Generator().manual_seed(seed)
    b, d, l, n = 2, 130, 40, 16
    draw = lambda *shape: torch.randn(*shape, generator=g).requires_grad_()  # noqa: E731
    A = (-torch.rand(d, n, generator=g)).requires_grad_()
    x, norm, weight, bias = draw(b, l, d), draw(d), draw(d, 4), draw(d)
    delta, B, C = draw(b, d, l), draw(b, n, l), draw(b, n, l)
    h = rms_norm_fn(x, norm, None).transpose(1, 2)
    h = causal_conv1d_fn(h, weight, bias, activation="silu")
    y = selective_scan_fn(h, delta, A, B, C, delta_softplus=True)
    return list(torch.autograd.grad(y.sum(), (x, norm, weight, bias, delta, A, B, C)))


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_several_python_threads_train_at_once(two_threads):
    expected = [_train(seed) for seed in range(4)]
    results: list[list] = [[] for _ in expected]

    def work(seed: int) -> None:
        results[seed] = [_train(seed) for _ in range(5)]

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive()
    for seed, got in enumerate(results):
        assert len(got) == 5 and all(_same(one, expected[seed]) for one in got)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_trains_after_first_use():
    code = """
import os, sys
import torch
sys.path.insert(0, sys.argv[1])
from test_native_training import _same, _train
torch.set_num_threads(2)
expected = _train(0)
pid = os.fork()
if pid == 0:
    with torch.autograd.set_multithreading_enabled(False):
        os._exit(0 if _same(_train(0), expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(
        [sys.executable, "-c", code, here], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
