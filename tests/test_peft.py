"""PEFT, replaced layers, hooks, parametrizations: our models, and transformers' on our ops."""

from __future__ import annotations

import copy
import warnings

import pytest
import test_transformers_client as client
import torch
from adapter_cases import (
    PROJECTIONS,
    Doubled,
    adapter_gradients,
    assert_same_gradients,
    expected_adapter_gradients,
    lora_layers,
    quantize,
)
from generation_helpers import HYBRID, tiny_lm
from test_transformers_client import ids
from torch.nn.utils import parametrize

import mamba_ssm.compat

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install mamba_ssm[eval]")

own_path = client.own_path  # a fixture
KINDS = pytest.mark.parametrize("kind", client.MODULES)
EACH = pytest.mark.parametrize("name", PROJECTIONS)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def ours(**options):
    return tiny_lm(40, **options).train()


def lora(**options):
    # Random B as well: with B = 0, as LoRA starts, A has no gradient.
    options = {"target_modules": list(PROJECTIONS), "r": 2, "init_lora_weights": False} | options
    return peft.LoraConfig(**options)


def loss_of(model, x):
    out = model(x, labels=x)
    return out.loss


def cross_entropy(model, x):
    logits = model(x).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())


def adapted(model, **options):
    torch.manual_seed(1)
    return peft.get_peft_model(model, lora(**options))


# --- this library's model -------------------------------------------------------------------------


def test_every_adapter_trains(backend):
    plain, x = ours(), ids(3, 11)
    model = adapted(copy.deepcopy(plain))
    assert len(lora_layers(model)) == 2 * len(PROJECTIONS)
    cross_entropy(model, x).backward()
    expected = expected_adapter_gradients(model, plain, lambda m: cross_entropy(m, x))
    assert_same_gradients(adapter_gradients(model), expected)
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


@EACH
def test_an_adapter_on_one_projection_trains(name, backend):
    plain, x = ours(), ids(2, 7)
    model = adapted(copy.deepcopy(plain), target_modules=[name])
    cross_entropy(model, x).backward()
    expected = expected_adapter_gradients(model, plain, lambda m: cross_entropy(m, x))
    assert_same_gradients(adapter_gradients(model), expected)


def test_merging_saving_and_loading(tmp_path, backend):
    base, x = ours().eval(), ids(2, 9)
    model = adapted(copy.deepcopy(base)).eval()
    with torch.no_grad():
        logits = model(x).logits
        assert not torch.allclose(logits, base(x).logits, rtol=1e-2, atol=1e-2)
        text = model.generate(input_ids=x, max_length=20)
        with model.disable_adapter():
            torch.testing.assert_close(model(x).logits, base(x).logits, **CLOSE)
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(loaded(x).logits, logits)
        merged = model.merge_and_unload()
        assert not lora_layers(merged)
        torch.testing.assert_close(merged(x).logits, logits, **CLOSE)
        assert torch.equal(merged.generate(input_ids=x, max_length=20), text)
        merged.save_pretrained(tmp_path / "merged")
        again = type(base).from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(again(x).logits, merged(x).logits)


