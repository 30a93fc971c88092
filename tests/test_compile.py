"""torch.compile with fullgraph=True: the block and the model, training and inference."""

from __future__ import annotations

import pytest
import torch
from module_helpers import assert_all_same, assert_same, run_with_grads, scrambled
from torch._dynamo.testing import CompileCounterWithBackend

from mamba_ssm import Mamba, MambaLMHeadModel
from mamba_ssm.models import fused_loss
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.ops import mamba_block
from mamba_ssm.utils.generation import InferenceParams

SHORT = {"d_state": 4}
# What these tests are about is tracing: the compiler's code generation is not ours.
compiled = torch.compile(backend="aot_eager", fullgraph=True)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_and_input(**options) -> tuple[Mamba, torch.Tensor]:
    torch.manual_seed(0)
    layer = scrambled(Mamba(6, layer_idx=0, **SHORT | options))
    return layer, torch.randn(2, 9, 6)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": True, "conv_bias": False}], ids=str)
def test_training_the_block(options, fast):
    layer, x = layer_and_input(**options, use_fast_path=fast)
    expected = run_with_grads(layer, layer, x)
    assert_all_same(run_with_grads(layer, compiled(layer), x), expected)


def test_states_and_packing():
    layer, x = layer_and_input()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False

    def call(x, conv, ssm):
        out, state = layer(
            x, initial_state=(conv, ssm), return_final_state=True, attention_mask=mask
        )
        return out, *state

    leaves = (x, torch.randn(2, 12, 3), torch.randn(2, 12, 4))
    expected = run_with_grads(layer, call, *leaves)
    assert_all_same(run_with_grads(layer, compiled(call), *leaves), expected)


def test_decoding_the_block():
    layer, x = layer_and_input()
    expected = layer(x).detach()
    step = compiled(layer.step)
    with torch.no_grad():
        for sizes in ((1,) * 9, (3, 3, 3)):
            cache = layer.allocate_inference_cache(2, 9)
            outs = [step(chunk, *cache)[0] for chunk in x.split(sizes, 1)]
            assert_same(torch.cat(outs, 1), expected)


@pytest.mark.slow
def test_the_default_compiler_once():
    layer, x = layer_and_input()
    expected = run_with_grads(layer, layer, x)
    actual = run_with_grads(layer, torch.compile(layer, fullgraph=True), x)
    assert_all_same(actual, expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"attn_layer_idx": [0], "attn_cfg": {"causal": True, "num_heads": 2, "d_conv": 2}}],
    ids=["mamba", "hybrid"],
)
def test_the_language_model(options):
    torch.manual_seed(0)
    config = MambaConfig(
        d_model=8, n_layer=1 + bool(options), vocab_size=24, ssm_cfg=SHORT, **options
    )
    model = scrambled(MambaLMHeadModel(config))
    x = torch.randint(0, 24, (2, 7))
    loss = compiled(lambda ids: model(ids, labels=ids).loss)
    expected = run_with_grads(model, lambda: model(x, labels=x).loss)
    assert_all_same(run_with_grads(model, lambda: loss(x)), expected)

    def decode(forward):
        cache, outs = InferenceParams(max_seqlen=7, max_batch_size=2), []
        cache.key_value_memory_dict = model.allocate_inference_cache(2, 7)
        for chunk in x.split((5, 1, 1), 1):
            outs.append(forward(chunk, inference_params=cache).logits)
            cache.seqlen_offset += chunk.shape[1]
        return torch.cat(outs, 1)

    with torch.no_grad():
        assert_same(
            decode(torch.compile(model, backend="aot_eager", fullgraph=True)), decode(model)
        )
        assert_same(decode(model), model(x).logits)


def small_model(device: str = "cpu", **options) -> MambaLMHeadModel:
    torch.manual_seed(0)
    config = MambaConfig(
        **{"d_model": 8, "n_layer": 1, "vocab_size": 24, "ssm_cfg": SHORT} | options
    )
    return scrambled(MambaLMHeadModel(config)).to(device)


def random_ids(*shape: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[-1])
    return torch.randint(0, 24, shape, generator=generator).to(device)


