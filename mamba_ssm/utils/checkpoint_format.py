"""The two checkpoint formats and how one becomes the other, both ways, without loss.

``mamba_ssm``: the reference package's; ``config.json`` holds the fields of ``MambaConfig`` only.
``hf``: transformers' own (``model_type: mamba``); other field names, the embedding is called
``backbone.embeddings``, and the vocabulary is the padded one.

Everything here is a pure function of dictionaries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mamba_ssm.utils.checkpoint import CheckpointError

__all__ = [
    "hf_to_mamba_ssm_config",
    "hf_to_mamba_ssm_state_dict",
    "mamba_ssm_to_hf_config",
    "mamba_ssm_to_hf_state_dict",
]

EMBEDDING = "backbone.embedding.weight"
HF_EMBEDDING = "backbone.embeddings.weight"
LM_HEAD = "lm_head.weight"

# MambaConfig's fields; a file may leave out those that have their default value.
CONFIG_DEFAULTS: dict[str, Any] = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}

# The norms of both libraries use this; MambaConfig has no field for another value.
_NORM_EPSILON = 1e-5
# transformers' name, its default, our name in ssm_cfg, our default.
_MIXER_FIELDS: tuple[tuple[str, Any, str, Any], ...] = (
    ("state_size", 16, "d_state", 16),
    ("conv_kernel", 4, "d_conv", 4),
    ("expand", 2, "expand", 2),
    ("time_step_rank", "auto", "dt_rank", "auto"),
    ("time_step_min", 0.001, "dt_min", 0.001),
    ("time_step_max", 0.1, "dt_max", 0.1),
    ("time_step_init_scheme", "random", "dt_init", "random"),
    ("time_step_scale", 1.0, "dt_scale", 1.0),
    ("time_step_floor", 1e-4, "dt_init_floor", 1e-4),
    ("use_conv_bias", True, "conv_bias", True),
    ("use_bias", False, "bias", False),
)
# transformers' name, its default, our name.
_MODEL_FIELDS: tuple[tuple[str, Any, str], ...] = (
    ("hidden_size", 768, "d_model"),
    ("num_hidden_layers", 32, "n_layer"),
    ("vocab_size", 50280, "vocab_size"),
    ("residual_in_fp32", True, "residual_in_fp32"),
    ("tie_word_embeddings", True, "tie_embeddings"),
)
_POSITIVE_INTEGERS = ("hidden_size", "num_hidden_layers", "vocab_size", "state_size", "conv_kernel")
# Our settings that change speed only; transformers has no use for them.
_SPEED_ONLY = ("layer", "use_fast_path")
# Where a transformers config keeps the MambaConfig that it was made from.
_ORIGINAL = "mamba_ssm"
_FIXED = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "hidden_act": "silu",
    "layer_norm_epsilon": _NORM_EPSILON,
}
# Written by tools around a model; they say nothing about its shape.
_BOOKKEEPING = (
    "_name_or_path",
    "architectures",
    "dtype",
    "model_type",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
)
# Old names and copies inside transformers configs, all implied by the fields above.
_HF_IMPLIED = (
    "_name_or_path",
    "d_inner",
    "d_model",
    "fused_add_norm",
    "intermediate_size",
    "n_layer",
    "pad_vocab_size_multiple",
    "rms_norm",
    "ssm_cfg",
    "transformers_version",
    _ORIGINAL,
)


def to_mamba_ssm_config(config: Mapping[str, Any], source: str = "config.json") -> dict[str, Any]:
    """Bring the content of a ``config.json`` of either format into ``MambaConfig``'s fields.

    Fields that the reference format leaves out stay out; unknown ones stay in, for
    ``MambaConfig`` to refuse.

    Raises:
        CheckpointError: the file describes something else than a Mamba-1 language model.
    """
    model_type = config.get("model_type", "mamba")
    if model_type != "mamba":
        raise CheckpointError(
            f"{source}: model_type {model_type!r} is not supported; this library reads Mamba-1 "
            "models: model_type 'mamba', or the mamba_ssm format, which has none."
        )
    if "quantization_config" in config:
        raise CheckpointError(
            f"{source}: the checkpoint is quantised (quantization_config); use the original one."
        )
    if "model_type" in config and ("hidden_size" in config or "d_model" not in config):
        return hf_to_mamba_ssm_config(config, source)[0]
    if "d_model" not in config:
        raise CheckpointError(
            f"{source} describes no Mamba model: it has neither 'd_model' nor a 'model_type'. "
            f"Its fields: {', '.join(map(repr, list(config)[:10])) or 'none'}."
        )
    return {key: value for key, value in config.items() if key not in _BOOKKEEPING}


def hf_to_mamba_ssm_config(
    hf_config: Mapping[str, Any], source: str = "config.json"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert a transformers ``MambaConfig`` dictionary.

    Returns:
        ``(config, extras)``: the fields of our ``MambaConfig``, and what has no place there
        (token ids, ``initializer_range``, …). ``mamba_ssm_to_hf_config(config, extras)`` is the
        inverse.

    Raises:
        CheckpointError: a value that our model cannot represent.
    """
    for key in _POSITIVE_INTEGERS:
        value = hf_config.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{source}: {key} is {value!r}; a positive integer is needed.")
    activation = hf_config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(
            f"{source}: hidden_act is {activation!r}; this library's Mamba has 'silu' only."
        )
    epsilon = hf_config.get("layer_norm_epsilon", _NORM_EPSILON)
    if epsilon != _NORM_EPSILON:
        raise CheckpointError(
            f"{source}: layer_norm_epsilon is {epsilon!r}; this library's models have "
            f"{_NORM_EPSILON} only."
        )
    config = {ours: hf_config.get(theirs, default) for theirs, default, ours in _MODEL_FIELDS}
    # transformers stores the padded size; an odd one must not be padded again.
    config["pad_vocab_size_multiple"] = 8 if config["vocab_size"] % 8 == 0 else 1
    config["rms_norm"] = config["fused_add_norm"] = True
    ssm_cfg = {}
    for theirs, default, ours, our_default in _MIXER_FIELDS:
        value = hf_config.get(theirs, default)
        if theirs == "time_step_rank" and value == _auto_rank(config["d_model"]):
            value = "auto"
        if value != our_default:
            ssm_cfg[ours] = value
    config["ssm_cfg"] = ssm_cfg
    original = hf_config.get(_ORIGINAL)
    if isinstance(original, dict) and _same_model(original, config):
        config = dict(original)
    known = {field[0] for field in (*_MODEL_FIELDS, *_MIXER_FIELDS)} | set(_HF_IMPLIED)
    extras = {
        key: value
        for key, value in hf_config.items()
        if key not in known and not (key in _FIXED and _FIXED[key] == value)
    }
    return config, extras


