"""How the reference scan lays out its inputs: chunks of time, channels innermost.

A sequence of l steps becomes k chunks of c steps, zero-padded at the end (delta = 0 leaves the
state untouched). Channels are innermost, (..., g, n, d/g), because then every broadcast of the
loop runs over a long contiguous dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# States of one time step of a group of chunks: within a CPU core's cache, and enough for a GPU.
_GROUP_ELEMENTS = {"cpu": 2**18}
_GROUP_ELEMENTS_GPU = 2**23


def without_autocast(op: Callable) -> Callable:
    """``op``, whose first argument is a tensor, with its matrix products in their own dtype."""

    @functools.wraps(op)
    def wrapper(first: Tensor, *args):
        with torch.autocast(first.device.type, enabled=False):
            return op(first, *args)

    return wrapper


def chunked(x: Tensor, chunks: int, chunk_size: int) -> Tensor:
    """(b, ..., l) -> (k, c, b, ...), zero-padded to k * c steps."""
    x = F.pad(x, (0, chunks * chunk_size - x.shape[-1]))
    return x.movedim(-1, 0).contiguous().unflatten(0, (chunks, chunk_size))


def unchunked(x: Tensor, length: int) -> Tensor:
    """(k, c, b, ...) -> (b, ..., l)."""
    return x.flatten(0, 1)[:length].movedim(0, -1)


def per_group(x: Tensor, groups: int) -> Tensor:
    """(..., d) -> (..., g, 1, d/g)."""
    return x.unflatten(-1, (groups, x.shape[-1] // groups)).unsqueeze(-2)


def state_rows(state: Tensor, groups: int) -> Tensor:
    """(..., d, n) -> (..., g, n, d/g)."""
    return state.unflatten(-2, (groups, state.shape[-2] // groups)).transpose(-1, -2)


def public_state(state: Tensor) -> Tensor:
    """(..., g, n, d/g) -> (..., d, n)."""
    return state.transpose(-1, -2).flatten(-3, -2)


def over_state(flag: Tensor) -> Tensor:
    """A flag per (chunk, row), shaped to broadcast over (g, n, d/g)."""
    return flag[..., None, None, None]


class Projection:
    """B or C: one value per step, shared by a group's channels, or a constant per channel."""

    def __init__(self, x: Tensor, groups: int, chunks: int, chunk_size: int, dtype: torch.dtype):
        self.constant = x.dim() == 2
        if self.constant:
            self.value = state_rows(x.to(dtype), groups).contiguous()  # (g, n, d/g)
        else:
            self.value = chunked(x.to(dtype), chunks, chunk_size).unsqueeze(-1)  # (k,c,b,g,n,1)
        self._gradient: Tensor | None = None

    def at(self, lo: int, hi: int, t: int) -> Tensor:
        """The values of step t of chunks lo..hi, to broadcast against (hi-lo, b, g, n, d/g)."""
        return self.value if self.constant else self.value[lo:hi, t]

    def contract(self, state: Tensor, lo: int, hi: int, t: int, out: Tensor) -> None:
        """out (hi-lo, b, g, 1, d/g) <- sum over n of state * this."""
        if self.constant:
            torch.sum(state * self.value, dim=-2, keepdim=True, out=out)
        else:
            out.copy_(torch.matmul(self.value[lo:hi, t].transpose(-1, -2), state))

    def add_gradient(self, state: Tensor, row: Tensor, lo: int, hi: int, t: int) -> None:
        """Add the gradient: this times ``state``, then summed against ``row``."""
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.value)
        if self.constant:
            self._gradient += (state * row).sum(dim=(0, 1))
        else:
            # Not a product of matrices: those add over a thousand channels one after the other.
            torch.sum(state * row, dim=-1, keepdim=True, out=self._gradient[lo:hi, t])

    def gradient(self, length: int, like: Tensor) -> Tensor:
        """The collected gradient in the shape and dtype of the public argument."""
        if self._gradient is None:
            return torch.zeros_like(like, memory_format=torch.contiguous_format)
        if self.constant:
            return public_state(self._gradient).to(like.dtype).contiguous()
        return unchunked(self._gradient.squeeze(-1), length).to(like.dtype).contiguous()


