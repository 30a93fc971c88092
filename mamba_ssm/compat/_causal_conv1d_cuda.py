"""``causal_conv1d_cuda``: the compiled module's two functions that model code calls directly.

As in release 1.4; for example FalconMamba's fused training in transformers 4.x. On any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """x (b, d, l), weight (d, w) → (b, d, l), without autograd; fills ``final_states_out``.

    Raises what :func:`mamba_ssm.ops.causal_conv1d.causal_conv1d_fn` raises.
    """
    with torch.no_grad():
        out = causal_conv1d_fn(
            x,
            weight,
            bias,
            seq_idx=seq_idx,
            initial_states=initial_states,
            return_final_states=final_states_out is not None,
            final_states_out=final_states_out,
            activation="silu" if silu_activation else None,
        )
    return out if final_states_out is None else out[0]


def causal_conv1d_bwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dinitial_states); ``dx`` is written into the tensor given, if any.

    Raises what :func:`mamba_ssm.ops.causal_conv1d.causal_conv1d_fn` raises.
    """
    states = initial_states if return_dinitial_states else None
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, states)]
    with torch.enable_grad():
        out = causal_conv1d_fn(
            *leaves[:3],
            seq_idx=seq_idx,
            initial_states=leaves[3] if return_dinitial_states else initial_states,
            return_final_states=dfinal_states is not None,
            activation="silu" if silu_activation else None,
        )
    outputs, grads = ((out,), (dout,)) if dfinal_states is None else (out, (dout, dfinal_states))
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(outputs, wanted, grads))
    results = [None if t is None else next(found) for t in leaves]
    if dx is not None:
        results[0] = dx.copy_(results[0])
    return tuple(results)