def test_training_with_adapters_lowers_the_loss_and_leaves_the_base(backend):
    base, x = ours(), ids(4, 12)
    model = adapted(copy.deepcopy(base), init_lora_weights=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = cross_entropy(model, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for layer in lora_layers(model).values():
        assert layer.lora_B["default"].weight.abs().max() > 1e-3
    after = model.unload().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in base.state_dict().items())


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    base = mamba_ssm.MambaLMHeadModel(
        mamba_ssm.models.config_mamba.MambaConfig(d_model=16, n_layer=2, vocab_size=40)
    )
    assert base.lm_head.weight is base.backbone.embedding.weight
    model = adapted(base)
    inner = model.base_model.model
    assert inner.lm_head.weight is inner.backbone.embedding.weight
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.backbone.embedding.weight
    assert "lm_head.weight" not in dict(merged.named_parameters())


def test_one_projection_shared_by_two_layers(backend):
    def tie(model):
        first, second = (model.backbone.layers[i].mixer for i in (0, 1))
        second.out_proj = first.out_proj
        second.x_proj.weight = first.x_proj.weight
        return model

    model, separate, x = tie(ours()), ours(), ids(2, 9)
    with torch.no_grad():
        for name in ("out_proj", "x_proj"):
            first, second = (
                separate.backbone.layers[i].mixer.get_submodule(name).weight for i in (0, 1)
            )
            second.copy_(first)
    for m in (model, separate):
        cross_entropy(m, x).backward()
    for name in ("out_proj", "x_proj"):
        parts = [separate.backbone.layers[i].mixer.get_submodule(name).weight.grad for i in (0, 1)]
        shared = model.backbone.layers[0].mixer.get_submodule(name).weight.grad
        torch.testing.assert_close(shared, parts[0] + parts[1], rtol=1e-3, atol=1e-6)


# --- replaced layers, hooks, parametrizations ----------------------------------------------------


def dequantized(model):
    """A plain model with the weights that a quantised one multiplies with."""
    plain = copy.deepcopy(model)
    for name in quantize(model):
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(model.get_submodule(name).dequantized())
    return plain


@pytest.mark.parametrize("options", [{}, HYBRID], ids=["mamba", "hybrid"])
def test_quantised_layers_are_called(options, backend):
    model, x = ours(**options), ids(2, 9)
    plain = dequantized(model)
    for m in (model, plain):
        m.zero_grad()
        cross_entropy(m, x).backward()
    torch.testing.assert_close(model(x).logits, plain(x).logits, **CLOSE)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = plain.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        text = model.eval().generate(x, 16)
        assert torch.equal(text, plain.eval().generate(x, 16))


@EACH
def test_hooks_run(name, backend):
    model, x = ours(), ids(2, 9)
    with torch.no_grad():
        before = model(x).logits
    layers = [block.mixer.get_submodule(name) for block in model.backbone.layers]
    handles = [layer.register_forward_hook(lambda *args: 2 * args[2]) for layer in layers]
    logits = model(x).logits
    assert not torch.allclose(logits, before, rtol=1e-3, atol=1e-3)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(2)
            if layer.bias is not None:
                layer.bias.mul_(2)
        torch.testing.assert_close(model(x).logits, logits, **CLOSE)


@pytest.mark.parametrize("name", [*PROJECTIONS, "conv1d"])
def test_parametrized_weights_train(name, backend):
    model, x = ours(), ids(2, 9)
    plain = copy.deepcopy(model)
    for m in (model, plain):
        for block in m.backbone.layers:
            layer = block.mixer.get_submodule(name)
            if m is model:
                parametrize.register_parametrization(layer, "weight", Doubled())
            else:
                layer.weight.data.mul_(2)
    for m in (model, plain):
        cross_entropy(m, x).backward()
    for mine, theirs in zip(model.backbone.layers, plain.backbone.layers, strict=True):
        grad = mine.mixer.get_submodule(name).parametrizations.weight.original.grad
        expected = 2 * theirs.mixer.get_submodule(name).weight.grad
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)


def hf(kind, **options):
    return client.make(kind, **options).train()


def mixers(model):
    return [m for m in model.modules() if mamba_ssm.ops.client_layers.is_foreign_mixer(m)]


@KINDS
def test_every_adapter_of_transformers_models_trains(kind, backend, own_path):
    plain, x = hf(kind), ids(3, 11)
    base = copy.deepcopy(plain)
    with mamba_ssm.compat.peft(base):
        model = adapted(base)
    assert model.config.model_type == plain.config.model_type
    assert len(lora_layers(model)) == len(mixers(plain)) * len(PROJECTIONS)
    with client.OurOps() as used:
        loss_of(model, x).backward()
    assert used.names >= {client.SCAN, "_selective_scan_bwd"}
    # In evaluation mode transformers takes its own path, which has no fused op, in training too.
    own_path(kind)
    expected = expected_adapter_gradients(model, plain.eval(), lambda m: loss_of(m, x))
    assert_same_gradients(adapter_gradients(model), expected)


