"""Generate text: `mamba-generate`, `python -m mamba_ssm generate`, `python mamba_generate.py`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from mamba_ssm.commands.loading import (
    CommandError,
    OneLineParser,
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    count_parameters,
    encode_prompt,
    load_mamba,
    random_prompt,
    resolve_device,
    resolve_dtype,
    run_command,
)

PROG = "mamba-generate"
# The embedded model has read Python.
DEFAULT_PROMPT = '''"""Small containers."""


class Stack:
    """Last in, first out."""

    def __init__(self):
'''

EXAMPLES = """examples:
  mamba-generate
  mamba-generate --prompt "import os" --genlen 300 --seed 1
  mamba-generate --model-name ./my-model --prompt "Once upon a time" --topk 40
  mamba-generate --model-name state-spaces/mamba-130m --random-weights --promptlen 100
"""


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = OneLineParser(
        prog=prog,
        description="Continue a prompt with a Mamba language model. Without options, the model "
        "that comes with the package writes some Python.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser, "embedded", "embedded, the small byte-level model in the package")
    add_prompt_options(parser, None, 256, repr(DEFAULT_PROMPT))
    add_sampling_options(parser, temperature=0.7, topk=0, topp=0.9)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; returns the exit code (2 for errors, with one line saying what to do)."""
    args = build_parser(prog).parse_args(argv)
    return run_command(prog, lambda: _generate(args))


def _generate(args: argparse.Namespace) -> None:
    if args.prompt == "":
        raise CommandError("the prompt is empty: give --prompt some text, or leave it out")
    if args.stream and args.batch > 1:
        raise CommandError("--stream prints one text: use --batch 1 or --no-stream")
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    int8 = args.dtype == "int8"
    model = load_mamba(args.model_name, device, dtype, args.random_weights, args.seed, int8)
    tokenizer = _tokenizer(args)
    if args.prompt is None and args.promptlen is not None:
        vocab_size = model.config.vocab_size
        ids = random_prompt(vocab_size, args.batch, args.promptlen, device, args.seed)
    else:
        ids = encode_prompt(tokenizer, args.prompt or DEFAULT_PROMPT, device)
        ids = ids.repeat(args.batch, 1)
    stream = args.batch == 1 if args.stream is None else args.stream
    parameters = count_parameters(model)
    start = time.perf_counter()
    sequences = _run(model, ids, tokenizer, args, stream and tokenizer is not None)
    seconds = time.perf_counter() - start
    generated = sequences.shape[1] - ids.shape[1]
    if tokenizer is None:
        print("\n".join(" ".join(map(str, row)) for row in sequences.tolist()))
    elif not stream:
        print(*tokenizer.batch_decode(sequences, skip_special_tokens=True), sep="\n---\n")
    print()
    print(f"Number of parameters: {parameters:,}")
    print(f"Prompt length: {ids.shape[1]}, generated: {generated} tokens")
    rate = args.batch * generated / seconds
    where = f"{device}, {dtype}" + (", int8 weights" if int8 else "")
    print(f"Prompt and generation: {seconds:.2f} s, {rate:.1f} tokens/s ({where})")


def _tokenizer(args: argparse.Namespace) -> Any:
    """The model's tokenizer; None if it cannot be had and only random tokens are wanted."""
    from mamba_ssm.utils.hf import CheckpointError, load_tokenizer

    try:
        return load_tokenizer(args.model_name)
    except CheckpointError as error:
        if args.prompt is None and args.promptlen is not None and not args.stream:
            return None
        raise CommandError(
            f"{error} Or use --promptlen N without --prompt to start from random tokens."
        ) from error


def _run(
    model: torch.nn.Module,
    ids: torch.Tensor,
    tokenizer: Any,
    args: argparse.Namespace,
    stream: bool,
) -> torch.Tensor:
    from mamba_ssm.utils.generation import TextStreamer

    return model.generate(
        ids,
        max_length=ids.shape[1] + args.genlen,
        top_k=args.topk,
        top_p=args.topp,
        min_p=args.minp,
        temperature=args.temperature,
        repetition_penalty=args.repetition_penalty,
        eos_token_id=None if tokenizer is None else tokenizer.eos_token_id,
        vocab_size=model.config.vocab_size,
        cg=args.cg and not model.config.attn_layer_idx,
        streamer=TextStreamer(tokenizer) if stream else None,
        seed=args.seed,
    )


if __name__ == "__main__":
    sys.exit(main())
