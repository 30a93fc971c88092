"""One token of the mixer in one op against the reference, and the modules that use it."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close_to_oracle, to_double

import mamba_ssm
from mamba_ssm.modules import mamba_simple
from mamba_ssm.ops import mixer_step, native, schema  # noqa: F401  (schema defines the ops)

OP = torch.ops.mamba_ssm._mixer_step
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
STATES = ("conv_state", "ssm_state")

needs_kernel = pytest.mark.skipif(
    not (torch.cuda.is_available() and native.has_kernel("_mixer_step", "cuda")),
    reason="needs a GPU and the compiled kernel",
)


def make_args(b=3, d=128, r=16, dtype=F16, state=None, plain=None, device="cuda", seed=0):
    """Arguments by name; ``state`` is ssm_state's dtype, ``plain`` that of the small vectors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    plain = plain or dtype
    return {
        "xz": draw(b, 2 * d),
        "conv_weight": draw(d, 4, dtype=plain, scale=0.5),
        "conv_bias": draw(d, dtype=plain),
        "x_proj": draw(r + 32, d, scale=d**-0.5),
        "dt_proj": draw(d, r, scale=r**-0.5),
        "dt_bias": draw(d, dtype=plain) - 2,
        "A_log": draw(d, 16, dtype=F32),
        "D": draw(d, dtype=F32),
        "conv_state": draw(b, d, 4),
        "ssm_state": draw(b, d, 16, dtype=state or dtype),
    }


def copied(args):
    return args | {name: args[name].clone() for name in STATES}


def check(args):
    """The kernel against the reference and the fp64 oracle, in the output and both states."""
    assert mixer_step.mixer_step_serves(**args)
    plain = copied(args)
    oracle = copied({k: v if v is None else to_double(v) for k, v in args.items()})
    out = mixer_step.mixer_step(**args)
    expected, exact = (OP.reference(*a.values()) for a in (plain, oracle))
    assert_close_to_oracle(out, expected, exact, "out")
    assert torch.equal(args["conv_state"], plain["conv_state"])
    assert_close_to_oracle(args["ssm_state"], plain["ssm_state"], oracle["ssm_state"], "ssm_state")


@needs_kernel
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(
    "size",
    [
        {},
        {"b": 1, "d": 64},
        {"b": 7, "d": 192, "r": 32},
        {"b": 8, "d": 512, "r": 48},
        {"b": 9, "d": 1536, "r": 48},
        {"b": 128, "d": 1536, "r": 48},
        {"b": 17, "d": 2048, "r": 64},
        {"b": 130, "d": 320, "r": 80},
        {"b": 16, "d": 5120, "r": 160},
        {"b": 4, "d": 16384, "r": 480},
    ],
    ids=str,
)
def test_sizes(size, dtype):
    check(make_args(dtype=dtype, **size))


@needs_kernel
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("state", [F32, None], ids=str)
@pytest.mark.parametrize("plain", [F32, None], ids=str)
def test_dtypes_and_absent_biases(dtype, state, plain):
    args = make_args(b=11, dtype=dtype, state=state, plain=plain)
    check(args)
    check(args | {"conv_bias": None, "dt_bias": None})
    check(args | {"A_log": args["A_log"].to(dtype), "D": args["D"].to(dtype)})


@needs_kernel
def test_repeats_give_the_same_bits_and_rows_do_not_depend_on_each_other():
    args = make_args(b=40, d=1536, r=48)
    runs = [copied(args) for _ in range(3)]
    outs = [mixer_step.mixer_step(**run) for run in runs]
    for run, out in zip(runs[1:], outs[1:], strict=True):
        assert torch.equal(out, outs[0])
        assert all(torch.equal(run[name], runs[0][name]) for name in STATES)
    rows = {name: args[name][5:6].clone() for name in ("xz", *STATES)}
    assert torch.equal(mixer_step.mixer_step(**(args | rows)), outs[0][5:6])


