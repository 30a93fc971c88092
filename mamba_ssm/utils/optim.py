"""Optimizer parameter groups."""

from __future__ import annotations

from typing import Any

from torch import nn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: with ``weight_decay``, and without.

    Not decayed: parameters marked ``_no_weight_decay`` (A_log and D of every Mamba layer) and
    everything with fewer than two dimensions (biases, norm weights). Frozen parameters are left
    out, shared ones appear once. Raises ValueError for a negative ``weight_decay``.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    decay, no_decay = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            exempt = getattr(parameter, "_no_weight_decay", False) or parameter.dim() < 2
            (no_decay if exempt else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
