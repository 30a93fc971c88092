"""Language models: initialisation, agreement with transformers, states, packing, the loss."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from module_helpers import assert_all_same, assert_same, run_with_grads, scrambled
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models import loss as loss_module
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MixerModel, _init_weights, create_block
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.modules.mha import MHA
from mamba_ssm.utils.generation import InferenceParams
from mamba_ssm.utils.optim import param_groups

SMALL = {"d_model": 16, "n_layer": 3, "vocab_size": 27, "ssm_cfg": {"d_state": 4}}
ATTENTION = {
    "causal": True,
    "num_heads": 4,
    "num_heads_kv": 2,
    "rotary_emb_dim": 4,
    "d_conv": 3,
    "mlp_dim": 8,
}
VARIANTS = {
    "default": {},
    "layer norm, unfused, untied": {
        "rms_norm": False,
        "fused_add_norm": False,
        "residual_in_fp32": False,
        "tie_embeddings": False,
    },
    "mlp": {"d_intermediate": 24},
    "hybrid": {"attn_layer_idx": [1], "attn_cfg": ATTENTION, "d_intermediate": 24},
}
EVERY = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def make(seed: int = 0, dtype=torch.float32, **options) -> MambaLMHeadModel:
    torch.manual_seed(seed)
    return scrambled(MambaLMHeadModel(MambaConfig(**SMALL | options))).to(dtype)


def ids(*shape: int, seed: int = 1, high: int = 27) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def params(batch: int, length: int) -> InferenceParams:
    return InferenceParams(max_seqlen=length, max_batch_size=batch)


# -- construction ----------------------------------------------------------------------------------


def test_keys_vocabulary_and_tying():
    model = make()
    per_layer = ["norm.weight", "mixer.A_log", "mixer.D", "mixer.in_proj.weight"]
    per_layer += ["mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.x_proj.weight"]
    per_layer += ["mixer.dt_proj.weight", "mixer.dt_proj.bias", "mixer.out_proj.weight"]
    assert list(model.state_dict()) == [
        "backbone.embedding.weight",
        *(f"backbone.layers.{i}.{key}" for i in range(3) for key in per_layer),
        "backbone.norm_f.weight",
        "lm_head.weight",
    ]
    assert model.backbone.embedding.weight.shape == (32, 16)
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert copy.deepcopy(model).lm_head.weight is not model.lm_head.weight
    untied = make(tie_embeddings=False)
    untied.tie_weights()
    assert untied.lm_head.weight is not untied.backbone.embedding.weight
    exact = make(pad_vocab_size_multiple=1)
    assert exact(ids(1, 2)).logits.shape == (1, 2, 27)
    assert [layer.layer_idx for layer in model.backbone.layers] == [0, 1, 2]


def test_hybrid_keys():
    model = make(**VARIANTS["hybrid"])
    assert isinstance(model.backbone.layers[1].mixer, MHA)
    prefix = "backbone.layers.1."
    assert [k.removeprefix(prefix) for k in model.state_dict() if k.startswith(prefix)] == [
        "norm.weight",
        "mixer.in_proj.weight",
        "mixer.in_proj.bias",
        "mixer.conv1d.weight",
        "mixer.conv1d.bias",
        "mixer.out_proj.weight",
        "mixer.out_proj.bias",
        "norm2.weight",
        "mlp.fc1.weight",
        "mlp.fc2.weight",
    ]


@pytest.mark.parametrize(("d_intermediate", "residuals"), [(0, 1), (256, 2)])
def test_initialisation(d_intermediate, residuals):
    torch.manual_seed(0)
    config = MambaConfig(
        d_model=128,
        n_layer=4,
        vocab_size=1000,
        d_intermediate=d_intermediate,
        ssm_cfg={"bias": True},
    )
    model = MambaLMHeadModel(config, initializer_cfg={"initializer_range": 0.5})
    assert abs(model.backbone.embedding.weight.std() - 0.5) < 0.01
    for layer in model.backbone.layers:
        mixer = layer.mixer
        bound = 1 / math.sqrt(mixer.d_inner) / math.sqrt(residuals * 4)
        largest = mixer.out_proj.weight.abs().max()
        assert 0.99 * bound < largest <= bound
        assert not mixer.in_proj.bias.any() and not mixer.out_proj.bias.any()
        dt = F.softplus(mixer.dt_proj.bias)
        assert dt.min() > 0.9e-3 and dt.max() < 0.11 and dt.std() > 0
        if d_intermediate:
            bound = 1 / math.sqrt(256) / math.sqrt(residuals * 4)
            assert 0.99 * bound < layer.mlp.fc2.weight.abs().max() <= bound


def test_seed_gives_the_historical_draws():
    """Everything is drawn when built, again by MixerModel, and again by the language model."""
    torch.manual_seed(3)
    model = MambaLMHeadModel(MambaConfig(**SMALL | {"n_layer": 1}))
    torch.manual_seed(3)
    embedding = nn.Embedding(32, 16)
    mixer = Mamba(16, d_state=4)
    for _ in range(2):
        if _ == 1:
            nn.Linear(16, 32, bias=False)
        nn.init.normal_(embedding.weight, std=0.02)
        nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
    assert torch.equal(model.backbone.embedding.weight, embedding.weight)
    built = model.backbone.layers[0].mixer.state_dict()
    for name, value in mixer.state_dict().items():
        assert torch.equal(built[name], value), name


def test_init_weights_on_its_own():
    linear = nn.Linear(3, 4)
    _init_weights(linear, n_layer=2)
    assert not linear.bias.any()
    mixer = Mamba(8)
    bias = mixer.dt_proj.bias.clone()
    mixer.apply(lambda m: _init_weights(m, n_layer=2, rescale_prenorm_residual=False))
    assert torch.equal(mixer.dt_proj.bias, bias)


def test_meta_construction_and_dtype():
    model = MambaLMHeadModel(MambaConfig(**SMALL), device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta for p in model.parameters())
    source = make()
    state = {
        name: value.to(model.state_dict()[name].dtype)
        for name, value in source.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        wide = name.endswith((".A_log", ".D"))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    x = ids(2, 20)
    expected = source(x).logits
    assert (model(x).logits.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"d_modle": 3}, TypeError, "d_modle"),
        ({"d_model": 0}, ValueError, "d_model must be at least 1"),
        ({"n_layer": 2.0}, TypeError, "n_layer must be an int"),
        ({"vocab_size": -1}, ValueError, "vocab_size"),
        ({"rms_norm": "yes"}, TypeError, "rms_norm must be True or False"),
        ({"ssm_cfg": [1]}, TypeError, "ssm_cfg must be a dict"),
        ({"attn_layer_idx": [3]}, ValueError, "layers from 0 to 2"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, ValueError, "must be 'Mamba1', got 'Mamba2'"),
        ({"ssm_cfg": {"d_stat": 3}}, TypeError, "d_stat"),
        ({"attn_layer_idx": [0]}, TypeError, "num_heads"),
    ],
)
def test_bad_configurations(options, error, message):
    with pytest.raises(error, match=message):
        MambaLMHeadModel(MambaConfig(**SMALL | options), device="meta")


def test_config_defaults_and_signatures():
    config = MambaConfig()
    assert (config.d_model, config.n_layer, config.vocab_size) == (2560, 64, 50277)
    assert (config.ssm_cfg, config.attn_layer_idx, config.attn_cfg) == ({}, [], {})
    assert config.rms_norm and config.residual_in_fp32 and config.fused_add_norm
    assert (config.pad_vocab_size_multiple, config.tie_embeddings) == (8, True)
    names = list(inspect.signature(MambaLMHeadModel.forward).parameters)
    assert names[1:5] == ["input_ids", "position_ids", "inference_params", "num_last_tokens"]
    block = create_block(16, rms_norm=False, layer_idx=5, ssm_cfg={"layer": "Mamba1"})
    assert block.layer_idx == block.mixer.layer_idx == 5 and isinstance(block.norm, nn.LayerNorm)
    with pytest.raises(TypeError, match="vocab_size"):
        MixerModel(16, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(ids(3)), ValueError, "\\(b, l\\)"),
        (lambda m: m(torch.ones(1, 3)), TypeError, "int64 or int32"),
        (lambda m: m(ids(1, 3), labels=ids(1, 4)), ValueError, "labels must have"),
        (lambda m: m(ids(1, 3), num_last_tokens=-1), ValueError, "num_last_tokens"),
        (lambda m: m(ids(1, 3), initial_state=[None]), ValueError, "each of the 3 layers"),
        (lambda m: m(ids(2, 3), cu_seqlens=torch.tensor([0, 3])), ValueError, "packed batch of 1"),
        (lambda m: m(ids(1, 3), attention_maks=ids(1, 3)), TypeError, "attention_maks"),
    ],
)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call(make())


# -- transformers ----------------------------------------------------------------------------------


def transformers_twin(model: MambaLMHeadModel):
    """transformers' own model with the same weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = model.config
    mixer = model.backbone.layers[0].mixer
    twin = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=model.backbone.embedding.num_embeddings,
            hidden_size=config.d_model,
            state_size=mixer.d_state,
            num_hidden_layers=config.n_layer,
            layer_norm_epsilon=1e-5,
            conv_kernel=mixer.d_conv,
            expand=mixer.expand,
            time_step_rank=mixer.dt_rank,
            use_bias=mixer.in_proj.bias is not None,
            use_conv_bias=mixer.conv1d.bias is not None,
            residual_in_fp32=config.residual_in_fp32,
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    twin.load_state_dict(
        {name.replace("embedding.", "embeddings."): t for name, t in model.state_dict().items()}
    )
    return twin


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_loss_and_gradients_equal_transformers(bias, train):
    model = make(ssm_cfg={"d_state": 4, "bias": bias, "conv_bias": not bias}).train(train)
    twin, x = transformers_twin(model).train(train), ids(2, 17)
    labels = x.clone()
    labels[0, 3:6] = -100

    expected = twin(x, labels=labels, output_hidden_states=True)
    actual = model(x, labels=labels, output_hidden_states=True, return_logits=True)
    assert_same(actual.logits, expected.logits)
    assert_same(actual.loss, expected.loss)
    assert len(actual.hidden_states) == model.config.n_layer + 1
    assert_same(actual.hidden_states, expected.hidden_states)

    expected.loss.backward()
    actual.loss.backward()
    grads = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        grad = grads[name.replace("embedding.", "embeddings.")].grad
        assert grad.abs().sum() > 0
        assert_same(parameter.grad, grad, name)


