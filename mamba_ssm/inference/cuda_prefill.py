"""A prompt on a GPU: all layers in one native call, where the host's time would be the cost.

`generate` uses it by itself where it applies, and the model's modules where it does not
(:func:`why_not` says why). The call does what the modules do, with the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_ssm.inference.cuda_decoder import layer_weights
from mamba_ssm.inference.served import NotServed, check_model, check_process
from mamba_ssm.modules import mamba_simple
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.mamba_inner import mamba_inner_fn
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

_OP = "_prefill_layers"
# What a client may have replaced in order to change how layers compute.
_ORIGINALS = {
    "mamba_inner_fn": mamba_inner_fn,
    "causal_conv1d_fn": causal_conv1d_fn,
    "selective_scan_fn": selective_scan_fn,
}


def _check(model: nn.Module) -> None:
    check_process(_OP, "cuda")
    for name, original in _ORIGINALS.items():
        if getattr(mamba_simple, name) is not original:
            raise NotServed(f"mamba_simple.{name} was replaced")
    tensors = check_model(model, "cuda", with_int8=False)
    if len({t.device for t in tensors}) > 1:
        raise NotServed("the weights are on more than one GPU")
    if not all(t.is_contiguous() for t in tensors):
        raise NotServed("not all weights are contiguous")
    backbone = model.backbone
    if len({norm.eps for norm in (backbone.norm_f, *(b.norm for b in backbone.layers))}) > 1:
        raise NotServed("the norms differ in eps")
    for block in backbone.layers:
        parts = block.mixer._modules
        if any(parts[name].bias is not None for name in ("in_proj", "x_proj", "out_proj")):
            raise NotServed("in_proj, x_proj or out_proj has a bias")
        if not block.fused_add_norm or not block.mixer.use_fast_path:
            raise NotServed("fused_add_norm or use_fast_path is off")
        if block.residual_in_fp32 != backbone.residual_in_fp32:
            raise NotServed("the layers differ in residual_in_fp32")
    if not backbone.fused_add_norm:
        raise NotServed("fused_add_norm is off")


def why_not(model: nn.Module) -> str | None:
    """Why a prompt goes through this model's modules now, or None if it does not."""
    if torch.is_grad_enabled():
        return "gradients are enabled"
    try:
        _check(model)
    except NotServed as reason:
        return str(reason)
    return None


class CudaPrefill:
    """The layers of one model as it is now. Make it with :func:`prefill_for`."""

    def __init__(self, model: nn.Module) -> None:
        backbone = model.backbone
        self.embedding, self.lm_head = backbone.embedding, model.lm_head
        absent = self.embedding.weight.new_empty(0)
        tensors = [t for block in backbone.layers for t in layer_weights(block)]
        tensors += [backbone.norm_f.weight, backbone.norm_f.bias]
        self.weights = [absent if t is None else t for t in tensors]
        self.n_layer, self.eps = len(backbone.layers), backbone.norm_f.eps
        self.width = backbone.layers[0].mixer.d_conv
        self.is_rms_norm = not isinstance(backbone.norm_f, nn.LayerNorm)
        fp32 = backbone.residual_in_fp32
        self.residual_dtype = torch.float32 if fp32 else self.embedding.weight.dtype
        self._layers = torch.ops.mamba_ssm._prefill_layers.default

    def serves(self, ids: Tensor, caches: dict[int, Any]) -> bool:
        """Whether this prompt fills the convolution's windows, and the caches can be written."""
        return ids.shape[1] >= self.width and all(
            part.is_contiguous() for i in range(self.n_layer) for part in caches[i]
        )

    def prefill(self, ids: Tensor, caches: dict[int, Any]) -> Tensor:
        """Consume a prompt for each row, from nothing.

        Args:
            ids: (b, l) int64 on the model's device.
            caches: {layer index: (conv (b, d_inner, d_conv), ssm (b, d_inner, d_state))}, as the
                model's ``allocate_inference_cache`` makes them; they are overwritten.

        Returns the last position's logits (b, vocabulary). Raises RuntimeError for caches of
        another shape, or that are not contiguous.
        """
        layers = [caches[i] for i in range(self.n_layer)]
        hidden = self._layers(
            F.embedding(ids, self.embedding.weight), self.weights, self.eps, self.is_rms_norm,
            self.residual_dtype, [layer[0] for layer in layers], [layer[1] for layer in layers],
        )  # fmt: skip
        return F.linear(hidden, self.lm_head.weight, self.lm_head.bias)


def prefill_for(model: nn.Module) -> CudaPrefill | None:
    """The model's prefill; None where the modules are used, see :func:`why_not`."""
    return CudaPrefill(model) if why_not(model) is None else None
