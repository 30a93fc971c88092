"""The historical home of the norms."""

from ..layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_forward,
    rms_norm_ref,
)
from .layernorm import _layer_norm_fwd  # noqa: F401 (what some clients import from here)

__all__ = [
    "RMSNorm",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "rms_norm_fn",
    "rms_norm_forward",
    "rms_norm_ref",
]
