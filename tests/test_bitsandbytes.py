"""Layers quantised by bitsandbytes itself, in this library's models: called, trained beside."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_cases import PROJECTIONS
from torch import nn

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig

bnb = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes"
)

KINDS = ["8 bit", "4 bit"]


def small_model(device: str) -> MambaLMHeadModel:
    torch.manual_seed(0)
    # On a CPU bitsandbytes wants rows of 64 inputs, and outputs in blocks of 32.
    config = MambaConfig(d_model=64, n_layer=2, vocab_size=40, ssm_cfg={"dt_rank": 64})
    return MambaLMHeadModel(config).to(device)


def quantized_layer(kind: str, linear: nn.Linear, device: str) -> nn.Module:
    """A layer of bitsandbytes with this one's weight; moving it to the device quantises it."""
    shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if kind == "8 bit":
        layer = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
    else:
        options = {"quant_type": "nf4", "compute_dtype": torch.float32}
        layer = bnb.nn.Linear4bit(*shape, bias=bias, **options)
    layer.load_state_dict(linear.state_dict())
    layer.requires_grad_(False)
    return layer.to(device)


def quantize(model: MambaLMHeadModel, kind: str) -> list[nn.Module]:
    """Replace every projection of every mixer; the new layers."""
    layers = []
    for block in model.backbone.layers:
        for name in PROJECTIONS:
            linear = getattr(block.mixer, name).cpu()
            layers.append(quantized_layer(kind, linear, str(model.lm_head.weight.device)))
            setattr(block.mixer, name, layers[-1])
    return layers


def dequantized(kind: str, layer: nn.Module) -> torch.Tensor:
    """The weight that a layer multiplies with, (out, in) fp32."""
    if kind == "4 bit":
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return weight.float()
    return layer.weight.data.float() * (layer.weight.SCB.float() / 127)[:, None]


def with_plain_layers(model: MambaLMHeadModel, kind: str) -> MambaLMHeadModel:
    """A copy of a quantised model with plain layers of the same weights."""
    plain = small_model(str(model.lm_head.weight.device))
    for mine, block in zip(plain.backbone.layers, model.backbone.layers, strict=True):
        for name in PROJECTIONS:
            layer, linear = getattr(block.mixer, name), getattr(mine.mixer, name)
            assert layer.weight.dtype in (torch.int8, torch.uint8)
            with torch.no_grad():
                linear.weight.copy_(dequantized(kind, layer))
    return plain


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    a, b = actual.detach().float(), expected.detach().float()
    return float((a - b).norm() / b.norm())


# The 8 bit layer rounds its input to 8 bits as well, and computes in fp16.
BOUND = {"8 bit": 4e-2, "4 bit": 2e-3}


@pytest.mark.filterwarnings("ignore:.*inputs will be cast from torch.float32")
@pytest.mark.parametrize("kind", KINDS)
class TestModels:
    def test_forward_and_gradients(self, kind, backend, device):
        unquantized, model = small_model(device), small_model(device)
        layers = quantize(model, kind)
        calls = []
        for layer in layers:
            layer.register_forward_hook(lambda *args: calls.append(args[0]))
        plain = with_plain_layers(model, kind)
        ids = torch.randint(40, (2, 31), device=device)
        logits = [m(ids).logits for m in (model, plain, unquantized)]
        assert len(set(calls)) == len(layers)
        assert relative(logits[0], logits[1]) < BOUND[kind]
        assert relative(logits[1], logits[2]) > 1e-3  # the quantisation is there to be seen
        for m in (model, plain):
            m(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                expected = plain.get_parameter(name).grad
                assert relative(parameter.grad, expected) < 4 * BOUND[kind], name

    def test_generation(self, kind, backend, device):
        model = small_model(device)
        quantize(model, kind)
        model.eval()
        ids = torch.randint(40, (2, 7), device=device)
        with torch.no_grad():
            text = model.generate(ids, max_length=16)
            again = copy.deepcopy(ids)
            for _ in range(9):
                token = model(again).logits[:, -1].argmax(-1, keepdim=True)
                again = torch.cat([again, token], 1)
        if kind == "4 bit":
            assert torch.equal(text, again)
        else:  # the largest input decides about the rounding of all, and a step has other inputs
            assert text.shape == again.shape
