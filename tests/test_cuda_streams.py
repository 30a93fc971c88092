"""CUDA ops run on the current stream and on their tensors' device, whichever is current."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from generation_helpers import prompt, tiny_lm
from module_helpers import assert_all_same, assert_same, run_with_grads, scrambled
from scan_cases import CASES, make_inputs, make_seq_idx
from torch import Tensor, nn

import mamba_ssm
from mamba_ssm import Mamba, selective_scan_fn, selective_state_update
from mamba_ssm.inference import cuda_decoder
from mamba_ssm.models.loss import chunked_cross_entropy
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ssm.ops.layer_norm import layer_norm_fn
from mamba_ssm.utils.graphed_step import EAGER_STEPS, GraphedStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
two_devices = pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason=f"two CUDA devices are needed, there are {torch.cuda.device_count()}",
)

Inputs = dict[str, Tensor]
Call = Callable[[Inputs], tuple[Tensor, ...]]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _scan(case: str) -> tuple[Inputs, Call]:
    values = make_inputs(CASES[case])
    inputs = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    options = {name: value for name, value in values.items() if name not in inputs}
    return inputs, lambda i: selective_scan_fn(**i, **options, return_last_state=True)


def _convolution(packing: str, channel_last: bool) -> tuple[Inputs, Call]:
    x = _normal(2, 70, 12).transpose(1, 2)
    inputs = {"weight": _normal(12, 4), "bias": _normal(12)}
    inputs["x"] = x if channel_last else x.contiguous()
    options = {"return_final_states": True, "activation": "silu"}
    if packing:
        inputs["seq_idx"], options["num_sequences"] = make_seq_idx(packing, 2, 70)
    else:
        inputs["initial_states"] = _normal(2, 12, 3)
    return inputs, lambda i: causal_conv1d_fn(**i, **options)


def _norm(rms: bool) -> tuple[Inputs, Call]:
    names = {"x": (9, 67), "residual": (9, 67), "weight": (67,), "bias": (67,)}
    inputs = {name: _normal(*shape) for name, shape in names.items()}
    return inputs, lambda i: layer_norm_fn(**i, prenorm=True, is_rms_norm=rms)


@torch.no_grad()
def _state_update(i: Inputs) -> tuple[Tensor, ...]:
    state = i["state"].clone()
    return selective_state_update(state, i["x"], i["x"].abs(), -i["A"].abs(), i["B"], i["B"]), state


@torch.no_grad()
def _convolution_update(i: Inputs) -> tuple[Tensor, ...]:
    state = i["state"].clone()
    return causal_conv1d_update(i["x"], state, i["weight"]), state


def _mamba(i: Inputs) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    layer = scrambled(Mamba(16, layer_idx=0)).to(i["x"].device)
    values = run_with_grads(layer, layer, i["x"])
    return tuple(value for _, value in sorted(values.items()))


def _loss(i: Inputs) -> tuple[Tensor, ...]:
    head = nn.Linear(16, 70, bias=False, device=i["x"].device)
    with torch.no_grad():
        head.weight.copy_(i["weight"])
    targets = torch.arange(60, device=i["x"].device).view(2, 30)
    values = run_with_grads(head, lambda x: chunked_cross_entropy(head, x, targets, 70), i["x"])
    return tuple(value for _, value in sorted(values.items()))


@torch.no_grad()
def _decode_step(i: Inputs) -> tuple[Tensor, ...]:
    model = tiny_lm(device=str(i["conv"].device))
    caches = {n: (i["conv"][n].clone(), i["ssm"][n].clone()) for n in range(2)}
    decoder = cuda_decoder.decoder_for(model, 3)
    assert decoder is not None, cuda_decoder.why_not(model, 3)
    logits = decoder.step(i["ids"], caches)
    return logits, *(t for cache in caches.values() for t in cache)


UPDATE = {"state": _normal(3, 67, 16), "x": _normal(3, 67), "A": _normal(67, 16)}
OPS: dict[str, tuple[Inputs, Call]] = {
    **{
        f"scan, {case}": _scan(case)
        for case in ("base", "bf16", "n=64", "constant B, C", "vision", "holes", "channel last")
    },
    **{
        f"convolution, {packing or 'states'}{', channel last' * last}": _convolution(packing, last)
        for packing in ("", "holes")
        for last in (False, True)
    },
    "layer norm": _norm(False),
    "RMS norm": _norm(True),
    "state update": (UPDATE | {"B": _normal(3, 16)}, _state_update),
    "convolution update": (
        {"state": _normal(3, 67, 4), "x": _normal(3, 67), "weight": _normal(67, 4)},
        _convolution_update,
    ),
    "block": ({"x": _normal(2, 100, 16)}, _mamba),
    "loss": ({"x": _normal(2, 30, 16), "weight": _normal(70, 16)}, _loss),
    "decode step": (
        {"ids": prompt(3, 1, "cpu")[:, 0], "conv": _normal(2, 3, 32, 4),
         "ssm": _normal(2, 3, 32, 16)},
        _decode_step,
    ),
}  # fmt: skip
EVERY_OP = pytest.mark.parametrize("op", OPS)


def results(call: Call, inputs: Inputs) -> dict[str, Tensor]:
    """The outputs of an op and every gradient, by name, by native kernels."""
    leaves = {
        name: value.detach().requires_grad_() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with mamba_ssm.backend("native"):
        outs = call(leaves)
        if any(out.requires_grad for out in outs):
            torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    grads = {f"grad of {name}": value.grad for name, value in leaves.items()}
    named = {f"output {n}": out.detach() for n, out in enumerate(outs)} | grads
    return {name: value for name, value in named.items() if value is not None}


def on(device: str, inputs: Inputs) -> Inputs:
    return {name: value.to(device) for name, value in inputs.items()}


def assert_equal(op: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit, but for the block: its matrix products are the GPU library's."""
    assert all(torch.isfinite(value).all() and value.any() for value in expected.values())
    actual = {name: value.to(expected[name].device) for name, value in actual.items()}
    if op == "block":
        return assert_all_same(actual, expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@EVERY_OP
def test_work_waits_for_its_own_stream(op):
    inputs, call = on("cuda", OPS[op][0]), OPS[op][1]
    expected = results(call, inputs)
    side = torch.cuda.Stream()
    late = {
        name: torch.full_like(value, float("nan") if value.is_floating_point() else 0)
        for name, value in inputs.items()
    }
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        # The inputs are there only after this wait: an op on another stream would read NaN.
        torch.cuda._sleep(200_000_000)
        for name, value in late.items():
            value.copy_(inputs[name])
        actual = results(call, late)
    torch.cuda.synchronize()
    assert_equal(op, actual, expected)


def test_decoding_through_the_module_waits_for_its_own_stream():
    torch.manual_seed(0)
    layer = scrambled(Mamba(16, layer_idx=0)).to("cuda")
    x = torch.randn(2, 4, 16).to("cuda")

    def decoded(x: Tensor) -> Tensor:
        cache = layer.allocate_inference_cache(2, 4)
        with torch.no_grad():
            return torch.cat([layer.step(x[:, t : t + 1], *cache)[0] for t in range(4)], 1)

    expected, late = decoded(x), torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        actual = decoded(late)
    torch.cuda.synchronize()
    assert_same(actual, expected)


def generated(model, ids: Tensor, cg: bool) -> Tensor:
    greedy = model.generate(ids, 24, cg=cg)
    return torch.stack([greedy, model.generate(ids, 24, cg=cg, top_k=5, seed=3)])


@pytest.mark.parametrize("batch", [3, 17], ids=["fused step", "modules"])
@pytest.mark.parametrize("cg", [False, True], ids=["no graph", "graphs"])
def test_generation_waits_for_its_own_stream(cg, batch):
    model, ids = tiny_lm(device="cuda"), prompt(batch, 6, "cuda")
    expected = generated(model, ids, False)
    side, late = torch.cuda.Stream(), torch.zeros_like(ids)
    torch.cuda.synchronize()
    for _ in range(2):  # with graphs: the second run replays what the first captured
        late.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)
            late.copy_(ids)
            actual = generated(model, late, cg)
        torch.cuda.synchronize()
        assert torch.equal(actual, expected)
    assert torch.equal(generated(model, ids, cg), expected)


