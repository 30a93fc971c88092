"""The residual block: Add → Norm → Mixer, then Add → Norm → MLP where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mamba_ssm.modules.sequence_args import is_plain
from mamba_ssm.ops.layer_norm import RMSNorm, layer_norm_fn


def add_norm(
    norm: nn.Module,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    fused: bool,
    residual_in_fp32: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the two streams and normalise the sum: returns (normalised, new residual).

    ``fused`` makes it one op, with the sum kept in fp32 before the norm; a norm with hooks, one
    that was replaced, or ``layer_norm_fn`` being unavailable means the module is called instead.
    """
    if fused and layer_norm_fn is not None and is_plain(norm, nn.LayerNorm, RMSNorm):
        return layer_norm_fn(
            hidden_states,
            norm.weight,
            norm.bias,
            residual=residual,
            eps=norm.eps,
            prenorm=True,
            residual_in_fp32=residual_in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
        )
    residual = hidden_states if residual is None else hidden_states + residual
    weight = getattr(norm, "weight", None)
    normed = norm(residual if weight is None else residual.to(weight.dtype))
    if residual_in_fp32:
        residual = residual.to(torch.float32)
    return normed, residual


class Block(nn.Module):
    """A mixer between residual streams: hidden (b, l, dim), residual (b, l, dim) or None.

    The order Add → Norm → Mixer (rather than Norm → Mixer → Add) lets the addition and the norm
    be one op: the block returns both streams, and whoever comes next adds them.

    Children: ``norm``, ``mixer``, and ``norm2``, ``mlp`` unless ``mlp_cls`` is ``nn.Identity``
    (then ``mlp`` is None). ``mixer_cls``, ``mlp_cls`` and ``norm_cls`` are called with ``dim``.
    ``fused_add_norm`` needs norm_cls to give ``nn.LayerNorm`` or ``RMSNorm`` (ValueError).
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[..., nn.Module],
        mlp_cls: Callable[..., nn.Module] = nn.Identity,
        norm_cls: Callable[..., nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        else:
            self.mlp = None
        if fused_add_norm and not isinstance(self.norm, (nn.LayerNorm, RMSNorm)):
            raise ValueError(
                "fused_add_norm=True works with nn.LayerNorm and RMSNorm, and norm_cls gave "
                f"{type(self.norm).__name__}: pass fused_add_norm=False"
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None = None,
        inference_params: Any = None,
        **mixer_kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Returns (hidden_states, residual), and the mixer's state third with
        ``return_final_state=True``. ``mixer_kwargs`` go to the mixer as they are."""
        hidden_states, residual = add_norm(
            self.norm, hidden_states, residual, self.fused_add_norm, self.residual_in_fp32
        )
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        state = None
        if mixer_kwargs.get("return_final_state", False):
            hidden_states, state = hidden_states
        if self.mlp is not None:
            hidden_states, residual = add_norm(
                self.norm2, hidden_states, residual, self.fused_add_norm, self.residual_in_fp32
            )
            hidden_states = self.mlp(hidden_states)
        if mixer_kwargs.get("return_final_state", False):
            return hidden_states, residual, state
        return hidden_states, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor | None, ...]:
        """The mixer's decode cache."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
