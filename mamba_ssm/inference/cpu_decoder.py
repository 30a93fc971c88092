"""Decoding on the CPU: one native call for each token, from weights packed once.

`generate` uses it by itself where it applies, and the model's modules where it does not
(:func:`why_not` says why). A pack is never made while gradients are recorded, and never used after
the weights it was made from have changed. It is kept beside the model rather than in it, so copies,
pickles and state dicts of the model do not contain it; it lives until the model is gone, put into
training mode, or ``release`` is called.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from mamba_ssm.inference.int8 import Int8Linear
from mamba_ssm.inference.pack import pack_model
from mamba_ssm.modules import block as block_module
from mamba_ssm.modules import mamba_simple
from mamba_ssm.modules.block import Block
from mamba_ssm.modules.dt_projection import DtProjection
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.modules.sequence_args import is_plain
from mamba_ssm.ops import backend
from mamba_ssm.ops.layer_norm import RMSNorm

_OP = "_decode_step"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Values of each parameter that are compared as well, to notice writes through `.data`, which no
# version counter does.
_SAMPLES = 16

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
# What a client may have replaced, for the whole process, in order to change how layers compute.
_PATCHABLE = [
    (mamba_simple, "causal_conv1d_update"),
    (mamba_simple, "selective_state_update"),
    (block_module, "layer_norm_fn"),
    (Mamba, "forward"),
    (Mamba, "step"),
    (Block, "forward"),
    (RMSNorm, "forward"),
]
_ORIGINALS = [getattr(owner, name) for owner, name in _PATCHABLE]


class NotServed(Exception):
    """The fused decode step does not do what this model's modules do; the message says why."""


def _check_plain(name: str, module: nn.Module, *kinds: type[nn.Module]) -> None:
    if type(module) not in kinds:
        raise NotServed(f"{name} is a {type(module).__name__}")
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise NotServed(f"{name} has hooks")
    changed = [key for key in ("forward", "step") if key in module.__dict__]
    if changed:
        raise NotServed(f"{name}.{changed[0]} was replaced")


def _check_process() -> None:
    if backend.current() not in ("auto", "native"):
        raise NotServed(f"the backend {backend.current()!r} was chosen")
    reason = backend.why_not_native(_OP, "cpu", torch.float32)
    if reason is not None:
        raise NotServed(reason)
    if torch.is_autocast_enabled("cpu"):
        raise NotServed("autocast is on")
    for (owner, name), original in zip(_PATCHABLE, _ORIGINALS, strict=True):
        if getattr(owner, name) is not original:
            raise NotServed(f"{owner.__name__}.{name} was replaced")
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        raise NotServed("torch has global module hooks")


def _leaves(model: nn.Module) -> list[tuple[str, nn.Module, tuple[type[nn.Module], ...]]]:
    """Every module whose weights are packed, with the types it may have; checks the others."""
    backbone = model.backbone
    linear = (nn.Linear, Int8Linear)
    leaves = [
        ("embedding", backbone.embedding, (nn.Embedding,)),
        ("norm_f", backbone.norm_f, (nn.LayerNorm, RMSNorm)),
        ("lm_head", model.lm_head, linear),
    ]
    for i, block in enumerate(backbone.layers):
        _check_plain(f"layer {i}", block, Block)
        if block.mlp is not None:
            raise NotServed(f"layer {i} has an MLP")
        mixer = block.mixer
        _check_plain(f"layer {i}'s mixer", mixer, Mamba)
        if mixer.layer_idx != i or mixer.activation not in ("silu", "swish"):
            raise NotServed(f"layer {i}'s mixer was changed")
        leaves += [
            (f"layer {i}'s norm", block.norm, (type(backbone.norm_f),)),
            (f"layer {i}'s in_proj", mixer.in_proj, linear),
            (f"layer {i}'s conv1d", mixer.conv1d, (nn.Conv1d,)),
            (f"layer {i}'s x_proj", mixer.x_proj, linear),
            (f"layer {i}'s dt_proj", mixer.dt_proj, (nn.Linear, DtProjection)),
            (f"layer {i}'s out_proj", mixer.out_proj, linear),
        ]
    return leaves


