"""torch.compile with fullgraph=True: the block and the model, training and inference."""

from __future__ import annotations

import pytest
import torch
from module_helpers import assert_all_same, assert_same, run_with_grads, scrambled

from mamba_ssm import Mamba, MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
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
