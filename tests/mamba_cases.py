"""Small Mamba layers and inputs for the tests of the layer."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from module_helpers import scrambled

from mamba_ssm import Mamba

OPTIONS = {
    "default": {},
    "bias": {"bias": True},
    "no conv bias": {"conv_bias": False},
    "width 1": {"d_conv": 1},
    "width 2, both": {"d_conv": 2, "bias": True, "conv_bias": False},
    "sizes": {"d_state": 3, "expand": 1.5, "dt_rank": 5, "d_conv": 3},
    "constant dt": {"dt_init": "constant", "dt_scale": 2.0},
}


def make(d_model: int = 6, seed: int = 0, dtype=torch.float64, **options) -> Mamba:
    torch.manual_seed(seed)
    return scrambled(Mamba(d_model, **{"d_state": 4, "layer_idx": 0} | options)).to(dtype)


def inputs(*shape: int, seed: int = 1, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def params(offset: int = 0, **kwargs):
    return SimpleNamespace(
        seqlen_offset=offset, key_value_memory_dict={}, batch_size_offset=0, **kwargs
    )
