"""Reading checkpoint files safely, and putting a state dict into a model.

Nothing in a checkpoint is ever executed: pickles are read with ``weights_only=True``, and every
way in which a file can be damaged or foreign ends in a :class:`CheckpointError` that names the
file and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba_ssm.utils.lazy import require

__all__ = [
    "CheckpointError",
    "HubUnreachableError",
    "check_state_dict",
    "load_into",
    "read_json",
    "read_weights",
]

CONFIG_NAME = "config.json"
# In order of preference, as transformers has it.
WEIGHTS_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# A progress bar is worth its line above this many bytes, or for several shards.
_PROGRESS_BYTES = 500 * 10**6
# How many keys of each kind an error lists.
_MAX_LISTED = 10


class CheckpointError(ValueError):
    """A checkpoint cannot be found, read, converted or written; the message says what to do."""


class HubUnreachableError(CheckpointError):
    """The model may well exist, but the hub cannot be reached and its cache does not have it."""


def read_json(path: str | Path) -> dict[str, Any]:
    """Parse the JSON object in ``path``.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or is not an object.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).{_hint(path)}") from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(data).__name__}, but an object ({{...}}) is needed."
        )
    return data


def shard_names(index_path: str | Path) -> dict[str, list[str]]:
    """Read a ``*.index.json``: shard file name -> the keys that it must hold.

    Raises:
        CheckpointError: the index is malformed, or names a file outside its own directory.
    """
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no 'weight_map' from keys to shard files.")
    suffix = ".safetensors" if ".safetensors." in Path(index_path).name else ".bin"
    shards: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        # An index is foreign data: it may not make us open anything outside its directory.
        plain = isinstance(name, str) and not set(name) & set("/\\:\0") and not name.startswith(".")
        if not plain or not name.endswith(suffix):
            raise CheckpointError(
                f"{index_path} maps {key!r} to {name!r}; allowed is the plain name of a "
                f"*{suffix} file in the same directory."
            )
        shards.setdefault(name, []).append(key)
    return shards