@KINDS
def test_merging_saving_and_loading_transformers_models(kind, tmp_path, backend):
    base, x = hf(kind).eval(), ids(2, 9)
    with mamba_ssm.compat.peft(base):
        model = adapted(copy.deepcopy(base)).eval()
    options = {"attention_mask": torch.ones_like(x), "max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        logits = model(x, use_cache=False).logits
        assert not torch.allclose(logits, base(x).logits, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(model(x, use_cache=True).logits, logits, **CLOSE)
        torch.testing.assert_close(model.train()(x).logits, logits, **CLOSE)
        text = model.eval().generate(input_ids=x, **options)
        model.save_pretrained(tmp_path)
        with mamba_ssm.compat.peft(base):
            loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(loaded(x).logits, logits, **CLOSE)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x).logits, logits, **CLOSE)
        assert torch.equal(merged.generate(input_ids=x, **options), text)
        if kind != "FalconMamba":  # its fused training op is another function than its evaluation
            torch.testing.assert_close(merged.train()(x).logits, logits, **CLOSE)


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba"])
@pytest.mark.parametrize("name", ["x_proj", "dt_proj"])
def test_an_adapter_that_would_be_left_out_is_an_error(kind, name):
    model = adapted(hf(kind), target_modules=[name])
    with pytest.raises(RuntimeError, match=rf"{name} of \w+Mixer is a peft.*call_projections"):
        loss_of(model, ids(2, 5))
    assert mamba_ssm.compat.call_projections(model) == 2
    loss_of(model, ids(2, 5)).backward()
    assert all(grad.abs().max() > 0 for grad in adapter_gradients(model).values())


def test_pefts_own_refusals():
    with pytest.raises(ValueError, match="out_proj"):
        adapted(hf("Mamba"))
    base = hf("Mamba")
    with (
        pytest.raises(ValueError, match=r"conv1d is a peft.*leave conv1d out"),
        mamba_ssm.compat.peft(base),
    ):
        adapted(base, target_modules=["conv1d"], r=32)
    with pytest.raises(ValueError, match="no transformers Mamba mixer"):
        mamba_ssm.compat.peft(ours())


def test_the_models_type_comes_back_after_an_error():
    base = hf("Mamba")
    with pytest.raises(KeyError), mamba_ssm.compat.peft(base):
        assert base.config.model_type != "mamba"
        raise KeyError
    assert base.config.model_type == "mamba" and "model_type" not in base.config.__dict__


@KINDS
def test_quantised_layers_of_transformers_models_are_called(kind, backend, own_path):
    model, x = hf(kind), ids(2, 9)
    plain = dequantized(model)
    if kind != "Jamba":
        with pytest.raises(RuntimeError, match=r"is a adapter_cases\.QuantLinear"):
            model(x)
    assert mamba_ssm.compat.call_projections(model) == len(mixers(model))
    logits = {train: model.train(train)(x).logits for train in (False, True)}
    own_path(kind)
    expected = plain.eval()(x).logits
    for train in (False, True):
        torch.testing.assert_close(logits[train], expected, **CLOSE)


