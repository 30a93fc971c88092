"""The configuration of a language model, as its ``config.json`` holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class MambaConfig:
    """Sizes and options of ``MambaLMHeadModel``; unknown keys raise TypeError.

    Args:
        d_model, n_layer, vocab_size: sizes; the vocabulary is rounded up to a multiple of
            ``pad_vocab_size_multiple``.
        d_intermediate: hidden size of a gated MLP after each mixer; 0 means none.
        ssm_cfg: keyword arguments of ``Mamba``, and ``layer`` ("Mamba1").
        attn_layer_idx, attn_cfg: which layers are attention, and keyword arguments of ``MHA``.
        rms_norm: RMSNorm instead of LayerNorm.
        residual_in_fp32: keep the residual stream in fp32.
        fused_add_norm: add and normalise in one op.
        tie_embeddings: the output projection shares the embedding's weight.

    Raises TypeError or ValueError for values of the wrong kind.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        least = {"d_model": 1, "n_layer": 1, "vocab_size": 1, "pad_vocab_size_multiple": 1}
        for name, minimum in (least | {"d_intermediate": 0}).items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        for name in ("rms_norm", "residual_in_fp32", "fused_add_norm", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("ssm_cfg", "attn_cfg"):
            value = getattr(self, name)
            if value is None:
                setattr(self, name, {})
            elif not isinstance(value, dict):
                raise TypeError(f"{name} must be a dict, got {value!r}")
        self.attn_layer_idx = list(self.attn_layer_idx or [])
        check_attn_layer_idx(self.attn_layer_idx, self.n_layer)


def check_attn_layer_idx(attn_layer_idx: list[int], n_layer: int) -> None:
    """Raise ValueError for an index that names no layer."""
    wrong = [i for i in attn_layer_idx if not isinstance(i, int) or not 0 <= i < n_layer]
    if wrong:
        raise ValueError(f"attn_layer_idx must be layers from 0 to {n_layer - 1}, got {wrong}")
