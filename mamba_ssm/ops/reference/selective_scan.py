"""The selective scan in pure PyTorch: two levels, so that no loop runs over the whole length.

The recurrence (arXiv 2312.00752, eq. 2a, with the discretisation of section 3.3)

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,        y_t = C_t h_t

is split into k chunks of ``chunk_size`` steps. A group of chunks advances together, one time step
of every chunk at once: first from zero, which gives each chunk's own contribution to its last
state; then, once these are combined in order, from the right initial states, which gives y. Only
decays exp(delta A) are ever multiplied, never divided, so any sign and size of A is safe.

A group holds as many chunks as keep one time step's states in cache; with one chunk a group the
first of the two sweeps is not needed. Nothing of size (b, l, d, n) is made in the forward; the
backward recomputes the states of one group at a time from those that entered its chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunk_size import balanced_chunk_size
from ..dtypes import accumulate_dtype
from ..layout import in_layout_of
from .scan_layout import (
    ScanInputs,
    chunked,
    over_state,
    per_group,
    public_state,
    state_rows,
    unchunked,
    without_autocast,
)
from .state_rows import add_rows


class _Forward:
    """The forward sweep: the rule of one step, and where sequences' states come from and go."""

    def __init__(self, x: ScanInputs, initial_state: Tensor | None, num_states: int):
        self.x, self.initial = x, None
        if initial_state is None:
            self.final = x.A.new_zeros((num_states, *x.A.shape))
        else:
            self.initial = state_rows(initial_state.to(x.A.dtype), x.groups)
            self.final = self.initial.clone()

    def start(self, batch: int) -> Tensor:
        """The state entering the first chunk; with packing every sequence's start is a restart."""
        if self.initial is not None and self.x.packing is None:
            return self.initial.clone()
        return self.x.A.new_zeros((batch, *self.x.A.shape))

    def decay(self, lo: int, hi: int, t: int, out: Tensor) -> Tensor:
        return torch.mul(self.x.delta_t[lo:hi, t], self.x.A, out=out).exp_()

    def restarted(self, h: Tensor, lo: int, hi: int, t: int) -> Tensor:
        """h as step t sees it: a sequence that starts there sees its initial state."""
        packing = self.x.packing
        if packing is None:
            return h
        restart = over_state(packing.restart[lo:hi, t])
        if self.initial is None:
            return h.masked_fill(restart, 0.0)
        return torch.where(restart, self.initial[packing.index[lo:hi, t]], h)

    def step(self, h: Tensor, decay: Tensor, lo: int, hi: int, t: int, out: Tensor) -> None:
        """out <- exp(delta_t A) h + delta_t u_t B_t (h may be out)."""
        torch.mul(self.restarted(h, lo, hi, t), decay, out=out)
        out.addcmul_(self.x.delta_u_t[lo:hi, t], self.x.B.at(lo, hi, t))

    def chunk_starts(self, carry: Tensor, lo: int, hi: int) -> Tensor:
        """States entering chunks lo..hi, (hi-lo, b, g, n, d/g), from the one entering chunk lo."""
        starts = carry.new_empty((hi - lo, *carry.shape))
        starts[0] = carry
        if hi - lo > 1:
            ends, buffer = torch.zeros_like(starts[1:]), torch.empty_like(starts[1:])
            for t in range(self.x.steps):
                self.step(ends, self.decay(lo, hi - 1, t, buffer), lo, hi - 1, t, out=ends)
            decays = self.x.chunk_decay(lo, hi - 1)
            for k in range(1, hi - lo):
                torch.addcmul(ends[k - 1], decays[k - 1], starts[k - 1], out=starts[k])
        return starts

    def keep_last(self, h: Tensor, lo: int, hi: int, t: int) -> None:
        """Move the states of sequences whose last step is this one into ``final``."""
        packing = self.x.packing
        last, index = packing.last[lo:hi, t].flatten(), packing.index[lo:hi, t].flatten()
        ids = torch.arange(self.final.shape[0], device=h.device)
        hit = last & (index == ids[:, None])  # at most one True a row: a sequence ends once
        row = hit.to(torch.uint8).argmax(dim=1)
        self.final = torch.where(over_state(hit.any(dim=1)), h.flatten(0, 1)[row], self.final)


