"""``causal_conv1d`` for this process, out of :mod:`mamba_ssm.ops.causal_conv1d`."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Iterator, Sequence
from email.message import Message
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from mamba_ssm.compat import _causal_conv1d_cuda
from mamba_ssm.ops import causal_conv1d as ops

_NAME = "causal_conv1d"
# The release whose functions and signatures ours are; the local part says whose they really are.
_VERSION = "1.4.0+mamba.ssm"
# Submodules, and what is imported from them.
_MODULES: dict[str, tuple[str, ...]] = {
    "": ("causal_conv1d_fn", "causal_conv1d_update"),
    ".causal_conv1d_interface": (
        "causal_conv1d_fn",
        "causal_conv1d_ref",
        "causal_conv1d_update",
        "causal_conv1d_update_ref",
    ),
    ".causal_conv1d_varlen": ("causal_conv1d_varlen_states",),
}
# The compiled module has a name of its own at the top level.
_COMPILED = f"{_NAME}_cuda"


class _Distribution(importlib.metadata.Distribution):
    """What importlib.metadata says of it; clients ask for the version before they import."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        message = Message()
        message["Metadata-Version"] = "2.1"
        message["Name"] = "causal-conv1d"
        message["Version"] = _VERSION
        message["Summary"] = "The functions of mamba_ssm.ops.causal_conv1d under another name"
        return str(message)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{_NAME} is made by mamba_ssm.compat and has no files: {path}")


class _Finder(Loader):
    """Both a finder of the modules and of the distribution, and the modules' loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == _COMPILED:
            return ModuleSpec(name, self, origin="mamba_ssm.compat")
        root, _, _ = name.partition(".")
        if root != _NAME or name[len(root) :] not in _MODULES:
            return None
        return ModuleSpec(name, self, origin="mamba_ssm.ops.causal_conv1d", is_package=name == root)

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context
    ) -> Iterator[importlib.metadata.Distribution]:
        if context.name is None or context.name.lower().replace("_", "-") == "causal-conv1d":
            yield _Distribution()

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == _COMPILED:
            module.causal_conv1d_fwd = _causal_conv1d_cuda.causal_conv1d_fwd
            module.causal_conv1d_bwd = _causal_conv1d_cuda.causal_conv1d_bwd
            module.__doc__ = _causal_conv1d_cuda.__doc__
            return
        suffix = module.__name__[len(_NAME) :]
        for name in _MODULES[suffix]:
            setattr(module, name, getattr(ops, name))
        module.__all__ = list(_MODULES[suffix])
        module.__doc__ = "mamba_ssm.ops.causal_conv1d, put here by mamba_ssm.compat.causal_conv1d()"
        if not suffix:
            module.__version__ = _VERSION
            for submodule in filter(None, _MODULES):
                importlib.import_module(_NAME + submodule)


_FINDER = _Finder()


def causal_conv1d() -> ModuleType:
    """Make ``import causal_conv1d`` give this library's convolution, in this process.

    For code that imports that package by name, such as transformers' Mamba models, which take
    each op from the package of that op. Call it before importing the model's module: transformers
    decides at that moment. Where the real package is installed nothing changes. Calling it again
    does nothing.

    ``importlib.util.find_spec`` and ``importlib.metadata.version`` know the name afterwards
    (version ``1.4.0+mamba.ssm``), as do answers that transformers has kept from before.
    ``causal_conv1d_cuda``, the compiled module that some models call directly, is there too.

    Returns:
        The module ``causal_conv1d``: the real one where it is installed, else the one made here.

    Raises:
        ImportError: the real package is installed and cannot be imported, or
            ``sys.modules["causal_conv1d"]`` blocks the name.

    Warns:
        RuntimeWarning: modules of transformers that look for the package are imported already;
            those keep what they found.
    """
    if _FINDER not in sys.meta_path:
        if _NAME in sys.modules and sys.modules[_NAME] is None:
            raise ImportError(
                f"sys.modules[{_NAME!r}] is None, which blocks the import: remove that entry "
                "before calling mamba_ssm.compat.causal_conv1d()"
            )
        if _NAME in sys.modules or importlib.util.find_spec(_NAME) is not None:
            return importlib.import_module(_NAME)
        late = _importers()
        if late:
            warnings.warn(
                f"{', '.join(late)} looked for {_NAME} before mamba_ssm.compat.causal_conv1d() was "
                "called and will not use it: call it before importing them",
                RuntimeWarning,
                stacklevel=2,
            )
        # Last: a real package that appears later on sys.path comes first.
        sys.meta_path.append(_FINDER)
        importlib.invalidate_caches()
        _forget_answers()
    return importlib.import_module(_NAME)


def _importers() -> list[str]:
    """Modules of transformers that are imported and hold the package's functions or stand-ins."""
    return sorted(
        name
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.")
        and ("causal_conv1d_fn" in vars(module) or "_causal_conv1d_cache" in vars(module))
    )


def _forget_answers() -> None:
    """transformers caches whether the package is there; it may have asked before."""
    utils = sys.modules.get("transformers.utils.import_utils")
    answer = getattr(utils, "is_causal_conv1d_available", None)
    if hasattr(answer, "cache_clear"):
        answer.cache_clear()