def test_training_steps_compile_once(device):
    model = small_model(device)
    twin = small_model(device)
    counter = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(lambda ids: model(ids, labels=ids).loss, backend=counter, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    losses = (loss, lambda ids: twin(ids, labels=ids).loss)
    for step in range(4):
        ids = random_ids(2, 9, device=device).roll(step, 1)
        for optimizer, loss_of in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss_of(ids).backward()
            optimizer.step()
    assert counter.frame_count == 1
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_same(parameter.detach(), other.detach(), name, scale=4.0)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_training_under_autocast(where, backend, device, monkeypatch):
    model = small_model(device)
    ids = random_ids(2, 9, device=device)

    def loss() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=where == "inside"):
            return model(ids, labels=ids).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)

    def run(call) -> dict[str, torch.Tensor]:
        def work() -> torch.Tensor:
            if where == "inside":
                return call()
            with torch.autocast(device, torch.bfloat16):
                return call()

        return run_with_grads(model, work)

    actual, expected = run(compiled), run(loss)
    if where == "inside" and device == "cpu":
        with monkeypatch.context() as parts:
            parts.setattr(mamba_block, "DEVICES", set())
            parts.setattr(fused_loss, "DEVICES", set())
            assert_all_same(actual, run(loss))
    # What is one function where nothing is compiled rounds to bf16 in other places. Outside, the
    # compiler takes the whole backward under autocast too, which autograd does not; on a GPU the
    # block asks for weight gradients in fp32 only where nothing is compiled.
    exact = run_with_grads(model, lambda: model(ids, labels=ids).loss)
    for name, value in exact.items():
        errors = [(result[name] - value).norm() for result in (actual, expected)]
        assert max(errors) <= 2 * min(errors) + 2.0**-7 * value.norm(), name
        if device == "cpu":  # there both round in the same places, nearly
            difference = (actual[name] - expected[name]).norm()
            assert difference <= 2.0**-7 * expected[name].norm(), name
    assert not torch.is_autocast_enabled(device)


def test_one_inference_graph_serves_all_lengths(device):
    model = small_model(device)
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    with torch.no_grad():
        for shape in ((2, 9), (2, 32), (3, 33), (2, 64), (5, 300)):
            ids = random_ids(*shape, device=device)
            assert_same(forward(ids).logits, model(ids).logits)
            counts.append(counter.frame_count)
    # The first call may hand torch's backend more than one graph; no later one may.
    assert counts == [counts[0]] * 5


def test_training_graphs_for_all_lengths_are_few(device):
    # A scan keeps a state for every chunk, and torch compiles tensors with a dimension of 1 (one
    # chunk, or a batch of one) apart.
    model = small_model(device)
    counter = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(
        lambda ids: model(ids, labels=ids).loss, backend=counter, fullgraph=True, dynamic=True
    )
    for shape in ((2, 100), (3, 101), (2, 200), (4, 77), (2, 9), (3, 12)):
        ids = random_ids(*shape, device=device)
        expected = run_with_grads(model, lambda ids=ids: model(ids, labels=ids).loss)
        assert_all_same(run_with_grads(model, lambda ids=ids: loss(ids)), expected)
    assert counter.frame_count <= 3


def test_decoding_steps_compile_once(device):
    model = small_model(device)
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model, backend=counter, fullgraph=True)
    ids = random_ids(2, 12, device=device)
    counts, outs = [], []
    cache = InferenceParams(max_seqlen=12, max_batch_size=2)
    cache.key_value_memory_dict = model.allocate_inference_cache(2, 12)
    with torch.no_grad():
        for t in range(12):
            outs.append(forward(ids[:, t : t + 1], inference_params=cache).logits)
            cache.seqlen_offset += 1
            counts.append(counter.frame_count)
        assert_same(torch.cat(outs, 1), model(ids).logits)
    # The prefill, the first step, and the first step whose position is a variable.
    assert counts[2:] == [counts[2]] * 10 and counts[2] <= 3


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.slow
def test_the_default_compiler_on_the_language_model(dynamic, device):
    model = small_model(device)
    ids = random_ids(2, 40, device=device)
    forward = torch.compile(model, fullgraph=True, dynamic=dynamic)
    expected = run_with_grads(model, lambda: model(ids).logits)
    assert_all_same(run_with_grads(model, lambda: forward(ids).logits), expected)
    with torch.no_grad():
        assert_same(forward(ids).logits, model(ids).logits)


def test_gradient_checkpointing_compiles():
    model = small_model().train()
    ids = random_ids(2, 9)
    expected = run_with_grads(model, lambda: model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable()
    loss = compiled(lambda: model(ids, labels=ids).loss)
    assert_all_same(run_with_grads(model, loss), expected)
