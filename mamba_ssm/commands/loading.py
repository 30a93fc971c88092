"""What the generation commands share: options, models, tokenizers, prompts, error lines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

# The shapes of the released models, so that they can be timed without their weights.
KNOWN_SHAPES = {
    "state-spaces/mamba-130m": (768, 24),
    "state-spaces/mamba-370m": (1024, 48),
    "state-spaces/mamba-790m": (1536, 48),
    "state-spaces/mamba-1.4b": (2048, 48),
    "state-spaces/mamba-2.8b": (2560, 64),
    "state-spaces/mamba-2.8b-slimpj": (2560, 64),
}
FLOATS = ("float32", "float16", "bfloat16")
# int8 is about the large weights; activations and the rest have the device's default dtype.
DTYPES = (*FLOATS, "int8")


class CommandError(Exception):
    """Something the user can put right; the message says how."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _number(kind: type, allowed: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return parse


POSITIVE = _number(int, lambda n: n >= 1, "an integer >= 1")
NOT_NEGATIVE = _number(int, lambda n: n >= 0, "an integer >= 0")
MASS = _number(float, lambda p: 0.0 < p <= 1.0, "in (0, 1]")
FRACTION = _number(float, lambda p: 0.0 <= p <= 1.0, "in [0, 1]")
TEMPERATURE = _number(float, lambda t: 0.0 <= t < float("inf"), ">= 0 and finite")
PENALTY = _number(float, lambda r: 0.0 < r < float("inf"), "> 0 and finite")


def add_model_options(parser: argparse.ArgumentParser, default: str | None, says: str) -> None:
    """--model-name, --random-weights, --device, --dtype, --seed, --cg."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model-name",
        metavar="NAME",
        default=default,
        help=f"'embedded', a local directory or a hub name (default: {says})",
    )
    group.add_argument(
        "--random-weights",
        action="store_true",
        help="the model's shape with random weights: for timing, needs no weights",
    )
    group.add_argument(
        "--device", metavar="DEVICE", help="such as cpu or cuda:0 (default: cuda if there is one)"
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default: float16 on a GPU, float32 on the CPU; int8: weights only, for inference",
    )
    group.add_argument("--seed", type=NOT_NEGATIVE, metavar="N", help="makes sampling reproducible")
    group.add_argument(
        "--cg",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode with a CUDA graph; means nothing on the CPU (default: on)",
    )


def add_prompt_options(
    parser: argparse.ArgumentParser, promptlen: int | None, genlen: int, prompt_says: str
) -> None:
    """--prompt, --promptlen, --genlen, --batch, --stream."""
    group = parser.add_argument_group("prompt and output")
    group.add_argument(
        "--prompt", metavar="TEXT", help=f"text to continue (default: {prompt_says})"
    )
    group.add_argument(
        "--promptlen",
        type=POSITIVE,
        default=promptlen,
        metavar="N",
        help="without --prompt: start from this many random tokens"
        + (f" (default: {promptlen})" if promptlen else ""),
    )
    group.add_argument(
        "--genlen",
        type=POSITIVE,
        default=genlen,
        metavar="N",
        help=f"how many tokens to add (default: {genlen})",
    )
    group.add_argument(
        "--batch", type=POSITIVE, default=1, metavar="N", help="copies of the prompt (default: 1)"
    )
    group.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="print text while it is generated (batch 1)",
    )


def add_sampling_options(
    parser: argparse.ArgumentParser, temperature: float, topk: int, topp: float
) -> None:
    """--temperature, --topk, --topp, --minp, --repetition-penalty."""
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add(
        "--temperature",
        type=TEMPERATURE,
        default=temperature,
        metavar="T",
        help=f"0 is greedy (default: {temperature})",
    )
    add(
        "--topk",
        type=NOT_NEGATIVE,
        default=topk,
        metavar="K",
        help=f"the K likeliest tokens; 1 is greedy, 0 is no limit (default: {topk})",
    )
    add(
        "--topp",
        type=MASS,
        default=topp,
        metavar="P",
        help=f"the likeliest tokens that make up this probability (default: {topp})",
    )
    add(
        "--minp",
        type=FRACTION,
        default=0.0,
        metavar="P",
        help="tokens at least P times as likely as the likeliest (default: 0, off)",
    )
    add(
        "--repetition-penalty",
        type=PENALTY,
        default=1.0,
        metavar="R",
        help="above 1, repeated tokens become less likely (default: 1, off)",
    )


def resolve_device(name: str | None) -> torch.device:
    """The device of that name. Raises CommandError if it does not exist here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"cannot use device {name!r} ({reason}): try --device cpu") from error
    return device


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name; by default, and beside int8 weights, float16 on a GPU and float32
    elsewhere."""
    if name is None or name == "int8":
        return torch.float16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def load_mamba(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    random_weights: bool,
    seed: int | None,
    int8: bool = False,
) -> nn.Module:
    """A MambaLMHeadModel in eval mode, with its weights or with random ones of its shape, and its
    large weights in int8 if asked.

    Raises:
        CheckpointError: when it cannot be loaded; the message says what to do.
    """
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from mamba_ssm.utils.hf import load_config_hf

    if not random_weights:
        model = MambaLMHeadModel.from_pretrained(name, device=device, dtype=dtype).eval()
        return model.quantize_("int8") if int8 else model
    if name in KNOWN_SHAPES:
        d_model, n_layer = KNOWN_SHAPES[name]
        config = MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=50277)
    else:
        config = MambaConfig(**load_config_hf(name))
    torch.manual_seed(seed or 0)
    model = MambaLMHeadModel(config, device=device, dtype=dtype).eval()
    return model.quantize_("int8") if int8 else model


def count_parameters(model: nn.Module) -> int:
    """How many weights a model has, int8 ones included and tied ones counted once."""
    from mamba_ssm.inference import Int8Linear

    total = sum(p.numel() for p in model.parameters())
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            tied = name == "lm_head" and model.config.tie_embeddings
            total += 0 if tied else module.quantized.numel()
    return total


def encode_prompt(tokenizer: Any, text: str, device: torch.device) -> Tensor:
    """(1, length) int64 of the text, without an end-of-text token that some tokenizers append."""
    if not text:
        raise CommandError("the prompt is empty: give --prompt some text, or leave it out")
    ids = list(tokenizer(text).input_ids)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    if not ids:
        raise CommandError("the prompt has no tokens: give --prompt other text, or leave it out")
    return torch.tensor([ids], device=device)


def random_prompt(
    vocab_size: int, batch: int, length: int, device: torch.device, seed: int | None
) -> Tensor:
    """(batch, length) int64 random token ids, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed or 0)
    high = max(2, min(1000, vocab_size))
    return torch.randint(1, high, (batch, length), generator=generator).to(device)


def run_command(prog: str, work: Callable[[], None]) -> int:
    """Exit code of a command: 0, or 2 with one line on standard error; 130 when interrupted."""
    from mamba_ssm.utils.hf import CheckpointError

    try:
        work()
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    except (CommandError, CheckpointError, ValueError, TypeError, ImportError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
