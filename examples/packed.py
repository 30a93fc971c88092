"""Packed training: documents of all lengths in one row, with the loss and gradients of padding.

A padded batch computes over its padding. ``cu_seqlens`` puts the documents one after the other into
a batch of one instead; the state restarts at every boundary, the convolution does not look across
it, and no loss is taken across it. First it is checked that packed and padded training agree, then
both train for some steps and their speed is compared.

    python examples/packed.py
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence

import corpus
import torch
from tqdm import trange

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.optim import param_groups


@functools.cache
def standard_library() -> torch.Tensor:
    """Token ids of twenty files, one after the other."""
    data = bytearray(b"".join(d.data for d in corpus.stdlib_documents()[:20]))
    return torch.frombuffer(data, dtype=torch.uint8).long() + corpus.BYTE_OFFSET


def documents(count: int, longest: int, seed: int) -> list[torch.Tensor]:
    """``count`` pieces of Python's standard library, most of them short: 1-D ids."""
    generator, text = torch.Generator().manual_seed(seed), standard_library()
    lengths = (longest * torch.rand(count, generator=generator) ** 2).long().clamp(min=8)
    starts = torch.randint(0, len(text) - longest, (count,), generator=generator)
    return [
        text[start : start + length]
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]


def packed(docs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Arguments of the model: one row, and where its documents begin and end."""
    ids = torch.cat(list(docs))[None]
    lengths = torch.tensor([0, *map(len, docs)], dtype=torch.int32)
    return {"input_ids": ids, "labels": ids, "cu_seqlens": lengths.cumsum(0, dtype=torch.int32)}


def padded(docs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Arguments of the model: a row for each document, padded on the right, and the mask."""
    ids = torch.nn.utils.rnn.pad_sequence(list(docs), batch_first=True, padding_value=corpus.PAD_ID)
    return {"input_ids": ids, "labels": ids, "attention_mask": ids != corpus.PAD_ID}


def loss_and_gradients(model, arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, all gradients in one vector)."""
    model.zero_grad()
    loss = model(**arguments).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def tokens_per_second(name: str, collate, options: argparse.Namespace) -> float:
    """Train a fresh model for some steps; real tokens per second, padding not counted."""
    torch.manual_seed(options.seed)
    model = new_model()
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=3e-3)
    tokens = seconds = 0
    with trange(options.steps, desc=name) as bar:
        for step in bar:
            docs = documents(options.documents, options.longest, seed=options.seed + 1 + step)
            start = time.perf_counter()
            loss = model(**collate(docs)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds += time.perf_counter() - start
            tokens += sum(map(len, docs))
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return tokens / seconds


def new_model() -> MambaLMHeadModel:
    """A small byte-level model."""
    return MambaLMHeadModel(MambaConfig(d_model=64, n_layer=2, vocab_size=corpus.NUM_IDS))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the example; the differences and the two speeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=16, help="documents in a batch")
    parser.add_argument("--longest", type=int, default=512, help="bytes of the longest document")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    model = new_model()
    docs = documents(options.documents, options.longest, options.seed)
    rows = padded(docs)["input_ids"].numel()
    real = sum(map(len, docs))
    print(f"{len(docs)} documents, {real} tokens: padded to {rows}, packed into {real}")

    (loss, grads), (other, others) = (
        loss_and_gradients(model, collate(docs)) for collate in (packed, padded)
    )
    results = {
        "loss difference": (loss - other).abs().item(),
        "gradient difference": ((grads - others).abs().max() / others.abs().max()).item(),
    }
    print(f"loss: packed {loss:.6f}, padded {other:.6f}")
    print(f"gradients: differ by {results['gradient difference']:.1e} of the largest")
    for name, collate in (("packed", packed), ("padded", padded)):
        results[name] = tokens_per_second(name, collate, options)
    print(
        f"tokens per second: packed {results['packed']:,.0f}, padded {results['padded']:,.0f} "
        f"({results['packed'] / results['padded']:.1f} times as many)"
    )
    return results


if __name__ == "__main__":
    main()
