"""Native calls that a language model offers `generate` in place of its modules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from mamba_ssm.inference import cpu_decoder, cuda_decoder, cuda_prefill, served
from mamba_ssm.ops import backend


class FusedDecoding:
    """Methods of ``MambaLMHeadModel``."""

    def decode_step(
        self, batch_size: int = 1
    ) -> Callable[[torch.Tensor, dict[int, Any]], torch.Tensor] | None:
        """What `generate` steps with: step(ids (b,), caches) -> logits (b, V), or None; on a CPU
        ``step.choose`` also takes the next tokens.

        On a GPU the fused step reads the model's weights where they are, for up to 8 rows, int8
        ones for one row. On a CPU it reads packed weights, made at the first call and again after
        the weights changed: until ``release_inference_packs`` or ``train`` they double the weights'
        memory. None where the modules have to be used; ``why_not`` of
        ``mamba_ssm.inference.cpu_decoder`` or ``.cuda_decoder`` says why.
        """
        if self.backbone.embedding.weight.is_cuda:
            decoder = cuda_decoder.decoder_for(self, batch_size)
            return None if decoder is None else decoder.step
        return cpu_decoder.decoder_for(self)

    def whole_prefill(self) -> cuda_prefill.CudaPrefill | None:
        """What `generate` consumes a prompt with on a GPU, or None where the modules have to be
        used; ``mamba_ssm.inference.cuda_prefill.why_not`` says why."""
        return cuda_prefill.prefill_for(self) if self.backbone.embedding.weight.is_cuda else None

    def greedy_into(self, logits: torch.Tensor, tokens: torch.Tensor) -> bool:
        """Whether a kernel wrote the most likely token of each row of logits (b, V) into tokens
        (b,) int64: the first one among equals, or a NaN. Where it did not, torch's argmax does."""
        served = (
            logits.is_cuda
            and type(logits) is torch.Tensor
            and logits.stride(-1) == 1
            and backend.runs_native("_argmax_rows", "cuda", logits.dtype)
        )
        if served:
            torch.ops.mamba_ssm._argmax_rows(logits, tokens)
        return served

    def one_look(self) -> AbstractContextManager[None]:
        """Within it, the questions above and below look at the model's parts once."""
        return served.one_look(self)

    def steps_are_plain(self) -> bool:
        """Whether a decode step on a GPU does only what this class defines: no hooks, adapters or
        replaced parts that a captured step might leave out. `generate` then captures by itself.
        """
        return cuda_decoder.is_served(self)

    def release_inference_packs(self) -> None:
        """Free the packed copy of the weights that decoding on a CPU has made, if any."""
        cpu_decoder.release(self)

    def _graph_key(self, batch_size: int) -> tuple[str | None, ...]:
        """What else a captured decode step depends on: where its kernels come from."""
        return (backend.current(), cuda_decoder.why_not(self, batch_size))
