"""Stream a document of a million tokens through a model in chunks, at flat memory.

A chunk starts from the state that the one before it left, so what is in memory is one chunk and the
state, however long the document is, and every token sees all that came before it. First it is
checked that chunks give the logits of one pass. The text is Python's standard library; the default
model is a small one with random weights (its bits per byte say nothing), ``--model-name embedded``
the trained one of this package, which takes longer.

    python examples/stream.py
    python examples/stream.py --model-name embedded --tokens 100000
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence

import corpus
import torch
import torch.nn.functional as F
from tqdm import tqdm

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig


def document(tokens: int) -> torch.Tensor:
    """(1, tokens) ids: the standard library's files one after the other, again from the start if
    it is shorter."""
    data = bytearray()
    while len(data) < tokens:
        for part in corpus.stdlib_documents():
            data += part.data
            if len(data) >= tokens:
                break
    ids = torch.frombuffer(data[:tokens], dtype=torch.uint8)
    return ids[None].long() + corpus.BYTE_OFFSET


def chunked_logits(model, ids: torch.Tensor, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first position, logits (1, size, V)) of each chunk of ``ids`` (1, l)."""
    state = None
    for start in range(0, ids.shape[1], size):
        chunk = ids[:, start : start + size]
        out = model(chunk, initial_state=state, return_final_state=True)
        state = out.final_state
        yield start, out.logits


def peak_bytes(device: str) -> int:
    """The most memory that was in use so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.inference_mode()
def stream(model, ids: torch.Tensor, size: int, device: str) -> dict[str, float]:
    """Bits per byte over the document, its speed, and how the peak of memory grew after a tenth."""
    total, early = 0.0, None
    start_time = time.perf_counter()
    with tqdm(total=ids.shape[1], unit="tok", unit_scale=True, desc="streaming") as bar:
        for start, logits in chunked_logits(model, ids, size):
            targets = ids[0, start + 1 : start + 1 + logits.shape[1]]
            kept = logits[0, : len(targets)].float()
            total += F.cross_entropy(kept, targets, reduction="sum").item()
            bar.update(logits.shape[1])
            if early is None and start >= ids.shape[1] // 10:
                early = peak_bytes(device)
            bar.set_postfix(peak=f"{peak_bytes(device) / 2**20:.0f} MiB")
    seconds = time.perf_counter() - start_time
    return {
        "bits per byte": total / (ids.shape[1] - 1) / math.log(2),
        "tokens per second": ids.shape[1] / seconds,
        "growth of the peak, MiB": (peak_bytes(device) - (early or 0)) / 2**20,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the example; what it measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--chunk", type=int, default=4096, help="tokens in memory at a time")
    parser.add_argument("--model-name", help="a byte-level model instead of random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.tokens < 20 * options.chunk:
        parser.error(f"--tokens must be at least 20 chunks of {options.chunk} for a memory figure")
    torch.manual_seed(options.seed)
    if options.model_name:
        model = MambaLMHeadModel.from_pretrained(options.model_name, device=options.device)
    else:
        config = MambaConfig(d_model=64, n_layer=2, vocab_size=corpus.NUM_IDS)
        model = MambaLMHeadModel(config, device=options.device)
    model.eval()
    ids = document(options.tokens).to(options.device)

    with torch.inference_mode():
        part = ids[:, : options.chunk + options.chunk // 2]
        logits = torch.cat([logits for _, logits in chunked_logits(model, part, 1000)], 1)
        difference = (logits - model(part).logits).abs().max().item()
    results = {"difference": difference} | stream(model, ids, options.chunk, options.device)
    print(f"chunks against one pass over {part.shape[1]} tokens: logits differ by {difference:.1e}")
    print(
        f"{options.tokens:,} tokens: {results['tokens per second']:,.0f} a second, "
        f"{results['bits per byte']:.3f} bits per byte; after the first tenth the peak of memory "
        f"grew by {results['growth of the peak, MiB']:.1f} MiB"
    )
    return results


if __name__ == "__main__":
    main()
