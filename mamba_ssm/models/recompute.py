"""Gradient checkpointing: blocks whose activations are computed again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class GradientCheckpointing:
    """``gradient_checkpointing_enable`` and ``_disable``, as transformers' models have them.

    While it is on and the model trains, only the residual stream between blocks is kept, and each
    block runs a second time in the backward pass: the memory of one block, for about a third more
    time. Results and gradients are the same.
    """

    gradient_checkpointing = False

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Recompute each block in the backward pass. Raises ValueError for ``use_reentrant=True``,
        which would not pass gradients through states and keyword arguments."""
        options = dict(gradient_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False) or options:
            raise ValueError(
                f"gradient_checkpointing_kwargs is {gradient_checkpointing_kwargs}, but only "
                "use_reentrant=False, the default here, is supported"
            )
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep the blocks' activations again."""
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, value: bool) -> None:
        for module in self.modules():
            if isinstance(module, GradientCheckpointing):
                module.gradient_checkpointing = value


def call_block(
    block: nn.Module,
    recompute: bool,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """``block(hidden_states, residual, **kwargs)``, computed again in the backward if asked.

    A call that fills a cache is never repeated.
    """
    if recompute and torch.is_grad_enabled() and kwargs.get("inference_params") is None:
        return checkpoint(block, hidden_states, residual, use_reentrant=False, **kwargs)
    return block(hidden_states, residual, **kwargs)
