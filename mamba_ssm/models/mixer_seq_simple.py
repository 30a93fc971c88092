"""Mamba language models: embedding, a stack of blocks, a norm and the output projection.

Dimensions: b batch, l length, V vocabulary (rounded up), N rows of a state (the batch, or the
number of packed sequences).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from mamba_ssm.inference import is_quantized, quantize_
from mamba_ssm.models.config_mamba import MambaConfig, check_attn_layer_idx
from mamba_ssm.models.fused_decoding import FusedDecoding
from mamba_ssm.models.loss import chunked_cross_entropy, shifted_targets
from mamba_ssm.models.outputs import CausalLMOutput, CausalLMOutputWithState, MixerModelOutput
from mamba_ssm.models.recompute import GradientCheckpointing, call_block
from mamba_ssm.modules.block import Block, add_norm
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.modules.mha import MHA
from mamba_ssm.modules.mlp import GatedMLP
from mamba_ssm.modules.sequence_args import resolve_packing
from mamba_ssm.ops.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_ssm.utils.generation import GenerationMixin
from mamba_ssm.utils.hf import (
    CheckpointError,
    check_target,
    load_config_hf,
    load_into,
    load_state_dict_hf,
    save_pretrained_dir,
)

__all__ = [
    "CausalLMOutput",
    "CausalLMOutputWithState",
    "MambaLMHeadModel",
    "MixerModel",
    "MixerModelOutput",
    "RMSNorm",
    "create_block",
    "layer_norm_fn",
    "rms_norm_fn",
]


def create_block(
    d_model: int,
    d_intermediate: int = 0,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: Sequence[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """One layer: a Mamba mixer (attention where ``attn_layer_idx`` says so), and a gated MLP when
    ``d_intermediate`` > 0. ValueError for an ``ssm_cfg["layer"]`` other than "Mamba1"."""
    factory = {"device": device, "dtype": dtype}
    if layer_idx not in (attn_layer_idx or ()):
        options = dict(ssm_cfg or {})
        layer = options.pop("layer", "Mamba1")
        if layer != "Mamba1":
            raise ValueError(f"ssm_cfg['layer'] must be 'Mamba1', got {layer!r}")
        mixer_cls = partial(Mamba, layer_idx=layer_idx, **options, **factory)
    else:
        mixer_cls = partial(MHA, layer_idx=layer_idx, **(attn_cfg or {}), **factory)
    norm_cls = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory)
    if d_intermediate == 0:
        mlp_cls = nn.Identity
    else:
        mlp_cls = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **factory)
    block = Block(
        d_model,
        mixer_cls,
        mlp_cls,
        norm_cls=norm_cls,
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx
    return block


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Initialise one module (for ``model.apply``).

    Linear biases become 0 unless marked ``_no_reinit`` (delta's bias), embeddings
    N(0, initializer_range). The projections that write to the residual stream (``out_proj``,
    ``fc2``) are drawn anew and divided by √(number of residual additions), as GPT-2 does, so that
    the stream's variance does not grow with depth. ``n_residuals_per_layer`` is 2 with MLPs.
    """
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                # Drawn anew, so that applying this twice does not shrink the weight twice.
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter /= math.sqrt(n_residuals_per_layer * n_layer)


