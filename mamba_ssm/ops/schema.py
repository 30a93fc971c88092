"""Every internal torch op on one page: schema, shape function, one-line meaning.

The ops live in the torch namespace ``mamba_ssm::``, are private, have fixed arity and carry no
autograd: the public functions wrap them in ``torch.autograd.Function``. Each op exists twice:

- ``_name``: dispatches to a compiled kernel where one is registered, else to the reference;
- ``_name.reference``: always the pure PyTorch reference, so that it can be chosen explicitly.

Letters: b batch, d channels, l length, n state size, g groups, w conv width, S number of states
(the batch, or with ``seq_idx`` the number of sequences), k number of chunks. An absent optional
result is an empty tensor of shape (0,).

Index conventions shared by the sequence ops: ``seq_idx`` (b, l) int32 restarts the state where the
id changes; a negative id is padding (output 0, state untouched, gradient 0); states passed in or
out are then indexed by the id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .dtypes import accumulate_dtype
from .layout import empty_like_layout
from .reference import causal_conv1d as _ref_conv
from .reference import cross_entropy as _ref_loss
from .reference import decode as _ref_decode
from .reference import mamba_block as _ref_block
from .reference import mixer_step as _ref_mixer
from .reference import norm as _ref_norm
from .reference import sampling as _ref_sampling
from .reference import selective_scan as _ref_scan
from .reference import state_update as _ref_update

NAMESPACE = "mamba_ssm"


@dataclass(frozen=True)
class Op:
    """One internal op: its arguments and results, what it means, its reference and its fake."""

    name: str
    signature: str
    meaning: str
    reference: Callable
    fake: Callable


def _absent(like: Tensor) -> Tensor:
    return like.new_empty((0,))


def _optional_like(x: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    if x is None:
        return _absent(like)
    return x.new_empty(x.shape, dtype=dtype)


def _number_of_chunks(length: int, chunk_size: int) -> int:
    if isinstance(length, torch.SymInt):
        # Imported here: it brings sympy, which takes half a second.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        # Of a symbolic length torch would not see that one chunk holds it all.
        if statically_known_true(chunk_size >= length):
            return 1
    return (length + chunk_size - 1) // chunk_size


def _scan_fwd_fake(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    delta_softplus,
    initial_state,
    seq_idx,
    num_states,
    chunk_size,
):
    b, d, length = u.shape
    acc = accumulate_dtype(u, delta, A, initial_state)
    return (
        empty_like_layout(u),
        u.new_empty((num_states, d, A.shape[1]), dtype=acc),
        u.new_empty((b, _number_of_chunks(length, chunk_size), d, A.shape[1]), dtype=acc),
    )


def _scan_bwd_fake(
    dout, dfinal_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx,
    num_states, chunk_size, chunk_states,
):  # fmt: skip
    acc = accumulate_dtype(u, delta, A, initial_state)
    return (
        empty_like_layout(u),
        empty_like_layout(delta),
        A.new_empty(A.shape, dtype=acc),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        _optional_like(D, u, acc),
        _absent(u) if z is None else empty_like_layout(z),
        _optional_like(delta_bias, u, acc),
        _optional_like(initial_state, u, acc),
    )


def _conv_fwd_fake(x, weight, bias, initial_states, seq_idx, num_states, silu):
    return empty_like_layout(x), x.new_empty((num_states, x.shape[1], weight.shape[1] - 1))


def _conv_bwd_fake(dout, dfinal_states, x, weight, bias, initial_states, seq_idx, num_states, silu):
    acc = accumulate_dtype(x, weight)
    return (
        empty_like_layout(x),
        weight.new_empty(weight.shape, dtype=acc),
        _optional_like(bias, x, acc),
        _optional_like(initial_states, x),
    )


def _conv_update_fake(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    return x.new_empty(x.shape)


def _state_update_fake(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices):
    return x.new_empty(x.shape)


def _norm_fwd_fake(x, residual, weight, bias, eps, is_rms_norm, residual_dtype):
    rows = x.shape[0]
    acc = accumulate_dtype(x, residual)
    residual_out = _absent(x)
    if residual is not None or residual_dtype not in (None, x.dtype):
        residual_out = x.new_empty(x.shape, dtype=residual_dtype or x.dtype)
    mean = _absent(x).to(acc) if is_rms_norm else x.new_empty((rows,), dtype=acc)
    return x.new_empty(x.shape), residual_out, mean, x.new_empty((rows,), dtype=acc)


def _norm_bwd_fake(
    dy, dresidual_out, x, residual, weight, bias, mean, rstd, is_rms_norm, dx_dtype, other_dtype
):  # fmt: skip
    acc = accumulate_dtype(x, residual)
    return (
        dy.new_empty(dy.shape, dtype=dx_dtype or acc),
        _absent(dy) if other_dtype is None else dy.new_empty(dy.shape, dtype=other_dtype),
        weight.new_empty(weight.shape, dtype=acc),
        _optional_like(bias, dy, acc),
    )


def _decode_step_fake(ids, embedding, pack, layout, conv_states, ssm_states):
    # The vocabulary stands in the layout; a model's logits have as many columns as its embedding.
    return embedding.new_empty((ids.shape[0], embedding.shape[0]))


def _decode_step_weights_fake(
    ids, embedding, weights, scales, eps, is_rms_norm, residual_dtype, conv_states, ssm_states
):
    return embedding.new_empty((ids.shape[0], weights[-1].shape[0]))


def _block_fwd_fake(
    hidden, in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj, dtype,
    chunk_size,
):  # fmt: skip
    b, length, m = hidden.shape
    d, n = A_log.shape
    acc = torch.promote_types(dtype, torch.float32)

    def new(*shape, dtype=dtype):
        return hidden.new_empty(shape, dtype=dtype)

    rows = new(b * length, m)
    if hidden.dtype == dtype and hidden.is_contiguous():
        rows = new(0)
    used = [
        new(0) if weight.dtype == dtype else new(*weight.shape)
        for weight in (in_proj, x_proj, dt_proj, out_proj)
    ]
    return (
        new(b, length, out_proj.shape[0]),
        rows,
        new(b * length, 2 * d),
        new(b * length, x_proj.shape[0]),
        new(d, n, dtype=acc),
        new(b * length, d),
        new(b, _number_of_chunks(length, chunk_size), d, n, dtype=acc),
        new(b, d, n, dtype=acc),
        *used,
        new(b * length, d),
        new(b * length, d),
    )


def _block_bwd_fake(
    d_rows, y, out_proj, rows, xz, x_dbl, conv, delta, A, states, in_proj, conv_weight, conv_bias,
    x_proj, dt_proj, dt_bias, D, hidden_dtype, in_dtype, x_dtype, dt_dtype, out_dtype, wanted,
    chunk_size,
):  # fmt: skip
    wide = torch.promote_types(xz.dtype, torch.float32)

    def gradient(bit: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        if not wanted & bit:
            return _absent(xz)
        return xz.new_empty(like.shape, dtype=wide if dtype == torch.float32 else xz.dtype)

    d_hidden = gradient(1, rows, hidden_dtype)
    return (
        d_hidden.unflatten(0, (states.shape[0], -1)) if wanted & 1 else d_hidden,
        gradient(2, in_proj, in_dtype),
        conv_weight.new_empty(conv_weight.shape, dtype=wide),
        _optional_like(conv_bias, xz, wide),
        gradient(4, x_proj, x_dtype),
        gradient(8, dt_proj, dt_dtype),
        _optional_like(dt_bias, xz, wide),
        A.new_empty(A.shape),
        D.new_empty(D.shape, dtype=wide),
        gradient(16, out_proj, out_dtype),
        torch.empty_like(xz) if wanted & 32 else _absent(xz),
    )


def _mixer_step_fake(
    xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, conv_state, ssm_state
):
    return xz.new_empty((xz.shape[0], A_log.shape[0]))


def _cross_entropy_fake(logits, targets, ignore_index):
    return logits.new_empty((logits.shape[0],), dtype=accumulate_dtype(logits))


OPS: tuple[Op, ...] = (
    Op(
        "_selective_scan_fwd",
        "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
        "Tensor? delta_bias, bool delta_softplus, Tensor? initial_state, Tensor? seq_idx, "
        "SymInt num_states, SymInt chunk_size) -> "
        "(Tensor out, Tensor final_state, Tensor chunk_states)",
        "u, delta, z (b,d,l); A (d,n); B, C (d,n) or (b,g,n,l) -> out (b,d,l), final_state "
        "(S,d,n), "
        "chunk_states (b,k,d,n): the state entering each chunk of chunk_size steps",
        _ref_scan.selective_scan_fwd,
        _scan_fwd_fake,
    ),
    Op(
        "_selective_scan_bwd",
        "(Tensor dout, Tensor? dfinal_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
        "Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus, Tensor? initial_state, "
        "Tensor? seq_idx, SymInt num_states, SymInt chunk_size, Tensor chunk_states) -> "
        "(Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, "
        "Tensor ddelta_bias, Tensor dinitial_state)",
        "gradients of _selective_scan_fwd; du, ddelta, dB, dC, dz in their input's dtype, the rest "
        "fp32",
        _ref_scan.selective_scan_bwd,
        _scan_bwd_fake,
    ),
    Op(
        "_causal_conv1d_fwd",
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? seq_idx, "
        "SymInt num_states, bool silu) -> (Tensor out, Tensor final_states)",
        "depthwise causal convolution of x (b,d,l) with weight (d,w), then SiLU if asked; "
        "states (S,d,w-1) are the last w-1 inputs",
        _ref_conv.causal_conv1d_fwd,
        _conv_fwd_fake,
    ),
    Op(
        "_causal_conv1d_bwd",
        "(Tensor dout, Tensor? dfinal_states, Tensor x, Tensor weight, Tensor? bias, "
        "Tensor? initial_states, Tensor? seq_idx, SymInt num_states, bool silu) -> "
        "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_states)",
        "gradients of _causal_conv1d_fwd; dx, dinitial_states in x's dtype, dweight, dbias fp32",
        _ref_conv.causal_conv1d_bwd,
        _conv_bwd_fake,
    ),
    Op(
        "_causal_conv1d_update",
        "(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, "
        "Tensor? cache_seqlens, Tensor? conv_state_indices) -> Tensor",
        "the convolution for a few new inputs x (b,d,l); conv_state (S,d,s>=w-1) is moved on in "
        "place, as a ring buffer when cache_seqlens is given",
        _ref_conv.causal_conv1d_update,
        _conv_update_fake,
    ),
    Op(
        "_state_update",
        "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
        "Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices) -> Tensor",
        "one step of the recurrence with h heads of p channels: state (S,h,p,n) in place; x, dt, z "
        "(b,h,p); A (h,p,n); B, C (b,g,n); D, dt_bias (h,p) -> (b,h,p)",
        _ref_update.state_update,
        _state_update_fake,
    ),
    Op(
        "_mixer_step",
        "(Tensor xz, Tensor conv_weight, Tensor? conv_bias, Tensor x_proj, Tensor dt_proj, "
        "Tensor? dt_bias, Tensor A_log, Tensor D, Tensor(a!) conv_state, Tensor(b!) ssm_state) "
        "-> Tensor",
        "one token of a mixer between in_proj and out_proj: xz (b,2d) -> (b,d); conv_weight (d,w), "
        "conv_state (b,d,w) and ssm_state (b,d,n) are moved on in place",
        _ref_mixer.mixer_step,
        _mixer_step_fake,
    ),
    Op(
        "_add_norm_fwd",
        "(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool is_rms_norm, "
        "ScalarType? residual_dtype) -> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)",
        "rows x (m,d): residual_out = x + residual (absent where it would be x itself), "
        "y = norm(residual_out) from the unrounded sum; mean (m,) is absent for RMS, rstd (m,)",
        _ref_norm.add_norm_fwd,
        _norm_fwd_fake,
    ),
    Op(
        "_add_norm_bwd",
        "(Tensor dy, Tensor? dresidual_out, Tensor x, Tensor? residual, Tensor weight, "
        "Tensor? bias, Tensor mean, Tensor rstd, bool is_rms_norm, ScalarType? dx_dtype, "
        "ScalarType? other_dtype) -> (Tensor dx, Tensor other, Tensor dweight, Tensor dbias)",
        "gradients of _add_norm_fwd, fp32 unless a dtype says else; dx is that of the sum "
        "x + residual, which may also be given whole as x; other is dx in a second dtype, if asked",
        _ref_norm.add_norm_bwd,
        _norm_bwd_fake,
    ),
    Op(
        "_decode_step",
        "(Tensor ids, Tensor embedding, Tensor pack, Tensor layout, Tensor(a!)[] conv_states, "
        "Tensor(b!)[] ssm_states) -> Tensor",
        "one token of a whole language model (ops/decode_layout.py): ids (b,) -> logits (b, vocab) "
        "in the embedding's dtype; each layer's states (b,d,w) and (b,d,n) are moved on in place",
        _ref_decode.decode_step,
        _decode_step_fake,
    ),
    Op(
        "_decode_and_choose",
        "(Tensor ids, Tensor embedding, Tensor pack, Tensor layout, Tensor(a!)[] conv_states, "
        "Tensor(b!)[] ssm_states, Tensor(c!) logits, Tensor(d!) tokens, Tensor? seen, "
        "Tensor? uniform, int vocab_size, int top_k, float top_p, float min_p, float temperature, "
        "float repetition_penalty) -> ()",
        "_decode_step with its logits (b, vocab) and the next tokens (b,) written in place: the "
        "first of the largest among vocab_size logits, those in seen (b, vocab) penalised, or "
        "with uniform (b,) fp64 in [0, 1) the token at that part of the filtered distribution; "
        "-1 where infinities or NaN leave no distribution",
        _ref_decode.decode_and_choose,
        lambda *arguments: None,
    ),
    Op(
        "_decode_step_weights",
        "(Tensor ids, Tensor embedding, Tensor[] weights, Tensor[] scales, float eps, "
        "bool is_rms_norm, ScalarType residual_dtype, Tensor(a!)[] conv_states, "
        "Tensor(b!)[] ssm_states) -> Tensor",
        "_decode_step from the model's own weights and int8 ones' scales, as ops/decode_weights.py "
        "lists them: ids (b,) -> logits (b, vocab)",
        _ref_decode.decode_step_weights,
        _decode_step_weights_fake,
    ),
    Op(
        "_prefill_layers",
        "(Tensor hidden, Tensor[] weights, float eps, bool is_rms_norm, ScalarType residual_dtype, "
        "Tensor(a!)[] conv_states, Tensor(b!)[] ssm_states) -> Tensor",
        "all layers and the last norm of a language model from zero states: the last step (b,m) "
        "of hidden (b,l,m), l >= the convolution's width; weights as ops/decode_weights.py lists "
        "them, but for lm_head, in_proj and out_proj without biases; each layer's states (b,d,w) "
        "and (b,d,n) are written",
        _ref_decode.prefill_layers,
        lambda hidden, *others: hidden.new_empty((hidden.shape[0], hidden.shape[2])),
    ),
    Op(
        "_mamba_block_fwd",
        "(Tensor hidden, Tensor in_proj, Tensor conv_weight, Tensor? conv_bias, Tensor x_proj, "
        "Tensor dt_proj, Tensor? dt_bias, Tensor A_log, Tensor D, Tensor out_proj, "
        "ScalarType dtype, SymInt chunk_size) -> (Tensor out, Tensor rows, Tensor xz, "
        "Tensor x_dbl, Tensor A, Tensor y, Tensor states, Tensor final_state, Tensor in_used, "
        "Tensor x_used, Tensor dt_used, Tensor out_used, Tensor conv, Tensor delta)",
        "the mixer of hidden (b,l,m) in dtype: out (b,l,e); what its backward needs as rows "
        "(b l,·), and hidden's rows and the weights in dtype, absent where they came so; conv and "
        "delta, which it computes again if they are not given",
        _ref_block.mamba_block_fwd,
        _block_fwd_fake,
    ),
    Op(
        "_mamba_block_bwd",
        "(Tensor d_rows, Tensor? y, Tensor out_proj, Tensor? rows, Tensor xz, Tensor x_dbl, "
        "Tensor? conv, Tensor? delta, Tensor A, Tensor states, Tensor? in_proj, "
        "Tensor conv_weight, Tensor? conv_bias, "
        "Tensor x_proj, Tensor dt_proj, Tensor? dt_bias, Tensor D, ScalarType hidden_dtype, "
        "ScalarType in_dtype, ScalarType x_dtype, ScalarType dt_dtype, ScalarType out_dtype, "
        "int wanted, SymInt chunk_size) -> "
        "(Tensor d_hidden, Tensor d_in, Tensor d_conv_weight, Tensor d_conv_bias, Tensor d_x, "
        "Tensor d_dt, Tensor d_dt_bias, Tensor dA_log, Tensor dD, Tensor d_out, Tensor dxz)",
        "gradients of _mamba_block_fwd from d_rows, that of out's rows; those of hidden, in_proj, "
        "x_proj, dt_proj, out_proj and xz where bits 1, 2, 4, 8, 16, 32 of wanted are set, in "
        "fp32 where their dtype is; y goes with bit 16, rows and in_proj with bits 1 and 2",
        _ref_block.mamba_block_bwd,
        _block_bwd_fake,
    ),
    Op(
        "_argmax_rows",
        "(Tensor values, Tensor(a!) places) -> ()",
        "where the largest of each row (b,v) stands into places (b,) int64: the first among "
        "equals, or the first NaN",
        _ref_sampling.argmax_rows,
        lambda values, places: None,
    ),
    Op(
        "_cross_entropy",
        "(Tensor(a!) logits, Tensor targets, int ignore_index) -> Tensor",
        "losses (t,) in fp32 of logits (t,V), rows contiguous, against targets (t,) int64; the "
        "logits become the gradient of the losses' sum; both are 0 for an ignored target",
        _ref_loss.cross_entropy,
        _cross_entropy_fake,
    ),
    Op(
        "_pack_weight",
        "(Tensor weight, Tensor(a!) into) -> ()",
        "a linear weight (out, in), rows contiguous, into its zeroed place in a pack",
        _ref_decode.pack_weight,
        lambda weight, into: None,
    ),
)

_library = torch.library.Library(NAMESPACE, "DEF")


def _register(op: Op) -> None:
    for overload in ("", ".reference"):
        name = op.name + overload
        _library.define(name + op.signature)
        _library.impl(name, op.reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", op.fake, lib=_library)


for _op in OPS:
    _register(_op)