def _same_model(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether two configs of ours describe the same model for transformers."""
    try:
        return _architecture(left) == _architecture(right)
    except (CheckpointError, TypeError, ValueError, AttributeError):
        return False


def mamba_ssm_to_hf_config(
    config: Mapping[str, Any],
    extras: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Convert the fields of our ``MambaConfig`` to those of transformers'.

    Args:
        config: fields of ``MambaConfig``; absent ones have their default.
        extras: further fields for transformers (``eos_token_id``, …).
        dtype: the dtype of the weights, noted in the result.

    Raises:
        CheckpointError: the model has something that transformers' Mamba lacks.
    """
    result = {**_FIXED, **_architecture(config)}
    result["intermediate_size"] = result["expand"] * result["hidden_size"]
    if dtype is not None:
        # The older of two names, which every version of transformers reads.
        result["torch_dtype"] = str(dtype).removeprefix("torch.")
    result.update(extras or {})
    result[_ORIGINAL] = dict(config)
    return result


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [key for key in config if key not in CONFIG_DEFAULTS]
    if unknown:
        raise CheckpointError(
            f"unknown configuration fields: {', '.join(map(repr, unknown))}; MambaConfig has "
            f"{', '.join(CONFIG_DEFAULTS)}."
        )
    full = {**CONFIG_DEFAULTS, **config}
    ssm_cfg = dict(full["ssm_cfg"] or {})
    obstacles = []
    if full["d_intermediate"]:
        obstacles.append(f"an MLP in each block (d_intermediate={full['d_intermediate']})")
    if full["attn_layer_idx"]:
        obstacles.append(f"attention layers (attn_layer_idx={full['attn_layer_idx']})")
    if not full["rms_norm"]:
        obstacles.append("LayerNorm (rms_norm=False)")
    if ssm_cfg.get("layer", "Mamba1") != "Mamba1":
        obstacles.append(f"another layer (ssm_cfg['layer']={ssm_cfg['layer']!r})")
    if int(ssm_cfg.get("expand", 2)) != ssm_cfg.get("expand", 2):
        obstacles.append(f"a fractional expand ({ssm_cfg['expand']})")
    ours = {field[2] for field in _MIXER_FIELDS} | set(_SPEED_ONLY)
    obstacles += [f"ssm_cfg[{key!r}]" for key in ssm_cfg if key not in ours]
    if obstacles:
        raise CheckpointError(
            "transformers' MambaForCausalLM cannot represent this model: it has "
            f"{', '.join(obstacles)}. Save it with format='mamba_ssm'."
        )
    result = {theirs: full[ours] for theirs, _, ours in _MODEL_FIELDS}
    multiple = full["pad_vocab_size_multiple"]
    result["vocab_size"] = math.ceil(full["vocab_size"] / multiple) * multiple
    for theirs, _, ours_name, our_default in _MIXER_FIELDS:
        result[theirs] = ssm_cfg.get(ours_name, our_default)
    result["expand"] = int(result["expand"])
    if result["time_step_rank"] == "auto":
        result["time_step_rank"] = _auto_rank(full["d_model"])
    return result


def _auto_rank(d_model: int) -> int:
    return math.ceil(d_model / 16)


def hf_to_mamba_ssm_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' keys to ours; our own keys stay as they are. Tensors are not copied.

    A bare ``MambaModel``'s keys, which lack ``backbone.``, get it.
    """
    bare = any(key in state_dict for key in ("embedding.weight", "embeddings.weight"))
    result = {}
    for key, value in state_dict.items():
        if bare and key != LM_HEAD:
            key = f"backbone.{key}"
        result[EMBEDDING if key == HF_EMBEDDING else key] = value
    return result


def mamba_ssm_to_hf_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our keys to transformers'. Tensors are not copied."""
    return {HF_EMBEDDING if key == EMBEDDING else key: value for key, value in state_dict.items()}
