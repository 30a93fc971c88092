"""The contestants' models: one set of random weights per shape, in every implementation and type.

Everything is made on first use and freed together. Before a model is timed, its logits for a short
prompt are compared with our fp32 ones.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers_llama
import peers_torch
import torch
from torch import Tensor

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.generation import InferenceParams

SHAPES: dict[str, dict[str, int]] = {
    "130m": {"d_model": 768, "n_layer": 24, "vocab_size": 50280},
    "370m": {"d_model": 1024, "n_layer": 48, "vocab_size": 50280},
    "tiny": {"d_model": 64, "n_layer": 4, "vocab_size": 384},
}
# Bytes of a weight; int8 has a scale for each output besides.
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}
GGUF = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0"}
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest ||difference|| / ||logits|| against fp32 that still counts as the same model.
_AGREE = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.1}


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


class StepClock:
    """A streamer that notes when each token came out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called by generate for the prompt and for every step's tokens."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by generate at the end."""


class OurModel:
    """MambaLMHeadModel as its users call it."""

    def __init__(self, model: MambaLMHeadModel) -> None:
        self.model = model

    def prefill(self, ids: Tensor) -> Tensor:
        """Consume a prompt (b, l) into fresh caches; the last position's logits (b, V)."""
        batch, length = ids.shape
        with torch.inference_mode():
            params = InferenceParams(length, batch)
            params.key_value_memory_dict = self.model.allocate_inference_cache(batch, length)
            return self.model(ids, inference_params=params, num_last_tokens=1).logits[:, -1]

    def decode(self, prompt: Tensor, steps: int, **options: Any) -> float:
        """``generate`` after a prompt (b, l), greedy by default: the seconds of ``steps`` alone."""
        clock = StepClock()
        self.model.generate(prompt, prompt.shape[1] + steps + 1, streamer=clock, **options)
        return clock.times[-1] - clock.times[-1 - steps]

    def after_steps(self, ids: Tensor) -> Tensor:
        """Logits (V,) after prefilling all but the last token and decoding that one."""
        out = self.model.generate(
            ids[:, :-1],
            ids.shape[1] + 1,
            teacher_outputs=ids,
            return_dict_in_generate=True,
            output_scores=True,
        )
        return out.scores[-1][0].float()

    def chunk_runner(self, chunk: int, batch: int = 1) -> Callable[[Tensor], Tensor]:
        """A function that consumes the next (batch, chunk) tokens of an endless sequence."""
        params = InferenceParams(2**62, batch)
        params.key_value_memory_dict = self.model.allocate_inference_cache(batch, chunk)

        def consume(ids: Tensor) -> Tensor:
            with torch.inference_mode():
                logits = self.model(ids, inference_params=params, num_last_tokens=1).logits
            params.seqlen_offset += ids.shape[1]
            return logits

        return consume


class Lab:
    """The models of one shape. ``disagreements`` lists those whose logits are not ours."""

    def __init__(self, shape: str, threads: int) -> None:
        self.shape, self.threads = shape, threads
        self.disagreements: list[str] = []
        self._made: dict[tuple[str, ...], Any] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="mamba-bench-")
        torch.manual_seed(0)
        say(f"making the {shape} model with random weights")
        self._base = MambaLMHeadModel(MambaConfig(**SHAPES[shape])).eval().requires_grad_(False)
        self.vocab = self._base.lm_head.out_features
        self._probe = self.ids(1, 24)
        self._expected = self._base(self._probe).logits[0, -1]

    def ids(self, batch: int, length: int) -> Tensor:
        """Reproducible token ids (batch, length)."""
        generator = torch.Generator().manual_seed(batch * 100_003 + length)
        return torch.randint(0, self.vocab, (batch, length), generator=generator)

    def weight_bytes(self, kind: str) -> int:
        """Bytes that a decode step has to read: the matrices in their type, the rest in fp32."""
        total = 0.0
        for name, p in self._base.named_parameters():  # tied weights are counted once
            matrix = p.dim() == 2 and not name.endswith("A_log")
            total += p.numel() * (WEIGHT_BYTES[kind] if matrix else 4)
            total += p.shape[0] * 4 * (matrix and kind == "int8")
        return int(total)

    def _get(self, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            say(f"  preparing {' '.join(key)}")
            self._made[key] = make()
        return self._made[key]

    def _compare(self, name: str, kind: str, logits: Tensor) -> None:
        difference = (logits.float() - self._expected).abs().max().item()
        relative = ((logits.float() - self._expected).norm() / self._expected.norm()).item()
        fine = relative <= _AGREE[kind]
        say(
            f"    {name}: largest logit difference from fp32 {difference:.2g} "
            f"(relative {relative:.2g}){'' if fine else '  DISAGREES'}"
        )
        if not fine:
            self.disagreements.append(f"{self.shape} {name}: relative difference {relative:.2g}")

    def ours(self, kind: str) -> OurModel | None:
        """Our model in "fp32", "bf16" or "int8"; None where it cannot be had."""

        def make() -> OurModel | None:
            model = self._base
            if kind == "bf16":
                model = copy.deepcopy(model).to(torch.bfloat16)
            elif kind == "int8":
                if not hasattr(model, "quantize_"):
                    return None
                model = copy.deepcopy(model)
                model.quantize_("int8")
            ours = OurModel(model)
            self._compare(f"mamba_ssm {kind} prefill", kind, ours.prefill(self._probe)[0])
            self._compare(f"mamba_ssm {kind} decode", kind, ours.after_steps(self._probe))
            return ours

        return self._get(("mamba_ssm", kind), make)

    def llama(self, kind: str) -> peers_llama.LlamaModel:
        """llama.cpp with f32, bf16 or (for "int8") q8_0 weights."""

        def make() -> peers_llama.LlamaModel:
            path = Path(self._folder.name) / f"{GGUF[kind]}.gguf"
            peers_llama.write_gguf(self._base, path, GGUF[kind])
            llama = peers_llama.LlamaModel(path, self.threads, self.vocab)
            llama.prefill(self._probe)
            self._compare(f"llama.cpp {GGUF[kind]}", kind, llama.logits())
            return llama

        return self._get(("llama.cpp", kind), make)

    def transformers(self, kind: str, **options: bool) -> peers_torch.TransformersModel:
        """transformers in "fp32" or "bf16"; options ``ours`` and ``mambapy``."""

        def make() -> peers_torch.TransformersModel:
            other = peers_torch.TransformersModel(self._base, TORCH[kind], **options)
            name = " ".join(["transformers", kind, *options])
            self._compare(name, kind, other.prefill(self._probe)[0])
            return other

        return self._get(("transformers", kind, *options), make)

    def close(self) -> None:
        """Free every model and file."""
        for made in self._made.values():
            if isinstance(made, peers_llama.LlamaModel):
                made.close()
        self._made.clear()
        self._folder.cleanup()
