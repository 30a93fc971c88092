"""The object that `generate` returns. Importing this module imports transformers."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.generation import GenerateDecoderOnlyOutput

from mamba_ssm.utils.generation_state import GenerationState


@dataclass
class MambaGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' `GenerateDecoderOnlyOutput` with the state to continue from.

    Attributes:
        sequences: (batch, prompt + new) int64.
        scores: tuple of (batch, vocab), the logits of each new token, or None.
        state: GenerationState, or None unless it was asked for.
    """

    state: GenerationState | None = None
