"""Multi-head attention for hybrid models: grouped queries, rotary, an optional convolution and MLP.

Dimensions: b batch, l length, nh query heads, nkv key/value heads, hd head_dim, S slots of a cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mamba_ssm.modules.rotary import apply_rotary
from mamba_ssm.modules.sequence_args import (
    Packing,
    causal_convolution,
    oldest_input,
    resolve_packing,
)
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn

Tensor = torch.Tensor
State = tuple[Tensor, Tensor | None, Tensor]


class _Past(NamedTuple):
    """What came before: rows are filled from slot 0, padding is never stored."""

    kv: Tensor  # (b, S, 2, nkv, hd)
    conv: Tensor | None  # the cache's width: (b, conv_dim, d_conv)
    lengths: Tensor  # (b,) slots in use
    in_place: bool = False  # kv is the decode cache itself, and may be written


class _Tokens(NamedTuple):
    """Where the tokens of this call stand."""

    valid: Tensor | None  # (b, l) bool, None when every token is real
    rank: Tensor  # (b, l) or (l,): the token's place among the real tokens of its sequence
    same: Tensor | None  # (b, l, l) bool: in one sequence; None when every row is one sequence


def _locate(length: int, seq_idx: Tensor | None, device: torch.device) -> _Tokens:
    if seq_idx is None:
        return _Tokens(None, torch.arange(length, device=device), None)
    valid = seq_idx >= 0
    # A new run starts where the id differs from that of the last real token.
    place = torch.arange(length, device=device).expand_as(seq_idx)
    last = torch.where(valid, place, -1).cummax(dim=1).values
    before = F.pad(last, (1, 0), value=-1)[:, :length]
    starts = valid & (seq_idx.gather(1, before.clamp(min=0)) != seq_idx)
    run = starts.cumsum(dim=1)
    same = (run[:, :, None] == run[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    rank = (same.tril().sum(dim=-1) - 1).clamp(min=0)
    return _Tokens(valid, rank, same)


class MHA(nn.Module):
    """Multi-head attention, (b, l, embed_dim) → (b, l, embed_dim).

    Parameters: ``in_proj`` gives the queries, keys and values and, first, the ``mlp_dim`` features
    of a gated MLP that runs beside the attention (rounded up to a multiple of 256); ``conv1d``, a
    depthwise causal convolution over queries, keys and values, when ``d_conv > 0``; ``out_proj``.

    Args:
        num_heads_kv: key/value heads (grouped queries), a divisor of num_heads; default the same.
        head_dim: default embed_dim / num_heads.
        softmax_scale: default head_dim^-0.5.
        causal: whether a token sees only what came before; states and caches need it.
        rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved: see ``rotary.apply_rotary``.

    Raises ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_heads_kv = num_heads_kv if num_heads_kv is not None else num_heads
        if min(embed_dim, num_heads, num_heads_kv) < 1 or num_heads % num_heads_kv != 0:
            raise ValueError(
                "embed_dim, num_heads and num_heads_kv must be positive and num_heads a multiple "
                f"of num_heads_kv, got {embed_dim}, {num_heads}, {num_heads_kv}"
            )
        if head_dim is None and embed_dim % num_heads != 0:
            raise ValueError(
                f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}: pass head_dim"
            )
        self.head_dim = head_dim if head_dim is not None else embed_dim // num_heads
        if self.head_dim < 1 or mlp_dim < 0 or d_conv < 0:
            raise ValueError(
                "head_dim must be positive, mlp_dim and d_conv not negative, got "
                f"{self.head_dim}, {mlp_dim}, {d_conv}"
            )
        if rotary_emb_dim % 2 != 0 or not 0 <= rotary_emb_dim <= self.head_dim:
            raise ValueError(
                f"rotary_emb_dim must be even and in [0, head_dim={self.head_dim}], got "
                f"{rotary_emb_dim}"
            )
        self.embed_dim, self.num_heads, self.num_heads_kv = embed_dim, num_heads, num_heads_kv
        self.mlp_dim = (mlp_dim + 255) // 256 * 256
        self.softmax_scale = softmax_scale
        self.causal = causal
        self.layer_idx = layer_idx
        self.d_conv = d_conv
        self.rotary_emb_dim = rotary_emb_dim
        self.rotary_emb_base = rotary_emb_base
        self.rotary_emb_interleaved = rotary_emb_interleaved

        factory = {"device": device, "dtype": dtype}
        qkv_dim = self.head_dim * (num_heads + 2 * num_heads_kv)
        out_dim = self.head_dim * num_heads
        self.in_proj = nn.Linear(embed_dim, qkv_dim + self.mlp_dim, bias=qkv_proj_bias, **factory)
        if d_conv > 0:
            self.conv1d = nn.Conv1d(
                qkv_dim, qkv_dim, kernel_size=d_conv, padding=d_conv - 1, groups=qkv_dim, **factory
            )
        self.out_proj = nn.Linear(
            out_dim + self.mlp_dim // 2, embed_dim, bias=out_proj_bias, **factory
        )

    # -- forward ---------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        inference_params: Any = None,
        *,
        initial_state: State | None = None,
        return_final_state: bool = False,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_sequences: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """(b, l, embed_dim) → the same, or (out, state) with ``return_final_state``.

        A state is (kv (b, S, 2, nkv, hd), conv_state (b, conv_dim, d_conv − 1) or None,
        lengths (b,) int32): row i uses its first lengths[i] slots; (kv, conv_state) alone means
        that all slots are used. The packing arguments are those of ``Mamba.forward`` and attention
        stays within a sequence. States and caches have one row for each batch row here: with
        seq_idx or cu_seqlens they raise ValueError, as they do when ``causal`` is False.
        """
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"x must have shape (b, l, embed_dim={self.embed_dim}), got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"x must be floating-point, got {x.dtype}")
        batch, length, _ = x.shape
        stateful = initial_state is not None or return_final_state or inference_params is not None
        if stateful and not self.causal:
            raise ValueError("states and inference_params need causal=True: build MHA with it")
        if stateful and (seq_idx is not None or cu_seqlens is not None):
            raise ValueError(
                "attention keeps its state by batch row, so seq_idx and cu_seqlens cannot be "
                "combined with states or inference_params: pad the batch and pass attention_mask"
            )
        packing = resolve_packing(batch, length, seq_idx, cu_seqlens, attention_mask, num_sequences)
        tokens = _locate(length, packing.seq_idx, x.device)
        past = self._past(inference_params, initial_state, batch, length)

        projected = self.in_proj(x)
        mlp, qkv = projected.split([self.mlp_dim, projected.shape[-1] - self.mlp_dim], dim=-1)
        qkv, new_conv = self._convolve(qkv, past, packing, stateful)
        q, kv = self._heads(qkv, tokens, past)
        context, new_kv, lengths = self._attend(q, kv, tokens, past, stateful)
        context = context.flatten(-2)
        if self.mlp_dim > 0:
            up, gate = mlp.chunk(2, dim=-1)
            context = torch.cat([context, up * F.silu(gate)], dim=-1)
        out = self.out_proj(context)
        if not stateful:
            return out
        state = (new_kv, None if new_conv is None else new_conv[..., 1:], lengths)
        if inference_params is not None:
            self._store(inference_params, past, new_kv, new_conv, lengths)
        return (out, state) if return_final_state else out

    def _convolve(
        self, qkv: Tensor, past: _Past | None, packing: Packing, stateful: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The depthwise convolution and, with a state, the new cache (b, conv_dim, d_conv)."""
        if self.d_conv == 0:
            return qkv, None
        inputs = qkv.transpose(1, 2)
        old = None if past is None else past.conv
        out, final = causal_convolution(
            self.conv1d,
            causal_conv1d_fn,
            inputs,
            self.d_conv,
            activation=None,
            act=None,
            initial=None if old is None else old[..., 1:],
            packing=packing,
            return_state=stateful,
        )
        if not stateful:
            return out.transpose(1, 2), None
        oldest = oldest_input(inputs, old, self.d_conv, packing)
        return out.transpose(1, 2), torch.cat([oldest.unsqueeze(-1), final], dim=-1)

    def _heads(self, qkv: Tensor, tokens: _Tokens, past: _Past | None) -> tuple[Tensor, Tensor]:
        """Split into heads and rotate: q (b, l, nh, hd), kv (b, l, 2, nkv, hd)."""
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(
            [self.num_heads, self.num_heads_kv, self.num_heads_kv], dim=2
        )
        positions = tokens.rank if past is None else past.lengths[:, None] + tokens.rank
        rotary = (self.rotary_emb_dim, self.rotary_emb_base, self.rotary_emb_interleaved)
        q, k = apply_rotary(q, positions, *rotary), apply_rotary(k, positions, *rotary)
        return q, torch.stack([k, v], dim=2)

    def _attend(
        self, q: Tensor, kv: Tensor, tokens: _Tokens, past: _Past | None, stateful: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attention over this call's tokens and the past.

        Returns the context (b, l, nh, hd) and, with a state, all keys and values stored so far
        (b, S, 2, nkv, hd), and how many each row has.
        """
        batch, length = q.shape[:2]
        stored = lengths = None
        if stateful:
            stored = kv
            if tokens.valid is None:
                lengths = torch.full((batch,), length, dtype=torch.int32, device=q.device)
            else:
                # Real tokens first, in order: what lies behind them is never read, and overwritten.
                order = torch.sort((~tokens.valid).int(), dim=1, stable=True).indices
                stored = kv.gather(1, order[:, :, None, None, None].expand_as(kv))
                lengths = tokens.valid.sum(dim=1).to(torch.int32)
        mask = None
        if past is None:
            if tokens.same is not None:
                mask = tokens.same.tril() if self.causal else tokens.same
                # A padding token sees itself, so that no row of the softmax is empty.
                mask = mask | torch.eye(length, dtype=torch.bool, device=q.device)
        else:
            slots = past.lengths[:, None].long() + torch.arange(length, device=q.device)
            slots = slots[:, :, None, None, None].expand_as(stored)
            append = past.kv.scatter_ if past.in_place else past.kv.scatter
            stored = append(1, slots, stored.to(past.kv.dtype))
            kv = stored.to(q.dtype)
            last = past.lengths[:, None] + tokens.rank
            mask = torch.arange(kv.shape[1], device=q.device) <= last[:, :, None]
            lengths = past.lengths + lengths
        context = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            kv[:, :, 0].transpose(1, 2),
            kv[:, :, 1].transpose(1, 2),
            attn_mask=None if mask is None else mask.unsqueeze(1),
            is_causal=self.causal and mask is None,
            scale=self.softmax_scale,
            enable_gqa=self.num_heads != self.num_heads_kv,
        ).transpose(1, 2)
        if tokens.valid is not None:
            context = context.masked_fill(~tokens.valid[:, :, None, None], 0.0)
        return context, stored, lengths

    # -- states ----------------------------------------------------------------------------------

    def _past(
        self, inference_params: Any, initial_state: State | None, batch: int, length: int
    ) -> _Past | None:
        """What this call continues from, with room for ``length`` more tokens; None: nothing."""
        continuing = inference_params is not None and inference_params.seqlen_offset > 0
        if continuing and initial_state is not None:
            raise ValueError(
                "initial_state was given with inference_params.seqlen_offset > 0, where the cache "
                "is the state: pass one of the two"
            )
        if inference_params is not None:
            offset = inference_params.seqlen_offset
            kv, conv, lengths = self._cache(inference_params, batch)
            if initial_state is None and offset + length > kv.shape[1]:
                raise ValueError(
                    f"the attention cache of layer {self.layer_idx} has {kv.shape[1]} slots, and "
                    f"this call ends at position {offset + length}: allocate a larger max_seqlen"
                )
            if continuing:
                if not torch.is_grad_enabled():
                    return _Past(kv, conv, lengths, in_place=True)
                # The graph keeps what it read, and the cache is about to change.
                return _Past(kv.clone(), None if conv is None else conv.clone(), lengths)
        if initial_state is None:
            return None
        if not isinstance(initial_state, (tuple, list)) or len(initial_state) not in (2, 3):
            raise TypeError("MHA's initial_state must be (kv, conv_state, lengths)")
        kv, conv = initial_state[:2]
        tail = (2, self.num_heads_kv, self.head_dim)
        if kv.dim() != 5 or kv.shape[0] != batch or tuple(kv.shape[2:]) != tail:
            raise ValueError(
                f"initial_state's kv must have shape {(batch, 'S', *tail)}, got {tuple(kv.shape)}"
            )
        if (conv is None) != (self.d_conv == 0):
            raise ValueError(
                f"initial_state's conv_state must be None exactly when d_conv == 0, "
                f"and d_conv is {self.d_conv}"
            )
        if conv is not None:
            shape = (batch, self.conv1d.weight.shape[0], self.d_conv - 1)
            if tuple(conv.shape) != shape:
                raise ValueError(
                    f"initial_state's conv_state must have shape {shape}, got {tuple(conv.shape)}"
                )
            conv = F.pad(conv, (1, 0))
        if len(initial_state) == 3:
            lengths = initial_state[2]
        else:
            lengths = torch.full((batch,), kv.shape[1], dtype=torch.int32, device=kv.device)
        return _Past(F.pad(kv, (0, 0, 0, 0, 0, 0, 0, length)), conv, lengths)

    def _cache(self, inference_params: Any, batch: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """This layer's rows of the decode cache, made when it is not there."""
        if self.layer_idx is None:
            raise ValueError("inference_params needs a layer_idx: build the layer with layer_idx=…")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(
                inference_params.max_batch_size, inference_params.max_seqlen
            )
        entry = cache[self.layer_idx]
        if len(entry) == 2:
            used = torch.full(
                (entry[0].shape[0],),
                inference_params.seqlen_offset,
                dtype=torch.int32,
                device=entry[0].device,
            )
            entry = cache[self.layer_idx] = (*entry, used)
        start = getattr(inference_params, "batch_size_offset", 0)
        if start + batch > entry[0].shape[0]:
            raise ValueError(
                f"the cache of layer {self.layer_idx} has {entry[0].shape[0]} rows, and this call "
                f"needs rows {start} to {start + batch}: allocate it for that batch size"
            )
        return tuple(None if t is None else t[start : start + batch] for t in entry)

    def _store(
        self,
        inference_params: Any,
        past: _Past | None,
        kv: Tensor,
        conv: Tensor | None,
        lengths: Tensor,
    ) -> None:
        """Write the new state into the decode cache, in place."""
        with torch.no_grad():
            if past is not None and inference_params.seqlen_offset == 0:
                # A state from elsewhere takes slots that max_seqlen did not count.
                entry = inference_params.key_value_memory_dict[self.layer_idx]
                grown = F.pad(entry[0], (0, 0, 0, 0, 0, 0, 0, past.kv.shape[1]))
                inference_params.key_value_memory_dict[self.layer_idx] = (grown, *entry[1:])
            target_kv, target_conv, target_lengths = self._cache(inference_params, kv.shape[0])
            if past is None or not past.in_place:
                target_kv[:, : kv.shape[1]].copy_(kv)
            target_lengths.copy_(lengths)
            if conv is not None:
                target_conv.copy_(conv)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Zeros: kv (b, max_seqlen, 2, nkv, hd), conv (b, conv_dim, d_conv) or None, and
        lengths (b,) int32, how many slots each row uses (rows differ when prompts are padded)."""
        weight = self.out_proj.weight
        if dtype is None:  # a quantised layer's weight has a dtype that it does not compute in
            floats = (p.dtype for p in (weight, *self.parameters()) if p.is_floating_point())
            dtype = next(floats, torch.float32)
        device = weight.device
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        conv = None
        if self.d_conv > 0:
            conv_dim = self.conv1d.weight.shape[0]
            conv = torch.zeros(batch_size, conv_dim, self.d_conv, device=device, dtype=dtype)
        lengths = torch.zeros(batch_size, device=device, dtype=torch.int32)
        return torch.zeros(*shape, device=device, dtype=dtype), conv, lengths
