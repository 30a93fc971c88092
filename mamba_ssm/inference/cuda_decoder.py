"""Decoding on a GPU: one native call for each token, from the model's own weights.

`generate` uses it by itself where it applies, and the model's modules where it does not
(:func:`why_not` says why). The weights, int8 ones too, are read where they are, so nothing is
copied and nothing can go stale: a step made for other weights is a step of another model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mamba_ssm.inference.int8 import Int8Linear
from mamba_ssm.inference.served import NotServed, check_model, check_process
from mamba_ssm.ops import backend
from mamba_ssm.ops.client_layers import tensor_of
from mamba_ssm.ops.decode_weights import LAYER_INT8, TAIL_INT8

_OP = "_decode_step_weights"


def _matrix(linear: nn.Module) -> Tensor:
    return linear.quantized if isinstance(linear, Int8Linear) else tensor_of(linear, "weight")


def layer_weights(block: nn.Module) -> list[Tensor | None]:
    """A block's tensors in the order of ``ops.decode_weights.LAYER_WEIGHTS``, None if absent."""
    norm, mixer = block._modules["norm"], block._modules["mixer"]
    part = mixer._modules
    return [
        tensor_of(norm, "weight"),
        norm.bias,
        _matrix(part["in_proj"]),
        tensor_of(part["in_proj"], "bias"),
        tensor_of(part["conv1d"], "weight"),
        tensor_of(part["conv1d"], "bias"),
        _matrix(part["x_proj"]),
        tensor_of(part["dt_proj"], "weight"),
        tensor_of(part["dt_proj"], "bias"),
        tensor_of(mixer, "A_log"),
        tensor_of(mixer, "D"),
        _matrix(part["out_proj"]),
        tensor_of(part["out_proj"], "bias"),
    ]


def _int8_layers(model: nn.Module) -> list[Int8Linear]:
    """As ``ops.decode_weights`` lists their scales; none, or NotServed is raised for a mixture."""
    # Past Module.__getattr__: the host's time counts.
    parts = [block.mixer._modules for block in model.backbone.layers]
    layers = [modules[name] for modules in parts for name in LAYER_INT8]
    layers += [model._modules[name] for name in TAIL_INT8]
    int8 = [layer for layer in layers if isinstance(layer, Int8Linear)]
    if int8 and len(int8) < len(layers):
        raise NotServed("some of the large weights are int8, others are not")
    return int8


def _check_int8(model: nn.Module) -> bool:
    """Whether the large weights are int8. Raises NotServed if the step does not know such ones."""
    int8 = _int8_layers(model)
    if not int8:
        return False
    if any(layer.scales.shape[1] > 1 for layer in int8):
        raise NotServed("int8 weights have scales of groups")
    # One row's kernel takes layers that are alike.
    have = {tuple(t is None for t in layer_weights(block)) for block in model.backbone.layers}
    if len(have) > 1:
        raise NotServed("some layers of int8 weights have biases that others lack")
    return True


def _check_sizes(model: nn.Module, tensors: list[Tensor], batch_size: int) -> None:
    backbone = model.backbone
    mixers = [block._modules["mixer"] for block in backbone.layers]
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise NotServed("the weights are on more than one GPU")
    if any(not t.is_contiguous() or t.data_ptr() % 16 for t in tensors):
        raise NotServed("not all weights are contiguous and aligned to 16 bytes")
    for name in ("A_log", "D"):
        if len({tensor_of(mixer, name).dtype for mixer in mixers}) > 1:
            raise NotServed(f"{name} has several dtypes")
    if len({norm.eps for norm in (backbone.norm_f, *(b.norm for b in backbone.layers))}) > 1:
        raise NotServed("the norms differ in eps")
    if model.lm_head.bias is not None:
        raise NotServed("lm_head has a bias")
    weight, mixer = backbone.embedding.weight, mixers[0]
    if _matrix(model.lm_head).shape != weight.shape:
        raise NotServed("lm_head and the embedding have different shapes")
    if mixer.D.dim() != 1:
        raise NotServed("D is not one number for each channel")
    reason = backend.why_not_decode(
        weight.device,
        weight.dtype,
        _check_int8(model),
        batch_size,
        len(mixers),
        weight.shape[1],
        mixer.d_inner,
        mixer.d_state,
        mixer.d_conv,
        mixer.dt_rank,
    )
    if reason is not None:
        raise NotServed(reason)


class CudaDecoder:
    """The step of one model as it is now. Make it with :func:`decoder_for`."""

    def __init__(self, model: nn.Module) -> None:
        backbone = model.backbone
        self.embedding = backbone.embedding.weight.detach()
        absent = self.embedding.new_empty(0)
        tensors = [t for block in backbone.layers for t in layer_weights(block)]
        tensors += [backbone.norm_f.weight, backbone.norm_f.bias, _matrix(model.lm_head)]
        self.weights = [absent if t is None else t.detach() for t in tensors]
        self.scales = [layer.scales for layer in _int8_layers(model)]
        self.n_layer = len(backbone.layers)
        self.eps = backbone.norm_f.eps
        self.is_rms_norm = not isinstance(backbone.norm_f, nn.LayerNorm)
        fp32 = backbone.residual_in_fp32
        self.residual_dtype = torch.float32 if fp32 else self.embedding.dtype
        self._step = torch.ops.mamba_ssm._decode_step_weights.default

    def step(self, ids: Tensor, caches: dict[int, Any]) -> Tensor:
        """Consume one token for each row.

        Args:
            ids: (b,) int64 on the model's device. An id outside the vocabulary makes its row NaN.
            caches: {layer index: (conv (b, d_inner, d_conv), ssm (b, d_inner, d_state))}, as the
                model's ``allocate_inference_cache`` makes them; updated in place.

        Returns the logits (b, vocabulary) in the weights' dtype. Raises RuntimeError for caches of
        another shape, dtype or device than the first layer's.
        """
        layers = [caches[i] for i in range(self.n_layer)]
        conv, ssm = [layer[0] for layer in layers], [layer[1] for layer in layers]
        return self._step(
            ids, self.embedding, self.weights, self.scales, self.eps, self.is_rms_norm,
            self.residual_dtype, conv, ssm,
        )  # fmt: skip


def why_not(model: nn.Module, batch_size: int = 1) -> str | None:
    """Why a decode step of this model goes through its modules now, or None if it does not."""
    if torch.is_grad_enabled():
        return "gradients are enabled"
    try:
        check_process(_OP, "cuda")
        _check_sizes(model, check_model(model, "cuda", with_int8=True), batch_size)
    except NotServed as reason:
        return str(reason)
    return None


def is_served(model: nn.Module) -> bool:
    """Whether decoding may bypass the model's modules: they are plain, and nothing watches them.

    Such a model's step can be captured by itself; a larger batch than the fused step's too.
    """
    try:
        check_process(_OP, "cuda")
        check_model(model, "cuda", with_int8=True)
    except (NotServed, AttributeError):
        return False
    return True


def decoder_for(model: nn.Module, batch_size: int) -> CudaDecoder | None:
    """The model's step for this many rows; None where the modules are used, see :func:`why_not`."""
    return CudaDecoder(model) if why_not(model, batch_size) is None else None