class MixerModel(nn.Module, GradientCheckpointing):
    """Embedding, ``n_layer`` blocks and a final norm: token ids (b, l) → (b, l, d_model).

    Children: ``embedding``, ``layers.{i}``, ``norm_f``. Arguments as in ``MambaConfig`` and
    ``create_block``; ``initializer_cfg`` goes to ``_init_weights``.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int = 0,
        vocab_size: int | None = None,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: Sequence[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if vocab_size is None:
            raise TypeError("MixerModel needs vocab_size")
        check_attn_layer_idx(list(attn_layer_idx or []), n_layer)
        factory = {"device": device, "dtype": dtype}
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        self.layers = nn.ModuleList(
            create_block(
                d_model,
                d_intermediate=d_intermediate,
                ssm_cfg=ssm_cfg,
                attn_layer_idx=attn_layer_idx,
                attn_cfg=attn_cfg,
                norm_epsilon=norm_epsilon,
                rms_norm=rms_norm,
                residual_in_fp32=residual_in_fp32,
                fused_add_norm=fused_add_norm,
                layer_idx=i,
                **factory,
            )
            for i in range(n_layer)
        )
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **factory)
        self.apply(
            partial(
                _init_weights,
                n_layer=n_layer,
                **(initializer_cfg or {}),
                n_residuals_per_layer=1 if d_intermediate == 0 else 2,
            )
        )

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, tuple[torch.Tensor | None, ...]]:
        """Decode caches of zeros, {layer index: cache}."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }

    def forward(
        self,
        input_ids: torch.Tensor,
        inference_params: Any = None,
        *,
        initial_state: Sequence[Any] | None = None,
        return_final_state: bool = False,
        seq_idx: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        num_sequences: int | None = None,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        **mixer_kwargs: Any,
    ) -> torch.Tensor | MixerModelOutput:
        """(b, l) ids → (b, l, d_model).

        ``initial_state`` is a list of the layers' states, and what ``return_final_state`` gives.
        The packing arguments are those of ``Mamba.forward``. ``output_hidden_states`` gives
        n_layer + 1 tensors, as transformers' Mamba does: the residual stream after each block, and
        the normalised result. With it or ``return_final_state`` this returns a MixerModelOutput.
        Raises ValueError / TypeError for arguments that do not fit.
        """
        self._check_call(input_ids, initial_state)
        if cu_seqlens is not None:  # once here rather than in every layer
            packing = resolve_packing(
                *input_ids.shape, seq_idx, cu_seqlens, attention_mask, num_sequences
            )
            seq_idx, num_sequences, cu_seqlens = *packing, None
        call = {
            "seq_idx": seq_idx,
            "num_sequences": num_sequences,
            "attention_mask": attention_mask,
        }
        mixer_kwargs |= {name: value for name, value in call.items() if value is not None}
        if return_final_state:
            mixer_kwargs["return_final_state"] = True
        hidden_states, residual = self.embedding(input_ids), None
        streams: list[torch.Tensor] = []
        states: list[Any] = []
        for i, layer in enumerate(self.layers):
            if initial_state is not None:
                mixer_kwargs["initial_state"] = initial_state[i]
            hidden_states, residual, *state = call_block(
                layer,
                self.gradient_checkpointing and self.training,
                hidden_states,
                residual,
                inference_params=inference_params,
                **mixer_kwargs,
            )
            states.extend(state)
            if output_hidden_states:
                streams.append(hidden_states + residual)
        hidden_states, _ = add_norm(
            self.norm_f, hidden_states, residual, self.fused_add_norm, self.residual_in_fp32
        )
        if not output_hidden_states and not return_final_state:
            return hidden_states
        return MixerModelOutput(
            hidden_states,
            (*streams, hidden_states) if output_hidden_states else None,
            states if return_final_state else None,
        )

    def _check_call(self, input_ids: torch.Tensor, initial_state: Sequence[Any] | None) -> None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must have shape (b, l), got {tuple(input_ids.shape)}")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
        if initial_state is not None and len(initial_state) != len(self.layers):
            raise ValueError(
                f"initial_state must have one state for each of the {len(self.layers)} layers, "
                f"got {len(initial_state)}"
            )


