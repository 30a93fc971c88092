"""CUDA kernels beyond 2³¹ elements and beyond 65,535 channels, where a grid's y and z would end.

Every channel (of the scan and the convolution) and every row (of the norm and the decode step) is
independent of the others, so a few of them, the last among them, are compared with the reference
and the fp64 oracle on those alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from helpers import assert_close_to_oracle, errors_of, nudged, to_double
from torch import Tensor

import mamba_ssm
from mamba_ssm import selective_scan_fn, selective_state_update
from mamba_ssm.ops import native
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.layer_norm import rms_norm_fn

GIB = 1 << 30
BF16 = torch.bfloat16
BEYOND = (1 << 31) + 1


@pytest.fixture(autouse=True)
def device_memory():
    """Skips without a GPU that the kernels serve; returns a check for free memory.

    What a test says it needs is checked against what it took.
    """
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is available to torch")
    reason = native.gpu_reason()
    if reason:
        pytest.skip(reason)

    needed = []

    def need(gib: float) -> None:
        free = torch.cuda.mem_get_info()[0] / GIB
        if free < gib:
            pytest.skip(f"needs {gib:.0f} GiB of free GPU memory, there are {free:.1f}")
        needed.append(gib)

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield need
    torch.cuda.empty_cache()
    peak = torch.cuda.max_memory_allocated() / GIB
    print(f"peak {peak:.2f} GiB of {needed}")
    assert not needed or peak <= needed[0], f"took {peak:.1f} GiB, said {needed[0]:.1f}"


def _with_grads(call: Callable, inputs: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    out = call(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def _assert_slices(
    call: Callable,
    inputs: dict[str, Tensor],
    grad: Tensor,
    dims: dict[str, int],
    picked: list[int],
) -> None:
    """Native on everything against the reference on the ``picked`` indices of ``dims``."""

    def pick(name: str, value: Tensor) -> Tensor:
        if name not in dims:
            return value.clone()
        index = torch.tensor(picked, device=value.device)
        return value.index_select(dims[name], index)

    with mamba_ssm.backend("native"):
        actual = _with_grads(call, inputs, grad)
    actual = {name: pick(name, value) for name, value in actual.items() if name in dims}
    few = {name: pick(name, value) for name, value in inputs.items()}
    few_grad = pick("out", grad)

    def plain_and_exact(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        doubled = {name: to_double(value) for name, value in inputs.items()}
        with mamba_ssm.backend("reference"):
            plain = _with_grads(call, inputs, few_grad)
            return plain, _with_grads(call, doubled, few_grad.double())

    plain, exact = plain_and_exact(few)
    neighbours = functools.cache(lambda: [plain_and_exact(nudged(few, i)) for i in (1, 2, 3)])
    for name, value in actual.items():
        errors = [errors_of(p[name], e[name]) for p, e in ((plain, exact), *neighbours())]
        print(f"{name}: errors {errors_of(value, exact[name])}, of the reference {errors}")
        try:
            assert_close_to_oracle(value, plain[name], exact[name], name)
        except AssertionError:
            # As in assert_matches: of few numbers, one run's error is luck.
            largest = tuple(max(kind) for kind in zip(*errors, strict=True))
            assert_close_to_oracle(value, plain[name], exact[name], name, largest)


def _sequences(b: int, d: int, length: int, channel_last: bool = False) -> Tensor:
    if channel_last:
        return torch.randn(b, length, d, device="cuda", dtype=BF16).transpose(1, 2)
    return torch.randn(b, d, length, device="cuda", dtype=BF16)


SIZES = {"more than 2^31 elements": (2, 8193, 131_104), "many channels": (2, 70_001, 33)}
LAYOUTS = pytest.mark.parametrize("channel_last", [False, True], ids=["bdl", "bld"])
SHAPES = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


@LAYOUTS
@SHAPES
def test_convolution(size, channel_last, device_memory):
    b, d, length = size
    device_memory(12 * b * d * length / GIB + 2)
    inputs = {
        "x": _sequences(*size, channel_last),
        "weight": torch.randn(d, 4, device="cuda"),
        "bias": torch.randn(d, device="cuda"),
    }
    grad = _sequences(*size, channel_last)
    dims = {"out": 1, "x": 1, "weight": 0, "bias": 0}
    _assert_slices(
        lambda x, weight, bias: causal_conv1d_fn(x, weight, bias, activation="silu"),
        inputs,
        grad,
        dims,
        [0, 1, d // 2, d - 2, d - 1],
    )


@LAYOUTS
@SHAPES
def test_scan(size, channel_last, device_memory):
    b, d, length = size
    device_memory(18 * b * d * length / GIB + 2)
    inputs = {
        "u": _sequences(*size, channel_last),
        "delta": _sequences(*size, channel_last).abs_().mul_(0.3),
        "A": -0.05 - torch.rand(d, 2, device="cuda"),
        "B": torch.randn(b, 2, length, device="cuda", dtype=BF16),
        "C": torch.randn(b, 2, length, device="cuda", dtype=BF16),
    }
    grad = _sequences(*size, channel_last)
    dims = {"out": 1, "u": 1, "delta": 1, "A": 0}
    # A's gradient has two numbers a channel: more channels, so that its errors are no luck.
    picked = [0, 1, *range(d // 17, d - 2, d // 17), d - 2, d - 1]
    _assert_slices(selective_scan_fn, inputs, grad, dims, picked)


@pytest.mark.parametrize(
    ("rows", "d"), [(32_769, 65_537), (BEYOND // 64 + 8, 64)], ids=["wide rows", "many rows"]
)
def test_norm(rows, d, device_memory):
    device_memory(14 * rows * d / GIB + 2)
    inputs = {
        "x": torch.randn(rows, d, device="cuda", dtype=BF16),
        "weight": torch.randn(d, device="cuda"),
    }
    grad = torch.randn(rows, d, device="cuda", dtype=BF16)
    _assert_slices(
        lambda x, weight: rms_norm_fn(x, weight, None),
        inputs,
        grad,
        {"out": 0, "x": 0},
        [0, 1, rows // 2, rows - 2, rows - 1],
    )


@pytest.mark.parametrize(("b", "d"), [(8_193, 16_400), (3, 70_001)])
def test_decode_step(b, d, device_memory):
    n = 16
    device_memory(5 * b * d * n / GIB + 2)
    state = torch.randn(b, d, n, device="cuda")
    x, dt = (torch.randn(b, d, device="cuda", dtype=BF16) for _ in range(2))
    A = -torch.rand(d, n, device="cuda")
    B, C = (torch.randn(b, n, device="cuda", dtype=BF16) for _ in range(2))
    picked = torch.tensor([0, b // 2, b - 1], device="cuda")

    def step(state, A, *rest):
        return selective_state_update(state, rest[0], rest[1], A, *rest[2:], dt_softplus=True)

    few = [t.index_select(0, picked) for t in (x, dt, B, C)]
    plain_state, exact_state = (state.index_select(0, picked) for _ in range(2))
    exact_state = exact_state.double()
    with mamba_ssm.backend("reference"):
        plain = step(plain_state, A, *few)
    exact = step(exact_state, A.double(), *(t.double() for t in few))
    with mamba_ssm.backend("native"):
        out = step(state, A, x, dt, B, C)
    assert_close_to_oracle(out.index_select(0, picked), plain, exact, "out")
    assert_close_to_oracle(state.index_select(0, picked), plain_state, exact_state, "state")