@needs_kernel
def test_no_rows_and_what_is_not_served():
    assert mixer_step.mixer_step(**make_args(b=0)).shape == (0, 128)
    args = make_args()
    for change in (
        {"conv_weight": args["conv_weight"][:, :3].contiguous()},
        {"xz": args["xz"].float()},
        {"x_proj": args["x_proj"].float()},
        {"ssm_state": args["ssm_state"].bfloat16()},
        {"ssm_state": args["ssm_state"].transpose(1, 2).contiguous().transpose(1, 2)},
        {"dt_proj": args["dt_proj"][:, :8].contiguous()},
    ):
        assert not mixer_step.mixer_step_serves(**(args | change))
        with pytest.raises(RuntimeError, match="_mixer_step"):
            mixer_step.mixer_step(**(args | change))


@needs_kernel
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_the_layer_uses_it_and_agrees_with_its_parts(dtype, monkeypatch):
    torch.manual_seed(0)
    layer = mamba_ssm.Mamba(64, dt_rank=16, layer_idx=0, device="cuda", dtype=dtype)
    x = torch.randn(5, 6, 64, device="cuda", dtype=dtype)
    calls = []
    used = mamba_simple.inner_step
    monkeypatch.setattr(mamba_simple, "inner_step", lambda *a: calls.append(y := used(*a)) or y)

    def run(model, x):
        cache = model.allocate_inference_cache(5, 8)
        return torch.cat([model.step(x[:, i : i + 1], *cache)[0] for i in range(6)], 1), cache

    with torch.no_grad():
        out, cache = run(layer, x)
        assert len(calls) == 6 and all(y is not None for y in calls)
        with mamba_ssm.backend("reference"):
            expected, expected_cache = run(layer, x)
            exact, exact_cache = run(layer.double(), x.double())
    assert_close_to_oracle(out, expected, exact, "out")
    for name, *parts in zip(STATES, cache, expected_cache, exact_cache, strict=True):
        assert_close_to_oracle(*parts, name)


@needs_kernel
def test_replaced_parts_and_hooks_are_obeyed(monkeypatch):
    layer = mamba_ssm.Mamba(64, dt_rank=16, layer_idx=0, device="cuda", dtype=F16)
    x, cache = torch.randn(2, 1, 64, device="cuda", dtype=F16), layer.allocate_inference_cache(2, 8)
    seen = []
    with torch.no_grad():
        handle = layer.x_proj.register_forward_hook(lambda *_: seen.append("x_proj"))
        layer.step(x, *cache)
        handle.remove()
        original = mamba_simple.selective_state_update
        monkeypatch.setattr(
            mamba_simple,
            "selective_state_update",
            lambda *a, **k: seen.append("update") or original(*a, **k),
        )
        layer.step(x, *cache)
    assert seen == ["x_proj", "update"]


@needs_kernel
def test_a_compiled_layer_steps_without_it():
    layer = mamba_ssm.Mamba(64, dt_rank=16, layer_idx=0, device="cuda", dtype=F16)
    x, caches = torch.randn(2, 1, 64, device="cuda", dtype=F16), []
    torch._dynamo.reset()
    with torch.no_grad():
        for step in (layer.step, torch.compile(layer.step, backend="aot_eager")):
            caches.append(layer.allocate_inference_cache(2, 8))
            caches[-1] = (step(x, *caches[-1])[0], *caches[-1])
    for one, other in zip(*caches, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def test_the_reference_is_the_parts_one_after_the_other():
    args = make_args(device="cpu", dtype=F32)
    plain = copied(args)
    out = OP.reference(*args.values())
    x, z = plain["xz"].chunk(2, 1)
    x = mamba_ssm.ops.causal_conv1d.causal_conv1d_update(
        x, plain["conv_state"], plain["conv_weight"], plain["conv_bias"], "silu"
    )
    low, B, C = (x @ plain["x_proj"].t()).split([16, 16, 16], 1)
    expected = mamba_ssm.selective_state_update(
        plain["ssm_state"], x, low @ plain["dt_proj"].t(), -plain["A_log"].exp(), B, C,
        plain["D"], z, plain["dt_bias"], True,
    )  # fmt: skip
    torch.testing.assert_close(out, expected)
    for name in STATES:
        torch.testing.assert_close(args[name], plain[name])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_kernel)])
def test_opcheck(device):
    args = make_args(device=device)
    step = torch.ops.mamba_ssm._mixer_step
    overload = step.default if device == "cuda" else step.reference
    torch.library.opcheck(overload, tuple(args.values()))
