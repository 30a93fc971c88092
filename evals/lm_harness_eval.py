"""Evaluate with lm-eval: its own command line, with the model type `mamba` added.

    python evals/lm_harness_eval.py --model mamba --model_args pretrained=embedded \
        --include_path tests/lm_eval_tasks --tasks local_choice,local_rolling,local_generate \
        --device cpu --batch_size 8
    python evals/lm_harness_eval.py --model mamba --model_args pretrained=state-spaces/mamba-130m \
        --tasks lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande \
        --device cuda --batch_size 256
    python evals/lm_harness_eval.py --model hf --model_args pretrained=EleutherAI/pythia-160m \
        --tasks lambada_openai --device cuda --batch_size 64
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    sys.exit(f"lm_harness_eval.py: error: {error}: pip install 'mamba_ssm[eval]' brings lm-eval")

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.commands.loading import DTYPES, count_parameters
from mamba_ssm.utils.hf import CheckpointError, load_config_hf, load_tokenizer


@register_model("mamba")
class MambaEvalWrapper(HFLM):
    """A MambaLMHeadModel for lm-eval: log-likelihoods, rolling perplexity, generation.

    Scoring batches are padded on the right, where a causal model does not see it; prompts for
    generation on the left, with an attention mask that keeps padding out of the states.

    Args:
        pretrained: "embedded", a local directory or a hub name.
        max_length: longest window of tokens; longer documents are scored in windows.
        batch_size: an integer, "auto" or "auto:N".
        device: such as "cpu" or "cuda:0".
        dtype: "auto" is float16 on a GPU and float32 elsewhere; "int8" is the same with the large
            weights in int8.
        tokenizer: another tokenizer than the model's own, by name.
        kwargs: HFLM's other options (max_batch_size, prefix_token_id, …).
    """

    AUTO_MODEL_CLASS = None

    def __init__(
        self,
        pretrained: str = "state-spaces/mamba-130m",
        max_length: int = 2048,
        batch_size: int | str = 1,
        device: str = "cuda",
        dtype: str | torch.dtype = "auto",
        tokenizer: str | None = None,
        **kwargs: Any,
    ) -> None:
        # Byte-level tokenizers would append </s> to every context and continuation.
        kwargs.setdefault("add_bos_token", False)
        super().__init__(
            pretrained,
            backend="causal",
            max_length=max_length,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            **kwargs,
        )

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        self._config = load_config_hf(pretrained)

    def _create_tokenizer(
        self, pretrained: str, tokenizer: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        if tokenizer is not None:
            super()._create_tokenizer(pretrained, tokenizer, *args, **kwargs)
        else:
            self.tokenizer = load_tokenizer(pretrained)

    def _create_model(self, pretrained: str, dtype: Any = "auto", **kwargs: Any) -> None:
        int8 = dtype == "int8"
        if dtype == "auto" or int8:
            dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        elif isinstance(dtype, str):
            if dtype not in DTYPES:
                raise CheckpointError(f"dtype must be auto or one of {DTYPES}, got {dtype!r}")
            dtype = getattr(torch, dtype)
        self._model = MambaLMHeadModel.from_pretrained(pretrained, device=self.device, dtype=dtype)
        if int8:
            self._model.quantize_("int8")

    def _model_call(self, inps: Tensor, attn_mask: None = None, labels: None = None) -> Tensor:
        with torch.inference_mode():
            return self.model(inps).logits

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        do_sample = generation_kwargs.pop("do_sample", None)
        greedy = do_sample is False or generation_kwargs.get("temperature", 0.0) == 0.0
        if greedy:
            generation_kwargs |= {"top_k": 1, "temperature": 1.0, "top_p": 1.0, "min_p": 0.0}
        else:
            generation_kwargs.setdefault("top_k", 0)
        return self.model.generate(
            context,
            max_length=max_length,
            eos_token_id=self.eot_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            stop_strings=[text for text in stop if text] or None,
            tokenizer=self.tokenizer,
            **generation_kwargs,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results; asks no hub."""
        return {
            "model_num_parameters": count_parameters(self.model),
            "model_dtype": str(next(self.model.parameters()).dtype),
            "model_revision": self.revision,
            "model_sha": "",
        }


def main() -> int:
    """lm-eval's command line; exit code 2 and one line when the model cannot be loaded."""
    try:
        cli_evaluate()
    except CheckpointError as error:
        message = " ".join(str(error).split())
        print(f"lm_harness_eval.py: error: {message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
