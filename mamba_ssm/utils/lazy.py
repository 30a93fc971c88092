"""Packages that are imported only where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, purpose: str) -> ModuleType:
    """The module, imported now.

    Raises ImportError that says what the package is needed for (``purpose``) and how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{purpose} needs the package {package!r}, which cannot be imported ({error}); "
            f"`pip install {package}` adds it",
            name=package,
        ) from error
