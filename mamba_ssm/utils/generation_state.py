"""What generation keeps between calls: the layers' caches while it runs, and a saved state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Cache = dict[int, Any]


@dataclass
class InferenceParams:
    """What the model needs to continue a sequence, passed along to every layer.

    Attributes:
        max_seqlen, max_batch_size: the sizes for which caches are allocated.
        seqlen_offset: how many positions the caches have consumed; 0 means prefill.
        batch_size_offset: first row of the caches that this call uses.
        key_value_memory_dict: layer index -> the layer's cache tensors, updated in place.
        lengths_per_sample: optional (batch,) int32, the positions consumed by each row.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start a new sequence with the same (allocated) caches."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def as_tensors(layer_cache: Any) -> list[Tensor | None]:
    """A layer's cache as a flat list (a tuple of tensors, some of which may be None)."""
    return list(layer_cache) if isinstance(layer_cache, (tuple, list)) else [layer_cache]


def clone_cache(cache: Cache) -> dict[int, list[Tensor | None]]:
    """A deep copy as {layer: [tensor or None]}."""
    return {
        layer: [None if t is None else t.clone() for t in as_tensors(entry)]
        for layer, entry in cache.items()
    }


def snapshot_rows(cache: Cache, rows: Tensor) -> dict[int, list[Tensor | None]]:
    """Copies of the given batch rows (int64 indices) of every cache tensor."""
    return {
        layer: [None if t is None else t[rows] for t in as_tensors(entry)]
        for layer, entry in cache.items()
    }


def restore_rows(cache: Cache, rows: Tensor, saved: dict[int, list[Tensor | None]]) -> None:
    """Put rows taken by `snapshot_rows` back, in place."""
    for layer, entry in cache.items():
        for target, source in zip(as_tensors(entry), saved[layer], strict=True):
            if target is not None:
                target[rows] = source


@dataclass
class GenerationState:
    """A finished call to `generate`, ready to be continued: `generate(new_ids, state=state, ...)`.

    The tensors are copies: neither the call that made the state nor one that continues from it
    alters them, so one state can be continued many times.

    Attributes:
        caches: layer index -> list of cache tensors, batch first (None where a layer has none).
        pending: (batch, 1) int64, each row's last token, which the model has not consumed yet.
        tokens_seen: (batch,) int64, real tokens of each row so far: prompts and generated ones,
            padding not counted, the pending token included.
        seqlen_offset: positions that the caches have consumed, padding included.
        seen: (batch, vocab) bool, the tokens that occurred; what the repetition penalty needs.
    """

    caches: dict[int, list[Tensor | None]]
    pending: Tensor
    tokens_seen: Tensor
    seqlen_offset: int
    seen: Tensor

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.pending.shape[0]

    def to(self, device: torch.device | str) -> GenerationState:
        """The same state on another device (tensors already there are shared)."""
        return GenerationState(
            caches={
                layer: [None if t is None else t.to(device) for t in entry]
                for layer, entry in self.caches.items()
            },
            pending=self.pending.to(device),
            tokens_seen=self.tokens_seen.to(device),
            seqlen_offset=self.seqlen_offset,
            seen=self.seen.to(device),
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, which `torch.load(..., weights_only=True)` accepts."""
        return {
            "caches": {layer: list(entry) for layer, entry in self.caches.items()},
            "pending": self.pending,
            "tokens_seen": self.tokens_seen,
            "seqlen_offset": self.seqlen_offset,
            "seen": self.seen,
        }

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> GenerationState:
        """The inverse of `state_dict`. Raises ValueError when it is not one."""
        wanted = {"caches", "pending", "tokens_seen", "seqlen_offset", "seen"}
        found = set(state_dict) if isinstance(state_dict, dict) else {type(state_dict).__name__}
        if found != wanted:
            raise ValueError(
                f"not a saved generation state: expected the keys {sorted(wanted)}, "
                f"got {sorted(map(str, found))}; pass what GenerationState.state_dict() returned"
            )
        return cls(**state_dict)

    def copy_into(self, cache: Cache) -> None:
        """Write this state into freshly allocated caches, in place.

        Attention caches may be longer than the saved ones: the saved part is their beginning.

        Raises:
            ValueError: if the caches are those of another model, batch size or dtype.
        """
        if set(cache) != set(self.caches):
            raise ValueError(
                f"the state has caches for layers {sorted(self.caches)}, the model for "
                f"{sorted(cache)}: a state continues only on the model that made it"
            )
        pairs = []
        for layer, entry in cache.items():
            targets, sources = as_tensors(entry), self.caches[layer]
            if len(targets) != len(sources):
                raise ValueError(
                    f"the state of layer {layer} has {len(sources)} tensors, "
                    f"the model's cache {len(targets)}"
                )
            for target, source in zip(targets, sources, strict=True):
                if target is not None or source is not None:
                    _check_fits(layer, target, source)
                    pairs.append((target, source))
        for target, source in pairs:
            common = tuple(
                slice(0, min(sizes)) for sizes in zip(target.shape, source.shape, strict=True)
            )
            target[common] = source[common]


def _check_fits(layer: int, target: Tensor | None, source: Tensor | None) -> None:
    """Shapes equal except for the length (dimension 1) of a 5-D attention cache; equal dtypes."""
    if target is not None and source is not None and target.dtype == source.dtype:
        free = 1 if target.dim() == 5 else None
        if target.dim() == source.dim() and all(
            t == s or i == free
            for i, (t, s) in enumerate(zip(target.shape, source.shape, strict=True))
        ):
            return

    def describe(t: Tensor | None) -> str:
        return "nothing" if t is None else f"{tuple(t.shape)} {t.dtype}"

    raise ValueError(
        f"the state of layer {layer} is {describe(source)}, the model needs {describe(target)}: "
        "a state continues only on the model, batch size and dtype that made it"
    )
