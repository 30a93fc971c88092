"""Which models the fused decode steps serve: those whose modules do exactly what the steps do.

A client may have replaced, hooked or wrapped any part of a model; such a model decodes through its
modules.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mamba_ssm.inference.int8 import Int8Linear
from mamba_ssm.modules import block as block_module
from mamba_ssm.modules import mamba_simple
from mamba_ssm.modules.block import Block
from mamba_ssm.modules.dt_projection import DtProjection
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.modules.sequence_args import is_plain
from mamba_ssm.ops import backend
from mamba_ssm.ops.client_layers import tensor_of
from mamba_ssm.ops.layer_norm import RMSNorm

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

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
    own = module.__dict__
    for hooks in _HOOKS:
        if own[hooks]:
            raise NotServed(f"{name} has hooks")
    for key in ("forward", "step"):
        if key in own:
            raise NotServed(f"{name}.{key} was replaced")


def check_process(op: str, device_type: str) -> None:
    """Raises NotServed if the process's settings keep the compiled step ``op`` from being used."""
    if backend.current() not in ("auto", "native"):
        raise NotServed(f"the backend {backend.current()!r} was chosen")
    reason = backend.why_not_native(op, device_type, torch.float32)
    if reason is not None:
        raise NotServed(reason)
    if torch.is_autocast_enabled(device_type):
        raise NotServed("autocast is on")
    for (owner, name), original in zip(_PATCHABLE, _ORIGINALS, strict=True):
        if getattr(owner, name) is not original:
            raise NotServed(f"{owner.__name__}.{name} was replaced")
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        raise NotServed("torch has global module hooks")


def _leaves(
    model: nn.Module, linear: tuple[type[nn.Module], ...]
) -> list[tuple[str, nn.Module, tuple[type[nn.Module], ...]]]:
    """Every module whose weights a step reads, with the types it may have; checks the others."""
    backbone = model.backbone
    leaves = [
        ("embedding", backbone.embedding, (nn.Embedding,)),
        ("norm_f", backbone.norm_f, (nn.LayerNorm, RMSNorm)),
        ("lm_head", model.lm_head, linear),
    ]
    for i, block in enumerate(backbone.layers):
        _check_plain(f"layer {i}", block, Block)
        if block.mlp is not None:
            raise NotServed(f"layer {i} has an MLP")
        mixer, norm = block._modules["mixer"], block._modules["norm"]
        _check_plain(f"layer {i}'s mixer", mixer, Mamba)
        if mixer.layer_idx != i or mixer.activation not in ("silu", "swish"):
            raise NotServed(f"layer {i}'s mixer was changed")
        part = mixer._modules  # past Module.__getattr__: the host's time counts
        leaves += [
            (f"layer {i}'s norm", norm, (type(backbone.norm_f),)),
            (f"layer {i}'s in_proj", part["in_proj"], linear),
            (f"layer {i}'s conv1d", part["conv1d"], (nn.Conv1d,)),
            (f"layer {i}'s x_proj", part["x_proj"], linear),
            (f"layer {i}'s dt_proj", part["dt_proj"], (nn.Linear, DtProjection)),
            (f"layer {i}'s out_proj", part["out_proj"], linear),
        ]
    return leaves


class _Seen(threading.local):
    """The model that `one_look` is about, and what was found of it."""

    model: nn.Module | None = None
    found: dict[tuple[str, bool], list[Tensor] | NotServed]


_seen = _Seen()


@contextmanager
def one_look(model: nn.Module) -> Iterator[None]:
    """Within it this thread's `check_model` looks at the model once.

    For the start of a generation, which asks several times: in a small model that takes longer
    than the prompt. Nothing of the caller's may run within it.
    """
    before = _seen.model
    _seen.model, _seen.found = model, {}
    try:
        yield
    finally:
        _seen.model, _seen.found = before, {}


def check_model(model: nn.Module, device_type: str, with_int8: bool) -> list[Tensor]:
    """The tensors that a step reads. Raises NotServed.

    ``with_int8``: whether the device's step knows int8 linear layers.
    """
    if _seen.model is not model:
        return _check_model(model, device_type, with_int8)
    key = (device_type, with_int8)
    if key not in _seen.found:
        try:
            _seen.found[key] = _check_model(model, device_type, with_int8)
        except NotServed as reason:
            _seen.found[key] = reason
    found = _seen.found[key]
    if isinstance(found, NotServed):
        raise NotServed(str(found))
    return found


def _int8_groups(mixer: nn.Module) -> tuple[int, ...]:
    """Groups of inputs with a scale, of each large linear layer; 0 where weights are not int8."""
    layers = (mixer._modules[name] for name in ("in_proj", "x_proj", "out_proj"))
    return tuple(m.scales.shape[1] if isinstance(m, Int8Linear) else 0 for m in layers)


def _check_model(model: nn.Module, device_type: str, with_int8: bool) -> list[Tensor]:
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
    leaves = _leaves(model, (nn.Linear, Int8Linear) if with_int8 else (nn.Linear,))
    mixers = [block._modules["mixer"] for block in backbone.layers]
    others = [tensor_of(mixer, name) for mixer in mixers for name in ("A_log", "D")]
    for name, module, kinds in leaves:
        _check_plain(name, module, *kinds)
        if isinstance(module, Int8Linear):
            others += [module.quantized, module.scales]
        elif is_plain(module, *kinds):
            floats.append(tensor_of(module, "weight"))
        else:
            raise NotServed(f"{name} is not plain any more (parametrized, or another tensor type)")
        own = module._parameters
        bias = own["bias"] if "bias" in own else getattr(module, "bias", None)
        if bias is not None:
            floats.append(bias)
    if backbone.embedding.max_norm is not None:
        raise NotServed("the embedding renormalises its rows")
    sizes = {(m.d_inner, m.d_state, m.d_conv, m.dt_rank) for m in mixers}
    if len(sizes) > 1:
        raise NotServed("the layers differ in size")
    if len({_int8_groups(mixer) for mixer in mixers}) > 1:
        raise NotServed("the layers differ in which weights are int8, or in their groups")
    dtype, tensors = backbone.embedding.weight.dtype, floats + others
    # As sets: of hundreds of tensors, asking each costs the host more than all else here.
    if dtype not in _DTYPES or {t.dtype for t in floats} != {dtype}:
        raise NotServed("the weights are not all fp32, all bf16 or all fp16")
    device_types = {device.type for device in {t.device for t in tensors}}
    if device_types != {device_type} or {t.layout for t in tensors} != {torch.strided}:
        where = {"cpu": "the CPU", "cuda": "one GPU"}[device_type]
        raise NotServed(f"not all weights are dense and on {where}")
    if device_type == "cpu" and any(t.is_inference() for t in tensors):
        raise NotServed("weights made in inference mode do not tell when they change")
    return tensors
