"""The Mamba mixer's forward and backward in one call each, in pure PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .causal_conv1d import causal_conv1d_bwd, causal_conv1d_fwd
from .selective_scan import selective_scan_bwd, selective_scan_fwd


def _sequences(rows: Tensor, batch: int) -> Tensor:
    """(b l, d) as (b, d, l)."""
    return rows.unflatten(0, (batch, -1)).transpose(1, 2)


def _rows(sequences: Tensor) -> Tensor:
    return sequences.transpose(1, 2).flatten(0, 1)


def _scan_inputs(conv, delta, xz, x_dbl, A, D, dt_bias, chunk_size) -> tuple:
    b, n = conv.shape[0], A.shape[1]
    rank = x_dbl.shape[1] - 2 * n
    B, C = (_sequences(x_dbl[:, i : i + n], b).unsqueeze(1) for i in (rank, rank + n))
    z = _sequences(xz[:, conv.shape[1] :], b)
    return conv, delta, A, B, C, D, z, dt_bias, True, None, None, b, chunk_size


def _made(used: Tensor, given: Tensor) -> Tensor:
    """An argument as it came is no result."""
    return used if used.dtype != given.dtype else used.new_empty((0,))


def mamba_block_fwd(
    hidden: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    dtype: torch.dtype,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    """Internal op ``_mamba_block_fwd``: see ``ops/schema.py`` for shapes."""
    b = hidden.shape[0]
    weights = (in_proj, x_proj, dt_proj, out_proj)
    w_in, w_x, w_dt, w_out = (weight.to(dtype) for weight in weights)
    rows = hidden.flatten(0, 1).to(dtype)
    xz = rows @ w_in.t()
    x = _sequences(xz[:, : D.shape[0]], b)
    conv, _ = causal_conv1d_fwd(x, conv_weight.flatten(1), conv_bias, None, None, b, True)
    x_dbl = _rows(conv) @ w_x.t()
    delta = _sequences(x_dbl[:, : dt_proj.shape[1]] @ w_dt.t(), b)
    A = -torch.exp(A_log.to(torch.promote_types(dtype, torch.float32)))
    inputs = _scan_inputs(conv, delta, xz, x_dbl, A, D, dt_bias, chunk_size)
    y, final_state, states = selective_scan_fwd(*inputs)
    y = _rows(y).contiguous()
    out = (y @ w_out.t()).unflatten(0, (b, -1))
    made = zip((w_in, w_x, w_dt, w_out), weights, strict=True)
    copied = rows.dtype != hidden.dtype or not hidden.is_contiguous()
    kept = rows.contiguous() if copied else rows.new_empty((0,))
    used = (_made(*pair) for pair in made)
    again = (_rows(conv).contiguous(), _rows(delta).contiguous())
    return out, kept, xz, x_dbl, A, y, states, final_state, *used, *again


def mamba_block_bwd(
    d_rows: Tensor,
    y: Tensor | None,
    out_proj: Tensor,
    rows: Tensor | None,
    xz: Tensor,
    x_dbl: Tensor,
    conv: Tensor | None,
    delta: Tensor | None,
    A: Tensor,
    states: Tensor,
    in_proj: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor | None,
    D: Tensor,
    hidden_dtype: torch.dtype,
    in_dtype: torch.dtype,
    x_dtype: torch.dtype,
    dt_dtype: torch.dtype,
    out_dtype: torch.dtype,
    wanted: int,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    """Internal op ``_mamba_block_bwd``: see ``ops/schema.py`` for shapes."""
    b, rank, none = states.shape[0], dt_proj.shape[1], xz.new_empty((0,))

    def product(bit: int, a: Tensor, b: Tensor | None, dtype: torch.dtype) -> Tensor:
        if not wanted & bit:
            return none.clone()
        wide = dtype == torch.float32 and a.dtype != torch.float64
        return a.float() @ b.float() if wide else a @ b

    x, taps = _sequences(xz[:, : D.shape[0]], b), conv_weight.flatten(1)
    if conv is None:
        conv = _rows(causal_conv1d_fwd(x, taps, conv_bias, None, None, b, True)[0])
    if delta is None:
        delta = x_dbl[:, :rank] @ dt_proj.t()
    conv, delta = _sequences(conv, b), _sequences(delta, b)
    inputs = _scan_inputs(conv, delta, xz, x_dbl, A, D, dt_bias, chunk_size)
    du, ddelta, dA, dB, dC, dD, dz, d_dt_bias, _ = selective_scan_bwd(
        _sequences(d_rows @ out_proj, b), None, *inputs, states
    )
    ddelta = _rows(ddelta)
    dx_dbl = torch.cat([ddelta @ dt_proj, _rows(dB.squeeze(1)), _rows(dC.squeeze(1))], dim=1)
    d_conv = _sequences(_rows(du) + dx_dbl @ x_proj, b)
    dx, d_taps, d_conv_bias, _ = causal_conv1d_bwd(
        d_conv, None, x, taps, conv_bias, None, None, b, True
    )
    dxz = torch.cat([_rows(dx), _rows(dz)], dim=1)
    d_hidden = product(1, dxz, in_proj, hidden_dtype)
    return (
        d_hidden.unflatten(0, (b, -1)) if wanted & 1 else d_hidden,
        product(2, dxz.t(), rows, in_dtype),
        d_taps.view(conv_weight.shape),
        d_conv_bias,
        product(4, dx_dbl.t(), _rows(conv), x_dtype),
        product(8, ddelta.t(), x_dbl[:, :rank], dt_dtype),
        d_dt_bias,
        dA * A,
        dD,
        product(16, d_rows.t(), y, out_dtype),
        dxz if wanted & 32 else none.clone(),
    )