def read_weights(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(key, tensor)`` from a weights file or from all shards of an index, on the CPU.

    The tensors may be views of memory-mapped files: copy what is to be kept.

    Args:
        path: ``*.safetensors``, ``*.bin``, or the ``*.index.json`` of either.

    Raises:
        CheckpointError: a file is missing, damaged, foreign, holds anything but dense tensors, or
            its keys are not those that the index promises.
    """
    path = Path(path)
    shards: dict[str, list[str] | None] = {path.name: None}
    if path.name.endswith(".index.json"):
        shards = dict(shard_names(path))
    files = [path.parent / name for name in shards]
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"{file} does not exist, but {path.name} names it. The checkpoint is incomplete: "
                "copy or download the missing file."
            )
    tqdm = require("tqdm", "reading a checkpoint").tqdm
    total = sum(file.stat().st_size for file in files)
    # None means: shown on a terminal only.
    disable = None if len(files) > 1 or total > _PROGRESS_BYTES else True
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="Loading weights", disable=disable
    ) as bar:
        for file, promised in zip(files, shards.values(), strict=True):
            found = []
            rest = file.stat().st_size
            for key, tensor in _read_file(file):
                found.append(key)
                yield key, tensor
                bar.update(tensor.nbytes)
                rest -= tensor.nbytes
            bar.update(rest)  # headers, or less than nothing where tensors share storage
            if promised is not None and set(found) != set(promised):
                lines = _key_lines(sorted(set(promised) - set(found)), "missing", "key")
                lines += _key_lines(sorted(set(found) - set(promised)), "unexpected", "key")
                raise CheckpointError(
                    "\n".join([f"{file} does not hold what {path.name} says:", *lines])
                )


def _read_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    safetensors = require("safetensors", f"reading {path.name}")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield key, file.get_tensor(key)
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}).{_hint(path)}"
        ) from error


def _read_bin(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        # Only the zip format can be memory-mapped. weights_only: pickled code is refused, not run.
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch.load fails in dozens of ways on damaged or foreign files
        raise CheckpointError(
            f"{path} is not a readable PyTorch checkpoint of plain tensors "
            f"({type(error).__name__}). It is damaged, foreign, or holds pickled objects other "
            f"than tensors; nothing in it was executed.{_hint(path)}"
        ) from error
    if not isinstance(data, Mapping) or not data:
        raise CheckpointError(
            f"{path} holds a {type(data).__name__}, but a dict from keys to tensors is needed."
        )
    for key, value in data.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            names = ", ".join(repr(name) for name in list(data)[:_MAX_LISTED])
            raise CheckpointError(
                f"{path}: the entry {key!r} is a {type(value).__name__}, not a tensor. This looks "
                f"like a training checkpoint (entries: {names}); save its model weights alone."
            )
        if value.layout is not torch.strided or value.is_quantized:
            raise CheckpointError(
                f"{path}: {key!r} is a {value.layout} tensor of dtype {value.dtype}; only dense, "
                "unquantised tensors are read."
            )
        yield key, value.detach()


def _hint(path: str | Path) -> str:
    """What a file that is no checkpoint looks like, as a sentence for an error message."""
    try:
        with open(path, "rb") as file:
            head = file.read(512).lstrip().lower()
    except OSError:
        return ""
    if not head:
        return " The file is empty: download or save it again."
    if head.startswith(b"version https://git-lfs"):
        return " It is a Git LFS pointer: run `git lfs pull` to get the real file."
    if head.startswith((b"<!doctype", b"<html")):
        return " It is a web page, not the file: download it again."
    return " It may be truncated: compare its size with the original, and download it again."


def _key_lines(keys: list[str], adjective: str, noun: str) -> list[str]:
    """At most one line that lists ``keys``, shortened after the first few."""
    if not keys:
        return []
    listed = ", ".join(keys[:_MAX_LISTED])
    more = f" … and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return [f"  {len(keys)} {adjective} {noun}{'s' * (len(keys) != 1)}: {listed}{more}"]


def check_state_dict(
    expected: Mapping[str, torch.Size | tuple[int, ...]],
    state_dict: Mapping[str, Tensor],
    source: str = "the state dict",
) -> None:
    """Compare keys and shapes, strictly.

    Args:
        expected: the model's keys and their shapes.
        state_dict: what is to be loaded.
        source: where it came from, for the message.

    Raises:
        CheckpointError: with counts and lists of missing, unexpected and wrongly shaped keys.
    """
    lines = _key_lines([key for key in expected if key not in state_dict], "missing", "key")
    lines += _key_lines([key for key in state_dict if key not in expected], "unexpected", "key")
    wrong = [
        f"{key} is {tuple(state_dict[key].shape)} and must be {tuple(shape)}"
        for key, shape in expected.items()
        if key in state_dict and tuple(state_dict[key].shape) != tuple(shape)
    ]
    lines += _key_lines(wrong, "wrong", "shape")
    if lines:
        raise CheckpointError("\n".join([f"{source} does not fit the model:", *lines]))


def same_tensor(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same bits (NaN equals NaN)."""
    if left.shape != right.shape or left.dtype != right.dtype or left.device != right.device:
        return False
    if left.data_ptr() == right.data_ptr() and left.stride() == right.stride():
        return True
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def _tied_groups(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one and the same object, for each such object."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _complete_tied(
    state: dict[str, Tensor], groups: list[list[str]], source: str
) -> dict[str, Tensor]:
    """Give all names of a tied parameter the same tensor; they may be absent, but not differ."""
    for names in groups:
        present = [name for name in names if name in state]
        for name in present[1:]:
            if not same_tensor(state[present[0]], state[name]):
                raise CheckpointError(
                    f"{source}: {present[0]} and {name} differ, but the model ties them. If the "
                    "weights were trained untied, set tie_embeddings to false in the "
                    "configuration; otherwise remove one of the two."
                )
        if present:
            state.update(dict.fromkeys(names, state[present[0]]))
    return state


@torch.no_grad()
def load_into(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    device: torch.device | str | None = None,
    source: str = "the state dict",
) -> None:
    """Load ``state_dict`` into ``model``, strictly; parameters keep the dtype the model gave them.

    A model built on the ``meta`` device takes the tensors over (``assign=True``, no copy unless
    dtype or device change), keeps its tied weights tied and its parameters' attributes
    (``_no_weight_decay``, ``_no_reinit``). Any other model is copied into, in place.

    Args:
        model: with parameters all on ``meta`` or all on real devices.
        state_dict: the model's keys; names of a tied parameter may be absent, if one is there.
        device: where the parameters of a ``meta`` model go; default: where the tensors are.
        source: where the tensors came from, for messages.

    Raises:
        CheckpointError: keys or shapes do not fit, tied tensors differ, integers are given for
            floating-point parameters, or something is left on ``meta``. The model is not changed
            in the first three cases.
    """
    own = model.state_dict()
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    groups = _tied_groups(model)
    state = _complete_tied(dict(state_dict), groups, source)
    check_state_dict({key: value.shape for key, value in own.items()}, state, source)
    for key, target in own.items():
        if state[key].is_floating_point() != target.is_floating_point():
            raise CheckpointError(
                f"{source}: {key} has dtype {state[key].dtype}, but the model needs {target.dtype}."
            )
    if not on_meta:
        model.load_state_dict(state, strict=True)
        return
    attributes = {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}
    moved = {key: state[key].to(device=device, dtype=own[key].dtype) for key in own}
    model.load_state_dict(moved, strict=True, assign=True)
    for name, values in attributes.items():
        vars(model.get_parameter(name)).update(values)
    for first, *others in groups:
        for name in others:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, model.get_parameter(first))
    everything = (*model.named_parameters(), *model.named_buffers())
    left = [name for name, value in everything if value.is_meta]
    if left:
        message = (
            "These tensors of the model are not part of its state dict and are still on the meta "
            "device; build the model on a real device instead:"
        )
        raise CheckpointError("\n".join([message, *_key_lines(left, "unset", "tensor")]))
