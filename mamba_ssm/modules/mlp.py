"""The gated feed-forward layer of hybrid and Llama-like models."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class GatedMLP(nn.Module):
    """``fc2(y · activation(gate))`` with ``y, gate = fc1(x)``.

    ``hidden_features`` defaults to 8/3 · ``in_features`` and is rounded up to ``multiple_of``.
    Parameters: ``fc1`` (2·hidden, in), ``fc2`` (out, hidden). Raises ValueError for sizes < 1.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = out_features if out_features is not None else in_features
        hidden = hidden_features if hidden_features is not None else int(8 * in_features / 3)
        for name, value in (
            ("in_features", in_features),
            ("hidden_features", hidden),
            ("out_features", out_features),
            ("multiple_of", multiple_of),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        hidden = (hidden + multiple_of - 1) // multiple_of * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) → (…, out_features), in the layers' dtype."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * self.activation(gate))
