"""Time prompt processing and decoding of a Mamba model, or of a transformers model for comparison.

    python benchmarks/benchmark_generation_mamba_simple.py --model-name state-spaces/mamba-130m \
        --prompt "My cat wrote all this CUDA code" --topp 0.9 --temperature 0.7
    python benchmarks/benchmark_generation_mamba_simple.py --batch 64 --random-weights
    python benchmarks/benchmark_generation_mamba_simple.py --model-name EleutherAI/pythia-2.8b
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_ssm.commands.loading import (
    POSITIVE,
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

PROG = "benchmark_generation_mamba_simple.py"
DEFAULT_MODEL = "state-spaces/mamba-130m"


def build_parser() -> argparse.ArgumentParser:
    """The options of the benchmark."""
    parser = OneLineParser(
        prog=PROG,
        description="Time prompt processing and decoding: one warm-up, then the median of the "
        "repeats. Names that are no Mamba model run through transformers.",
    )
    add_model_options(parser, None, f"{DEFAULT_MODEL}, its shape alone if the hub is out of reach")
    add_prompt_options(parser, 100, 100, "random tokens")
    add_sampling_options(parser, temperature=1.0, topk=1, topp=1.0)
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--repeats", type=POSITIVE, default=3, metavar="N", help="timed runs (default: 3)"
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON object; everything else goes to standard error",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code (2 for errors, with one line saying what to do)."""
    args = build_parser().parse_args(argv)
    return run_command(PROG, lambda: benchmark(args))


def is_mamba(name: str) -> bool:
    """Whether this library runs the model; a local directory says so in its config.json."""
    config = Path(name).expanduser() / "config.json"
    if config.is_file():
        try:
            return json.loads(config.read_text()).get("model_type", "mamba") == "mamba"
        except (ValueError, AttributeError):
            return True  # damaged: our own loader explains it best
    return name == "embedded" or "mamba" in name.lower() or Path(name).expanduser().exists()


def load(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, note: Callable) -> Any:
    """The model, and the name under which it is reported; sets args.random_weights if it must."""
    from mamba_ssm.utils.hf import HubUnreachableError

    named = args.model_name is not None
    args.model_name = args.model_name or DEFAULT_MODEL
    int8 = args.dtype == "int8"
    if not is_mamba(args.model_name):
        if int8:
            raise CommandError("--dtype int8 is for Mamba models: choose a floating-point dtype")
        return load_transformers(args, device, dtype)
    try:
        return load_mamba(args.model_name, device, dtype, args.random_weights, args.seed, int8)
    except HubUnreachableError:
        if named:
            raise
    note(f"The hub cannot be reached: timing the shape of {DEFAULT_MODEL} with random weights.")
    args.random_weights = True
    return load_mamba(args.model_name, device, dtype, True, args.seed, int8)


def load_transformers(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """A transformers model in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from mamba_ssm.utils.hub import find_required, open_model

    # Says at once what is wrong, where transformers would go through a minute of retries.
    find_required(open_model(args.model_name), "config.json")
    try:
        if args.random_weights:
            torch.manual_seed(args.seed or 0)
            config = AutoConfig.from_pretrained(args.model_name)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(args.model_name, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(
            f"cannot load {args.model_name!r} through transformers ({reason}): give a local "
            "directory with config.json and weights, or --random-weights for its shape alone"
        ) from error
    # A fixed number of tokens is timed, whatever they are.
    model.generation_config.eos_token_id = None
    return model.to(device).eval()


def load_tokenizer(name: str, for_mamba: bool) -> Any:
    """The tokenizer of a model."""
    if for_mamba:
        from mamba_ssm.utils.hf import load_tokenizer

        return load_tokenizer(name)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"cannot load the tokenizer of {name!r}: leave --prompt and --stream out to time "
            "random tokens"
        ) from error


def generator_for(
    model: torch.nn.Module, ids: Tensor, args: argparse.Namespace, streamer: Any
) -> Callable[[], Tensor]:
    """A function that runs the generation once and returns the sequences."""
    max_length = ids.shape[1] + args.genlen
    if is_mamba(args.model_name):
        return lambda: model.generate(
            ids,
            max_length=max_length,
            cg=args.cg and not model.config.attn_layer_idx,
            top_k=args.topk,
            top_p=args.topp,
            min_p=args.minp,
            temperature=args.temperature,
            repetition_penalty=args.repetition_penalty,
            vocab_size=model.config.vocab_size,
            streamer=streamer,
            seed=args.seed,
        )
    sampling: dict[str, Any] = {"do_sample": False}
    if args.topk != 1 and args.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": args.temperature,
            "top_k": args.topk,
            "top_p": args.topp,
            "min_p": args.minp or None,
        }

    def run() -> Tensor:
        if args.seed is not None:
            torch.manual_seed(args.seed)
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_length=max_length,
            pad_token_id=0,
            repetition_penalty=args.repetition_penalty,
            streamer=streamer,
            **sampling,
        )

    return run


def timed(run: Callable[[], Tensor], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each run, with a progress bar where there is a terminal."""
    from tqdm import tqdm

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    seconds = []
    for _ in tqdm(range(repeats), desc="timing", unit="run", disable=None, leave=False):
        start = clock()
        run()
        seconds.append(clock() - start)
    return seconds


def benchmark(args: argparse.Namespace) -> None:
    """Load, warm up, time and print."""

    def note(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    if args.prompt == "":
        raise CommandError("the prompt is empty: give --prompt some text, or leave it out")
    if args.stream and (args.batch > 1 or args.json):
        raise CommandError("--stream prints one text: use it with --batch 1 and without --json")
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    dtype_name = args.dtype or str(dtype).removeprefix("torch.")
    note(f"Loading model {args.model_name or DEFAULT_MODEL}")
    model = load(args, device, dtype, note)
    parameters = count_parameters(model)
    note(f"Number of parameters: {parameters}")
    tokenizer = None
    if args.prompt is not None or args.stream:
        tokenizer = load_tokenizer(args.model_name, is_mamba(args.model_name))
    if args.prompt is None:
        vocab_size = model.config.vocab_size
        ids = random_prompt(vocab_size, args.batch, args.promptlen, device, args.seed)
    else:
        ids = encode_prompt(tokenizer, args.prompt, device).repeat(args.batch, 1)
    streamer = None
    if args.stream:
        from mamba_ssm.utils.generation import TextStreamer

        streamer = TextStreamer(tokenizer)
    # The warm-up is the run that shows its text.
    sequences = generator_for(model, ids, args, streamer)()
    if tokenizer is not None and not args.stream:
        note("\n---\n".join(tokenizer.batch_decode(sequences, skip_special_tokens=True)))
    seconds = timed(generator_for(model, ids, args, None), args.repeats, device)
    median = statistics.median(seconds)
    generated = sequences.shape[1] - ids.shape[1]
    rate = args.batch * generated / median
    note(f"Prompt length: {ids.shape[1]}, generation length: {generated}")
    note(f"{args.model_name} prompt processing + decoding time: {median * 1000:.0f}ms")
    note(f"Throughput: {rate:.1f} tokens/s (batch {args.batch}, {device}, {dtype_name})")
    if args.json:
        result = {
            "model": args.model_name,
            "random_weights": args.random_weights,
            "parameters": parameters,
            "batch": args.batch,
            "prompt_length": ids.shape[1],
            "generation_length": generated,
            "seconds_median": median,
            "seconds": seconds,
            "tokens_per_second": rate,
            "device": str(device),
            "dtype": dtype_name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