@two_devices
@EVERY_OP
def test_a_device_that_is_not_current(op):
    inputs, call = OPS[op]
    expected = results(call, on("cuda:0", inputs))
    actual = results(call, on("cuda:1", inputs))
    assert torch.cuda.current_device() == 0
    assert all(value.device == torch.device("cuda:1") for value in actual.values())
    assert_equal(op, actual, expected)


@two_devices
@EVERY_OP
def test_a_stream_of_a_device_that_is_not_current(op):
    """A device keeps its current stream while another device is the current one."""
    inputs, call = on("cuda:1", OPS[op][0]), OPS[op][1]
    expected = results(call, inputs)
    late = {
        name: torch.full_like(value, float("nan") if value.is_floating_point() else 0)
        for name, value in inputs.items()
    }
    torch.cuda.synchronize("cuda:1")
    with torch.cuda.stream(torch.cuda.Stream("cuda:1")), torch.cuda.device("cuda:0"):
        assert torch.cuda.current_device() == 0
        with torch.cuda.device("cuda:1"):
            torch.cuda._sleep(200_000_000)
        for name, value in late.items():
            value.copy_(inputs[name])
        actual = results(call, late)
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize("cuda:1")
    assert_equal(op, actual, expected)


@two_devices
@pytest.mark.parametrize("batch", [3, 17], ids=["fused step", "modules"])
def test_generation_on_a_device_that_is_not_current(batch):
    model, ids = tiny_lm(), prompt(batch, 6, "cpu")
    tokens = [
        generated(model.to(device), ids.to(device), cg).cpu()
        for device in ("cuda:0", "cuda:1", "cuda:0")
        for cg in (False, True, True)
    ]
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(result, tokens[0]) for result in tokens)


@two_devices
def test_a_captured_training_step_on_a_device_that_is_not_current():
    def losses(device: str, captured: bool) -> list[float]:
        model, ids = tiny_lm().train().to(device), prompt(3, 30, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
        last = torch.zeros((), device=device)

        def train() -> None:
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            last.copy_(loss.detach())

        step = GraphedStep(train, device) if captured else train
        values = []
        for _ in range(EAGER_STEPS + 3):
            step()
            values.append(last.item())
        assert not captured or step.graph is not None
        return values

    expected = losses("cuda:0", False)
    assert expected[-1] < expected[0]
    for device in ("cuda:0", "cuda:1", "cuda:0"):  # the first capture must not decide where
        torch.testing.assert_close(losses(device, True), expected, rtol=1e-5, atol=0.0)
    assert torch.cuda.current_device() == 0
