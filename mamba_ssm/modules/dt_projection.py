"""The projection from the low-rank step size to delta, with its own initialisation."""

from __future__ import annotations

import math

import torch
from torch import nn


class DtProjection(nn.Linear):
    """``nn.Linear(dt_rank, d_inner)`` whose ``reset_parameters`` keeps delta in its range.

    Weight: uniform in ± dt_rank^-0.5 · dt_scale, or that value itself for ``dt_init="constant"``.
    Bias: the inverse softplus of a log-uniform draw from [dt_min, dt_max], so that
    softplus(bias) starts there (Mamba, arXiv 2312.00752, section 3.6 and appendix). It carries
    ``_no_reinit = True``. A framework that re-initialises every module through
    ``reset_parameters`` (FSDP after ``to_empty``, for one) therefore gets a proper delta.
    """

    def __init__(
        self,
        dt_rank: int,
        d_inner: int,
        dt_min: float,
        dt_max: float,
        dt_init: str,
        dt_scale: float,
        dt_init_floor: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Plain attributes first: nn.Linear's constructor calls reset_parameters, which reads them.
        self.dt_min, self.dt_max = dt_min, dt_max
        self.dt_init, self.dt_scale, self.dt_init_floor = dt_init, dt_scale, dt_init_floor
        super().__init__(dt_rank, d_inner, bias=True, device=device, dtype=dtype)
        self._mark_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew (random numbers: Linear's own, the weight, one per channel)."""
        super().reset_parameters()
        std = self.in_features**-0.5 * self.dt_scale
        if self.dt_init == "constant":
            nn.init.constant_(self.weight, std)
        else:
            nn.init.uniform_(self.weight, -std, std)
        # Drawn in the parameter's dtype (that fixes the random stream), computed in fp32 or better.
        # rand_like: the bias may be sharded (a DTensor).
        draw = torch.rand_like(self.bias, requires_grad=False)
        draw = draw if draw.dtype == torch.float64 else draw.float()
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        dt = torch.exp(draw * (high - low) + low).clamp(min=self.dt_init_floor)
        with torch.no_grad():
            # softplus⁻¹(dt) = log(exp(dt) − 1), written so that a small dt keeps its digits.
            self.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        # Moving, copying and loading make new Parameter objects without the old ones' attributes.
        if isinstance(self.bias, nn.Parameter):
            self.bias._no_reinit = True

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._mark_parameters()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._mark_parameters()

    def __setstate__(self, state):
        super().__setstate__(state)
        self._mark_parameters()
