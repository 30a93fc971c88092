"""The historical extension module ``selective_scan_cuda``, over this library's ops, on any device.

Research code imports it directly. No gradient flows through these functions: :func:`bwd` is the
gradient of :func:`fwd`. New code wants ``mamba_ssm.selective_scan_fn``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_ssm.ops import backend
from mamba_ssm.ops.chunking import chunk_size_for
from mamba_ssm.ops.dtypes import accumulate_dtype
from mamba_ssm.ops.scan_checks import check_scan_arguments
from mamba_ssm.ops.scan_groups import same_groups, sum_groups

__all__ = ["bwd", "fwd"]

# The historical kernels keep a state for every so many steps, in ``x``.
_KEPT_EVERY = 2048


def _checked(u, delta, A, B, C, D, z, delta_bias) -> None:
    for name, x in (("B", B), ("C", C)):
        if x.dim() == 3:
            raise ValueError(
                f"{name} must be (b, g, n, l) or (d, n) here, but is {tuple(x.shape)}; "
                f"use {name}.unsqueeze(1)"
            )
    if A.is_complex():
        raise TypeError("complex A is served by selective_scan_fn, not by selective_scan_cuda")
    check_scan_arguments(u, delta, A, B, C, D, z, delta_bias)


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    op = backend.resolve("_selective_scan_fwd", u.device.type, u.dtype)
    chunk = min(_KEPT_EVERY, chunk_size_for(u.shape[2], op, u.device.type))
    arguments = (
        u, delta, A, *same_groups(B, C), D, z, delta_bias, delta_softplus, None, None, u.shape[0],
        chunk,
    )  # fmt: skip
    return op(*arguments), arguments


def _kept_states(delta, A, delta_bias, delta_softplus, final: Tensor, states: Tensor, chunk: int):
    """x (b, d, ceil(l / 2048), 2n): decay products since the start, and states, interleaved."""
    length = delta.shape[2]
    kept = -(-length // _KEPT_EVERY)
    acc = accumulate_dtype(delta, A)
    dt = delta.to(acc)
    if delta_bias is not None:
        dt = dt + delta_bias.to(acc)[:, None]
    if delta_softplus:
        dt = torch.nn.functional.softplus(dt, threshold=20.0)
    ends = torch.arange(1, kept + 1, device=delta.device) * _KEPT_EVERY
    total = dt.cumsum(dim=-1).index_select(-1, ends.clamp(max=length) - 1)  # (b, d, kept)
    x = torch.empty((*total.shape, 2 * A.shape[1]), dtype=acc, device=delta.device)
    x[..., 0::2] = torch.exp(total[..., None] * A.to(acc)[:, None])
    entering = states[:, :: _KEPT_EVERY // chunk]  # (b, kept, d, n)
    x[..., :-1, 1::2] = entering[:, 1:].transpose(1, 2)
    if kept:
        x[..., -1, 1::2] = final
    return x


@torch.no_grad()
def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """``[out, x]`` or, with z, ``[out, x, out_z]``.

    u, delta, z (b, d, l); A (d, n); B, C (b, g, n, l) or (d, n); D, delta_bias (d,).
    out (b, d, l) is not gated, out_z is. x (b, d, ceil(l / 2048), 2n): ``x[..., 1::2]`` is the
    state at the end of each 2048 steps, ``x[..., 0::2]`` the product of decays since the start.
    Raises ValueError and TypeError as selective_scan_fn does.
    """
    _checked(u, delta, A, B, C, D, z, delta_bias)
    (out, final, states), arguments = _scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    x = _kept_states(delta, A, delta_bias, delta_softplus, final, states, arguments[-1])
    if z is None:
        return [out, x]
    (out_z, _, _), _ = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return [out, x, out_z]


@torch.no_grad()
def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """``[du, ddelta, dA, dB, dC, dD, ddelta_bias]``, then dz if z is given, then out_z if asked.

    Arguments as in :func:`fwd`; dout (b, d, l) is the gradient of out_z if z is given, else of out.
    ``x`` and ``out`` are accepted and not needed: states are recomputed. A given ``dz`` is filled.
    dD and ddelta_bias are None where D and delta_bias are. Raises as :func:`fwd` does.
    """
    _checked(u, delta, A, B, C, D, z, delta_bias)
    for name, gradient in (("dout", dout), ("dz", dz)):
        if gradient is not None and gradient.shape != u.shape:
            found = tuple(gradient.shape)
            raise ValueError(f"{name} must have u's shape {tuple(u.shape)}, but has {found}")
        if gradient is not None and gradient.device != u.device:
            raise ValueError(f"{name} is on {gradient.device}, but u is on {u.device}")
    if z is None and (dz is not None or recompute_out_z):
        raise ValueError("dz and recompute_out_z need z, which is None")
    (gated, _, states), arguments = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    op = backend.resolve("_selective_scan_bwd", u.device.type, u.dtype)
    du, ddelta, dA, dB, dC, dD, dz_new, dbias, _ = op(dout, None, *arguments, states)
    results = [
        du,
        ddelta,
        dA,
        sum_groups(dB, B),
        sum_groups(dC, C),
        None if D is None else dD,
        None if delta_bias is None else dbias,
    ]
    if z is not None:
        results.append(dz_new if dz is None else dz.copy_(dz_new))
        if recompute_out_z:
            results.append(gated)
    return results
