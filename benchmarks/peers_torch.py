"""transformers and mamba.py as peers, with our weights; transformers on its own code or on our ops.

transformers takes its Mamba ops from any importable mamba_ssm. `own_code` switches its model file
to the PyTorch code that it has for everyone else, which is what the peer's rows measure.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mamba_ssm.utils.checkpoint_format import mamba_ssm_to_hf_config, mamba_ssm_to_hf_state_dict

_OPS = (
    "mamba_inner_fn",
    "mamba_selective_scan",
    "mamba_selective_state_update",
    "causal_conv1d_fn",
    "causal_conv1d_update",
)


def why_absent(package: str) -> str | None:
    """None if the package can be imported, else what to type."""
    try:
        __import__(package)
    except ImportError:
        return f"not installed: pip install {package}"
    if package == "transformers":
        from transformers.models.mamba import modeling_mamba

        if not all(hasattr(getattr(modeling_mamba, name, None), "__wrapped__") for name in _OPS):
            return (
                "this version cannot be switched to its own code: pip install 'transformers>=5.16'"
            )
    return None


@contextmanager
def own_code(on: bool = True) -> Iterator[None]:
    """Inside, transformers' Mamba runs its own PyTorch code (``on``) or this library's ops."""
    from transformers.models.mamba import modeling_mamba

    kept = {name: getattr(modeling_mamba, name) for name in _OPS}
    if on:
        for name, op in kept.items():
            setattr(modeling_mamba, name, inspect.unwrap(op))
    try:
        yield
    finally:
        for name, op in kept.items():
            setattr(modeling_mamba, name, op)


class TransformersModel:
    """MambaForCausalLM with the weights of one of our models, in a dtype.

    Args:
        model: our fp32 model.
        ours: run on this library's ops instead of transformers' own code.
        mambapy: use mamba.py's parallel scan where transformers can.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, *, ours: bool = False, mambapy: bool = False
    ) -> None:
        import transformers

        config = mamba_ssm_to_hf_config(dataclasses.asdict(model.config))
        config.pop("mamba_ssm", None)
        with torch.device("meta"):
            self.model = transformers.MambaForCausalLM(
                transformers.MambaConfig(**config, use_mambapy=mambapy)
            )
        state = {k: v.detach() for k, v in model.state_dict().items() if k != "lm_head.weight"}
        state = mamba_ssm_to_hf_state_dict(state)
        missing, unexpected = self.model.load_state_dict(state, strict=False, assign=True)
        if set(missing) - {"lm_head.weight"} or unexpected:
            raise RuntimeError(f"weights do not fit: {missing} missing, {unexpected} unexpected")
        self.model.tie_weights()
        if dtype != torch.float32:
            self.model = copy.deepcopy(self.model).to(dtype)
        self.model.eval()
        self._own = not ours

    def prefill(self, ids: Tensor) -> Tensor:
        """Consume a prompt (b, l) into a fresh cache; the last position's logits (b, V)."""
        with torch.inference_mode(), own_code(self._own):
            return self.model(ids, use_cache=True, logits_to_keep=1).logits[:, -1]

    def decode(self, prompt: Tensor, steps: int) -> float:
        """Greedy steps after a prompt (b, l): the seconds of the steps alone."""
        with torch.inference_mode(), own_code(self._own):
            out = self.model(prompt, use_cache=True, logits_to_keep=1)
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            start = time.perf_counter()
            for _ in range(steps):
                out = self.model(tokens, cache_params=out.cache_params, use_cache=True)
                tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            return time.perf_counter() - start

    def train_step(self, ids: Tensor) -> dict[str, Tensor]:
        """Loss and gradients of one step on ids (b, l)."""
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        with own_code(self._own):
            loss = self.model(ids, labels=ids).loss
            loss.backward()
        self.model.eval()
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        return {"loss": loss.detach(), **gradients}

    def generate(self, prompt: Tensor, new: int) -> Tensor:
        """transformers' own greedy generate."""
        with torch.inference_mode(), own_code(self._own):
            return self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
            )


def transformers_block(block: nn.Module) -> nn.Module:
    """transformers' mixer, on mamba.py's parallel scan, with the weights of one of our blocks."""
    import transformers
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config: Any = transformers.MambaConfig(
        hidden_size=block.d_model, num_hidden_layers=1, vocab_size=8, use_mambapy=True
    )
    other = MambaMixer(config, layer_idx=0)
    other.load_state_dict(block.state_dict())
    return other.train()


def mambapy_block(block: nn.Module) -> nn.Module:
    """mamba.py's block (parallel scan) with the weights of one of ours."""
    from mambapy.mamba import MambaBlock, MambaConfig

    other = MambaBlock(MambaConfig(d_model=block.d_model, n_layers=1))
    other.load_state_dict(block.state_dict())
    return other