@KINDS
@EACH
def test_hooks_of_transformers_models_run(kind, name, backend):
    model, x = hf(kind), ids(2, 9)
    calls = []
    for mixer in mixers(model):
        mixer.get_submodule(name).register_forward_hook(lambda *args: calls.append(args[0]))
    if kind != "Jamba" and name != "in_proj":
        with pytest.warns(RuntimeWarning, match=f"{name} of .* has hooks"):
            model(x)
        assert not calls
    mamba_ssm.compat.call_projections(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model(x)
    assert len(calls) == len(mixers(model))
    assert model.training and all(m.training and "dt_proj" not in vars(m) for m in mixers(model))


@KINDS
@EACH
def test_parametrized_weights_of_transformers_models_train(kind, name, backend, own_path):
    # A mixer whose in_proj alone is not plain keeps the fused op, in FalconMamba another function.
    train = kind in client.OWN_TRAINING or name != "in_proj"
    model, x = hf(kind).train(train), ids(2, 9)
    plain = copy.deepcopy(model)
    for mine, theirs in zip(mixers(model), mixers(plain), strict=True):
        parametrize.register_parametrization(mine.get_submodule(name), "weight", Doubled())
        theirs.get_submodule(name).weight.data.mul_(2)
    assert mamba_ssm.compat.call_projections(model) == len(mixers(model))
    with client.OurOps() as used:
        loss_of(model, x).backward()
    assert used.names >= {client.SCAN, "_selective_scan_bwd"}
    own_path(kind)
    loss_of(plain.eval(), x).backward()  # in evaluation mode transformers has no fused op
    for mine, theirs in zip(mixers(model), mixers(plain), strict=True):
        grad = mine.get_submodule(name).parametrizations.weight.original.grad
        expected = 2 * theirs.get_submodule(name).weight.grad
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)


@KINDS
def test_projections_that_layers_of_transformers_models_share(kind, backend, own_path):
    # FalconMamba's fused training op is another function than its own path.
    train = kind in client.OWN_TRAINING
    model, separate, x = hf(kind).train(train), hf(kind).train(train), ids(2, 9)
    first, second = mixers(model)[:2]
    second.out_proj, second.x_proj.weight = first.out_proj, first.x_proj.weight
    mamba_ssm.compat.call_projections(model)
    with client.OurOps() as used:
        loss_of(model, x).backward()
    assert client.SCAN in used.names
    own_path(kind)
    pair = mixers(separate)[:2]
    with torch.no_grad():
        for name in ("out_proj", "x_proj"):
            pair[1].get_submodule(name).weight.copy_(pair[0].get_submodule(name).weight)
    loss_of(separate, x).backward()
    for name in ("out_proj", "x_proj"):
        shared = first.get_submodule(name).weight.grad
        parts = [mixer.get_submodule(name).weight.grad for mixer in pair]
        torch.testing.assert_close(shared, parts[0] + parts[1], rtol=1e-3, atol=1e-5)


def test_a_tied_head_of_transformers_models_stays_tied():
    base = client.make("Mamba", tie_word_embeddings=True).train()
    with mamba_ssm.compat.peft(base):
        model = adapted(base)
    loss_of(model, ids(2, 9)).backward()
    for m in (model.base_model.model, model.merge_and_unload()):
        assert m.lm_head.weight is m.backbone.embeddings.weight


def test_plain_mixers_keep_the_fused_op(monkeypatch):
    model, x = hf("Mamba"), ids(2, 9)
    mamba_ssm.compat.call_projections(model)
    mamba_ssm.compat.call_projections(model)  # twice is once
    assert len(mixers(model)[0]._forward_hooks) == 1
    with client.OurOps() as used:
        loss_of(model, x).backward()
    assert "_causal_conv1d_bwd" in used.names  # only the fused op brings our convolution here


def test_a_failing_forward_leaves_the_mixer_as_it_was():
    model, x = hf("Mamba"), ids(2, 9)
    mamba_ssm.compat.call_projections(model)

    def fail(*args):
        raise KeyError("from a hook")

    mixer = mixers(model)[0]
    mixer.out_proj.register_forward_hook(fail)
    with pytest.raises(KeyError):
        model(x)
    assert mixer.training and "dt_proj" not in vars(mixer)


def test_copies_and_checkpointing_keep_calling(backend):
    base, x = hf("Mamba"), ids(2, 9)
    with mamba_ssm.compat.peft(base):
        model = adapted(base)
    loss_of(model, x).backward()
    expected = {name: grad.clone() for name, grad in adapter_gradients(model).items()}
    again = copy.deepcopy(model)
    again.zero_grad()
    again.enable_input_require_grads()
    again.base_model.model.gradient_checkpointing_enable()
    loss_of(again, x).backward()
    assert_same_gradients(adapter_gradients(again), expected)
