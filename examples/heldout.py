"""Score and sample a byte-level language model.

Held-out bits per byte: every file is read once from its beginning to its end in one pass, with the
state of the model carried from piece to piece, so that no byte is scored twice or without its
history. As in `ngram.py`, a file's end mark is scored with its bytes, and the sum is divided by the
number of bytes.

    python examples/heldout.py --dtype fp32 bf16 int8   # the embedded model on its held-out files
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence

import corpus
import numpy as np
import torch
import torch.nn.functional as F
from corpus import BYTE_OFFSET, EOS_ID, NUM_IDS, PAD_ID, Document, decode, encode
from torch import Tensor, nn

IGNORED = -100
MAX_PIECE = 4096


@torch.inference_mode()
def bits_per_byte(
    model: nn.Module, documents: Sequence[Document], tokens_per_pass: int | None = None
) -> float:
    """Bits that `model` needs for `documents`, divided by their number of bytes.

    Files advance side by side, the longest first; one that has ended leaves the batch.
    `tokens_per_pass` bounds the memory (default: 65,536 on an accelerator, 8,192 on a CPU); it does
    not change the meaning of the result. Runs under the caller's autocast, if any.
    """
    if not documents:
        raise ValueError("there are no documents to score")
    device = next(model.parameters()).device
    if tokens_per_pass is None:
        tokens_per_pass = 8_192 if device.type == "cpu" else 65_536
    if tokens_per_pass < 1:
        raise ValueError(f"tokens_per_pass must be at least 1, got {tokens_per_pass}")
    was_training = model.training
    model.eval()
    ordered = sorted((document.data for document in documents), key=len, reverse=True)
    rows = max(1, min(len(ordered), tokens_per_pass // 256))
    nats = sum(
        _batch_nats(model, ordered[first : first + rows], tokens_per_pass, device)
        for first in range(0, len(ordered), rows)
    )
    model.train(was_training)
    return float(nats) / math.log(2) / sum(map(len, ordered))


def _batch_nats(
    model: nn.Module, ordered: Sequence[bytes], tokens_per_pass: int, device: torch.device
) -> Tensor:
    """Nats for a batch of documents sorted from long to short, 0-d float64."""
    inputs, targets = _padded_batch(ordered, device)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    state, start = None, 0
    while start < inputs.shape[1]:
        # Sorted by length, so those still running are the first rows.
        rows = sum(len(data) + 1 > start for data in ordered)
        stop = start + max(1, min(MAX_PIECE, tokens_per_pass // rows))
        if state is not None:
            state = [tuple(tensor[:rows] for tensor in layer) for layer in state]
        output = model(inputs[:rows, start:stop], initial_state=state, return_final_state=True)
        state = output.final_state
        labels = targets[:rows, start:stop].reshape(-1)
        logits = output.logits.float().flatten(0, 1)
        nats += F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").double()
        start = stop
    return nats


def _padded_batch(ordered: Sequence[bytes], device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs (eos, bytes…) and targets (bytes…, eos), each (rows, longest + 1) int64."""
    shape = (len(ordered), len(ordered[0]) + 1)
    inputs = np.full(shape, PAD_ID, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    for row, data in enumerate(ordered):
        ids = encode(data)
        inputs[row, 0] = EOS_ID
        inputs[row, 1 : len(ids) + 1] = ids
        targets[row, : len(ids)] = ids
        targets[row, len(ids)] = EOS_ID
    return torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)


@torch.inference_mode()
def sample_text(
    model: nn.Module, prompt: str, num_bytes: int, temperature: float = 0.0, seed: int = 0
) -> str:
    """`prompt` continued by at most `num_bytes` bytes; greedy at temperature 0.

    Stops at the end of a document. The draw is made on the CPU from its own generator, so sampling
    leaves the training's random numbers alone.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    ids = [EOS_ID, *map(int, encode(prompt.encode()))]
    pending, state = torch.tensor([ids], device=device), None
    for _ in range(num_bytes):
        output = model(pending, initial_state=state, return_final_state=True)
        state = output.final_state
        logits = output.logits[0, -1, :NUM_IDS].float().cpu()
        logits[[i for i in range(BYTE_OFFSET) if i != EOS_ID]] = -math.inf
        if temperature > 0:
            p = torch.softmax(logits / temperature, dim=-1)
            choice = int(torch.multinomial(p, 1, generator=generator))
        else:
            choice = int(logits.argmax())
        if choice == EOS_ID:
            break
        ids.append(choice)
        pending = torch.tensor([[choice]], device=device)
    model.train(was_training)
    return decode(ids).decode("utf-8", "replace")


def load(name: str, dtype: str, device: str) -> nn.Module:
    """A model in fp32, bf16 or int8 (weights in int8, the rest in fp32), ready to be scored."""
    from mamba_ssm import MambaLMHeadModel

    precision = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = MambaLMHeadModel.from_pretrained(name, device=device, dtype=precision).eval()
    return model.quantize_("int8") if dtype == "int8" else model


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Held-out bits per byte of a byte-level model.")
    parser.add_argument("--model", default="embedded", help="a name or a directory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16", "int8"), default=["fp32"])
    corpus.add_corpus_options(parser)
    args = parser.parse_args(argv)
    try:
        held_out = corpus.split_documents(corpus.documents_from_options(args))[1]
        found = {}
        for dtype in args.dtype:
            start = time.monotonic()
            found[dtype] = bits_per_byte(load(args.model, dtype, args.device), held_out)
            seconds = time.monotonic() - start
            print(f"{dtype} on {args.device}: {found[dtype]:.6f} bits per byte, {seconds:.1f} s")
    except (ValueError, OSError) as error:
        print(f"heldout.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    return found


if __name__ == "__main__":
    main()
