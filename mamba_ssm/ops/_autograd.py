"""Where the fused functions step aside: gradients of gradients, and torch.func's transforms.

Neither the fused backward passes nor the internal ops can be transformed; plain torch ops can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from . import backend


def wants_double_backward() -> bool:
    """Whether the backward pass that runs now must be differentiable (``create_graph=True``)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def transforms_active() -> bool:
    """Whether a transform of torch.func is active here."""
    return torch._C._are_functorch_transforms_active()


# What torch.compiler.assume_constant_result does, without importing the compiler: a graph asks
# while it is traced. A fused function in a transform in a graph would give wrong gradients.
transforms_active._dynamo_marked_constant = True


def transformed(what: str) -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is active: plain ops serve ``what``.

    Says so once. Raises BackendError where a compiled backend was chosen explicitly, and
    NotImplementedError where a transform is traced by torch.compile.
    """
    if not transforms_active():
        return False
    backend.only_reference(f"{what} inside a torch.func transform (grad, vmap, jvp, ...)")
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{what} is inside a torch.func transform (grad, vmap, jvp, ...) inside torch.compile, "
            "which is not supported: leave the transform outside the compiled function"
        )
    backend.warn_once(
        "torch.func",
        f"{what} runs inside a torch.func transform (grad, vmap, jvp, ...): there mamba_ssm uses "
        "plain PyTorch operations, a Python loop over the length, which are slower; "
        'with mamba_ssm.backend("reference"): chooses them and silences this.',
    )
    return True


class _NoContext:
    """Stands in for an autograd context where nothing is recorded."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def run(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``; in inference mode its forward alone, which costs the host less."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return function.forward(_NoContext(), *args)
    return function.apply(*args)


def needs_grad(*values: Any) -> bool:
    """Whether autograd records now and any of the values requires a gradient."""
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in values
    )


def differentiable_backward(
    ref_fn: Callable, inputs: Sequence[Any], grad_outputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``ref_fn(*inputs)`` that can be differentiated again.

    ``ref_fn`` is a plain differentiable implementation; it returns a tensor or a tuple with one
    entry for every entry of ``grad_outputs`` (None there: no gradient arrives). Returns one entry
    for every input: None for non-tensors and for tensors that require no gradient. Raises
    BackendError where such a gradient is wanted of an explicitly chosen compiled backend.
    """
    if wants_double_backward():
        backend.only_reference("a gradient that can be differentiated again")
    with torch.enable_grad():
        # Views, so that an input which is computed from another one, or given twice, gets only its
        # own share; they stay connected to the originals for the next differentiation.
        values = [
            value.view_as(value) if isinstance(value, Tensor) and value.requires_grad else value
            for value in inputs
        ]
        outputs = ref_fn(*values)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        if len(outputs) != len(grad_outputs):
            raise ValueError(
                f"{len(outputs)} outputs, but {len(grad_outputs)} gradients of outputs"
            )
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, grad_outputs, strict=True)
            if grad is not None and isinstance(output, Tensor) and output.requires_grad
        ]
        wanted = [
            i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad
        ]
        grads: list[Tensor | None] = [None] * len(values)
        if pairs and wanted:
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                [values[i] for i in wanted],
                [grad for _, grad in pairs],
                create_graph=True,
                allow_unused=True,
            )
            for i, grad in zip(wanted, found, strict=True):
                grads[i] = grad
    return tuple(grads)


class _AutocastOff:
    """torch.autocast(device, enabled=False) at a small part of its cost."""

    __slots__ = ("device", "was")

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.was = torch.is_autocast_enabled(self.device)
        if self.was:
            torch.set_autocast_enabled(self.device, False)

    def __exit__(self, *error: object) -> None:
        if self.was:
            torch.set_autocast_enabled(self.device, True)


def without_autocast(device: str) -> AbstractContextManager:
    """A context manager inside which autocast is off."""
    if torch.compiler.is_compiling():  # which knows torch's own context manager only
        return torch.autocast(device, enabled=False)
    return _AutocastOff(device)