# -- training --------------------------------------------------------------------------------------


@EVERY
def test_every_parameter_trains(options):
    model, x = make(**options), ids(2, 11)
    model(x, labels=x).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


class LargestFloat(TorchDispatchMode):
    """Remembers the largest floating tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("tied", [True, False])
def test_chunked_loss_is_the_loss_and_never_holds_all_logits(monkeypatch, tied):
    model = make(tie_embeddings=tied, vocab_size=2000)
    x = ids(2, 61, high=2000)
    labels = x.clone()
    labels[1, 20:40] = 7

    def whole():
        logits = model(x).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=7)

    def chunked():
        return model(x, labels=labels, ignore_index=7).loss

    expected = run_with_grads(model, whole)
    assert_all_same(run_with_grads(model, chunked), expected)
    monkeypatch.setattr(loss_module, "MAX_LOGIT_ELEMENTS", 2000 * 10)
    with LargestFloat() as seen:
        actual = run_with_grads(model, chunked)
    assert_all_same(actual, expected)
    # Scratch of a step stays below the embedding's own gradient.
    assert seen.largest <= model.lm_head.weight.numel() < x.numel() * 2000
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        chunked()
    assert not any(shape and shape[-1] == 2000 for shape in kept), "logits are kept for backward"
    with torch.no_grad():
        assert_same(chunked(), expected["output 0"])
        assert model(x, labels=labels).logits is None
        assert model(x, labels=labels, return_logits=True).logits.shape == (2, 61, 2000)


def test_loss_without_any_target_is_zero():
    model, x = make(), ids(2, 5)
    loss = model(x, labels=torch.full_like(x, -100)).loss
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for p in model.parameters())
    assert model(ids(2, 1), labels=ids(2, 1)).loss == 0


def test_loss_of_packed_and_padded_batches():
    model, lengths = make(dtype=torch.float64), (5, 1, 7)
    x = ids(1, 13)
    parts = x.split(lengths, 1)

    def alone():
        total = sum(model(p, labels=p).loss * (p.shape[1] - 1) for p in parts if p.shape[1] > 1)
        return total / sum(n - 1 for n in lengths)

    bounds = torch.tensor((0, *lengths)).cumsum(0)
    width = max(lengths)
    expected = run_with_grads(model, alone)
    packed = run_with_grads(model, lambda: model(x, labels=x, cu_seqlens=bounds).loss)
    assert_all_same(packed, expected)
    for left in (True, False):
        pads = [(width - n, 0) if left else (0, width - n) for n in lengths]
        batch = torch.cat([F.pad(p, pad, value=1) for p, pad in zip(parts, pads, strict=True)])
        masks = [F.pad(torch.ones_like(p), pad) for p, pad in zip(parts, pads, strict=True)]
        mask = torch.cat(masks)
        padded = run_with_grads(
            model,
            lambda batch=batch, mask=mask: model(batch, labels=batch, attention_mask=mask).loss,
        )
        assert_all_same(padded, expected)


def test_parameter_groups():
    model = make(d_intermediate=24, ssm_cfg={"bias": True})
    model.backbone.layers[0].mixer.in_proj.weight.requires_grad_(False)
    decay, plain = param_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    plain_names = {names[id(p)] for p in plain["params"]}
    decay_names = {names[id(p)] for p in decay["params"]}
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    frozen = {"backbone.layers.0.mixer.in_proj.weight"}
    assert decay_names | plain_names | frozen == set(names.values())
    assert len(decay["params"]) + len(plain["params"]) + 1 == len(names)
    for name in plain_names:
        assert name.endswith(
            ("A_log", ".D", "bias", "norm.weight", "norm2.weight", "norm_f.weight")
        )
    assert all("A_log" not in name for name in decay_names)
    torch.optim.AdamW([decay, plain])
    with pytest.raises(ValueError, match="negative"):
        param_groups(model, -1.0)


# -- states ----------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("sizes", [(1,) * 8, (5, 1, 1, 1), (3, 2, 3)])
def test_decoding_equals_forward(options, sizes):
    model, x = make(dtype=torch.float64, **options | {"residual_in_fp32": False}), ids(2, 8)
    cache = params(2, 8)
    cache.key_value_memory_dict = model.allocate_inference_cache(2, 8)
    assert sorted(cache.key_value_memory_dict) == [0, 1, 2]
    outs = []
    with torch.no_grad():
        for chunk in x.split(sizes, 1):
            outs.append(model(chunk, inference_params=cache).logits)
            cache.seqlen_offset += chunk.shape[1]
        assert_same(torch.cat(outs, 1), model(x).logits)
        last = model(x, num_last_tokens=3).logits
        assert_same(last, model(x).logits[:, -3:])


@EVERY
def test_chunks_with_states_equal_one_pass_with_all_gradients(options):
    model, x = make(dtype=torch.float64, **options | {"residual_in_fp32": False}), ids(2, 9)

    def whole():
        return model(x).logits

    def chunked():
        state, outs = None, []
        for chunk in x.split((4, 1, 4), 1):
            out = model(chunk, initial_state=state, return_final_state=True)
            outs.append(out.logits)
            state = out.final_state
            assert out.loss is None and out.hidden_states is None and len(state) == 3
        return torch.cat(outs, 1)

    assert_all_same(run_with_grads(model, chunked), run_with_grads(model, whole))


@EVERY
def test_packed_and_padded_equal_separate(options):
    model = make(dtype=torch.float64, **options | {"residual_in_fp32": False})
    lengths, x = (4, 2, 3), ids(1, 9)
    parts = x.split(lengths, 1)
    expected = torch.cat([model(p).logits for p in parts], 1)
    bounds = torch.tensor((0, *lengths)).cumsum(0)
    numbers = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    assert_same(model(x, cu_seqlens=bounds).logits, expected)
    assert_same(model(x, seq_idx=numbers).logits, expected)

    pads = [(0, 0), (2, 0), (0, 1)]
    batch = torch.cat([F.pad(p, pad, value=3) for p, pad in zip(parts, pads, strict=True)])
    mask = torch.cat(
        [F.pad(torch.ones_like(p), pad) for p, pad in zip(parts, pads, strict=True)]
    ).bool()
    assert_same(model(batch, attention_mask=mask).logits[mask], expected[0])

    more, cache = ids(3, 2, seed=9), params(3, 8)
    with torch.no_grad():
        model(batch, inference_params=cache, attention_mask=mask)
        cache.seqlen_offset = 4
        continued = model(more, inference_params=cache).logits
        for i, part in enumerate(parts):
            alone = model(torch.cat([part, more[i : i + 1]], 1)).logits[:, -2:]
            assert_same(continued[i : i + 1], alone)


def test_packed_states_go_in_and_out():
    model = make(dtype=torch.float64, residual_in_fp32=False)
    first, second = ids(1, 9), ids(1, 6, seed=4)
    one = model(first, cu_seqlens=torch.tensor([0, 4, 9]), return_final_state=True)
    two = model(second, cu_seqlens=torch.tensor([0, 5, 6]), initial_state=one.final_state)
    for a, b, c, d in ((0, 4, 0, 5), (4, 9, 5, 6)):
        whole = model(torch.cat([first[:, a:b], second[:, c:d]], 1)).logits
        assert_same(two.logits[:, c:d], whole[:, b - a :])
    with pytest.raises(ValueError, match="pass attention_mask"):
        make(**VARIANTS["hybrid"])(
            first, cu_seqlens=torch.tensor([0, 4, 9]), return_final_state=True
        )


def test_low_precision_forward():
    model, x = make(n_layer=2), ids(2, 33)
    reference = model(x).logits
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(model).to(dtype)(x).logits
        assert low.dtype == dtype
        bound = 16 * torch.finfo(dtype).eps * reference.abs().max()
        assert (low.float() - reference).abs().max() <= bound
        with torch.autocast("cpu", dtype):
            cast = model(x, labels=x, return_logits=True)
        assert (cast.logits.float() - reference).abs().max() <= bound
        assert cast.loss.dtype == torch.float32
        assert abs(cast.loss - model(x, labels=x).loss) < 0.05


def test_saving_and_loading(tmp_path):
    model, x = make(**VARIANTS["hybrid"]), ids(2, 6)
    model.save_pretrained(tmp_path)
    loaded = MambaLMHeadModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert loaded.lm_head.weight is loaded.backbone.embedding.weight
    mixer = loaded.backbone.layers[0].mixer
    assert mixer.A_log._no_weight_decay and mixer.dt_proj.bias._no_reinit
    low = MambaLMHeadModel.from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16)
    kept = {p.dtype for n, p in low.named_parameters() if n.endswith(("A_log", ".D"))}
    assert kept == {torch.float32} and low.lm_head.weight.dtype == torch.bfloat16