def _check_model(model: nn.Module) -> list[Tensor]:
    """The tensors that a pack is made of. Raises NotServed."""
    backbone = model.backbone
    for name, module, forward in (
        ("the model", model, "MambaLMHeadModel.forward"),
        ("the backbone", backbone, "MixerModel.forward"),
    ):
        _check_plain(name, module, type(module))
        if type(module).forward.__qualname__ != forward:
            raise NotServed(f"{name} has a forward of its own")
    if not backbone.layers:
        raise NotServed("the model has no layers")
    floats: list[Tensor] = []
    leaves = _leaves(model)
    others = [t for block in backbone.layers for t in (block.mixer.A_log, block.mixer.D)]
    for name, module, kinds in leaves:
        _check_plain(name, module, *kinds)
        if isinstance(module, Int8Linear):
            others += [module.quantized, module.scales]
        elif is_plain(module, *kinds):
            floats.append(module.weight)
        else:
            raise NotServed(f"{name} is not plain any more (parametrized, or another tensor type)")
        if getattr(module, "bias", None) is not None:
            floats.append(module.bias)
    if backbone.embedding.max_norm is not None:
        raise NotServed("the embedding renormalises its rows")
    mixers = [block.mixer for block in backbone.layers]
    sizes = {(m.d_inner, m.d_state, m.d_conv, m.dt_rank) for m in mixers}
    if len(sizes) > 1:
        raise NotServed("the layers differ in size")
    dtype = backbone.embedding.weight.dtype
    if dtype not in _DTYPES or any(t.dtype != dtype for t in floats):
        raise NotServed("the weights are not all fp32, all bf16 or all fp16")
    for tensor in floats + others:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise NotServed("not all weights are dense and on the CPU")
        if tensor.is_inference():
            raise NotServed("weights made in inference mode do not tell when they change")
    return floats + others


def _sample(tensors: list[Tensor]) -> Tensor:
    """A few values of every tensor, spread over it."""
    samples = []
    for t in tensors:
        flat = t.detach().view(-1) if t.is_contiguous() else t.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        samples.append(flat[::step].float())
    return torch.cat(samples)


class CpuDecoder:
    """The packed copy of one model's weights, and the step that runs from it.

    Make it with :func:`decoder_for`. Safe to use from several threads at once, each with caches
    of its own.
    """

    def __init__(self, model: nn.Module, tensors: list[Tensor]) -> None:
        self.pack, self.layout = pack_model(model)
        self.embedding = model.backbone.embedding.weight.detach()
        self.n_layer = len(model.backbone.layers)
        self._sources = [weakref.ref(t) for t in tensors]
        self._versions = self._stamp(tensors)
        self._values = _sample(tensors)
        self._step = torch.ops.mamba_ssm._decode_step.default

    @staticmethod
    def _stamp(tensors: list[Tensor]) -> list[tuple[int, int, tuple[int, ...]]]:
        return [(t.data_ptr(), t._version, t.stride()) for t in tensors]

    def is_current(self, tensors: list[Tensor]) -> bool:
        """Whether the pack was made from these tensors, and nothing has written to them since."""
        return (
            len(tensors) == len(self._sources)
            and all(ref() is t for ref, t in zip(self._sources, tensors, strict=True))
            and self._stamp(tensors) == self._versions
            and torch.equal(_sample(tensors), self._values)
        )

    def step(self, ids: Tensor, caches: dict[int, Any]) -> Tensor:
        """Consume one token for each row.

        Args:
            ids: (b,) int64.
            caches: {layer index: (conv (b, d_inner, d_conv), ssm (b, d_inner, d_state))}, as the
                model's ``allocate_inference_cache`` makes them; updated in place.

        Returns the logits (b, vocabulary) in the weights' dtype. Raises RuntimeError for ids
        outside the vocabulary and for caches of another shape.
        """
        layers = [caches[i] for i in range(self.n_layer)]
        conv, ssm = [layer[0] for layer in layers], [layer[1] for layer in layers]
        return self._step(ids, self.embedding, self.pack, self.layout, conv, ssm)


_lock = threading.Lock()
_decoders: weakref.WeakKeyDictionary[nn.Module, CpuDecoder] = weakref.WeakKeyDictionary()


def why_not(model: nn.Module) -> str | None:
    """Why a decode step of this model goes through its modules now, or None if it does not."""
    if torch.is_grad_enabled():
        return "gradients are enabled"
    try:
        _check_process()
        _check_model(model)
    except NotServed as reason:
        return str(reason)
    return None


def decoder_for(model: nn.Module) -> CpuDecoder | None:
    """The model's decoder, packed now if there is none or the weights have changed since.

    None if the modules have to be used, see :func:`why_not`.
    """
    if torch.is_grad_enabled():
        return None
    with torch.inference_mode(False), torch.no_grad():
        try:
            _check_process()
            tensors = _check_model(model)
        except NotServed:
            release(model)
            return None
        with _lock:
            decoder = _decoders.get(model)
            if decoder is None or not decoder.is_current(tensors):
                _decoders.pop(model, None)  # first, so that two packs never exist at once
                decoder = _decoders[model] = CpuDecoder(model, tensors)
            return decoder


def release(model: nn.Module) -> None:
    """Free the model's packed weights; the next decode step packs them again."""
    with _lock:
        _decoders.pop(model, None)