class MambaLMHeadModel(nn.Module, GenerationMixin, FusedDecoding, GradientCheckpointing):
    """A Mamba language model (arXiv 2312.00752, section 4.2), token ids (b, l) → logits (b, l, V).

    Children: ``backbone`` (MixerModel) and ``lm_head``, whose weight is the embedding's when
    ``config.tie_embeddings``. The vocabulary is rounded up to ``config.pad_vocab_size_multiple``.

    Args:
        config: a MambaConfig.
        initializer_cfg: keyword arguments of ``_init_weights``.
        device, dtype: of the parameters; A_log and D are always created in fp32. "meta" works.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory = {"device": device, "dtype": dtype}
        multiple = config.pad_vocab_size_multiple
        vocab_size = (config.vocab_size + multiple - 1) // multiple * multiple
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=vocab_size,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            **factory,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, **factory)
        # A second time over everything: seeds give the same weights as they always did.
        self.apply(
            partial(
                _init_weights,
                n_layer=config.n_layer,
                **(initializer_cfg or {}),
                n_residuals_per_layer=1 if config.d_intermediate == 0 else 2,
            )
        )
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make ``lm_head`` share the embedding's weight, when the configuration says so."""
        if self.config.tie_embeddings and not is_quantized(self.lm_head):
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, tuple[torch.Tensor | None, ...]]:
        """Decode caches of zeros, {layer index: cache}."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def quantize_(self, scheme: str = "int8", group_size: int | None = None) -> MambaLMHeadModel:
        """Replace the large linear layers by int8 ones (weights only), in place; returns self.

        For inference: such a model cannot be trained or saved. Each output channel has a scale, or
        each ``group_size`` inputs of one. Raises ValueError, see ``mamba_ssm.inference.quantize_``.
        """
        quantize_(self, scheme, group_size)
        self.release_inference_packs()
        return self

    def train(self, mode: bool = True) -> MambaLMHeadModel:
        """As ``nn.Module.train``; training mode frees the packed copy of the weights."""
        if mode:
            self.release_inference_packs()
        return super().train(mode)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        *,
        labels: torch.Tensor | None = None,
        ignore_index: int = -100,
        return_logits: bool | None = None,
        return_final_state: bool = False,
        output_hidden_states: bool = False,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput | CausalLMOutputWithState:
        """(b, l) ids → ``CausalLMOutput(logits (b, l, V))``.

        Args:
            position_ids: accepted for compatibility; the layers need no positions.
            inference_params: see ``Mamba.forward``.
            num_last_tokens: if > 0, logits of that many last positions only.
            labels: (b, l) ids, usually ``input_ids`` itself: they are shifted here, as transformers
                does, position t predicting labels[:, t + 1]. ``ignore_index`` does not count,
                neither do padding and the first token of each packed sequence. The mean
                cross-entropy is computed in chunks, so the logits are never all in memory; they
                are returned only with ``return_logits=True``.
            mixer_kwargs: initial_state, seq_idx, cu_seqlens, num_sequences, attention_mask: see
                ``MixerModel.forward``, as for return_final_state and output_hidden_states.

        With labels, output_hidden_states or return_final_state the result is a
        ``CausalLMOutputWithState``, whose fields are None where not asked for.
        """
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels must have input_ids' shape {tuple(input_ids.shape)}, got "
                f"{tuple(labels.shape)}"
            )
        if num_last_tokens < 0:
            raise ValueError(f"num_last_tokens must not be negative, got {num_last_tokens}")
        out = self.backbone(
            input_ids,
            inference_params=inference_params,
            return_final_state=return_final_state,
            output_hidden_states=output_hidden_states,
            **mixer_kwargs,
        )
        extended = labels is not None or output_hidden_states or return_final_state
        if not isinstance(out, MixerModelOutput):
            out = MixerModelOutput(out)
        hidden_states = out.last_hidden_state
        loss = None
        if labels is not None:
            packing = resolve_packing(
                *input_ids.shape,
                mixer_kwargs.get("seq_idx"),
                mixer_kwargs.get("cu_seqlens"),
                mixer_kwargs.get("attention_mask"),
                mixer_kwargs.get("num_sequences"),
            )
            targets = shifted_targets(labels, ignore_index, packing.seq_idx)
            vocab_size = self.backbone.embedding.num_embeddings
            loss = chunked_cross_entropy(
                self.lm_head, hidden_states, targets, vocab_size, ignore_index
            )
        logits = None
        if return_logits if return_logits is not None else labels is None:
            if 0 < num_last_tokens < hidden_states.shape[1]:
                # Of rows with gaps torch makes a batch of products, with a copy of the weight.
                rows = hidden_states[:, -num_last_tokens:]
                hidden_states = rows.clone(memory_format=torch.contiguous_format)
            logits = self.lm_head(hidden_states)
        if not extended:
            return CausalLMOutput(logits=logits)
        return CausalLMOutputWithState(logits, loss, out.hidden_states, out.final_state)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | os.PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> MambaLMHeadModel:
        """Load a hub name, a local directory or "embedded", strictly.

        Parameters get ``dtype`` (default: torch's default dtype), A_log and D stay fp32.
        ``kwargs`` go to the constructor. Raises CheckpointError, a ValueError, saying what does
        not fit and what to do.
        """
        check_target(device, dtype)
        config_data = load_config_hf(pretrained_model_name)
        try:
            config = MambaConfig(**config_data)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{pretrained_model_name}: config.json: {error}") from error
        model = cls(config, device="meta", dtype=dtype, **kwargs)
        state_dict = load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype)
        load_into(model, state_dict, device=device, source=str(pretrained_model_name))
        model.tie_weights()
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        format: str = "mamba_ssm",
        max_shard_size: int | str = "5GB",
        extras: dict[str, Any] | None = None,
    ) -> None:
        """Write ``config.json`` and safetensors; the arguments are those of
        ``save_pretrained_dir``: ``format="hf"`` is for transformers. Raises CheckpointError, also
        for a model with int8 weights."""
        if is_quantized(self):
            raise CheckpointError(
                "int8 weights have no checkpoint format: save the model before quantize_, and "
                "quantize it again after loading"
            )
        save_pretrained_dir(
            self.state_dict(), self.config, save_directory, format, max_shard_size, extras
        )
