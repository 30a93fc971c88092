"""What every sequence mixer does with its packing and state arguments.

Packing (``seq_idx``, ``cu_seqlens`` or ``attention_mask``) always becomes one ``seq_idx`` (b, l)
int32 for the ops: the state restarts where the id changes, and a negative id is padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from mamba_ssm.ops.client_layers import is_plain
from mamba_ssm.ops.packing import seq_idx_from_cu_seqlens, seq_idx_from_mask


class Packing(NamedTuple):
    """Which sequence every token belongs to."""

    seq_idx: torch.Tensor | None  # (b, l) int32, or None when row i is simply sequence i
    num_sequences: int  # rows of the states


def resolve_packing(
    batch: int,
    length: int,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    num_sequences: int | None = None,
    state_rows: int | None = None,
) -> Packing:
    """Turn the packing arguments into one ``seq_idx``, without a device synchronisation.

    Shapes: ``seq_idx`` (b, l) integers, ``cu_seqlens`` (num_sequences + 1,) with b = 1,
    ``attention_mask`` (b, l) of bool or 0/1. ``state_rows`` is the number of rows of a given
    initial state. Raises ValueError (shape, more than one argument, row counts that do not
    agree) and TypeError (dtype).
    """
    if seq_idx is cu_seqlens is attention_mask is num_sequences is state_rows is None:
        return Packing(None, batch)
    given = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens, "attention_mask": attention_mask}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(
            f"{' and '.join(names)} were both given, and each alone says which tokens belong "
            "together: pass one of them (padding inside seq_idx is a negative id)"
        )
    if not names:
        rows = batch
    elif cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens describes a packed batch of 1, but the batch is {batch}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(
                "cu_seqlens must have shape (num_sequences + 1,) with at least one sequence, got "
                f"{tuple(cu_seqlens.shape)}"
            )
        rows = cu_seqlens.shape[0] - 1
        seq_idx = seq_idx_from_cu_seqlens(cu_seqlens, length)
    else:
        name, tokens = names[0], given[names[0]]
        if tuple(tokens.shape) != (batch, length):
            raise ValueError(
                f"{name} must have shape (b, l) = {(batch, length)}, the tokens of this call, got "
                f" {tuple(tokens.shape)}"
            )
        if name == "attention_mask":
            rows = batch
            seq_idx = seq_idx_from_mask(tokens)
        else:
            if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
                raise TypeError(f"seq_idx must be integers (int32), got {tokens.dtype}")
            seq_idx = tokens.to(torch.int32)
            rows = num_sequences if num_sequences is not None else state_rows
            rows = batch if rows is None else rows
    for what, value in (("num_sequences", num_sequences), ("initial_state", state_rows)):
        if value is not None and value != rows:
            raise ValueError(
                f"{what} has {value} sequences where this call has {rows}: states have one row for "
                "each sequence (the batch; the sequences of cu_seqlens; num_sequences for seq_idx)"
            )
    return Packing(seq_idx, rows)


def oldest_input(
    x: torch.Tensor, cache: torch.Tensor | None, width: int, packing: Packing
) -> torch.Tensor:
    """The input ``width`` steps before the end of each sequence: column 0 of the decode cache.

    The convolution's own state has ``width - 1`` columns, and the historical cache one more.
    ``x`` (b, d, l), ``cache`` (N, d, width), the cache before this call (None: zeros) → (N, d).
    """
    seq_idx, rows = packing
    batch, dim, length = x.shape
    if seq_idx is None:
        if length >= width:
            return x[..., length - width]
        return x.new_zeros(batch, dim) if cache is None else cache[..., length].to(x.dtype)
    if cache is None:
        cache = x.new_zeros(rows, dim, width)
    if batch * length == 0:
        return cache[..., 0].to(x.dtype)
    # Sorting by id (stable) puts the tokens of a sequence side by side, padding first.
    ids, order = torch.sort(seq_idx.reshape(-1).long(), stable=True)
    wanted = torch.arange(rows, device=x.device)
    starts, ends = torch.searchsorted(ids, wanted), torch.searchsorted(ids, wanted, right=True)
    token = order[(ends - width).clamp(min=0)]
    from_x = x[token // length, :, token % length]
    count = (ends - starts).clamp(max=width - 1)
    from_cache = cache.to(x.dtype).gather(2, count[:, None, None].expand(-1, dim, 1)).squeeze(2)
    return torch.where((ends - starts >= width)[:, None], from_x, from_cache)


def causal_convolution(
    conv1d: nn.Module,
    op: Callable | None,
    x: torch.Tensor,
    width: int,
    *,
    activation: str | None,
    act: nn.Module | None,
    initial: torch.Tensor | None,
    packing: Packing,
    return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Depthwise causal convolution of ``x`` (b, d, l), through ``op`` or the module itself.

    ``op`` is ``causal_conv1d_fn``, or None when it is not available; the module is called then,
    and whenever it is not a plain ``nn.Conv1d`` any more. ``initial`` (N, d, width − 1).
    Returns the output and, if asked, the state (N, d, width − 1). Raises ValueError for packing
    when the module has to be called: it would mix the sequences.
    """
    seq_idx, rows = packing
    if op is not None and is_plain(conv1d, nn.Conv1d):
        extra = {}
        if initial is not None:
            extra["initial_states"] = initial.to(x.dtype)
        if return_state:
            extra["return_final_states"] = True
        if seq_idx is not None:
            extra["seq_idx"] = seq_idx
            extra["num_sequences"] = rows
        out = op(x, conv1d.weight.squeeze(1), conv1d.bias, activation=activation, **extra)
        return out if return_state else (out, None)
    if seq_idx is not None:
        reason = "causal_conv1d_fn is not available"
        if op is not None:
            reason = f"conv1d ({type(conv1d).__name__}) was replaced, hooked or parametrized"
        raise ValueError(
            f"packed or padded sequences need causal_conv1d_fn on a plain nn.Conv1d, and {reason}: "
            "run the sequences one by one, or merge the change into conv1d's weight"
        )
    length = x.shape[-1]
    if initial is None and not return_state:
        out = conv1d(x)[..., :length]
        return (out if act is None else act(out)), None
    if initial is None:
        initial = x.new_zeros(x.shape[0], x.shape[1], width - 1)
    # The module pads both ends; behind the true past, its own zeros are out of reach.
    x = torch.cat([initial.to(x.dtype), x], dim=-1)
    out = conv1d(x)[..., width - 1 : width - 1 + length]
    return (out if act is None else act(out)), x[..., length:]
