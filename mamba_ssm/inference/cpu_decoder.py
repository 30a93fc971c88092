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

from mamba_ssm.inference.pack import pack_model
from mamba_ssm.inference.served import NotServed, check_model, check_process

_OP = "_decode_step"
# Values of each parameter that are compared as well, to notice writes through `.data`, which no
# version counter does.
_SAMPLES = 16


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
        check_process(_OP, "cpu")
        check_model(model, "cpu", with_int8=True)
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
            check_process(_OP, "cpu")
            tensors = check_model(model, "cpu", with_int8=True)
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
