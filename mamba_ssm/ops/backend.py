"""Which backend runs an op, and why.

``native`` (compiled, per device) comes before ``triton`` (any GPU that Triton serves) and
``reference`` (pure PyTorch, anything). ``auto``, the default, takes the first that supports the
call. An explicit choice, by the environment variable ``MAMBA_SSM_BACKEND`` or with
``with mamba_ssm.backend("reference"):``, never falls back: it raises and says what is unsupported.
The choice holds for the whole process, as torch's own backend flags do.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from . import native
from .schema import NAMESPACE, OPS

BACKENDS = ("auto", "native", "triton", "reference")
ENVIRONMENT_VARIABLE = "MAMBA_SSM_BACKEND"

# What the shipped sources compile, by device: where such a kernel is absent, installing it helps.
SHIPPED_KERNELS = {
    "cpu": frozenset(
        {
            "_selective_scan_fwd",
            "_selective_scan_bwd",
            "_causal_conv1d_fwd",
            "_causal_conv1d_bwd",
            "_causal_conv1d_update",
            "_add_norm_fwd",
            "_add_norm_bwd",
            "_state_update",
            "_decode_step",
            "_decode_and_choose",
            "_pack_weight",
        }
    ),
    "cuda": frozenset(
        {
            "_selective_scan_fwd",
            "_selective_scan_bwd",
            "_causal_conv1d_fwd",
            "_causal_conv1d_bwd",
            "_causal_conv1d_update",
            "_add_norm_fwd",
            "_add_norm_bwd",
            "_state_update",
            "_mixer_step",
            "_decode_step_weights",
            "_prefill_layers",
            "_argmax_rows",
            "_cross_entropy",
            "_mamba_block_fwd",
            "_mamba_block_bwd",
        }
    ),
}

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_DEFAULT = {op.name: getattr(getattr(torch.ops, NAMESPACE), op.name).default for op in OPS}
_REFERENCE = {op.name: getattr(getattr(torch.ops, NAMESPACE), op.name).reference for op in OPS}
_warned: set[str] = set()


class BackendError(RuntimeError):
    """An explicitly chosen backend does not serve the call."""


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; allowed: {', '.join(BACKENDS)}")
    return name


_choice = _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def current() -> str:
    """The backend asked for: one of ``auto``, ``native``, ``triton``, ``reference``."""
    return _choice


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of every op called inside the ``with`` block (process-wide).

    Raises ValueError for an unknown name; inside the block a call that the backend does not serve
    raises :class:`BackendError` instead of falling back.
    """
    global _choice
    previous, _choice = _choice, _checked(name, "backend name")
    try:
        yield
    finally:
        _choice = previous


def _unserved_gpu(device_type: str) -> str | None:
    return native.gpu_reason() if device_type == "cuda" else None


def why_not_native(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """None if the compiled kernel serves this op, device and dtype, else the reason."""
    if not native.has_kernel(op, device_type):
        loaded, reason = native.status().get(
            device_type, (False, f"no kernels exist for {device_type!r}")
        )
        return f"the {device_type} library has no kernel for {op}" if loaded else reason
    unserved = _unserved_gpu(device_type)
    if unserved:
        return unserved
    if dtype not in _FLOATS:
        return f"the {device_type} kernels take fp32, fp16 and bf16, not {dtype}"
    return None


def why_not_decode(device: torch.device, dtype: torch.dtype, int8: bool, *sizes: int) -> str | None:
    """Why a loaded CUDA library's fused decode step does not serve these sizes on a GPU, or None:
    see ``native.decode_refusal``."""
    return native.decode_refusal(device.index or 0, dtype, int8, *sizes)


def warn_once(key: str, message: str) -> None:
    """A RuntimeWarning, once a process for each key, unless the reference was asked for."""
    if _choice != "reference" and key not in _warned:
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _warn_slower(op: str, device_type: str, dtype: torch.dtype) -> None:
    if torch.compiler.is_compiling() or device_type in _warned:
        return
    _warned.add(device_type)
    # A loaded library without the kernel was compiled from older sources.
    reason = why_not_native(op, device_type, dtype)
    warnings.warn(
        f"mamba_ssm runs on the slower pure PyTorch reference on {device_type!r}: {reason}. "
        "`python -m mamba_ssm build` compiles the kernels; `python -m mamba_ssm info` tells more; "
        f"{ENVIRONMENT_VARIABLE}=reference chooses the reference and silences this.",
        RuntimeWarning,
        stacklevel=3,
    )


def resolve(op: str, device_type: str, dtype: torch.dtype) -> Callable:
    """The callable that serves internal op ``op`` for inputs of this device and dtype.

    Raises :class:`BackendError` when the backend was chosen explicitly and does not serve the call.
    """
    if _choice == "reference":
        return _REFERENCE[op]
    if _choice == "triton":
        raise BackendError(
            f"backend 'triton' was chosen, but it has no kernel for {op}; "
            "choose 'auto', 'native' or 'reference'"
        )
    usable = native.has_kernel(op, device_type) and not _unserved_gpu(device_type)
    if usable and dtype in _FLOATS:
        return _DEFAULT[op]
    if _choice == "native":
        raise BackendError(
            f"backend 'native' was chosen, but it does not serve {op} on {device_type} in {dtype}: "
            f"{why_not_native(op, device_type, dtype)}"
        )
    if op in SHIPPED_KERNELS.get(device_type, ()) and not usable:
        _warn_slower(op, device_type, dtype)
    return _REFERENCE[op]


def runs_native(op: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether a call that may do with the compiled kernel of ``op`` or without it gets it."""
    return _choice in ("auto", "native") and why_not_native(op, device_type, dtype) is None


def _served(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """(backend, or "none" where a call raises; why not native), as :func:`resolve` decides."""
    if _choice == "triton":
        return "none", f"backend 'triton' was chosen, but it has no kernel for {op}"
    reason = why_not_native(op, device_type, dtype)
    if reason:
        return "none" if _choice == "native" else "reference", reason
    if _choice == "reference":
        return "reference", "backend 'reference' was chosen"
    return "native", ""


def only_reference(what: str) -> None:
    """Raises :class:`BackendError` if an explicit choice forbids what only the reference serves."""
    if _choice in ("native", "triton"):
        raise BackendError(
            f"backend {_choice!r} was chosen, but {what} is served by the reference only; choose "
            "'auto' or 'reference'"
        )


def is_native(op: Callable) -> bool:
    """Whether :func:`resolve` gave the compiled kernel."""
    return any(op is native_op for native_op in _DEFAULT.values())


def report() -> list[dict[str, str]]:
    """For each op, device type and dtype: the backend that serves it and why native does not."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = []
    for op in OPS:
        for device in devices:
            for dtype in (*_FLOATS, torch.float64):
                served, reason = _served(op.name, device, dtype)
                rows.append(
                    {
                        "op": op.name,
                        "device": device,
                        "dtype": str(dtype).removeprefix("torch."),
                        "backend": served,
                        "reason": reason,
                    }
                )
    return rows
