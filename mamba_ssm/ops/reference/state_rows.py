"""Reading and writing a cache's rows through an index, without a device synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor


def add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """out[index] += rows, always in the same order: index_add_ is atomic on a GPU, so not there."""
    if rows.is_cuda:
        out.index_put_((index,), rows, accumulate=True)
    else:
        out.index_add_(0, index, rows)


class StateRows:
    """Rows ``indices`` (b,) of ``state`` (S, ...): negative is skipped, None is every row."""

    def __init__(self, state: Tensor, indices: Tensor | None):
        self.state, self.indices, self.old = state, indices, None
        if indices is None:
            return
        self.valid = indices >= 0
        self.rows = indices.long().clamp(min=0)

    def _over_state(self, mask: Tensor, like: Tensor) -> Tensor:
        return mask.reshape(-1, *([1] * (like.dim() - 1)))

    def read(self) -> Tensor:
        """The states (b, ...); those of skipped rows are arbitrary but finite if the cache is."""
        if self.indices is None:
            return self.state
        if self.state.shape[0] == 0:
            return self.state.new_zeros((self.rows.shape[0], *self.state.shape[1:]))
        return self.state[self.rows]

    def write(self, new: Tensor) -> None:
        """Put the new states (b, ...) in place, whatever the strides of ``state``."""
        if self.indices is None:
            self.state.copy_(new)
            return
        if self.rows.shape[0] == 0 or self.state.shape[0] == 0:
            return
        # A skipped row repeats the write of the first row that is not skipped, so that every index
        # is written with one value only; when all are skipped, row 0 is written with itself.
        batch = torch.arange(self.rows.shape[0], device=self.rows.device)
        source = torch.where(self.valid, batch, self.valid.to(torch.uint8).argmax())
        rows = self.rows[source]
        keep = self._over_state(self.valid[source], new)
        values = torch.where(keep, new[source].to(self.state.dtype), self.state[rows])
        if values.requires_grad:  # of the writes of one value, one carries the gradient
            carries = self._over_state(source == batch, values)
            values = torch.where(carries, values, values.detach())
        self.state.index_put_((rows,), values)

    def zero_skipped(self, out: Tensor) -> Tensor:
        """``out`` (b, ...) with zeros in the skipped rows."""
        if self.indices is None:
            return out
        return out.masked_fill(~self._over_state(self.valid, out), 0.0)
