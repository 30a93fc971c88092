"""Argument checks of the public ops. They run on every call: compare first, format late."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_shape(name: str, x: Tensor | None, shape: tuple[int, ...], axes: str) -> None:
    """Raises ValueError unless ``x`` is None or has exactly this shape; ``axes`` names it."""
    if x is not None and x.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} = {axes}, but has {tuple(x.shape)}"
        )


def check_dim(name: str, x: Tensor, dims: tuple[int, ...], axes: str) -> None:
    """Raises ValueError unless ``x`` has one of these numbers of dimensions."""
    if x.dim() not in dims:
        raise ValueError(f"{name} must be {axes}, but has shape {tuple(x.shape)}")


def check_dtype(name: str, x: Tensor | None, allowed: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raises TypeError unless ``x`` is None or has one of the allowed dtypes."""
    if x is not None and x.dtype not in allowed:
        raise TypeError(f"{name} must be one of {_listed(allowed)}, but is {_listed((x.dtype,))}")


def check_device(name: str, x: Tensor | None, device: torch.device, owner: str) -> None:
    """Raises ValueError unless ``x`` is None or on the device of the argument called ``owner``."""
    if x is not None and x.device != device:
        raise ValueError(
            f"{name} is on {x.device}, but {owner} is on {device}; move it there first"
        )


def values_are_readable(x: Tensor) -> bool:
    """Whether looking at x's values costs no device synchronisation and no graph break."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return x.device.type == "cpu" and type(x) is Tensor


def check_indices(name: str, indices: Tensor | None, batch: int, rows: int, owner: str) -> None:
    """Cache row numbers (batch,), negative to skip, below ``rows``.

    Raises ValueError for the shape, TypeError for the dtype and IndexError for a number at or above
    ``rows`` (looked at on CPU tensors only: there is no device synchronisation).
    """
    if indices is None:
        return
    check_shape(name, indices, (batch,), "(batch,)")
    check_dtype(name, indices, INTEGERS)
    if batch > 0 and values_are_readable(indices):
        largest = int(indices.max())
        if largest >= rows:
            raise IndexError(f"{name} holds {largest}, but {owner} has {rows} rows")


def check_writable(name: str, x: Tensor) -> None:
    """Raises ValueError if ``x``, which is changed in place, is expanded (stride 0)."""
    if any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(
            f"{name} is changed in place, but is an expanded view (strides {tuple(x.stride())}); "
            "give a tensor of its own, for example .clone()"
        )


def is_silu(activation: str | None) -> bool:
    """Whether the activation is SiLU. Raises NotImplementedError for any but None, silu, swish."""
    if activation is None:
        return False
    if activation in ("silu", "swish"):
        return True
    raise NotImplementedError(f"activation must be None, 'silu' or 'swish', but is {activation!r}")
