"""What the op tests share: the tolerance rule, and outputs together with all gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def _norms(values: Tensor) -> tuple[float, float]:
    """(largest, root mean square) of the values; zeros for an empty tensor."""
    if values.numel() == 0:
        return 0.0, 0.0
    values = values.abs()
    return values.max().item(), values.square().mean().sqrt().item()


def errors_of(result: Tensor, oracle: Tensor) -> tuple[float, float]:
    """(largest, root mean square) difference."""
    wide = torch.complex128 if result.dtype.is_complex else torch.float64
    return _norms(result.detach().to("cpu", wide) - oracle.detach().to("cpu", wide))


def assert_close_to_oracle(
    actual: Tensor,
    reference: Tensor,
    oracle: Tensor,
    name: str = "result",
    reference_errors: tuple[float, float] | None = None,
) -> None:
    """The one tolerance rule: error <= 2 x (the reference's error + one rounding of the dtype).

    ``oracle`` is the fp64 (or complex128) result from the same inputs, ``reference`` that of the
    plain implementation in the dtypes under test. Errors are compared in the largest value and in
    the root mean square, so neither one bad element nor a broad loss of accuracy passes.
    ``reference_errors`` replaces those of ``reference`` where they were found otherwise.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, expected {oracle.shape}"
    dtype = reference.dtype
    assert actual.dtype == dtype, f"{name}: dtype {actual.dtype}, expected {dtype}"
    assert oracle.isfinite().all(), f"{name}: the oracle is not finite; choose other inputs"
    assert actual.isfinite().all(), f"{name}: not finite"
    rounding = torch.finfo(dtype).eps
    checks = zip(
        ("largest", "rms"),
        errors_of(actual, oracle),
        reference_errors or errors_of(reference, oracle),
        _norms(oracle.detach().cpu()),
        strict=True,
    )
    for kind, error, reference_error, size in checks:
        bound = 2 * (reference_error + rounding * size)
        assert error <= bound, f"{name}: {kind} error {error:.3e} > {bound:.3e} ({kind} {size:.3e})"


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def to_double(value: Any) -> Any:
    """A floating (complex) tensor in fp64 (complex128); anything else unchanged."""
    if not _is_float(value):
        return value
    return value.detach().to(torch.complex128 if value.is_complex() else torch.float64)


def cotangent(shape: Iterable[int], dtype: torch.dtype, device="cpu", seed: int = 1) -> Tensor:
    """A random gradient whose values every dtype represents exactly."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(tuple(shape), generator=generator).bfloat16()
    return real.to(device, dtype)


def _named_outputs(result: Any) -> dict[str, Tensor]:
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    return {f"output {i}": t for i, t in enumerate(outputs) if isinstance(t, Tensor)}


def evaluate(
    fn: Callable, inputs: dict[str, Any], without_grad: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Outputs of ``fn(**inputs)`` and the gradient of every floating input, by name.

    Strides of the inputs are kept (also stride 0). An input that got no gradient has a zero one.
    """
    leaves = {
        name: value.detach().requires_grad_(name not in without_grad) if _is_float(value) else value
        for name, value in inputs.items()
    }
    results = _named_outputs(fn(**leaves))
    roots = [(t, seed) for seed, t in enumerate(results.values()) if t.requires_grad]
    if roots:
        seeds = [cotangent(t.shape, t.dtype, t.device, seed) for t, seed in roots]
        torch.autograd.backward([t for t, _ in roots], seeds)
    for name, value in leaves.items():
        if _is_float(value) and value.requires_grad:
            missing = value.grad is None
            results[f"grad of {name}"] = torch.zeros_like(value) if missing else value.grad
    return {name: t.detach() for name, t in results.items()}


def nudged(inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """Neighbours of the inputs, a few roundings away: another draw of all rounding errors."""
    generator = torch.Generator().manual_seed(seed)
    moved = dict(inputs)
    for name, value in inputs.items():
        if _is_float(value):
            steps = torch.randint(-4, 5, value.shape, generator=generator).to(value.device)
            moved[name] = value * (1 + torch.finfo(value.dtype).eps * steps).to(value.dtype)
    return moved


def _doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: to_double(value) for name, value in inputs.items()}


def assert_matches(
    fn: Callable,
    reference: Callable,
    inputs: dict[str, Any],
    without_grad: Iterable[str] = (),
) -> None:
    """``fn`` and the plain differentiable ``reference`` agree in outputs and in all gradients.

    Both take ``inputs`` by name; the oracle is ``reference`` with every floating input in fp64.
    The reference's error in one run is a matter of luck where few numbers are compared (a sum may
    happen to be exact), so where it decides, it is the largest of that in four neighbouring runs,
    each against its own oracle.
    """
    actual = evaluate(fn, inputs, without_grad)
    plain = evaluate(reference, inputs, without_grad)
    exact = evaluate(reference, _doubled(inputs), without_grad)
    assert actual.keys() == plain.keys(), f"{sorted(actual)} differ from {sorted(plain)}"
    neighbours = None
    for name in actual:
        try:
            assert_close_to_oracle(actual[name], plain[name], exact[name], name)
        except AssertionError:
            if neighbours is None:
                runs = [inputs, *(nudged(inputs, seed) for seed in (1, 2, 3))]
                neighbours = [
                    (
                        evaluate(reference, run, without_grad),
                        evaluate(reference, _doubled(run), without_grad),
                    )
                    for run in runs
                ]
            errors = [errors_of(run[name], oracle[name]) for run, oracle in neighbours]
            largest = tuple(max(kind) for kind in zip(*errors, strict=True))
            assert_close_to_oracle(actual[name], plain[name], exact[name], name, largest)
