"""The causal convolution of packed and padded sequences, in pure PyTorch.

Padding is squeezed out of every row (valid tokens first, order kept), so that a window is again w
neighbours; taps that reach before a run's start come from the run's initial state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _add_rows(size: int, index: Tensor, rows: Tensor) -> Tensor:
    """out[index] += rows, always in the same order: index_add_ is atomic on a GPU, so not there."""
    out = rows.new_zeros((size, rows.shape[1]))
    if rows.is_cuda:
        return out.index_put_((index,), rows, accumulate=True)
    return out.index_add_(0, index, rows)


class PackedConv:
    """One packed convolution. Inside, sequences are (b, l, d) with the padding last in every row.

    A run is a maximal stretch of tokens of one id; ``since`` is a token's place in its run, so
    tap j lies in the run where ``since >= j`` and else in column ``w - 1 + since - j`` of the
    initial state. An id at or above ``num_states`` has no final state. Every run of an id starts
    from its initial state; the last one makes the final state.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial: Tensor | None,
        seq_idx: Tensor,
        num_states: int,
    ):
        (self.batch, self.length), device = seq_idx.shape, seq_idx.device
        self.weight, self.bias, self.last = weight, bias, weight.shape[1] - 1
        self.num_states = num_states
        order = torch.argsort((seq_idx < 0).to(torch.uint8), dim=1, stable=True)
        self.ids = seq_idx.gather(1, order).long()
        self.valid = self.ids >= 0
        rows = torch.arange(self.batch, device=device)[:, None] * self.length
        self.order = (order + rows).flatten()
        time = torch.arange(self.length, device=device).expand(self.batch, -1)
        starts = torch.ones_like(self.valid)
        starts[:, 1:] = self.ids[:, 1:] != self.ids[:, :-1]
        if self.length > 0:
            self.since = time - time.masked_fill(~starts, 0).cummax(dim=1).values
        else:
            self.since = time
        self.x = self.pack(x.to(weight.dtype))
        self.initial = None  # (S, w-1, d)
        if initial is not None and initial.shape[0] > 0:
            self.initial = initial.transpose(1, 2).contiguous()

    def pack(self, x: Tensor) -> Tensor:
        """(b,d,l) to (b,l,d) in packed order, zero (whatever was there) at padding."""
        rows = x.transpose(1, 2).reshape(-1, x.shape[1]).index_select(0, self.order)
        rows = rows.view(self.batch, self.length, x.shape[1])
        return rows.masked_fill_(~self.valid[..., None], 0.0)

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`pack`, with zeros at padding."""
        x = x.masked_fill(~self.valid[..., None], 0.0)
        rows = torch.empty_like(x).flatten(0, 1).index_copy_(0, self.order, x.flatten(0, 1))
        return rows.view_as(x).transpose(1, 2)

    def _inside(self, j: int) -> Tensor:
        return (self.since >= j)[..., None]

    def _tap(self, j: int) -> Tensor:
        """The input j steps before each token, in its run or in its initial state."""
        if j == 0:
            return self.x
        shifted = F.pad(self.x, (0, 0, j, 0))[:, : self.length]
        if self.initial is None:
            return shifted.masked_fill(~self._inside(j), 0.0)
        column = (self.last + self.since - j).clamp(0, self.last - 1)
        state = self.ids.clamp(0, self.initial.shape[0] - 1)
        return torch.where(self._inside(j), shifted, self.initial[state, column])

    def pre_activation(self) -> Tensor:
        """bias + the convolution (b,l,d), arbitrary at padding."""
        out = self.x * self.weight[:, self.last]
        if self.bias is not None:
            out += self.bias
        for j in range(1, self.last + 1):
            out.addcmul_(self._tap(j), self.weight[:, self.last - j])
        return out

    def _ends(self) -> tuple[Tensor, Tensor]:
        """Each state's last token: its packed position (0 if none) and its ``since`` (-1)."""
        known = self.valid & (self.ids < self.num_states)
        key = torch.where(known, self.ids, self.num_states).flatten()
        position = torch.arange(key.shape[0], device=key.device)
        end = position.new_full((self.num_states + 1,), -1)
        end = end.scatter_reduce_(0, key, position, "amax")[: self.num_states]
        at = end.clamp(min=0)
        return at, torch.where(end >= 0, self.since.flatten()[at], -1)

    def final_states(self) -> Tensor:
        """(S,d,w-1): each sequence's last w-1 tokens, its initial state where it is shorter."""
        channels, device = self.x.shape[2], self.x.device
        initial = self.initial
        if initial is None:
            initial = self.x.new_zeros((self.num_states, self.last, channels))
        if self.x.numel() == 0 or self.last == 0:
            return initial.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        end, since = (t[:, None] for t in self._ends())
        back = torch.arange(self.last - 1, -1, -1, device=device)
        inside = (back <= since)[..., None]
        tokens = self.x.flatten(0, 1)[(end - back).clamp(min=0)]
        column = (self.last + since - back).clamp(0, self.last - 1)
        before = initial.gather(1, column[..., None].expand(-1, -1, channels))
        return torch.where(inside, tokens, before).transpose(1, 2).contiguous()

    def gradients(
        self, dpre: Tensor, dfinal: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x (b,l,d), weight, bias and initial states, given the pre-activation's."""
        dx = dpre * self.weight[:, self.last]
        dweight = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        for j in range(self.last + 1):
            dweight[:, self.last - j] = (dpre * self._tap(j)).sum(dim=(0, 1))
            if 0 < j < self.length:
                dtap = dpre.masked_fill(~self._inside(j), 0.0)[:, j:]
                dx[:, : self.length - j].addcmul_(dtap, self.weight[:, self.last - j])
        if dfinal is not None and dx.numel() > 0 and self.num_states > 0 and self.last > 0:
            dx += self._final_to_tokens(dfinal.transpose(1, 2))
        return dx, dweight, dpre.sum(dim=(0, 1)), self._initial_gradient(dpre, dfinal)

    def _final_to_tokens(self, dfinal: Tensor) -> Tensor:
        """The part of dx (b,l,d) that comes from the final states' gradient (S,w-1,d)."""
        end, end_since = self._ends()
        state = self.ids.clamp(0, self.num_states - 1)
        position = torch.arange(self.order.shape[0], device=state.device).view_as(state)
        back = end[state] - position
        hit = self.valid & (self.ids < self.num_states) & (back >= 0) & (back < self.last)
        hit &= self.since + back == end_since[state]  # in the run that made the final state
        column = (self.last - 1 - back).clamp(0, self.last - 1)
        return dfinal[state, column].masked_fill_(~hit[..., None], 0.0)

    def _initial_gradient(self, dpre: Tensor, dfinal: Tensor | None) -> Tensor:
        channels, size = dpre.shape[2], self.num_states * self.last
        total = dpre.new_zeros((size, channels))
        if self.initial is None or size == 0:
            return total.view(self.num_states, self.last, channels).transpose(1, 2)
        known = self.valid & (self.ids < self.num_states)
        for j in range(1, self.last + 1):
            key = self.ids * self.last + self.last + self.since - j
            key = torch.where(known & (self.since < j), key, size).flatten()
            rows = (dpre * self.weight[:, self.last - j]).flatten(0, 1)
            total += _add_rows(size + 1, key, rows)[:size]
        total = total.view(self.num_states, self.last, channels)
        if dfinal is not None:
            since = (
                self._ends()[1] if dpre.numel() > 0 else self.ids.new_full((self.num_states,), -1)
            )
            column = torch.arange(self.last, device=dpre.device)
            source = column - since[:, None] - 1
            index = source.clamp(0, self.last - 1)[..., None].expand(-1, -1, channels)
            moved = dfinal.transpose(1, 2).gather(1, index)
            total = total + moved.masked_fill((source < 0)[..., None], 0.0)
        return total.transpose(1, 2)
