"""Writing a checkpoint directory so that an interruption never damages the earlier one.

All files are first written into a temporary directory inside the target; only when everything is
on disk are they renamed into place. A single weights file beside an unchanged configuration, the
case of repeated saves in training, is replaced by one atomic rename.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_ssm.utils.checkpoint import CONFIG_NAME, CheckpointError, same_tensor
from mamba_ssm.utils.checkpoint_format import (
    CONFIG_DEFAULTS,
    EMBEDDING,
    LM_HEAD,
    mamba_ssm_to_hf_config,
    mamba_ssm_to_hf_state_dict,
)
from mamba_ssm.utils.lazy import require

__all__ = ["save_pretrained_dir"]

_BACKUP = "previous"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Every name that a loader would take for weights: a new save supersedes all of them.
_WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?", re.ASCII
)


def save_pretrained_dir(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any] | Any,
    directory: str | os.PathLike[str],
    format: str = "mamba_ssm",
    max_shard_size: int | str = "5GB",
    extras: Mapping[str, Any] | None = None,
) -> None:
    """Write ``config.json`` and safetensors weights into ``directory``.

    Args:
        state_dict: the model's weights under this library's keys. Left untouched; tied weights
            are written once.
        config: a ``MambaConfig``, or its fields.
        directory: made if need be. Earlier weights in it are superseded, and removed once the new
            ones are complete; other files stay.
        format: ``"mamba_ssm"``, or ``"hf"`` for transformers' ``MambaForCausalLM``.
        max_shard_size: bytes, or a string such as ``"5GB"``; a larger model is split over several
            files with an index. A single larger tensor gets a file of its own.
        extras: further fields of a ``"hf"`` configuration, such as ``eos_token_id``.

    Raises:
        CheckpointError: an argument is wrong, the model cannot be represented in ``format``, or
            the files cannot be written. An earlier checkpoint in ``directory`` is then as it was.
    """
    if format not in ("mamba_ssm", "hf"):
        raise CheckpointError(f"format is {format!r}; allowed are 'mamba_ssm' and 'hf'.")
    if extras and format != "hf":
        raise CheckpointError("extras belong to format='hf'; the mamba_ssm format has no place.")
    limit = _parse_size(max_shard_size)
    fields = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)
    tensors = _without_tied(_checked(state_dict), fields)
    if format == "hf":
        dtype = tensors[EMBEDDING].dtype if EMBEDDING in tensors else None
        fields = mamba_ssm_to_hf_config(fields, extras, dtype)
        tensors = mamba_ssm_to_hf_state_dict(tensors)
    try:
        config_text = json.dumps(fields, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the configuration cannot be written as JSON: {error}") from error

    target = Path(directory)
    made = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        # In the same directory, hence on the same file system: renaming is atomic.
        temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    except OSError as error:
        raise CheckpointError(f"cannot write into {str(target)!r}: {error}") from error
    done = False
    try:
        new = _write_weights(tensors, temporary, limit)
        (temporary / CONFIG_NAME).write_text(config_text, encoding="utf-8")
        _move_into_place(temporary, target, [*new, CONFIG_NAME])
        done = True
    except OSError as error:
        raise CheckpointError(f"cannot write into {str(target)!r}: {error}") from error
    finally:
        # An earlier checkpoint that could not be moved back is left where it is.
        if done or not any((temporary / _BACKUP).glob("*")):
            shutil.rmtree(temporary, ignore_errors=True)
        if made and not done:
            shutil.rmtree(target, ignore_errors=True)


def _parse_size(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    number = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0
    if isinstance(size, bool) or number < 1:
        raise CheckpointError(
            f"max_shard_size is {size!r}; a positive number of bytes or a string such as '5GB' or "
            "'500MB' is needed."
        )
    return int(number)


def _checked(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not state_dict:
        raise CheckpointError("the state dict is empty; there is nothing to save.")
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key!r} is a {type(value).__name__}; only tensors are saved.")
        if value.is_meta:
            raise CheckpointError(f"{key!r} is on the meta device: it has no values to save.")
        if value.layout is not torch.strided or value.is_quantized:
            raise CheckpointError(f"{key!r} is {value.layout}, {value.dtype}; only dense tensors.")
    return dict(state_dict)


def _without_tied(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Leave out the copy of the embedding that a tied model's state dict has."""
    if not config.get("tie_embeddings", CONFIG_DEFAULTS["tie_embeddings"]):
        return tensors
    if LM_HEAD in tensors and EMBEDDING in tensors:
        if not same_tensor(tensors[LM_HEAD], tensors[EMBEDDING]):
            raise CheckpointError(
                f"{LM_HEAD} and {EMBEDDING} differ, but the configuration has tie_embeddings=True. "
                "Call model.tie_weights(), or set tie_embeddings=False in the configuration."
            )
        del tensors[LM_HEAD]
    return tensors


def _write_weights(tensors: dict[str, Tensor], directory: Path, limit: int) -> list[str]:
    """Write the weights files; returns their names, the index last."""
    save_file = require("safetensors.torch", "saving a model").save_file
    SafetensorError = require("safetensors", "saving a model").SafetensorError
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, keys in zip(names, shards, strict=True):
        # clone: safetensors refuses tensors that share memory, such as views of one buffer.
        shard = {key: tensors[key].detach().to("cpu").contiguous() for key in keys}
        storages = [tensor.untyped_storage().data_ptr() for tensor in shard.values()]
        if len(set(storages)) < len(storages):
            shard = {key: tensor.clone() for key, tensor in shard.items()}
        path = directory / name
        path.touch()
        # safetensors makes files that only their owner can read; an ordinary one has this mode.
        mode = stat.S_IMODE(path.stat().st_mode)
        try:
            save_file(shard, path, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for one
            raise OSError(str(error)) from error
        path.chmod(mode)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {
                key: name for name, keys in zip(names, shards, strict=True) for key in sorted(keys)
            },
        }
        names.append("model.safetensors.index.json")
        (directory / names[-1]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


def _move_into_place(temporary: Path, target: Path, new: list[str]) -> None:
    """Rename the finished files into ``target`` and drop the weights that they supersede."""
    old_config = target / CONFIG_NAME
    if old_config.is_file() and old_config.read_bytes() == (temporary / CONFIG_NAME).read_bytes():
        new = [name for name in new if name != CONFIG_NAME]
    stale = {path.name for path in target.iterdir() if _WEIGHTS.fullmatch(path.name)}
    if len(new) == 1 and stale <= set(new):
        os.replace(temporary / new[0], target / new[0])
        return
    # Several files cannot be replaced in one step. The old ones go aside first and config.json
    # comes last: were the process killed in between, the directory would be visibly incomplete,
    # never a mixture of two checkpoints, and the old files would still be in the backup.
    backup = temporary / _BACKUP
    backup.mkdir()
    aside = [name for name in sorted(stale | set(new)) if (target / name).exists()]
    moved: list[str] = []
    try:
        for name in sorted(aside, key=lambda name: name != CONFIG_NAME):
            os.replace(target / name, backup / name)
        for name in new:
            os.replace(temporary / name, target / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            (target / name).unlink(missing_ok=True)
        for path in backup.iterdir():
            os.replace(path, target / path.name)
        raise
