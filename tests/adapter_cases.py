"""What the tests of adapters share: gradients of LoRA adapters from those of merged weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name without PEFT's prefix: layer} of every LoRA layer."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def expected_adapter_gradients(
    adapted: nn.Module, plain: nn.Module, loss: Callable[[nn.Module], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Gradients of the adapters' matrices, out of ``plain``'s with the same function.

    Merges W + s B A into ``plain``, a copy of the base model, and takes dA = s Bᵀ dW and
    dB = s dW Aᵀ: no adapter can be missed here.
    """
    layers, weights = lora_layers(adapted), {}
    for name, layer in layers.items():
        weight = plain.get_submodule(name).weight
        with torch.no_grad():
            weight += layer.get_delta_weight("default")
        weights[name] = weight
    grads = torch.autograd.grad(loss(plain), list(weights.values()))
    result = {}
    for (name, layer), grad in zip(layers.items(), grads, strict=True):
        scale = layer.scaling["default"]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        result[f"{name}.lora_A"] = scale * B.detach().t() @ grad
        result[f"{name}.lora_B"] = scale * grad @ A.detach().t()
    return result


def adapter_gradients(adapted: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients that a backward pass left in the adapters."""
    result = {}
    for name, layer in lora_layers(adapted).items():
        result[f"{name}.lora_A"] = layer.lora_A["default"].weight.grad
        result[f"{name}.lora_B"] = layer.lora_B["default"].weight.grad
    return result


def assert_same_gradients(actual: dict, expected: dict) -> None:
    """Every adapter trains, and by the gradient that it should have."""
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 1e-7, f"{name}: the test expects no gradient"
        assert actual[name] is not None, f"{name} has no gradient"
        # Other orders of the same sums in fp32; an adapter that was left out is off by 1.
        error = ((actual[name] - grad).norm() / grad.norm()).item()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


class QuantLinear(nn.Linear):
    """A linear layer as bitsandbytes makes them: an nn.Linear by type, with int8 in ``weight``."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        values = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dequantized(self) -> torch.Tensor:
        """The weight that a call multiplies with."""
        return self.weight * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + bias with the weight in x's dtype."""
        return nn.functional.linear(x, self.dequantized().to(x.dtype), self.bias)


def quantize(model: nn.Module) -> list[str]:
    """Replace every projection of every mixer by a QuantLinear; returns their names."""
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantLinear(model.get_submodule(name)))
    return names


class Doubled(nn.Module):
    """A parametrization that shows up in every output and gradient."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """2 W."""
        return 2 * weight