@dataclass
class Packing:
    """What ``seq_idx`` means for the recurrence, chunked by time; found without device syncs."""

    index: Tensor  # (k, c, b) state index of each step, 0 where padded
    restart: Tensor  # (k, c, b) the step starts a sequence
    last: Tensor  # (k, c, b) the step is the last of its sequence
    restarts_in_chunk: Tensor  # (k, b)
    empty: Tensor  # (S,) no step belongs to this state

    @classmethod
    def make(cls, seq_idx: Tensor, num_states: int, chunks: int, chunk_size: int) -> Packing:
        """The packing of seq_idx (b, l), with its steps arranged in chunks."""
        b, length = seq_idx.shape
        ids = seq_idx.long()
        valid = ids >= 0
        position = torch.arange(length, device=ids.device).expand(b, length)
        latest = position.masked_fill(~valid, -1).cummax(dim=1).values
        before = F.pad(latest, (1, 0), value=-1)[:, :-1]
        previous = ids.gather(1, before.clamp(min=0)).masked_fill(before < 0, -1)
        restart = valid & (ids != previous)
        index = ids.clamp(min=0)
        flat = position + length * torch.arange(b, device=ids.device)[:, None]
        last_flat = torch.full((num_states,), -1, dtype=torch.long, device=ids.device)
        last = torch.zeros_like(valid)
        if num_states > 0:  # without states the numbers only tell where to restart
            last_flat = last_flat.scatter_reduce(
                0, index.flatten(), flat.masked_fill(~valid, -1).flatten(), "amax"
            )
            last = valid & (last_flat[index] == flat)
        restart = chunked(restart, chunks, chunk_size)
        return cls(
            index=chunked(index, chunks, chunk_size),
            restart=restart,
            last=chunked(last, chunks, chunk_size),
            restarts_in_chunk=restart.any(dim=1),
            empty=last_flat < 0,
        )


class ScanInputs:
    """The inputs of the sweeps in chunked form, with delta's bias, softplus and padding applied."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        seq_idx: Tensor | None,
        num_states: int,
        chunk_size: int,
        dtype: torch.dtype,
    ):
        b, d, length = u.shape
        self.length, self.steps, self.chunks = length, chunk_size, -(-length // chunk_size)
        self.groups = B.shape[1] if B.dim() == 4 else C.shape[1] if C.dim() == 4 else 1
        self.padding = None if seq_idx is None else (seq_idx < 0)[:, None, :]
        # Padding may hold anything, NaN included: nothing of it may reach a state or a sum.
        self.u = self.without_padding(u.to(dtype))
        self.raw_delta = self.without_padding(delta.to(dtype))
        if delta_bias is not None:
            self.raw_delta = self.raw_delta + delta_bias.to(dtype)[:, None]
        value = F.softplus(self.raw_delta, threshold=20.0) if delta_softplus else self.raw_delta
        self.delta = self.without_padding(value)
        self.A = state_rows(A.to(dtype), self.groups).contiguous()
        layout = (self.groups, self.chunks, chunk_size, dtype)
        self.B = Projection(self._projection_without_padding(B), *layout)
        self.C = Projection(self._projection_without_padding(C), *layout)
        delta_chunks = chunked(self.delta, self.chunks, chunk_size)
        u_chunks = chunked(self.u, self.chunks, chunk_size)
        self.delta_t = per_group(delta_chunks, self.groups)
        self.delta_u_t = per_group(delta_chunks * u_chunks, self.groups)
        self.packing = None
        if seq_idx is not None:
            self.packing = Packing.make(seq_idx, num_states, self.chunks, chunk_size)
        budget = _GROUP_ELEMENTS.get(u.device.type, _GROUP_ELEMENTS_GPU)
        self.group = max(1, min(self.chunks, budget // max(1, b * d * A.shape[1])))

    def without_padding(self, x: Tensor) -> Tensor:
        """x (b, d, l) with zeros at padded steps."""
        return x if self.padding is None else x.masked_fill(self.padding, 0.0)

    def _projection_without_padding(self, x: Tensor) -> Tensor:
        if self.padding is None or x.dim() == 2:
            return x
        return x.masked_fill(self.padding[:, None], 0.0)

    def chunk_decay(self, lo: int, hi: int) -> Tensor:
        """The decay over each whole chunk lo..hi: 0 where a sequence starts inside it."""
        decay = (self.delta_t[lo:hi].sum(dim=1) * self.A).exp_()
        if self.packing is not None:
            decay.masked_fill_(over_state(self.packing.restarts_in_chunk[lo:hi]), 0.0)
        return decay
