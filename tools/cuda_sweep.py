"""Every CUDA kernel once on small inputs, forward and backward: what tools/sanitize_cuda.sh runs.

    python tools/cuda_sweep.py                  # everything
    python tools/cuda_sweep.py scans steps      # these parts; see PARTS
    python tools/cuda_sweep.py --no-products    # nothing after 16-bit products of torch

Prints what it ran and fails if an op has no kernel or a result is not finite.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from scan_cases import CASES, make_inputs, make_seq_idx

import mamba_ssm
from mamba_ssm import Mamba, MambaLMHeadModel, selective_scan_fn, selective_state_update
from mamba_ssm.inference import cuda_decoder
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.loss import chunked_cross_entropy
from mamba_ssm.modules.fused_step import inner_step
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ssm.ops.layer_norm import layer_norm_fn

DTYPES = (torch.float32, torch.bfloat16)
# What reads the results of torch's matrix products; with --no-products in fp32 only.
AFTER_PRODUCTS = list(DTYPES)
SCANS = [
    "base", "l=1", "l=257", "n=17", "n=64", "d=67", "vision", "constant B, C", "initial state",
    "tiles, n=8", "tiles, bf16, channel last", "bf16", "bf16, all", "channel last", "stride 0",
    "holes", "returning", "shared by rows",
]  # fmt: skip
# (config of a two-layer model, rows) of the fused decode step
STEPS = [
    ({}, 1),
    ({"rms_norm": False, "residual_in_fp32": False}, 3),
    ({"ssm_cfg": {"d_state": 5, "d_conv": 3, "bias": True, "dt_rank": 7, "conv_bias": False}}, 5),
    ({"ssm_cfg": {"d_state": 33, "d_conv": 1, "expand": 1}, "tie_embeddings": False}, 8),
    ({"d_model": 264, "vocab_size": 301}, 2),
    ({"d_model": 264, "vocab_size": 301, "rms_norm": False}, 1),
    ({"ssm_cfg": {"d_state": 33, "d_conv": 3, "bias": True, "dt_rank": 7, "conv_bias": False}}, 1),
]
INT8_STEPS = [({"d_model": 48}, 1), ({"d_model": 272, "rms_norm": False, "vocab_size": 301}, 1)]


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
            for d, channel_last in ((67, False), (67, True), (68, True)):
                x = torch.randn(2, length, d, device="cuda").to(dtype).transpose(1, 2)
                inputs = {
                    "x": x if channel_last else x.contiguous(),
                    "weight": torch.randn(d, width, device="cuda"),
                    "bias": torch.randn(d, device="cuda"),
                }
                if packing:
                    seq_idx, states = make_seq_idx(packing, 2, length)
                    inputs |= {"seq_idx": seq_idx.cuda(), "num_sequences": states}
                else:
                    inputs["initial_states"] = torch.randn(2, d, width - 1, device="cuda").to(x)
                _run(
                    f"convolution, {dtype}, width {width}, length {length}, {packing or 'states'}"
                    f", {d} channels{' last' * channel_last}",
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
                alone = {"x": inputs["x"], "weight": inputs["weight"], "bias": None}
                for more, given in (("", inputs), (", without bias and residual", alone)):
                    _run(
                        f"{'RMS' if rms else 'layer'} norm, {dtype}, {d} channels{more}",
                        lambda rms=rms, **i: layer_norm_fn(**i, prenorm=True, is_rms_norm=rms),
                        given,
                    )


def _blocks() -> None:
    for dtype in AFTER_PRODUCTS:
        for d_model, length in ((16, 37), (5, 3)):
            layer = Mamba(d_model, device="cuda", dtype=dtype)
            x = torch.randn(2, length, d_model, device="cuda", dtype=dtype)
            _run(
                f"block, {dtype}, {d_model} wide, {length} steps", lambda x, f=layer: f(x), {"x": x}
            )


def _losses() -> None:
    for dtype in DTYPES:
        for vocabulary in (9, 64, 8200):
            logits = torch.randn(9, vocabulary, device="cuda", dtype=dtype)
            targets = torch.arange(-1, 8, device="cuda")
            losses = torch.ops.mamba_ssm._cross_entropy(logits, targets, -1)
            if not (losses.isfinite().all() and logits.isfinite().all()):
                raise SystemExit(f"loss of {vocabulary} tokens, {dtype}: not finite")
    for dtype in AFTER_PRODUCTS:
        for vocabulary in (9, 64, 8200):
            head = nn.Linear(24, vocabulary, bias=False, device="cuda", dtype=dtype)
            targets = torch.arange(-1, 8, device="cuda")[None]
            _run(
                f"loss, {dtype}, {vocabulary} tokens",
                lambda x, head=head, t=targets: chunked_cross_entropy(
                    head, x, t, head.out_features, -1
                ),
                {"x": torch.randn(1, 9, 24, device="cuda", dtype=dtype)},
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


@torch.no_grad()
def _decode_steps() -> None:
    for dtype in (*DTYPES, torch.float16):
        int8_steps = INT8_STEPS if dtype != torch.float32 else []
        for changes, batch in STEPS + int8_steps:
            sizes = {"d_model": 40, "n_layer": 2, "vocab_size": 77, "pad_vocab_size_multiple": 1}
            model = MambaLMHeadModel(MambaConfig(**sizes | changes), device="cuda", dtype=dtype)
            name = f"decode step, {dtype}, {changes}, {batch} rows"
            if (changes, batch) in int8_steps:
                model.quantize_("int8")
                name += ", int8"
            decoder = cuda_decoder.decoder_for(model.eval(), batch)
            if decoder is None:
                raise SystemExit(f"{name}: {cuda_decoder.why_not(model, batch)}")
            caches = model.allocate_inference_cache(batch, 8)
            for step in range(2):
                logits = decoder.step(torch.full((batch,), step, device="cuda"), caches)
            results = [logits, *(t for cache in caches.values() for t in cache)]
            if not all(result.isfinite().all() for result in results):
                raise SystemExit(f"{name}: not finite")
            print("ran", name, flush=True)


def _mixer_steps() -> None:
    sizes = [(32, 16, 3), (768, 48, 17)]
    if len(AFTER_PRODUCTS) > 1:  # of so many channels torch multiplies by x_proj
        sizes.append((2560, 160, 9))
    ops = (causal_conv1d_update, selective_state_update)
    for d_model, rank, batch in sizes:
        for dtype in (torch.float16, torch.bfloat16):
            layer = Mamba(d_model, dt_rank=rank, layer_idx=0, device="cuda", dtype=dtype)
            for states in (dtype, torch.float32):
                conv, ssm = layer.allocate_inference_cache(batch, 8)
                ssm = ssm.to(states)
                with torch.no_grad():
                    for _ in range(2):
                        xz = torch.randn(batch, 4 * d_model, device="cuda", dtype=dtype)
                        out = inner_step(layer, xz, conv, ssm, ops)
                name = f"mixer step, {dtype}, {d_model}, {batch} rows, states {states}"
                if out is None:
                    raise SystemExit(f"{name}: not one op")
                if not all(result.isfinite().all() for result in (out, conv, ssm)):
                    raise SystemExit(f"{name}: not finite")
                print("ran", name, flush=True)


PARTS = {
    "scans": _scans,
    "convolutions": _convolutions,
    "norms": _norms,
    "blocks": _blocks,
    "losses": _losses,
    "decoding": _decoding,
    "steps": _decode_steps,
    "mixer_steps": _mixer_steps,
}


def main(names: list[str]) -> None:
    """Run the named parts, or all, on the native backend."""
    if "--no-products" in names:
        names.remove("--no-products")
        AFTER_PRODUCTS[:] = [torch.float32]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise SystemExit(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    torch.manual_seed(0)
    with mamba_ssm.backend("native"):
        for name in names or PARTS:
            PARTS[name]()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
