"""Packed and padded batches, written as ``seq_idx``: one rule for the scan and the convolution.

``seq_idx`` (b, l) int32 gives each step the number of its sequence. The state restarts where the
number changes; a negative number is padding, which is skipped: output 0, state untouched. States
that go in or come out are indexed by the number, over the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _values_are_readable(x: Tensor) -> bool:
    """Whether looking at x's values costs no device synchronisation and no graph break."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return x.device.type == "cpu"


def seq_idx_from_cu_seqlens(cu_seqlens: Tensor, total_length: int) -> Tensor:
    """(1, total_length) int32 from the sequences' bounds ``cu_seqlens`` (num_sequences + 1,).

    Steps past the last bound are padding. Raises ValueError where the bounds do not start at 0,
    fall, or pass the end (checked on CPU tensors only: there is no device synchronisation).
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype.is_floating_point:
        raise ValueError(
            "cu_seqlens must be a 1-D integer tensor of num_sequences + 1 bounds, but is "
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if _values_are_readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] > total_length or bounds != sorted(bounds):
            shown = bounds if len(bounds) <= 16 else [*bounds[:16], "..."]
            raise ValueError(
                "cu_seqlens must start at 0, never fall and end at most at the length "
                f"{total_length}, but is {shown}"
            )
    steps = torch.arange(total_length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    index = torch.searchsorted(cu_seqlens, steps, right=True).to(torch.int32) - 1
    return index.masked_fill(steps >= cu_seqlens[-1], -1)[None]


def seq_idx_from_mask(attention_mask: Tensor) -> Tensor:
    """(b, l) int32: row i is sequence i where the mask is true (non-zero), else padding."""
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be (batch, length), but is {tuple(attention_mask.shape)}"
        )
    rows = torch.arange(attention_mask.shape[0], device=attention_mask.device, dtype=torch.int32)
    return torch.where(attention_mask.bool(), rows[:, None], -1).to(torch.int32)


def resolve_packing(
    batch: int,
    length: int,
    device: torch.device,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    num_sequences: int | None,
    initial_state: Tensor | None,
) -> tuple[Tensor | None, int]:
    """``(seq_idx, number of states)`` from what the caller gave.

    The number of states is the batch without packing; with it ``num_sequences``, else what
    ``cu_seqlens`` or ``initial_state`` tells, else the batch. Raises ValueError where these
    contradict each other and IndexError for a sequence number out of range (values are checked on
    CPU tensors only).
    """
    if seq_idx is None and cu_seqlens is None:
        if num_sequences is not None:
            raise ValueError("num_sequences needs seq_idx or cu_seqlens")
        return None, batch
    if cu_seqlens is not None:
        if seq_idx is not None:
            raise ValueError("give seq_idx or cu_seqlens, not both")
        if batch != 1:
            raise ValueError(f"cu_seqlens needs a packed batch of one, but the batch is {batch}")
        seq_idx = seq_idx_from_cu_seqlens(cu_seqlens.to(device), length)
        known = cu_seqlens.shape[0] - 1
        if num_sequences is not None and num_sequences != known:
            raise ValueError(
                f"num_sequences is {num_sequences}, but cu_seqlens bounds {known} sequences"
            )
        return seq_idx, known
    if tuple(seq_idx.shape) != (batch, length):
        raise ValueError(f"seq_idx must be {(batch, length)}, but is {tuple(seq_idx.shape)}")
    if seq_idx.dtype.is_floating_point or seq_idx.dtype == torch.bool:
        raise TypeError(f"seq_idx must be an integer tensor (int32), but is {seq_idx.dtype}")
    if seq_idx.device != device:
        raise ValueError(f"seq_idx is on {seq_idx.device}, but the input is on {device}")
    states = num_sequences
    if states is None:
        states = batch if initial_state is None else initial_state.shape[0]
    if states < 0:
        raise ValueError(f"num_sequences must not be negative, but is {states}")
    return seq_idx.to(torch.int32), states


def check_sequence_numbers(seq_idx: Tensor | None, num_states: int) -> None:
    """Raises IndexError if a sequence number has no state (on CPU tensors only)."""
    if seq_idx is None or seq_idx.numel() == 0 or not _values_are_readable(seq_idx):
        return
    largest = int(seq_idx.max())
    if largest >= num_states:
        raise IndexError(
            f"seq_idx holds sequence number {largest}, but there are {num_states} states; give "
            "num_sequences= (or an initial state with a row for each sequence)"
        )