@without_autocast
def selective_scan_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    num_states: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Internal op ``_selective_scan_fwd``: see ``ops/schema.py`` for shapes."""
    dtype = accumulate_dtype(u, delta, A, initial_state)
    # One chunk for the whole length asks for the first state alone, not for a loop over the length.
    whole = chunk_size >= u.shape[2] > 0
    steps = min(chunk_size, balanced_chunk_size(u.shape[2])) if whole else chunk_size
    x = ScanInputs(u, delta, A, B, C, delta_bias, delta_softplus, seq_idx, num_states, steps, dtype)
    sweep = _Forward(x, initial_state, num_states)
    y = torch.empty_like(x.delta_t)
    carry = sweep.start(u.shape[0])
    chunk_states = carry.new_empty((x.chunks, *carry.shape))
    for lo in range(0, x.chunks, x.group):
        hi = min(x.chunks, lo + x.group)
        h = sweep.chunk_starts(carry, lo, hi)
        chunk_states[lo:hi] = h
        buffer = torch.empty_like(h)
        for t in range(x.steps):
            sweep.step(h, sweep.decay(lo, hi, t, buffer), lo, hi, t, out=h)
            x.C.contract(h, lo, hi, t, out=y[lo:hi, t])
            if x.packing is not None:
                sweep.keep_last(h, lo, hi, t)
        carry = h[-1]
    final = carry if x.packing is None else sweep.final
    return (
        in_layout_of(_gated(_with_skip(x, y, D), z, x).to(u.dtype), u),
        public_state(final).contiguous(),
        public_state(chunk_states[:1] if whole else chunk_states).transpose(0, 1).contiguous(),
    )


def _with_skip(x: ScanInputs, y: Tensor, D: Tensor | None) -> Tensor:
    """The scan's result in (b, d, l), plus D u."""
    out = unchunked(y.flatten(3), x.length)
    return out if D is None else torch.addcmul(out, D.to(out.dtype)[:, None], x.u)


def _gated(y: Tensor, z: Tensor | None, x: ScanInputs) -> Tensor:
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return x.without_padding(y)


class _Backward:
    """The reverse sweep: the gradient of the state, and the sums that become the gradients."""

    def __init__(self, x: ScanInputs, sweep: _Forward, dy: Tensor, dfinal: Tensor | None, keep_y):
        self.x, self.sweep = x, sweep
        self.dy_t = per_group(chunked(dy, x.chunks, x.steps), x.groups)
        self.dfinal = None if dfinal is None else state_rows(dfinal.to(x.A.dtype), x.groups)
        self.d_delta = torch.empty_like(x.delta_t)
        self.d_delta_u = torch.empty_like(x.delta_t)
        self.y = torch.empty_like(x.delta_t) if keep_y else None
        self.dA = x.A.new_zeros((x.group, dy.shape[0], *x.A.shape))
        self.dinitial = torch.zeros_like(sweep.final)
        if self.dfinal is not None and x.packing is not None:
            # A sequence without a step hands its initial state straight to its final one.
            keep = x.packing.empty[:, None, None, None]
            self.dinitial = self.dfinal.masked_fill(~keep, 0.0).contiguous()

    def start(self, batch: int) -> Tensor:
        """The gradient arriving at the end of the last chunk."""
        if self.dfinal is not None and self.x.packing is None:
            return self.dfinal.contiguous()
        return self.x.A.new_zeros((batch, *self.x.A.shape))

    def pull(self, dh: Tensor, lo: int, hi: int, t: int) -> None:
        """dh <- dh + C_t dy_t, plus the gradient of the final states that this step makes."""
        dh.addcmul_(self.x.C.at(lo, hi, t), self.dy_t[lo:hi, t])
        packing = self.x.packing
        if packing is not None and self.dfinal is not None:
            last = over_state(packing.last[lo:hi, t])
            dh.add_(self.dfinal[packing.index[lo:hi, t]].masked_fill_(~last, 0.0))

    def push(self, dh: Tensor, decay: Tensor, lo: int, hi: int, t: int, collect: bool) -> None:
        """dh <- the gradient of the state before step t; at a restart the initial state gets it."""
        dh.mul_(decay)
        packing = self.x.packing
        if packing is None:
            return
        restart = over_state(packing.restart[lo:hi, t])
        if collect:
            index = packing.index[lo:hi, t].flatten()
            add_rows(self.dinitial, index, dh.masked_fill(~restart, 0.0).flatten(0, 1))
        dh.masked_fill_(restart, 0.0)

    def chunk_ends(self, carry: Tensor, lo: int, hi: int) -> Tensor:
        """Gradients arriving at the ends of chunks lo..hi, from the one arriving at hi's."""
        ends = carry.new_empty((hi - lo, *carry.shape))
        ends[-1] = carry
        if hi - lo > 1:
            dh, buffer = torch.zeros_like(ends[1:]), torch.empty_like(ends[1:])
            for t in reversed(range(self.x.steps)):
                self.pull(dh, lo + 1, hi, t)
                decay = self.sweep.decay(lo + 1, hi, t, buffer)
                self.push(dh, decay, lo + 1, hi, t, collect=False)
            decays = self.x.chunk_decay(lo + 1, hi)
            for k in reversed(range(hi - lo - 1)):
                torch.addcmul(dh[k], decays[k], ends[k + 1], out=ends[k])
        return ends

    def group(self, states: Tensor, carry: Tensor, lo: int, hi: int) -> Tensor:
        """All gradients of chunks lo..hi; returns the gradient of the state entering chunk lo."""
        h = states.new_empty((self.x.steps + 1, *states.shape))
        h[0] = states
        decays = torch.empty_like(h[1:])
        for t in range(self.x.steps):
            self.sweep.decay(lo, hi, t, decays[t])
            self.sweep.step(h[t], decays[t], lo, hi, t, out=h[t + 1])
        dh = self.chunk_ends(carry, lo, hi)
        for t in reversed(range(self.x.steps)):
            self.pull(dh, lo, hi, t)
            self.collect(dh, h[t], h[t + 1], decays[t], lo, hi, t)
            self.push(dh, decays[t], lo, hi, t, collect=True)
        return dh[0]

    def collect(self, dh, before, after, decay, lo: int, hi: int, t: int) -> None:
        """The gradients of step t's inputs, given that of its state."""
        x = self.x
        x.C.add_gradient(after, self.dy_t[lo:hi, t], lo, hi, t)
        x.B.add_gradient(dh, x.delta_u_t[lo:hi, t], lo, hi, t)
        x.B.contract(dh, lo, hi, t, out=self.d_delta_u[lo:hi, t])
        if self.y is not None:
            x.C.contract(after, lo, hi, t, out=self.y[lo:hi, t])
        through_decay = (dh * self.sweep.restarted(before, lo, hi, t)).mul_(decay)
        self.dA[: hi - lo].addcmul_(through_decay, x.delta_t[lo:hi, t])
        torch.sum(through_decay.mul_(x.A), dim=-2, keepdim=True, out=self.d_delta[lo:hi, t])


