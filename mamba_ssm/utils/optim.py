"""Optimizer parameter groups."""

from __future__ import annotations

from typing import Any

from torch import nn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: with ``weight_decay``, and without.

    Not decayed: A_log and D of every Mamba layer, also when they are sharded (parameters marked
    ``_no_weight_decay``, or listed in their module's ``_no_weight_decay_names``), and everything
    with fewer than two dimensions (biases, norm weights). Frozen parameters are left out, shared
    ones appear once. Raises ValueError for a negative ``weight_decay``.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    named = {
        id(module._parameters.get(name))
        for module in model.modules()
        for name in getattr(module, "_no_weight_decay_names", ())
    }
    decay, no_decay = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            marked = getattr(parameter, "_no_weight_decay", False) or id(parameter) in named
            (no_decay if marked or parameter.dim() < 2 else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
