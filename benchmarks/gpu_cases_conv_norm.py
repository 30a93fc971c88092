"""The convolution's and the norm's cases of benchmarks/gpu_ops.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_measuring import Work

from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.layer_norm import rms_norm_fn


def forward_and_backward(case, call, leaves, grads, sizes, reference, target, note="") -> Iterator:
    """Two works: ``call()`` without gradients, and its backward alone.

    ``sizes``, ``reference``, ``target``: of the forward and of the backward.
    """

    def forward():
        with torch.no_grad():
            return call()

    outs = call()
    outs = outs if isinstance(outs, tuple) else (outs,)

    def backward():
        return torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    yield Work(f"{case}, forward", forward, sizes[0], reference[0], target[0], note)
    yield Work(f"{case}, backward", backward, sizes[1], reference[1], target[1], note)


def conv() -> Iterator[Work]:
    """Causal convolution, SiLU, bf16, batch 8, 1536 channels, length 2048, width 4"""
    b, d, length = 8, 1536, 2048
    for layout in ("(b,d,l)", "(b,l,d)"):
        x = torch.randn(b, d, length, device="cuda", dtype=torch.bfloat16)
        if layout == "(b,l,d)":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        x.requires_grad_()
        weight = torch.randn(d, 4, device="cuda", requires_grad=True)
        bias = torch.randn(d, device="cuda", requires_grad=True)
        size = 2 * x.numel()
        yield from forward_and_backward(
            f"conv bf16 b{b} d{d} l{length} w4 {layout}",
            lambda x=x, w=weight, bias=bias: causal_conv1d_fn(x, w, bias, activation="silu"),
            (x, weight, bias),
            (torch.randn_like(x),),
            (2 * size, 3 * size),
            (32, 174),
            (30, 60),
        )


def norm() -> Iterator[Work]:
    """Add + RMSNorm with an fp32 residual, bf16, prenorm, 16384 × 2560 and 16384 × 768"""
    for rows, d, reference, target in (
        (16384, 2560, (149, 565), (140, 220)),
        (16384, 768, (None, None), (None, None)),
    ):
        x = torch.randn(rows, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        residual = torch.randn(rows, d, device="cuda", requires_grad=True)
        weight = torch.ones(d, device="cuda", requires_grad=True)
        yield from forward_and_backward(
            f"add+rmsnorm bf16 {rows}x{d} fp32 residual",
            lambda x=x, r=residual, w=weight: rms_norm_fn(
                x, w, None, residual=r, prenorm=True, residual_in_fp32=True
            ),
            (x, residual, weight),
            (torch.randn_like(x), torch.randn_like(residual)),
            # x, residual → sum, y; dy, d sum, sum → dx, d residual
            (12 * rows * d, 16 * rows * d),
            reference,
            target,
        )
