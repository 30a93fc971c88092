"""A bidirectional Mamba layer, the recommended way, on a task that one direction cannot solve.

Two Mamba layers, one over the sequence and one over it reversed, added. Two things are easily got
wrong when the sequence is flipped:

- the second direction needs weights of its own (or, with ``share=True``, deliberately the same);
- padding: a flipped right-padded batch is left-padded, so the mask is flipped along. Mamba skips
  padding on either side, and each sequence comes out as it would alone.

The task: at every position, say which token stands three positions later.

    python examples/bimamba.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from mamba_ssm import Mamba

VOCABULARY, AHEAD = 8, 3


class BiMamba(nn.Module):
    """(b, l, d_model) → (b, l, d_model), every position seeing the whole sequence.

    ``options`` are those of ``Mamba``; ``share`` uses one layer for both directions.
    """

    def __init__(self, d_model: int, share: bool = False, **options):
        super().__init__()
        self.forwards = Mamba(d_model, **options)
        self.backwards = self.forwards if share else Mamba(d_model, **options)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """``attention_mask`` (b, l): False or 0 is padding, on either side."""
        flipped_mask = None if attention_mask is None else attention_mask.flip(1)
        ahead = self.forwards(x, attention_mask=attention_mask)
        back = self.backwards(x.flip(1), attention_mask=flipped_mask).flip(1)
        return ahead + back


class Tagger(nn.Module):
    """A token's embedding, one mixing layer, a class for each position."""

    def __init__(self, mixer: nn.Module, d_model: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, d_model)
        self.mixer, self.norm = mixer, nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return self.head(self.norm(x + self.mixer(x)))


def train(name: str, mixer: nn.Module, d_model: int, options: argparse.Namespace) -> float:
    """Train a tagger with this mixer; the accuracy on fresh sequences."""
    generator = torch.Generator().manual_seed(options.seed)
    model = Tagger(mixer, d_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(0, VOCABULARY, (size, options.length), generator=generator)
        return ids, ids[:, AHEAD:]

    with trange(options.steps, desc=name) as bar:
        for _ in bar:
            ids, later = batch(16)
            loss = F.cross_entropy(model(ids)[:, :-AHEAD].flatten(0, 1), later.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        ids, later = batch(128)
        return (model(ids)[:, :-AHEAD].argmax(-1) == later).float().mean().item()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the example; the two accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    d_model = 32
    results = {
        "one direction": train("one direction", Mamba(d_model), d_model, options),
        "both directions": train("both directions", BiMamba(d_model), d_model, options),
    }
    for name, accuracy in results.items():
        print(f"{name}: accuracy {accuracy:.3f} (chance is {1 / VOCABULARY:.3f})")
    return results


if __name__ == "__main__":
    main()
