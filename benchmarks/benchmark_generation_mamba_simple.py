"""Time prompt processing and decoding of a Mamba model, or of a transformers model for comparison.

    python benchmarks/benchmark_generation_mamba_simple.py --model-name state-spaces/mamba-130m \
        --prompt "My cat wrote all this CUDA code" --topp 0.9 --temperature 0.7
    python benchmarks/benchmark_generation_mamba_simple.py --batch 64 --random-weights
    python benchmarks/benchmark_generation_mamba_simple.py --model-name EleutherAI/pythia-2.8b
    python benchmarks/benchmark_generation_mamba_simple.py --model-name EleutherAI/pythia-2.8b \
        --random-weights --batch 128

Printed are the time of the whole call, the time to the first token, each further token's latency as
a reader of the stream sees it (median, 95th percentile), tokens per second, how near the steps come
to reading the weights once a step at the memory's speed (measured in the same run), and the peak
memory of the GPU.
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


# Hidden size and layers of the Pythia models, for --random-weights without the hub.
PYTHIA_SHAPES = {
    "EleutherAI/pythia-160m": (768, 12, 12),
    "EleutherAI/pythia-410m": (1024, 24, 16),
    "EleutherAI/pythia-1.4b": (2048, 24, 16),
    "EleutherAI/pythia-2.8b": (2560, 32, 32),
}


def transformers_config(name: str, random_weights: bool) -> Any:
    """The configuration of a transformers model, of a known shape without the hub."""
    from transformers import AutoConfig, GPTNeoXConfig

    from mamba_ssm.utils.hub import find_required, open_model

    if random_weights and name in PYTHIA_SHAPES:
        size, layers, heads = PYTHIA_SHAPES[name]
        return GPTNeoXConfig(
            vocab_size=50304,
            hidden_size=size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * size,
        )
    # Says at once what is wrong, where transformers would go through a minute of retries.
    find_required(open_model(name), "config.json")
    return AutoConfig.from_pretrained(name)


def load_transformers(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """A transformers model in eval mode."""
    from transformers import AutoModelForCausalLM

    try:
        config = transformers_config(args.model_name, args.random_weights)
        if args.random_weights:
            torch.manual_seed(args.seed or 0)
            with device:
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
    model: torch.nn.Module, ids: Tensor, args: argparse.Namespace, streamer: Any, new: int
) -> Callable[[], Tensor]:
    """A function that generates `new` tokens and returns the sequences."""
    max_length = ids.shape[1] + new
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


def clock(device: torch.device) -> float:
    """Now, in seconds, when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(run: Callable[[], Tensor], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each run, with a progress bar where there is a terminal."""
    from tqdm import tqdm

    seconds = []
    for _ in tqdm(range(repeats), desc="timing", unit="run", disable=None, leave=False):
        start = clock(device)
        run()
        seconds.append(clock(device) - start)
    return seconds


class StampStreamer:
    """Notes when each step's tokens arrive on the host."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: Tensor) -> None:
        """A step's tokens; the first call brings the prompt."""
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""

    def latencies(self) -> list[float]:
        """Seconds between the tokens after the first one."""
        pairs = zip(self.stamps[1:], self.stamps[2:], strict=False)
        return sorted(later - earlier for earlier, later in pairs)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second at which this device reads memory far larger than its caches."""
    size = (2 << 30) if device.type == "cuda" else (256 << 20)
    data = torch.zeros(size // 4, device=device)
    data.sum()
    return size / min(timed(lambda: data.sum(), 5, device))


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of weights that a step reads; of an embedding that is no output layer, nothing."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = model.lm_head if head is None else head
    skipped = [
        id(m.weight)
        for m in model.modules()
        if isinstance(m, torch.nn.Embedding) and m.weight is not getattr(head, "weight", None)
    ]
    tensors = (*model.parameters(), *model.buffers())
    return sum(t.numel() * t.element_size() for t in tensors if id(t) not in skipped)


def measure(
    model: torch.nn.Module, ids: Tensor, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """The figures of one model and prompt; everything was run once before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = timed(generator_for(model, ids, args, None, 1), args.repeats, device)
    seconds = timed(generator_for(model, ids, args, None, args.genlen), args.repeats, device)
    result: dict[str, Any] = {
        "seconds_median": statistics.median(seconds),
        "seconds": seconds,
        "time_to_first_token": statistics.median(first),
        "tokens_per_second": args.batch * args.genlen / statistics.median(seconds),
    }
    if args.genlen > 1:
        step = (statistics.median(seconds) - statistics.median(first)) / (args.genlen - 1)
        floor = weight_bytes(model) / read_bandwidth(device)
        result |= {"seconds_per_step": step, "of_bandwidth_floor": floor / step}
        # transformers streams one row at a time only.
        if args.batch == 1 or is_mamba(args.model_name):
            stamps = StampStreamer()
            generator_for(model, ids, args, stamps, args.genlen)()
            latencies = stamps.latencies()
            result["latency_median"] = statistics.median(latencies)
            result["latency_p95"] = latencies[int(0.95 * (len(latencies) - 1))]
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return result


def describe(result: dict[str, Any]) -> list[str]:
    """The figures as lines of text."""
    lines = [f"Time to first token: {result['time_to_first_token'] * 1000:.1f}ms"]
    if "seconds_per_step" in result:
        lines.append(
            f"Per step: {result['seconds_per_step'] * 1000:.3f}ms, reading the weights alone takes "
            f"{result['of_bandwidth_floor']:.0%} of it"
        )
    if "latency_median" in result:
        lines.append(
            f"Latency of a streamed token: median {result['latency_median'] * 1000:.3f}ms, "
            f"95th percentile {result['latency_p95'] * 1000:.3f}ms"
        )
    if "peak_bytes" in result:
        lines.append(f"Peak GPU memory: {result['peak_bytes'] / 2**20:.0f} MiB")
    return lines


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
    sequences = generator_for(model, ids, args, streamer, args.genlen)()
    if tokenizer is not None and not args.stream:
        note("\n---\n".join(tokenizer.batch_decode(sequences, skip_special_tokens=True)))
    generated = sequences.shape[1] - ids.shape[1]
    result = measure(model, ids, args, device)
    note(f"Prompt length: {ids.shape[1]}, generation length: {generated}")
    note(
        f"{args.model_name} prompt processing + decoding time: "
        f"{result['seconds_median'] * 1000:.0f}ms"
    )
    note(
        f"Throughput: {result['tokens_per_second']:.1f} tokens/s "
        f"(batch {args.batch}, {device}, {dtype_name})"
    )
    for line in describe(result):
        note(line)
    if args.json:
        about = {
            "model": args.model_name,
            "random_weights": args.random_weights,
            "parameters": parameters,
            "batch": args.batch,
            "prompt_length": ids.shape[1],
            "generation_length": generated,
            "device": str(device),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "dtype": dtype_name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        print(json.dumps(about | result))


if __name__ == "__main__":
    sys.exit(main())
