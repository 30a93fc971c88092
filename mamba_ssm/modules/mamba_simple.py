"""The Mamba block's mixer: the selective state space layer (arXiv 2312.00752, figure 3).

Dimensions: b batch, l length, d_model, d_inner = expand · d_model, d_state n, d_conv w, dt_rank r,
N rows of a state (the batch, or the number of packed sequences).

The op names below are looked up here at every call, and one that is None counts as not available:
``causal_conv1d_fn``, ``causal_conv1d_update``, ``selective_state_update`` and ``mamba_inner_fn``
each have another path.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mamba_ssm.modules.block import Block
from mamba_ssm.modules.constructor_checks import check_mamba_arguments
from mamba_ssm.modules.dt_projection import DtProjection
from mamba_ssm.modules.fused_path import at_least_fp32 as _at_least_fp32
from mamba_ssm.modules.fused_path import fused_forward, fused_prefill, project
from mamba_ssm.modules.fused_step import inner_step
from mamba_ssm.modules.sequence_args import (
    Packing,
    causal_convolution,
    is_plain,
    oldest_input,
    resolve_packing,
)
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ssm.ops.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_ssm.ops.linear import linear
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from mamba_ssm.ops.selective_state_update import selective_state_update

__all__ = [
    "Block",
    "Mamba",
    "RMSNorm",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "layer_norm_fn",
    "mamba_inner_fn",
    "rms_norm_fn",
    "selective_scan_fn",
    "selective_state_update",
]

State = tuple[torch.Tensor, torch.Tensor]


class Mamba(nn.Module):
    """Selective state space mixer, (b, l, d_model) → (b, l, d_model).

    In order: in_proj gives x and the gate z; x goes through a depthwise causal convolution and
    silu; x_proj gives the low-rank step size, B and C for every position (the *selection*,
    arXiv 2312.00752 algorithm 2); dt_proj widens the step size; the scan runs
    h_t = exp(delta_t A) h_{t−1} + delta_t B_t u_t, y_t = C_t h_t + D u_t; the result is gated with
    silu(z) and projected back by out_proj.

    Args:
        d_model, d_state (n ≤ 256), d_conv (≥ 1), expand: sizes; d_inner = int(expand · d_model).
        dt_rank: rank of the step size's projection, "auto" = ceil(d_model / 16).
        dt_min, dt_max, dt_init ("random" or "constant"), dt_scale, dt_init_floor: see DtProjection.
        conv_bias, bias: whether conv1d has a bias; whether in_proj and out_proj have one.
        use_fast_path: use the fused ``mamba_inner_fn`` where it applies.
        layer_idx: this layer's key in ``inference_params.key_value_memory_dict``.
        device, dtype: of the parameters; A_log and D are always created in fp32.

    Raises TypeError, ValueError or (unknown dt_init) NotImplementedError for bad arguments.
    """

    # What `param_groups` exempts, also where a framework (FSDP) made parameters without the mark.
    _no_weight_decay_names = ("A_log", "D")

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dt_rank == "auto" and isinstance(d_model, int):
            dt_rank = math.ceil(d_model / 16)
        dt = {
            "dt_min": dt_min,
            "dt_max": dt_max,
            "dt_init": dt_init,
            "dt_scale": dt_scale,
            "dt_init_floor": dt_init_floor,
        }
        check_mamba_arguments(
            {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "expand": expand}
            | {"dt_rank": dt_rank, **dt}
        )
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = dt_rank
        self.dt_min, self.dt_max, self.dt_init = dt_min, dt_max, dt_init
        self.dt_scale, self.dt_init_floor = dt_scale, dt_init_floor
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.activation = "silu"
        self.act = nn.SiLU()

        # The order of these lines is the order of the random draws: seeds keep their meaning.
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            kernel_size=d_conv,
            groups=self.d_inner,
            padding=d_conv - 1,
            bias=conv_bias,
            **factory,
        )
        self.x_proj = nn.Linear(self.d_inner, dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = DtProjection(dt_rank, self.d_inner, **dt, **factory)
        fp32 = {"device": device, "dtype": torch.float32}
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, **fp32))
        self.D = nn.Parameter(torch.empty(self.d_inner, **fp32))
        self._reset_state_space()
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def _reset_state_space(self) -> None:
        with torch.no_grad():
            # S4D-real: every channel's state starts with the decays −1, −2, …, −n.
            # Counted in place of A_log itself, which may be sharded (a DTensor).
            self.A_log.fill_(1.0)
            self.A_log.copy_(self.A_log.cumsum(dim=1).log())
            self.D.fill_(1.0)
        self._mark_parameters()

    def reset_parameters(self) -> None:
        """Initialise A_log, D and dt_proj again, as the constructor does.

        For frameworks that re-initialise a built model (FSDP after ``to_empty``, or
        ``model.apply(...)``): delta keeps the range [dt_min, dt_max] and A its decays, whether the
        framework visits this module before or after its children. The other layers are reset by
        their own ``reset_parameters``. The marks ``_no_weight_decay`` and ``_no_reinit`` are set
        again too.
        """
        self._reset_state_space()
        if isinstance(self.dt_proj, DtProjection):
            self.dt_proj.reset_parameters()

    def _mark_parameters(self) -> None:
        # Moving, copying and loading make new Parameter objects without the old ones' attributes.
        for name in self._no_weight_decay_names:
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter._no_weight_decay = True

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._mark_parameters()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._mark_parameters()

    def __setstate__(self, state):
        super().__setstate__(state)
        self._mark_parameters()

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, "
            f"expand={self.expand}, dt_rank={self.dt_rank}, layer_idx={self.layer_idx}"
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_params: Any = None,
        *,
        initial_state: State | None = None,
        return_final_state: bool = False,
        seq_idx: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        num_sequences: int | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, State]:
        """(b, l, d_model) → (b, l, d_model), or (out, state) with ``return_final_state``.

        Args:
            hidden_states: (b, l, d_model).
            inference_params: with ``seqlen_offset == 0`` this is a prefill, which fills the cache
                of ``layer_idx``; with ``seqlen_offset > 0`` any number of tokens continue from it.
            initial_state: (conv_state (N, d_inner, d_conv − 1), ssm_state (N, d_inner, d_state)),
                differentiable; default zeros.
            seq_idx: (b, l) int32 ids; the state restarts where the id changes, < 0 is padding. With
                states, ids number the sequences of the whole batch, from 0 to N − 1.
            cu_seqlens: (N + 1,) int32 boundaries of the sequences packed into a batch of one.
            num_sequences: N, for ``seq_idx`` where neither the batch nor initial_state tells it.
            attention_mask: (b, l), 0 or False = padding, on either side.

        The state returned is differentiable, conv_state in the activations' dtype, ssm_state in
        fp32. Raises ValueError / TypeError for shapes and arguments that do not fit together.
        """
        batch, length = self._check_input(hidden_states)
        rows = None if initial_state is None else self._check_state(initial_state)
        packing = resolve_packing(
            batch, length, seq_idx, cu_seqlens, attention_mask, num_sequences, rows
        )
        if inference_params is not None:
            return self._forward_cached(
                hidden_states, inference_params, initial_state, return_final_state, packing
            )
        plain_call = initial_state is None and not return_final_state and packing.seq_idx is None
        if plain_call and self._fast_path_applies():
            return fused_forward(self, hidden_states, mamba_inner_fn)
        out, _, state = self._forward_sequence(
            hidden_states, initial_state, packing, return_final_state
        )
        return (out, state) if return_final_state else out

    def _fast_path_applies(self) -> bool:
        if not self.use_fast_path or mamba_inner_fn is None or causal_conv1d_fn is None:
            return False
        # Past Module.__getattr__: the host's time counts in a small model.
        part = self._modules.get
        x_proj = part("x_proj")
        return (
            is_plain(part("conv1d"), nn.Conv1d)
            and is_plain(x_proj, nn.Linear)
            and x_proj.bias is None
            and is_plain(part("dt_proj"), nn.Linear, DtProjection)
            and is_plain(part("out_proj"), nn.Linear)
        )

    def _forward_sequence(
        self,
        hidden_states: torch.Tensor,
        initial_state: State | None,
        packing: Packing,
        return_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, State | None]:
        """The layer op by op. Returns (out, the convolution's input (b, d, l), final state)."""
        conv_state, ssm_state = (None, None) if initial_state is None else initial_state
        conv_input, z = project(self.in_proj, hidden_states).transpose(1, 2).chunk(2, dim=1)
        x, conv_final = causal_convolution(
            self.conv1d,
            causal_conv1d_fn,
            conv_input,
            self.d_conv,
            activation=self.activation,
            act=self.act,
            initial=conv_state,
            packing=packing,
            return_state=return_state,
        )
        dt, B, C, dt_bias = self._select(x.transpose(1, 2))
        extra: dict[str, Any] = {}
        if ssm_state is not None:
            extra["initial_state"] = _at_least_fp32(ssm_state)
        if packing.seq_idx is not None:
            extra["seq_idx"] = packing.seq_idx
            extra["num_sequences"] = packing.num_sequences
        y = selective_scan_fn(
            x,
            dt.transpose(1, 2),
            -torch.exp(_at_least_fp32(self.A_log)),
            B.transpose(1, 2),
            C.transpose(1, 2),
            _at_least_fp32(self.D),
            z=z,
            delta_bias=_at_least_fp32(dt_bias),
            delta_softplus=True,
            return_last_state=return_state,
            **extra,
        )
        state = None
        if return_state:
            y, ssm_final = y
            state = (conv_final, ssm_final)
        return project(self.out_proj, y.transpose(1, 2)), conv_input, state

    def _select(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x (…, d_inner) → delta before its bias (…, d_inner), B and C (…, d_state), the bias."""
        # One dtype for the scan, also when a replaced projection computes in another.
        projected = project(self.x_proj, x).to(x.dtype)
        dt, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if is_plain(self.dt_proj, nn.Linear, DtProjection):
            # The bias goes to the scan or the update, which add it in fp32.
            return linear(dt, self.dt_proj.weight), B, C, self.dt_proj.bias
        return self.dt_proj(dt).to(x.dtype), B, C, None

    def _forward_cached(
        self,
        hidden_states: torch.Tensor,
        inference_params: Any,
        initial_state: State | None,
        return_final_state: bool,
        packing: Packing,
    ) -> torch.Tensor | tuple[torch.Tensor, State]:
        continuing = inference_params.seqlen_offset > 0
        if continuing and initial_state is not None:
            raise ValueError(
                "initial_state was given with inference_params.seqlen_offset > 0, where the cache "
                "is the state: pass one of the two"
            )
        cache = self._get_states_from_cache(inference_params, packing.num_sequences)
        if continuing and packing.seq_idx is None and not return_final_state:
            return self.step(hidden_states, *cache)[0]
        length = hidden_states.shape[1]
        plain_call = not continuing and initial_state is None and packing.seq_idx is None
        if plain_call and not return_final_state and length >= self.d_conv:
            whole = None
            if self._fast_path_applies():
                whole = fused_prefill(self, hidden_states, mamba_inner_fn)
            if whole is not None:
                out, conv_input, state = whole
                cache[0].copy_(conv_input[..., -self.d_conv :])
                cache[1].copy_(state)
                return out
        old_conv = None
        if continuing:
            # The ops may keep what they read for backward, and the cache is about to change.
            old_conv, old_ssm = (part.clone() for part in cache)
            initial_state = (old_conv[..., 1:], old_ssm)
        elif initial_state is not None:
            old_conv = F.pad(initial_state[0], (1, 0))
        out, conv_input, state = self._forward_sequence(hidden_states, initial_state, packing, True)
        with torch.no_grad():
            if packing.seq_idx is None and conv_input.shape[2] >= self.d_conv:
                cache[0].copy_(conv_input[..., -self.d_conv :])
            else:
                oldest = oldest_input(conv_input, old_conv, self.d_conv, packing)
                cache[0].copy_(torch.cat([oldest.unsqueeze(-1), state[0]], dim=-1))
            cache[1].copy_(state[1])
        return (out, state) if return_final_state else out

    def step(
        self, hidden_states: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Continue by l ≥ 1 tokens: (b, l, d_model) → (out (b, l, d_model), conv_state, ssm_state).

        conv_state (b, d_inner, d_conv) holds the last d_conv inputs, ssm_state is
        (b, d_inner, d_state); both are updated in place and returned. Where gradients are recorded
        (grad mode on, and the input, a state or a parameter requires them) the states returned are
        new, differentiable tensors, and the ones passed in still receive the new values unless
        they require gradients themselves.
        """
        batch, length = self._check_input(hidden_states)
        if length < 1:
            raise ValueError("step needs at least one token, got hidden_states of length 0")
        expected = {
            "conv_state": (conv_state, (batch, self.d_inner, self.d_conv)),
            "ssm_state": (ssm_state, (batch, self.d_inner, self.d_state)),
        }
        for name, (state, shape) in expected.items():
            if tuple(state.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(state.shape)}")
        recording = torch.is_grad_enabled() and (
            hidden_states.requires_grad
            or conv_state.requires_grad
            or ssm_state.requires_grad
            or any(parameter.requires_grad for parameter in self.parameters())
        )
        if not recording and length == 1 and self._single_step_applies():
            return self._step_one(hidden_states, conv_state, ssm_state), conv_state, ssm_state

        old_conv, old_ssm = conv_state, ssm_state
        if recording:
            # The graph keeps what it read; the buffers are about to be overwritten.
            old_conv = conv_state if conv_state.requires_grad else conv_state.clone()
            old_ssm = ssm_state if ssm_state.requires_grad else ssm_state.clone()
        packing = Packing(None, batch)
        out, conv_input, state = self._forward_sequence(
            hidden_states, (old_conv[..., 1:], old_ssm), packing, True
        )
        oldest = oldest_input(conv_input, old_conv, self.d_conv, packing)
        new_conv = torch.cat([oldest.unsqueeze(-1), state[0]], dim=-1).to(conv_state.dtype)
        new_ssm = state[1].to(ssm_state.dtype)
        with torch.no_grad():
            for buffer, new in ((conv_state, new_conv), (ssm_state, new_ssm)):
                if not (recording and buffer.requires_grad):
                    buffer.copy_(new)
        return (out, new_conv, new_ssm) if recording else (out, conv_state, ssm_state)

    def _single_step_applies(self) -> bool:
        return (
            causal_conv1d_update is not None
            and selective_state_update is not None
            and is_plain(self.conv1d, nn.Conv1d)
        )

    def _step_one(
        self, hidden_states: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
    ) -> torch.Tensor:
        """One token without gradients: two fused updates, both in place."""
        xz = self.in_proj(hidden_states.squeeze(1))
        ops = (causal_conv1d_update, selective_state_update)
        if (y := inner_step(self, xz, conv_state, ssm_state, ops)) is not None:
            return self.out_proj(y).unsqueeze(1)
        x, z = xz.chunk(2, dim=-1)
        conv = self.conv1d
        x = causal_conv1d_update(
            x.to(conv_state.dtype), conv_state, conv.weight.squeeze(1), conv.bias, self.activation
        ).to(z.dtype)
        dt, B, C, dt_bias = self._select(x)
        y = selective_state_update(
            ssm_state,
            x,
            dt,
            -torch.exp(_at_least_fp32(self.A_log)),
            B,
            C,
            _at_least_fp32(self.D),
            z=z,
            dt_bias=dt_bias,
            dt_softplus=True,
        )
        return self.out_proj(y).unsqueeze(1)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> State:
        """Zeros: conv (b, d_inner, d_conv) and ssm (b, d_inner, d_state).

        Their dtypes are conv1d's and dt_proj's unless ``dtype`` says otherwise; max_seqlen is
        ignored.
        """
        conv, dt = self.conv1d.weight, self.dt_proj.weight
        dt = dt if dt.is_floating_point() else conv  # a quantised layer computes in another dtype
        shape = (batch_size, self.d_inner)
        return (
            torch.zeros(*shape, self.d_conv, device=conv.device, dtype=dtype or conv.dtype),
            torch.zeros(*shape, self.d_state, device=dt.device, dtype=dtype or dt.dtype),
        )

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> State:
        """This layer's cache, made when it is not there, zeroed if asked."""
        if self.layer_idx is None:
            raise ValueError("inference_params needs a layer_idx: build the layer with layer_idx=…")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        conv_state, ssm_state = cache[self.layer_idx]
        start = getattr(inference_params, "batch_size_offset", 0)
        if start + batch_size > conv_state.shape[0]:
            raise ValueError(
                f"the cache of layer {self.layer_idx} has {conv_state.shape[0]} rows, and this "
                f"call needs rows {start} to {start + batch_size}: allocate it for that batch size"
            )
        if batch_size != conv_state.shape[0]:
            conv_state = conv_state[start : start + batch_size]
            ssm_state = ssm_state[start : start + batch_size]
        if initialize_states:
            conv_state.zero_()
            ssm_state.zero_()
        return conv_state, ssm_state

    def _check_input(self, hidden_states: torch.Tensor) -> tuple[int, int]:
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.d_model:
            raise ValueError(
                f"hidden_states must have shape (b, l, d_model={self.d_model}), got "
                f"{tuple(hidden_states.shape)}"
            )
        if not hidden_states.is_floating_point():
            raise TypeError(f"hidden_states must be floating-point, got {hidden_states.dtype}")
        return hidden_states.shape[0], hidden_states.shape[1]

    def _check_state(self, state: State) -> int:
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            raise TypeError("initial_state must be the pair (conv_state, ssm_state)")
        rows = state[0].shape[0]
        for name, part, width in (
            ("conv_state", state[0], self.d_conv - 1),
            ("ssm_state", state[1], self.d_state),
        ):
            if tuple(part.shape) != (rows, self.d_inner, width):
                raise ValueError(
                    f"initial_state's {name} must have shape {(rows, self.d_inner, width)}, got "
                    f"{tuple(part.shape)}"
                )
        return rows
