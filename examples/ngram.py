"""The baseline that a language model has to beat: a smoothed n-gram model over bytes.

Interpolated modified Kneser-Ney smoothing (Chen & Goodman 1998, "An Empirical Study of Smoothing
Techniques for Language Modeling", section 3), counted by sorting with NumPy: seconds for
30 MB of text at order 5. The symbols are the 256 bytes and the end of a document; every document
starts from a history of end marks, as it does for the neural model.

    python examples/ngram.py                     # order 5 on the standard library's sources
    python examples/ngram.py --order 4 --text DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import corpus
import numpy as np

SYMBOL_BITS = 9  # 256 bytes and the end mark
END = 256
NUM_SYMBOLS = 257
MAX_ORDER = 63 // SYMBOL_BITS


class _Level(NamedTuple):
    """Everything about one n-gram length; arrays are sorted by key."""

    ngrams: np.ndarray  # (types,) int64: the symbols of the n-gram, the last in the low bits
    discounted: np.ndarray  # (types,) float64: count minus its discount
    contexts: np.ndarray  # (contexts,) int64: n-grams without their last symbol
    totals: np.ndarray  # (contexts,) float64: sum of counts
    backoff: np.ndarray  # (contexts,) float64: probability mass left to the shorter context


class NGramModel:
    """Interpolated modified Kneser-Ney over bytes. `fit` first, then ask for probabilities."""

    def __init__(self, order: int = 5) -> None:
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"order must be from 1 to {MAX_ORDER}, got {order}")
        self.order = order
        self._levels: list[_Level] = []  # index 0 holds single symbols

    def fit(self, documents: Sequence[bytes]) -> NGramModel:
        """Count `documents`; returns self."""
        if not documents:
            raise ValueError("there are no documents to count")
        keys = np.concatenate([self._keys(data) for data in documents])
        ngrams, counts = np.unique(keys, return_counts=True)
        levels = []
        for length in range(self.order, 0, -1):
            levels.append(_make_level(ngrams, counts))
            # A shorter n-gram counts once for each different symbol seen before it.
            shorter = ngrams & ((1 << SYMBOL_BITS * (length - 1)) - 1)
            ngrams, counts = np.unique(shorter, return_counts=True)
        self._levels = levels[::-1]
        return self

    def log2_probabilities(self, data: bytes) -> np.ndarray:
        """log2 p of every byte of a document and of its end, (len(data) + 1,) float64."""
        return np.log2(self._interpolate(self._keys(data)))

    def next_symbol(self, context: bytes) -> np.ndarray:
        """p of each next symbol after a document's beginning `context`, (257,) float64.

        Entries 0…255 are the bytes, 256 is the end of the document.
        """
        history = self._keys(context)[-1] >> SYMBOL_BITS
        return self._interpolate((history << SYMBOL_BITS) | np.arange(NUM_SYMBOLS))

    def bits_per_byte(self, documents: Sequence[bytes]) -> float:
        """Bits for all bytes and end marks of `documents`, divided by the number of bytes."""
        bits = -sum(self.log2_probabilities(data).sum() for data in documents)
        return float(bits / sum(map(len, documents)))

    def _keys(self, data: bytes) -> np.ndarray:
        """The n-gram that ends at each byte of the document, and at its end: (len + 1,) int64."""
        symbols = np.full(self.order - 1 + len(data) + 1, END, dtype=np.int64)
        symbols[self.order - 1 : -1] = np.frombuffer(data, dtype=np.uint8)
        keys = np.zeros(len(data) + 1, dtype=np.int64)
        for place in range(self.order):
            keys = (keys << SYMBOL_BITS) | symbols[place : place + len(keys)]
        return keys

    def _interpolate(self, keys: np.ndarray) -> np.ndarray:
        """p of the last symbol of each key given the ones before it, shortest context first."""
        if not self._levels:
            raise RuntimeError("the model has counted no text yet; call fit first")
        p = np.full(len(keys), 1 / NUM_SYMBOLS)
        for length, level in enumerate(self._levels, start=1):
            ngrams = keys & ((1 << SYMBOL_BITS * length) - 1)
            at, known = _find(level.contexts, ngrams >> SYMBOL_BITS)
            where, seen = _find(level.ngrams, ngrams)
            direct = np.where(seen, level.discounted[where], 0.0) / level.totals[at]
            p = np.where(known, direct + level.backoff[at] * p, p)
        return p


def _find(table: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each wanted value in the sorted table (any index if absent), and whether it is."""
    index = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return index, table[index] == wanted


def _make_level(ngrams: np.ndarray, counts: np.ndarray) -> _Level:
    discounts = _discounts(counts)
    kind = np.minimum(counts, 3)
    contexts, starts = np.unique(ngrams >> SYMBOL_BITS, return_index=True)
    totals = np.add.reduceat(counts, starts).astype(np.float64)
    removed = np.add.reduceat(discounts[kind], starts)
    return _Level(ngrams, counts - discounts[kind], contexts, totals, removed / totals)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Chen & Goodman's discounts for counts 0, 1, 2 and 3 or more, (4,) float64."""
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    if 0 in (n1, n2, n3, n4):  # too little text for the estimate: absolute discounting
        return np.array([0.0, 0.5, 0.75, 0.75])
    y = n1 / (n1 + 2 * n2)
    raw = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # Odd counts of counts can leave the range in which probabilities stay positive.
    return np.clip(raw, [0.0, 0.05, 0.05, 0.05], [0.0, 0.95, 1.95, 2.95])


def baseline_bits_per_byte(documents: Sequence[corpus.Document], order: int = 5) -> float:
    """Held-out bits per byte of the n-gram model on the split that the training script uses."""
    training, held_out = corpus.split_documents(documents)
    model = NGramModel(order).fit([document.data for document in training])
    return model.bits_per_byte([document.data for document in held_out])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    corpus.add_corpus_options(parser)
    parser.add_argument("--order", type=int, default=5, help=f"1 to {MAX_ORDER} (default: 5)")
    args = parser.parse_args(argv)
    try:
        documents = corpus.documents_from_options(args)
        print(corpus.describe(documents), flush=True)
        figure = baseline_bits_per_byte(documents, args.order)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"{args.order}-gram, interpolated modified Kneser-Ney: {figure:.4f} bits per byte")


if __name__ == "__main__":
    main()
