"""The causal convolution of packed and padded sequences, in pure PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .state_rows import add_rows


class PackedConv:
    """Which input each tap of each step reads, as rows of one table (rows, d).

    The table holds the steps (b*l), then the columns of the initial states (S*(w-1)) if there are
    any, then one row of zeros. ``taps[j]`` (b*l,) is the row of the input j steps before, padding
    skipped; for padding itself it is the zero row. ``final`` (S*(w-1),) are the rows that make up
    the final states.

    A run is a maximal stretch of one sequence number, padding ignored. Every run starts from its
    sequence's initial state, and the last one makes the final state. A number without a state
    starts from zeros.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, initial: Tensor | None, seq_idx: Tensor, num_states: int
    ):
        self.batch, self.channels, self.length = x.shape
        self.weight, self.last, self.num_states = weight, weight.shape[1] - 1, num_states
        self.steps = self.batch * self.length
        self.zero = self.steps + (0 if initial is None else num_states * self.last)
        self.padding = (seq_idx < 0).flatten()
        self.table = x.new_empty((self.zero + 1, self.channels), dtype=weight.dtype)
        self.table[: self.steps].view(self.batch, self.length, self.channels).copy_(
            x.transpose(1, 2)
        )
        if initial is not None:
            states = self.table[self.steps : self.zero].view(num_states, self.last, self.channels)
            states.copy_(initial.transpose(1, 2))
        self.table[self.zero] = 0.0
        self._find_rows(seq_idx)

    def _find_rows(self, seq_idx: Tensor) -> None:
        """Squeeze the padding out of every row, where a window is w neighbours, and look there."""
        device, padding = seq_idx.device, seq_idx < 0
        order = torch.argsort(padding.to(torch.uint8), dim=1, stable=True)
        ids = seq_idx.gather(1, order).long()
        row = order + torch.arange(self.batch, device=device)[:, None] * self.length
        time = torch.arange(self.length, device=device).expand(self.batch, -1)
        starts = torch.ones_like(padding)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        since = time  # the step's place in its run
        if self.length > 0:
            since = time - time.masked_fill(~starts, 0).cummax(dim=1).values
        with_state = (ids >= 0) & (ids < self.num_states)
        back_in_order = row.flatten()
        self.taps = []
        for j in range(self.last + 1):
            neighbour = F.pad(row, (j, 0))[:, : self.length]
            tap = torch.where(since >= j, neighbour, self._state_row(ids, since - j, with_state))
            tap = tap.masked_fill(ids < 0, self.zero).flatten()
            self.taps.append(torch.empty_like(tap).index_copy_(0, back_in_order, tap))

        key = torch.where(with_state, ids, self.num_states).flatten()
        position = torch.arange(self.steps, device=device)
        end = position.new_full((self.num_states + 1,), -1)
        end = end.scatter_reduce_(0, key, position, "amax")[: self.num_states, None]
        # The last step of each sequence; -1 for none reads the entry appended for it.
        end_since = F.pad(since.flatten(), (0, 1), value=-1)[end]
        back = torch.arange(self.last - 1, -1, -1, device=device)
        tokens = F.pad(row.flatten(), (0, 1))[(end - back).clamp(min=-1)]
        ids = torch.arange(self.num_states, device=device)[:, None]
        before = self._state_row(ids, end_since - back, torch.ones_like(end, dtype=torch.bool))
        self.final = torch.where(back <= end_since, tokens, before).flatten()

    def _state_row(self, ids: Tensor, place: Tensor, with_state: Tensor) -> Tensor:
        """The row of the input at ``place`` -1, -2, ... before the sequence's first."""
        if self.zero == self.steps:
            return torch.full_like(place, self.zero)
        row = self.steps + ids * self.last + self.last + place
        return torch.where(with_state, row, self.zero)

    def _rows(self, x: Tensor) -> Tensor:
        """(b,d,l) as (b*l,d), with zeros (whatever was there) at padding."""
        rows = x.transpose(1, 2).reshape(self.steps, self.channels)
        return rows.masked_fill(self.padding[:, None], 0.0)

    def _tap(self, j: int, buffer: Tensor) -> Tensor:
        """The input j steps before each step, written over ``buffer`` (fresh memory is slower)."""
        return torch.index_select(self.table, 0, self.taps[j], out=buffer)

    def pre_activation(self, bias: Tensor | None) -> Tensor:
        """bias + the convolution, as rows (b*l,d), arbitrary at padding."""
        out = self.table.new_empty((self.steps, self.channels))
        self._tap(0, out).mul_(self.weight[:, self.last])
        if bias is not None:
            out += bias
        buffer = torch.empty_like(out)
        for j in range(1, self.last + 1):
            out.addcmul_(self._tap(j, buffer), self.weight[:, self.last - j])
        return out

    def forward(self, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
        """(out (b,d,l), final states (S,d,w-1)), both views."""
        out = self.pre_activation(bias)
        if silu:
            F.silu(out, inplace=True)
        out.masked_fill_(self.padding[:, None], 0.0)
        final = self.table.index_select(0, self.final)
        return (
            out.view(self.batch, self.length, self.channels).transpose(1, 2),
            final.view(self.num_states, self.last, self.channels).transpose(1, 2),
        )

    def backward(
        self, dout: Tensor, dfinal: Tensor | None, bias: Tensor | None, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x (b,d,l), weight, bias and initial states (S,d,w-1 or empty)."""
        dpre = self._rows(dout)
        if silu:
            pre = self.pre_activation(bias).masked_fill_(self.padding[:, None], 0.0)
            dpre = torch.ops.aten.silu_backward(dpre, pre)
        dtable = torch.zeros_like(self.table)
        dweight = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        buffer = torch.empty_like(dpre)
        for j, rows in enumerate(self.taps):
            dweight[:, self.last - j] = self._tap(j, buffer).mul_(dpre).sum(dim=0)
            add_rows(dtable, rows, torch.mul(dpre, self.weight[:, self.last - j], out=buffer))
        if dfinal is not None:
            add_rows(dtable, self.final, dfinal.transpose(1, 2).reshape(-1, self.channels))
        dx = dtable[: self.steps].view(self.batch, self.length, self.channels)
        dinitial = dtable[self.steps : self.zero]
        if self.zero > self.steps or self.num_states * self.last == 0:
            dinitial = dinitial.view(self.num_states, self.last, self.channels).transpose(1, 2)
        return dx.transpose(1, 2), dweight, dpre.sum(dim=0), dinitial
