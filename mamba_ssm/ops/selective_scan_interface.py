"""The selective scan (arXiv 2312.00752, algorithm 2): public functions, and their autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend
from ._autograd import (
    differentiable_backward,
    needs_grad,
    run,
    transformed,
    wants_double_backward,
)
from .chunking import chunk_size_for
from .dtypes import accumulate_dtype, no_wider_than
from .layer_norm import rms_norm_forward
from .mamba_inner import MambaInnerFn, mamba_inner_fn, mamba_inner_ref
from .packing import check_sequence_numbers, resolve_packing
from .reference.scan_oracle import selective_scan_sequential
from .scan_checks import check_initial_state, check_scan_arguments
from .scan_groups import same_groups, sum_groups

__all__ = [
    "MambaInnerFn",
    "SelectiveScanFn",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "rms_norm_forward",
    "selective_scan_fn",
    "selective_scan_ref",
]


class SelectiveScanFn(torch.autograd.Function):
    """Autograd over the scan ops. ``apply`` takes selective_scan_fn's positional arguments."""

    @staticmethod
    def forward(
        ctx,
        u,
        delta,
        A,
        B,
        C,
        D=None,
        z=None,
        delta_bias=None,
        delta_softplus=False,
        return_last_state=False,
        initial_state=None,
        seq_idx=None,
        num_states=None,
        keep_states=True,
    ):
        ctx.set_materialize_grads(False)
        if seq_idx is None:
            num_states = u.shape[0]
        ctx.delta_softplus, ctx.num_states = delta_softplus, num_states
        ctx.return_last_state = bool(return_last_state)
        tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx)
        if A.is_complex():
            backend.only_reference("a scan with complex A")
            ctx.save_for_backward(*tensors, None)
            out, final = _sequential(ctx, *tensors)
            return (out, final) if return_last_state else out
        B_, C_ = same_groups(B, C)
        op = backend.resolve("_selective_scan_fwd", u.device.type, u.dtype)
        ctx.chunk_size = chunk_size_for(u.shape[2], op, u.device.type, keep_states)
        out, final, chunk_states = op(
            u, delta, A, B_, C_, D, z, delta_bias, delta_softplus, initial_state, seq_idx,
            num_states, ctx.chunk_size,
        )  # fmt: skip
        ctx.save_for_backward(*tensors, chunk_states)
        return (out, final) if return_last_state else out

    @staticmethod
    def backward(ctx, dout, dfinal=None):
        *tensors, chunk_states = ctx.saved_tensors
        u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx = tensors
        nothing = (None,) * 14
        if dout is None and dfinal is None:
            return nothing
        if A.is_complex() or wants_double_backward():
            grads = differentiable_backward(
                lambda *t: _sequential(ctx, *t, seq_idx), tuple(tensors[:9]), (dout, dfinal)
            )
            return (*grads[:8], None, None, grads[8], None, None, None)
        if dout is None:
            dout = torch.zeros_like(u)
        B_, C_ = same_groups(B, C)
        op = backend.resolve("_selective_scan_bwd", u.device.type, u.dtype)
        du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = op(
            dout, dfinal, u, delta, A, B_, C_, D, z, delta_bias, ctx.delta_softplus, initial_state,
            seq_idx, ctx.num_states, ctx.chunk_size, chunk_states,
        )  # fmt: skip
        return (
            du,
            ddelta,
            dA.to(A.dtype),
            sum_groups(dB, B).to(B.dtype),
            sum_groups(dC, C).to(C.dtype),
            None if D is None else dD.to(D.dtype),
            None if z is None else dz,
            None if delta_bias is None else dbias.to(delta_bias.dtype),
            None,
            None,
            None if initial_state is None else dinitial.to(initial_state.dtype),
            None,
            None,
            None,
        )


def _sequential(ctx, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx):
    return selective_scan_sequential(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        ctx.delta_softplus,
        initial_state,
        seq_idx,
        ctx.num_states,
    )


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan: h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t.

    Source: arXiv 2312.00752, algorithm 2 and eq. 2a; the gate is that of section 3.4.

    Args:
        u, delta, z: (b, d, l), one dtype of fp32, fp16, bf16 (fp64 on the reference). Any strides.
        A: (d, n) fp32 or complex64, n from 1 to 256. Real parameters are used in fp32 (fp64 with
            fp64 activations).
        B, C: constant (d, n), or variable (b, n, l) or (b, g, n, l) in u's dtype, g dividing d.
            With complex A the last dimension of a variable one is 2 l, real and imaginary
            parts interleaved, and y is 2 Re(C h).
        D, delta_bias: (d,) fp32.
        delta_softplus: apply softplus (identity above 20) to delta + delta_bias.
        return_last_state: also return the final state.
        initial_state: (b, d, n) fp32, or with packing (num_sequences, d, n).
        seq_idx: (b, l) int32; the state restarts where it changes; negative is padding.
        cu_seqlens: (num_sequences + 1,) int32 bounds of a packed batch of one, instead of seq_idx.
        num_sequences: the number of states when ``seq_idx`` is given; by default that of
            ``initial_state``, else b.

    Returns:
        out (b, d, l) in u's dtype, gated by silu(z) if z is given; with ``return_last_state`` the
        tuple (out, last_state), last_state (b or num_sequences, d, n) in A's dtype. Both are
        differentiable, with respect to every tensor argument.

    Raises:
        ValueError: shape, device or group count; TypeError: dtype; IndexError: a sequence number
        without a state; BackendError: an explicitly chosen backend does not serve the call.
    """
    check_scan_arguments(u, delta, A, B, C, D, z, delta_bias)
    b, _, length = u.shape
    seq_idx, num_states = resolve_packing(
        b, length, u.device, seq_idx, cu_seqlens, num_sequences, initial_state
    )
    if seq_idx is not None:
        if initial_state is None and not return_last_state:
            num_states = 0
        else:
            check_sequence_numbers(seq_idx, num_states)
    check_initial_state(initial_state, num_states, A, u)
    acc = accumulate_dtype(u)
    if not A.is_complex():
        A = A.to(acc)
        D, delta_bias = no_wider_than(D, acc), no_wider_than(delta_bias, acc)
        initial_state = None if initial_state is None else initial_state.to(acc)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if transformed("a selective scan"):
        results = selective_scan_sequential(
            *tensors[:8], delta_softplus, initial_state, seq_idx, num_states
        )
        return results if return_last_state else results[0]
    return run(
        SelectiveScanFn, *tensors[:8], delta_softplus, return_last_state, initial_state, seq_idx,
        num_states, needs_grad(*tensors),
    )  # fmt: skip


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`selective_scan_fn` one step after the other in plain differentiable torch: the oracle.

    Same arguments, results and errors; twice differentiable; its memory grows with b d l n.
    """
    check_scan_arguments(u, delta, A, B, C, D, z, delta_bias)
    seq_idx, num_states = resolve_packing(
        u.shape[0], u.shape[2], u.device, seq_idx, cu_seqlens, num_sequences, initial_state
    )
    if seq_idx is not None and initial_state is None and not return_last_state and seq_idx.numel():
        num_states = max(num_states, int(seq_idx.max()) + 1)
    check_sequence_numbers(seq_idx, num_states)
    check_initial_state(initial_state, num_states, A, u)
    out, final = selective_scan_sequential(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, num_states
    )
    return (out, final) if return_last_state else out
