"""Where a model's files are: a local directory, the embedded model, or the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from mamba_ssm.utils.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAMES,
    CheckpointError,
    HubUnreachableError,
    shard_names,
)
from mamba_ssm.utils.lazy import require

__all__ = ["EMBEDDED", "HubFiles", "LocalFiles", "ModelFiles", "open_model", "resolve_model"]

EMBEDDED = "embedded"
_ASSETS = Path(__file__).resolve().parent.parent / "assets" / "embedded"
# A hub that does not answer a small request within this time counts as unreachable.
_TIMEOUT_S = 5.0


class ModelFiles(Protocol):
    """Access to the files of one model by name."""

    name: str

    def find(self, filename: str) -> Path | None:
        """The local path of ``filename`` (fetched if need be), or None where there is none."""


class LocalFiles:
    """The files in a local directory."""

    def __init__(self, directory: Path, name: str | None = None) -> None:
        self.directory = directory
        self.name = name or str(directory)

    def find(self, filename: str) -> Path | None:
        """The file in the directory, or None."""
        path = self.directory / filename
        return path if path.is_file() else None


class HubFiles:
    """The files of a hub repository, downloaded into the hub's own cache when asked for.

    One quick request decides whether the hub answers; without that, the hub's client would go
    through minutes of retries. A hub that cannot be reached still serves what is in the cache.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._failure: Exception | None = None
        self._cached = False

    def find(self, filename: str) -> Path | None:
        """The file in the hub's local cache, downloaded if need be, or None."""
        huggingface_hub = require("huggingface_hub", f"the hub name {self.name!r}")
        errors = require("huggingface_hub.errors", f"the hub name {self.name!r}")

        if self._failure is None:
            try:
                url = huggingface_hub.hf_hub_url(self.name, filename)
                huggingface_hub.get_hf_file_metadata(url, timeout=_TIMEOUT_S)
                return Path(huggingface_hub.hf_hub_download(self.name, filename))
            except errors.HFValidationError as error:
                raise CheckpointError(
                    f"{self.name!r} is neither an existing local directory nor a valid hub name "
                    "(owner/model). Give a directory with config.json and weights."
                ) from error
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
                raise CheckpointError(
                    f"{self.name!r} is neither a local directory nor a model on the hub that you "
                    "have access to. Check the spelling, log in (`hf auth login`) if it is "
                    "private or gated, or give a local directory."
                ) from error
            except errors.EntryNotFoundError as error:
                # A subclass of it also reports a connection that broke after the first request.
                if not isinstance(error, errors.LocalEntryNotFoundError):
                    return None
                self._failure = error
            except Exception as error:  # the HTTP library's classes differ between versions
                self._failure = error
        return self._find_in_cache(filename)

    def _find_in_cache(self, filename: str) -> Path | None:
        huggingface_hub = require("huggingface_hub", f"the hub name {self.name!r}")
        errors = require("huggingface_hub.errors", f"the hub name {self.name!r}")

        try:
            path = huggingface_hub.hf_hub_download(self.name, filename, local_files_only=True)
        except errors.EntryNotFoundError:
            return None
        self._cached = True
        return Path(path)

    def raise_unreachable(self) -> None:
        """Raise if the reason why something was not found is that the hub does not answer."""
        if self._failure is None:
            return
        what = "not all files needed are" if self._cached else "the model is not"
        reason = str(self._failure).splitlines()[0] if str(self._failure) else ""
        raise HubUnreachableError(
            f"cannot load {self.name!r}: there is no local directory of that name, the hub cannot "
            f"be reached ({type(self._failure).__name__}: {reason}), and {what} in the hub's "
            "local cache. Give a local directory with config.json and weights instead, or, where "
            "a command offers it, --random-weights for the model's shape without its weights."
        ) from self._failure


def open_model(name: str | os.PathLike[str]) -> ModelFiles:
    """Say where the files of ``name`` are: ``"embedded"``, a local directory, or a hub name.

    Raises:
        CheckpointError: it is clearly a path, and no directory.
    """
    text = os.fspath(name)
    if not text:
        raise CheckpointError("the model name is empty; give a local directory or a hub name.")
    if text == EMBEDDED:
        if not (_ASSETS / CONFIG_NAME).is_file():
            raise CheckpointError(
                "this installation has no embedded model (mamba_ssm/assets/embedded has no "
                "config.json); give a local directory or a hub name."
            )
        return LocalFiles(_ASSETS, EMBEDDED)
    path = Path(text).expanduser()
    if path.is_dir():
        return LocalFiles(path, text)
    if path.exists():
        raise CheckpointError(
            f"{text!r} is a file; give the directory that holds config.json and the weights."
        )
    is_path = isinstance(name, os.PathLike) or text.startswith((".", "/", "~")) or "\\" in text
    if is_path or text.endswith("/") or text.count("/") > 1:
        raise CheckpointError(
            f"there is no directory {text!r}. Give a local directory with config.json and "
            "weights, or a hub name (owner/model)."
        )
    return HubFiles(text)


def find_required(files: ModelFiles, *candidates: str) -> Path:
    """The first of ``candidates`` that the model has.

    Raises:
        HubUnreachableError: none was found, and the hub does not answer.
        CheckpointError: there is none.
    """
    for filename in candidates:
        path = files.find(filename)
        if path is not None:
            return path
    if isinstance(files, HubFiles):
        files.raise_unreachable()
    wanted = candidates[0] if len(candidates) == 1 else f"weights: none of {', '.join(candidates)}"
    raise CheckpointError(f"the model {files.name!r} has no {wanted}.")


def find_weights(files: ModelFiles) -> Path:
    """The weights file, or the index of the shards after making sure that all are there.

    Raises:
        CheckpointError: as for :func:`find_required`; or a shard is missing.
    """
    path = find_required(files, *WEIGHTS_NAMES)
    if path.name.endswith(".index.json"):
        for shard in shard_names(path):
            find_required(files, shard)
    return path


def resolve_model(name: str | os.PathLike[str]) -> Path:
    """The local directory of a model, downloading configuration and weights from the hub if needed.

    Args:
        name: ``"embedded"`` (the model inside the package), a local directory, or a hub name.

    Raises:
        HubUnreachableError: the hub does not answer and its cache lacks the model.
        CheckpointError: there is no such model, or files are missing.
    """
    files = open_model(name)
    config = find_required(files, CONFIG_NAME)
    weights = find_weights(files)
    if config.parent != weights.parent:
        raise CheckpointError(f"{files.name!r} changed on the hub during the download; try again.")
    return config.parent
