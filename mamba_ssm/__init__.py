"""Mamba: selective state space models (arXiv 2312.00752), with the historical names."""

__version__ = "1.3.0"

from .models.mixer_seq_simple import MambaLMHeadModel
from .modules.mamba_simple import Mamba
from .ops.backend import backend
from .ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from .ops.selective_state_update import selective_state_update

__all__ = [
    "Mamba",
    "MambaLMHeadModel",
    "__version__",
    "backend",
    "mamba_inner_fn",
    "selective_scan_fn",
    "selective_state_update",
]
