"""What the tests of modules and models share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# Both sides compute the same sums in another order.
TIGHT = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    torch.float32: {"rtol": 1e-4, "atol": 2e-6},
}


def assert_same(actual, expected, name: str = "result", scale: float = 1.0) -> None:
    """Equal tensors (or nested tuples of them) up to the rounding of their dtype."""
    if isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected), name
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same(a, e, f"{name}[{i}]", scale)
    elif expected is None or not expected.is_floating_point():
        assert (actual is None and expected is None) or torch.equal(actual, expected), name
    else:
        tolerance = TIGHT[expected.dtype]
        size = expected.detach().abs().max().item() if expected.numel() else 0.0
        atol = tolerance["atol"] * scale * max(1.0, size)
        torch.testing.assert_close(
            actual,
            expected,
            rtol=tolerance["rtol"],
            atol=atol,
            msg=lambda text: f"{name}: {text}",
        )


def scrambled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with every parameter moved off its special initial value (zeros, ones)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter.dtype))
    return module


def run_with_grads(
    module: nn.Module, call: Callable[..., Tensor | Sequence[Tensor]], *inputs: Tensor
) -> dict[str, Tensor]:
    """Outputs of ``call(*inputs)`` and the gradients of all inputs and parameters, by name.

    The gradient that comes back is random but fixed, by the position of the output.
    """
    module.zero_grad(set_to_none=True)
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = call(*leaves)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    seeds = []
    for i, out in enumerate(outputs):
        generator = torch.Generator().manual_seed(100 + i)
        seeds.append(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out))
    torch.autograd.backward(outputs, seeds)
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    results |= {f"grad of input {i}": t.grad for i, t in enumerate(leaves)}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            results[f"grad of {name}"] = parameter.grad.clone()
    module.zero_grad(set_to_none=True)
    return results


def assert_all_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names and the same values (see `run_with_grads`)."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_same(actual[name], expected[name], name, scale=4.0)
