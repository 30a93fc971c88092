"""Small models for the synthetic tasks: Mamba, and two layers with one of its parts taken away."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_ssm import Mamba, MambaLMHeadModel, selective_scan_fn
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn


class UngatedMamba(Mamba):
    """S6 without gating: the Mamba layer without its branch z."""

    def __init__(self, d_model: int, **kwargs) -> None:
        super().__init__(d_model, **kwargs)
        self.in_proj = nn.Linear(d_model, self.d_inner, bias=False)

    def forward(self, hidden_states: Tensor, inference_params: None = None) -> Tensor:
        """(b, l, d_model) → (b, l, d_model)."""
        x = self.in_proj(hidden_states).transpose(1, 2)
        x = causal_conv1d_fn(x, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")
        projected = self.x_proj(x.transpose(1, 2))
        delta, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan_fn(
            x,
            F.linear(delta, self.dt_proj.weight).transpose(1, 2),
            -torch.exp(self.A_log),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
        )
        return self.out_proj(y.transpose(1, 2))


class TimeInvariantMamba(Mamba):
    """The Mamba layer without selection: delta, B and C are parameters, the same at every time.

    That makes the state space model linear and time-invariant (S4D, in the Mamba architecture).
    Delta keeps its initialisation; B starts as ones and C as standard normal, as S4D's do.
    """

    def __init__(self, d_model: int, **kwargs) -> None:
        super().__init__(d_model, **kwargs)
        self.delta_bias = nn.Parameter(self.dt_proj.bias.detach().clone())
        self.B = nn.Parameter(torch.ones(self.d_inner, self.d_state))
        self.C = nn.Parameter(torch.randn(self.d_inner, self.d_state))
        del self.x_proj, self.dt_proj

    def forward(self, hidden_states: Tensor, inference_params: None = None) -> Tensor:
        """(b, l, d_model) → (b, l, d_model)."""
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        x = causal_conv1d_fn(x, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")
        y = selective_scan_fn(
            x,
            torch.zeros_like(x),
            -torch.exp(self.A_log),
            self.B.to(x.dtype),
            self.C.to(x.dtype),
            self.D,
            z=z,
            delta_bias=self.delta_bias,
            delta_softplus=True,
        )
        return self.out_proj(y.transpose(1, 2))


LAYERS: dict[str, type[Mamba]] = {
    "mamba": Mamba,
    "no_gate": UngatedMamba,
    "time_invariant": TimeInvariantMamba,
}
DESCRIPTIONS = {
    "mamba": "Mamba (S6)",
    "no_gate": "S6 without gating",
    "time_invariant": "Mamba, time-invariant",
}


def build_model(
    kind: str,
    vocab_size: int,
    d_model: int,
    n_layer: int,
    seed: int,
    device: torch.device,
    **ssm_cfg: float,
) -> MambaLMHeadModel:
    """A language model whose mixers are `LAYERS[kind]`; its weights depend on `seed` only.

    `ssm_cfg` are further arguments of Mamba.
    """
    torch.manual_seed(seed)
    config = MambaConfig(
        d_model=d_model,
        n_layer=n_layer,
        vocab_size=vocab_size,
        ssm_cfg=ssm_cfg,
        tie_embeddings=False,
    )
    model = MambaLMHeadModel(config)
    if kind != "mamba":
        for index, block in enumerate(model.backbone.layers):
            out_proj = block.mixer.out_proj
            block.mixer = LAYERS[kind](d_model, layer_idx=index, **ssm_cfg)
            block.mixer.out_proj = out_proj  # scaled by the number of layers
    return model.to(device)
