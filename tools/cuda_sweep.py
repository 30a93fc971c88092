"""Every CUDA kernel once on small inputs, forward and backward: what tools/sanitize_cuda.sh runs.

    python tools/cuda_sweep.py

Prints what it ran and fails if an op has no kernel or a result is not finite.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from scan_cases import CASES, make_inputs, make_seq_idx

import mamba_ssm
from mamba_ssm import selective_scan_fn, selective_state_update
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ssm.ops.layer_norm import layer_norm_fn

DTYPES = (torch.float32, torch.bfloat16)
SCANS = [
    "base", "l=1", "l=257", "n=17", "n=64", "d=67", "vision", "constant B, C", "initial state",
    "bf16", "bf16, all", "channel last", "stride 0", "holes", "returning", "shared by rows",
]  # fmt: skip


def _run(name: str, call: Callable[..., Tensor | tuple], inputs: dict) -> None:
    leaves = {
        key: value.detach().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in inputs.items()
    }
    outs = call(**leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    results = [*outs, *(v.grad for v in leaves.values() if getattr(v, "grad", None) is not None)]
    if not all(result.isfinite().all() for result in results):
        raise SystemExit(f"{name}: not finite")
    print("ran", name, flush=True)


def _scans() -> None:
    for name in SCANS:
        _run(f"scan, {name}", selective_scan_fn, make_inputs(CASES[name], "cuda"))


def _convolutions() -> None:
    for dtype in DTYPES:
        for width, length, packing in ((4, 70, ""), (2, 33, "holes"), (5, 3, ""), (3, 1, "")):
            for channel_last in (False, True):
                x = torch.randn(2, length, 67, device="cuda").to(dtype).transpose(1, 2)
                inputs = {
                    "x": x if channel_last else x.contiguous(),
                    "weight": torch.randn(67, width, device="cuda"),
                    "bias": torch.randn(67, device="cuda"),
                }
                if packing:
                    seq_idx, states = make_seq_idx(packing, 2, length)
                    inputs |= {"seq_idx": seq_idx.cuda(), "num_sequences": states}
                else:
                    inputs["initial_states"] = torch.randn(2, 67, width - 1, device="cuda").to(x)
                _run(
                    f"convolution, {dtype}, width {width}, length {length}, {packing or 'states'}"
                    f"{', channel last' * channel_last}",
                    lambda **i: causal_conv1d_fn(**i, return_final_states=True, activation="silu"),
                    inputs,
                )


def _norms() -> None:
    for dtype in DTYPES:
        for d in (1, 67, 2560):
            for rms in (False, True):
                inputs = {
                    "x": torch.randn(9, d, device="cuda").to(dtype),
                    "residual": torch.randn(9, d, device="cuda"),
                    "weight": torch.randn(d, device="cuda"),
                    "bias": torch.randn(d, device="cuda"),
                }
                _run(
                    f"{'RMS' if rms else 'layer'} norm, {dtype}, {d} channels",
                    lambda rms=rms, **i: layer_norm_fn(**i, prenorm=True, is_rms_norm=rms),
                    inputs,
                )


@torch.no_grad()
def _decoding() -> None:
    for dtype in DTYPES:
        x, dt, z = (torch.rand(3, 67, device="cuda").to(dtype) for _ in range(3))
        B, C = (torch.randn(3, 16, device="cuda").to(dtype) for _ in range(2))
        D, bias, A = (torch.rand(67, *more, device="cuda") for more in ((), (), (16,)))
        state = torch.zeros(3, 67, 16, device="cuda")
        rows = torch.tensor([2, -1, 0], dtype=torch.int32, device="cuda")
        out = selective_state_update(state, x, dt, -A, B, C, D, z, bias, True, rows)
        conv_state = torch.zeros(3, 67, 4, device="cuda", dtype=dtype)
        weight = torch.randn(67, 4, device="cuda")
        places = torch.tensor([0, 3, 7], dtype=torch.int32, device="cuda")
        outs = [
            out,
            causal_conv1d_update(x, conv_state, weight, D, "silu"),
            causal_conv1d_update(x, conv_state, weight, D, "silu", places, rows),
        ]
        if not all(result.isfinite().all() for result in (*outs, state, conv_state)):
            raise SystemExit(f"decoding, {dtype}: not finite")
        print(f"ran decoding, {dtype}", flush=True)


def main() -> None:
    """Run everything on the native backend."""
    torch.manual_seed(0)
    with mamba_ssm.backend("native"):
        _scans()
        _convolutions()
        _norms()
        _decoding()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
