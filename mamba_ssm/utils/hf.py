"""Loading and saving models by name: local directories, the embedded model, the hub.

Both checkpoint formats are read, the reference package's and transformers' (``model_type:
mamba``); what comes back is always in this library's names. See
:mod:`mamba_ssm.utils.checkpoint_format` for the formats.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mamba_ssm.utils.checkpoint import (
    CONFIG_NAME,
    CheckpointError,
    HubUnreachableError,
    check_state_dict,
    load_into,
    read_json,
    read_weights,
    same_tensor,
)
from mamba_ssm.utils.checkpoint_format import (
    CONFIG_DEFAULTS,
    EMBEDDING,
    LM_HEAD,
    hf_to_mamba_ssm_state_dict,
    to_mamba_ssm_config,
)
from mamba_ssm.utils.checkpoint_save import save_pretrained_dir
from mamba_ssm.utils.hub import (
    LocalFiles,
    ModelFiles,
    find_required,
    find_weights,
    open_model,
    resolve_model,
)
from mamba_ssm.utils.lazy import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CheckpointError",
    "HubUnreachableError",
    "check_state_dict",
    "check_target",
    "load_config_hf",
    "load_into",
    "load_state_dict_hf",
    "load_tokenizer",
    "resolve_model",
    "save_pretrained_dir",
]

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
# The tokenizer of every reference-format checkpoint on the hub, which has none of its own.
_DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"
_DEFAULT_TOKENIZER_SIZE = 50277
# Parameters that are float32 in every model, whatever its dtype (the recurrence needs it).
_FP32_KEYS = (".A_log", ".D")


def load_config_hf(model_name: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a model's configuration as keyword arguments for ``MambaConfig``.

    Args:
        model_name: ``"embedded"``, a local directory, or a hub name.

    Returns:
        The fields that the file states, in ``MambaConfig``'s names, whatever the file's format.

    Raises:
        HubUnreachableError: the hub does not answer and its cache lacks the file.
        CheckpointError: there is no such model or file, it is damaged, or it describes no Mamba-1
            model.
    """
    return _config(open_model(model_name))


def _config(files: ModelFiles) -> dict[str, Any]:
    path = find_required(files, CONFIG_NAME)
    return to_mamba_ssm_config(read_json(path), str(path))


def load_state_dict_hf(
    model_name: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Load a model's weights.

    Args:
        model_name: ``"embedded"``, a local directory, or a hub name.
        device: where the tensors go; default: the CPU.
        dtype: of all floating-point tensors except ``A_log`` and ``D``, which become float32 when
            a dtype is given; default: as stored.

    Returns:
        Tensors under this library's keys, in memory of their own. A tied ``lm_head.weight`` is
        the same tensor as the embedding, whether the file has it or not.

    Raises:
        HubUnreachableError: the hub does not answer and its cache lacks the files.
        CheckpointError: files are missing, damaged, foreign or contradictory.
        ValueError: ``device`` or ``dtype`` cannot be used.
    """
    target = check_target(device, dtype)
    files = open_model(model_name)
    config_path = files.find(CONFIG_NAME)
    config = {}
    if config_path is not None:
        config = to_mamba_ssm_config(read_json(config_path), str(config_path))
    path = find_weights(files)
    state: dict[str, Tensor] = {}
    for key, tensor in read_weights(path):
        if key in state:
            raise CheckpointError(f"{path}: the key {key!r} is there twice.")
        wanted = tensor.dtype
        if dtype is not None and tensor.is_floating_point():
            wanted = torch.float32 if key.endswith(_FP32_KEYS) else dtype
        # A copy, so that nothing depends on the file, which may be memory-mapped, any more.
        state[key] = tensor.to(device=target, dtype=wanted, copy=True).contiguous()
    state = hf_to_mamba_ssm_state_dict(state)
    tied = config.get("tie_embeddings", CONFIG_DEFAULTS["tie_embeddings"])
    if config_path is not None and tied:
        _tie(state, str(path))
    return state


def _tie(state: dict[str, Tensor], source: str) -> None:
    names = [name for name in (EMBEDDING, LM_HEAD) if name in state]
    if len(names) == 2 and not same_tensor(state[EMBEDDING], state[LM_HEAD]):
        raise CheckpointError(
            f"{source}: {EMBEDDING} and {LM_HEAD} differ, but the configuration ties them. If "
            "they were trained untied, set tie_embeddings (tie_word_embeddings) to false in "
            "config.json."
        )
    if names:
        state[EMBEDDING] = state[LM_HEAD] = state[names[0]]


def check_target(
    device: torch.device | str | None, dtype: torch.dtype | None = None
) -> torch.device:
    """The device that weights are to be loaded onto (None: the CPU).

    Raises:
        ValueError: torch has no such device here, or ``dtype`` is no floating-point dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; a floating-point torch.dtype or None is needed.")
    try:
        target = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}, which torch does not know ({error}).") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {str(target)!r}, but torch sees {torch.cuda.device_count()} CUDA devices "
            "here; use device='cpu', or a CUDA build of torch on a machine with a GPU."
        )
    return target


