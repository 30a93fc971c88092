"""Autoregressive generation: prefill the prompt, then one token at a time from the layers' states.

A Mamba layer's state has a fixed size (arXiv 2312.00752, section 3.3.2), so a step costs the same
at any length, and continuing from a saved state costs only the new tokens.

The historical names stay importable from here: InferenceParams, sample, the `modify_logit…`
filters, decode, GenerationMixin, DecodingCGCache, update_graph_cache, capture_graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mamba_ssm.utils.cuda_graph import DecodingCGCache, capture_graph, update_graph_cache
from mamba_ssm.utils.decoding import DecodeRequest, run_request
from mamba_ssm.utils.generation_state import GenerationState, InferenceParams
from mamba_ssm.utils.lazy import require
from mamba_ssm.utils.sampling import (
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
)
from mamba_ssm.utils.text_stream import TextStreamer

__all__ = [
    "DecodingCGCache",
    "GenerationMixin",
    "GenerationState",
    "InferenceParams",
    "TextStreamer",
    "capture_graph",
    "decode",
    "modify_logit_for_repetition_penalty",
    "modify_logits_for_min_p_filtering",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
    "update_graph_cache",
]


def decode(
    input_ids: Tensor,
    model: nn.Module,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
    *,
    attention_mask: Tensor | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    seed: int | None = None,
    prefill_chunk_size: int | None = None,
    state: GenerationState | None = None,
    return_state: bool = False,
) -> Any:
    """Generate tokens after a prompt; greedy by default (top_k=1).

    Args:
        input_ids: (batch, length) int64, the prompt; with `state`, only what is new (length ≥ 0).
        model: `model(input_ids, position_ids=, inference_params=, num_last_tokens=).logits`.
        max_length: length of the result, `input_ids` included. At least one token is produced.
        top_k, top_p, min_p, temperature: see `sample`.
        repetition_penalty: > 1 makes tokens of the prompt, the continued state and the output less
            likely; see `modify_logit_for_repetition_penalty`.
        eos_token_id: one or several ids that finish a row; the row then gets `pad_token_id`.
        teacher_outputs: (batch, n) int64: position i < n of the result is forced to be
            `teacher_outputs[:, i]`; later positions are sampled.
        vocab_size: ignore the logits from there on (a padded vocabulary).
        cg: replay decode steps and the choice of tokens as CUDA graphs, captured once for a batch
            size, dtype and set of weights; without meaning on other devices. `generate` does so by
            itself for a plain model on a GPU unless told `cg=False`. Stop strings, scores, forced
            tokens, and a state wanted back from rows that may end, take the plain loop.
        enable_timing: print the time of prefill and decoding together.
        output_scores: return each new token's logits, before penalty and filters.
        streamer: object with `put(tensor on the CPU)` for the prompt and for each step's tokens,
            and `end()`, which is also called when generation is interrupted.
        attention_mask: (batch, length) of 0/1 or bool, 0 = padding, on any side of the prompt:
            rows come out as they would alone and unpadded.
        pad_token_id: what finished rows get; default: the first eos_token_id, else 0.
        stop_strings: text that finishes a row once its generated part contains it; the tokens that
            complete the text stay in the result. Needs `tokenizer`.
        tokenizer: object with `decode(list[int], skip_special_tokens=...)`.
        seed: sample reproducibly, from a generator of this call's own; None uses the global one.
        prefill_chunk_size: consume the prompt in pieces of this many tokens (less memory, the same
            result).
        state: continue after the call that returned this state: its text is not processed again.
        return_state: put a `GenerationState` into the result's `.state`.

    Returns:
        `MambaGenerateOutput`, transformers' GenerateDecoderOnlyOutput with a field more:
        sequences (batch, length + new) int64 — `input_ids` as given, padding included, then the
        new tokens; new ends when every row is finished or at `max_length`; scores — a tuple of new
        (batch, vocab) tensors, or None; state — a `GenerationState`, or None.

    Raises:
        ValueError, TypeError: for bad arguments, before anything is computed.
    """
    request = DecodeRequest(
        input_ids,
        model,
        max_length,
        top_k,
        top_p,
        min_p,
        temperature,
        repetition_penalty,
        eos_token_id,
        teacher_outputs,
        vocab_size,
        cg,
        enable_timing,
        output_scores,
        streamer,
        attention_mask,
        pad_token_id,
        stop_strings,
        tokenizer,
        seed,
        prefill_chunk_size,
        state,
        return_state,
    )
    require("transformers", "the output object of decode() and return_dict_in_generate")
    from mamba_ssm.utils.generation_output import MambaGenerateOutput

    return MambaGenerateOutput(**run_request(request))


class GenerationMixin:
    """Adds `generate` to a language model (see `decode` for what its forward must accept)."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Zeroed caches, {layer index: tensors}. A model that uses the mixin provides it."""
        raise NotImplementedError(
            f"{type(self).__name__} must define allocate_inference_cache(batch_size, max_seqlen, "
            "dtype=None, **kwargs) -> {layer index: cache}"
        )

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generate after a prompt. All other keyword arguments are those of `decode`.

        Returns:
            sequences (batch, length + new) int64; or, with `return_dict_in_generate` or
            `return_state`, the object that `decode` returns.

        Raises:
            ValueError, TypeError: for bad arguments, before anything is computed.
        """
        unknown = set(kwargs) - set(inspect.signature(decode).parameters)
        if unknown:
            raise TypeError(f"generate() does not know {sorted(unknown)}: see decode() for what is")
        arguments = (input_ids, self, max_length, top_k, top_p, min_p, temperature)
        if return_dict_in_generate or kwargs.get("return_state", False):
            return decode(*arguments, output_scores=output_scores, **kwargs)
        return run_request(DecodeRequest(*arguments, **kwargs))["sequences"]