@without_autocast
def selective_scan_bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    num_states: int,
    chunk_size: int,
    chunk_states: Tensor,
) -> tuple[Tensor, ...]:
    """Internal op ``_selective_scan_bwd``: see ``ops/schema.py`` for shapes."""
    dtype = accumulate_dtype(u, delta, A, initial_state)
    x = ScanInputs(
        u, delta, A, B, C, delta_bias, delta_softplus, seq_idx, num_states, chunk_size, dtype
    )
    sweep = _Forward(x, initial_state, num_states)
    dout = x.without_padding(dout.to(dtype))
    dy = dout if z is None else dout * F.silu(z.to(dtype))
    dy = x.without_padding(dy)
    back = _Backward(x, sweep, dy, dfinal_state, keep_y=z is not None)
    carry = back.start(u.shape[0])
    states = state_rows(chunk_states.transpose(0, 1), x.groups)
    for lo in reversed(range(0, x.chunks, x.group)):
        hi = min(x.chunks, lo + x.group)
        carry = back.group(states[lo:hi], carry, lo, hi)

    d_delta_u = unchunked(back.d_delta_u.flatten(3), x.length)
    du = d_delta_u * x.delta
    if D is not None:
        du = torch.addcmul(du, D.to(dtype)[:, None], dy)
    ddelta = x.without_padding(unchunked(back.d_delta.flatten(3), x.length) + d_delta_u * x.u)
    if delta_softplus:
        ddelta = torch.where(x.raw_delta > 20.0, ddelta, ddelta * torch.sigmoid(x.raw_delta))
    dz = u.new_empty((0,))
    if z is not None:
        gate = z.to(dtype)
        s = torch.sigmoid(gate)
        dz = dout * _with_skip(x, back.y, D) * s * (1 + gate * (1 - s))
        dz = in_layout_of(x.without_padding(dz).to(z.dtype), z)
    dinitial = u.new_empty((0,))
    if initial_state is not None:
        dinitial = public_state(carry if x.packing is None else back.dinitial).contiguous()
    return (
        in_layout_of(du.to(u.dtype), u),
        in_layout_of(ddelta.to(delta.dtype), delta),
        public_state(back.dA.sum(dim=(0, 1))).contiguous(),
        x.B.gradient(x.length, B),
        x.C.gradient(x.length, C),
        u.new_empty((0,)) if D is None else (dy * x.u).sum(dim=(0, 2)),
        dz,
        u.new_empty((0,)) if delta_bias is None else ddelta.sum(dim=(0, 2)),
        dinitial,
    )
