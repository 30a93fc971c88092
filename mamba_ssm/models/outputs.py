"""What the models return: named tuples, which ``torch.export`` can save."""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


class CausalLMOutputWithState(NamedTuple):
    """What ``MambaLMHeadModel.forward`` returns once more than logits was asked for."""

    logits: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    final_state: list[Any] | None = None


class MixerModelOutput(NamedTuple):
    """What ``MixerModel.forward`` returns once more than the last hidden state was asked for."""

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    final_state: list[Any] | None = None


# torch has no public function for this; without it torch.export.save refuses these results.
for _output in (CausalLMOutput, CausalLMOutputWithState, MixerModelOutput):
    _pytree._register_namedtuple(_output, serialized_type_name=f"mamba_ssm.{_output.__name__}")