def load_tokenizer(model_name: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    It is the model's own where it has tokenizer files (a ``tokenizer_config.json`` with
    ``"tokenizer_class": "ByT5Tokenizer"`` is enough for a byte-level model, whose tokenizer needs
    no vocabulary); otherwise GPT-NeoX-20B's, with which the released Mamba models were trained.

    Raises:
        HubUnreachableError: the tokenizer has to come from the hub, which does not answer.
        CheckpointError: there is no such model, its tokenizer files are damaged, or its vocabulary
            is too small for the GPT-NeoX tokenizer.
    """
    files = open_model(model_name)
    if isinstance(files, LocalFiles) or files.find(CONFIG_NAME) is not None:
        config_path = find_required(files, CONFIG_NAME)
        raw_config = read_json(config_path)
        found = [path for path in map(files.find, TOKENIZER_FILES) if path is not None]
        if found:
            return _tokenizer_from(found[0].parent)
        if raw_config.get("tokenizer_class") == "ByT5Tokenizer":
            return require("transformers", "a tokenizer").ByT5Tokenizer()
        config = to_mamba_ssm_config(raw_config, str(config_path))
        size = config.get("vocab_size", CONFIG_DEFAULTS["vocab_size"])
        if size < _DEFAULT_TOKENIZER_SIZE:
            raise CheckpointError(
                f"{files.name!r} has no tokenizer files, and its vocabulary of {size} is too small "
                f"for the default tokenizer ({_DEFAULT_TOKENIZER}). Put its tokenizer there; for a "
                'byte-level model a tokenizer_config.json with {"tokenizer_class": '
                '"ByT5Tokenizer"} is enough.'
            )
    default = open_model(_DEFAULT_TOKENIZER)
    try:
        required = find_required(default, "tokenizer.json")
    except HubUnreachableError as error:
        raise HubUnreachableError(
            f"{files.name!r} has no tokenizer files at hand, and the default tokenizer is on the "
            f"hub, which cannot be reached ({error.__cause__}). Put the tokenizer's files "
            "(tokenizer.json, tokenizer_config.json) into the model's directory, or pass token ids."
        ) from error.__cause__
    for filename in TOKENIZER_FILES:
        default.find(filename)
    return _tokenizer_from(required.parent)


def _tokenizer_from(directory: os.PathLike[str]) -> PreTrainedTokenizerBase:
    transformers = require("transformers", "a tokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            os.fspath(directory), local_files_only=True
        )
    except Exception as error:  # damaged files fail in as many ways as there are tokenizers
        raise CheckpointError(
            f"the tokenizer files in {os.fspath(directory)!r} cannot be loaded "
            f"({type(error).__name__}: {error})."
        ) from error
