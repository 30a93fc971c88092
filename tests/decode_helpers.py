"""Small language models and decode steps, by the fused step and by the modules."""

from __future__ import annotations

import pytest
import torch

from mamba_ssm.inference import cpu_decoder, is_quantized
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.ops import native
from mamba_ssm.utils.generation import InferenceParams

needs_native = pytest.mark.skipif(
    not native.has_kernel("_decode_step", "cpu"),
    reason=f"no native decode step: {native.status()['cpu'][1]}",
)


def make_model(dtype=torch.float32, seed=0, **changes) -> MambaLMHeadModel:
    """A model with odd sizes, whose outputs are far from zero."""
    torch.manual_seed(seed)
    config = {"d_model": 40, "n_layer": 3, "vocab_size": 77, "pad_vocab_size_multiple": 1}
    model = MambaLMHeadModel(MambaConfig(**(config | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("conv1d.bias", "proj.bias", "D")):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embedding" in name:
                parameter.mul_(20)
    model = model.to(dtype).eval()
    for block in model.backbone.layers:
        for parameter in (getattr(block.mixer, name, None) for name in ("A_log", "D")):
            if parameter is not None:
                parameter.data = parameter.data.float()
    return model


def random_cache(model, batch, dtype=None, seed=1):
    """A decode cache with something in it."""
    generator = torch.Generator().manual_seed(seed)
    cache = model.allocate_inference_cache(batch, 8, dtype=dtype)
    for layer in cache.values():
        for t in layer:
            t.copy_(torch.randn(t.shape, generator=generator))
    return cache


def copied(cache):
    """The same values in memory of its own."""
    return {i: tuple(t.clone() for t in layer) for i, layer in cache.items()}


def module_step(model, ids, cache):
    """One step through the modules: logits (b, vocab); the cache is moved on."""
    params = InferenceParams(8, len(ids), seqlen_offset=1, key_value_memory_dict=cache)
    with torch.no_grad():
        return model(ids[:, None], inference_params=params).logits[:, -1]


def fused_step(model, ids, cache):
    """The same through the fused step, which must serve the model."""
    with torch.no_grad():
        decoder = cpu_decoder.decoder_for(model)
        assert decoder is not None, cpu_decoder.why_not(model)
        return decoder.step(ids, cache)


def oracle_step(model, ids, cache):
    """The same in fp64 by the modules: (logits, cache)."""
    wide = dequantized(model) if is_quantized(model) else make_like(model).double()
    wide = wide.to(ids.device)
    with torch.no_grad():
        for block in wide.backbone.layers:
            block.residual_in_fp32 = block.fused_add_norm = False
        wide.backbone.residual_in_fp32 = wide.backbone.fused_add_norm = False
    cache = {i: tuple(t.double() for t in layer) for i, layer in cache.items()}
    return module_step(wide, ids, cache), cache


def dequantized(model):
    """A float twin, in fp64, of a model with int8 weights."""
    twin = MambaLMHeadModel(model.config).eval().double()
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith(".quantized"):
            scales = model.state_dict()[name.replace(".quantized", ".scales")].double()
            groups = value.double().unflatten(1, (scales.shape[1], -1))
            state[name.replace(".quantized", ".weight")] = (groups * scales[..., None]).flatten(1)
        elif not name.endswith(".scales"):
            state[name] = value
    twin.tie_weights = lambda: None
    twin.lm_head.weight = torch.nn.Parameter(twin.lm_head.weight.detach().clone())  # untied
    twin.load_state_dict(state)
    return twin


def make_like(model):
    """A copy of a model."""
    config = model.config
    twin = MambaLMHeadModel(config, dtype=model.lm_head.weight.dtype).eval()
    twin.load_state_dict(model.state_dict())
    return twin
