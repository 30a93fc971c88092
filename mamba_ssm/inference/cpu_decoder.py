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
        count = t.numel()
        step = max(1, count // _SAMPLES)
        if t.is_contiguous():
            samples.append(t.as_strided((-(-count // step),), (step,)))  # one call, of hundreds
        else:
            samples.append(t.reshape(-1)[::step])
    return torch.cat(samples).float()


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
        self._step_and_choose = torch.ops.mamba_ssm._decode_and_choose.default

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
        return self._step(ids, self.embedding, self.pack, self.layout, *self._states(caches))

    def __call__(self, ids: Tensor, caches: dict[int, Any]) -> Tensor:
        """``step``."""
        return self.step(ids, caches)

    def _states(self, caches: dict[int, Any]) -> tuple[list[Tensor], list[Tensor]]:
        layers = [caches[i] for i in range(self.n_layer)]
        return [layer[0] for layer in layers], [layer[1] for layer in layers]

    def new_logits(self, batch_size: int) -> Tensor:
        """Memory for the logits of ``choose``."""
        return self.embedding.new_empty(batch_size, self.embedding.shape[0])

    def choose(
        self,
        ids: Tensor,
        caches: dict[int, Any],
        logits: Tensor,
        tokens: Tensor,
        seen: Tensor | None,
        uniform: Tensor | None,
        vocab_size: int,
        **choice: Any,
    ) -> None:
        """``step``, and each row's next token from its logits, in the same call.

        Args:
            logits: of ``new_logits``; gets what ``step`` returns.
            tokens: (b,) int64; gets the tokens.
            seen: (b, vocabulary) bool, the tokens that the penalty concerns, or None.
            uniform: (b,) fp64 in [0, 1), where in its distribution a row's token is; None takes
                the most likely one.
            vocab_size: only logits before it count.
            choice: top_k, top_p, min_p, temperature, repetition_penalty, as in ``sample``.

        Raises RuntimeError, besides ``step``'s reasons, where no distribution is left.
        """
        self._step_and_choose(
            ids, self.embedding, self.pack, self.layout, *self._states(caches), logits, tokens,
            seen, uniform, vocab_size, **choice,
        )  # fmt: skip
        if uniform is not None and bool((tokens < 0).any()):
            raise RuntimeError("the logits contain NaN or infinity: there is nothing to sample")


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
