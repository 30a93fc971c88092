"""Loads the compiled kernels and says, readably, why they are absent or do not fit.

:func:`load` runs once, when this module is imported. It never raises: a library that is missing,
built for another platform or too new for the installed torch leaves a reason in :func:`status`, and
the ops run on another backend.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
from pathlib import Path

import torch

NAMESPACE = "mamba_ssm"
DISABLE_VARIABLE = "MAMBA_SSM_DISABLE_NATIVE"
CPU_ISA_VARIABLE = "MAMBA_SSM_CPU_ISA"
LIBRARY_DIR_VARIABLE = "MAMBA_SSM_LIBRARY_DIR"
MIN_TORCH = (2, 10)

_PACKAGE_DIR = Path(__file__).resolve().parent.parent
_LIBRARIES = {"cpu": "_native_cpu.so", "cuda": "_native_cuda.so"}
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_BUILD_HINT = "`python -m mamba_ssm build` compiles it"

_status: dict[str, tuple[bool, str]] = {}
# A plain dict, complete after load(): torch.compile can trace a lookup in it.
_kernels: dict[tuple[str, str], bool] = {}


def _torch_version() -> tuple[int, int]:
    major, minor = re.findall(r"\d+", str(torch.__version__))[:2]
    return int(major), int(minor)


def library_path(device_type: str) -> Path:
    """Where the library of a device ("cpu" or "cuda") is expected. Raises KeyError for others.

    Beside the package, or in the folder that ``MAMBA_SSM_LIBRARY_DIR`` names (another build of the
    kernels, such as the one of ``make sanitize``).
    """
    return Path(os.environ.get(LIBRARY_DIR_VARIABLE) or _PACKAGE_DIR) / _LIBRARIES[device_type]


def _reason_to_skip(device_type: str) -> str | None:
    """Why not even to try loading, or None."""
    disabled = os.environ.get(DISABLE_VARIABLE, "").strip().lower()
    if disabled not in ("", "0", "false"):
        return f"{DISABLE_VARIABLE}={disabled} leaves the compiled kernels unloaded"
    if platform.system() != "Linux":
        return f"compiled kernels exist for Linux only, not for {platform.system()}"
    if _torch_version() < MIN_TORCH:
        wanted = ".".join(map(str, MIN_TORCH))
        return (
            f"torch {torch.__version__} is too old for the compiled kernels: they need >= {wanted}"
        )
    if device_type == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not library_path(device_type).is_file():
        return (
            f"{_LIBRARIES[device_type]} was not built when mamba_ssm was installed; {_BUILD_HINT}"
        )
    return None


def _load_library(device_type: str) -> tuple[bool, str]:
    reason = _reason_to_skip(device_type)
    if reason is not None:
        return False, reason
    path = library_path(device_type)
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        # torch wraps the dynamic linker's own message, the useful one, in another error.
        detail = str(error.__cause__ or error).strip().splitlines()[0]
        return False, (
            f"{path.name} does not fit this machine ({platform.machine()}) or torch "
            f"{torch.__version__}: {detail}; {_BUILD_HINT} again"
        )
    if device_type == "cpu":
        refused = _refused_isa(path)
        if refused:
            return False, refused
    return True, f"loaded from {path}"


def _refused_isa(path: Path) -> str | None:
    """Why the instruction set that the environment asks for is not to be had, or None."""
    wanted = os.environ.get(CPU_ISA_VARIABLE)
    if not wanted or ctypes.CDLL(str(path)).mamba_ssm_force_cpu_isa(wanted.encode()):
        return None
    return (
        f"{CPU_ISA_VARIABLE} is {wanted!r}, which is no instruction set of this machine's kernels; "
        "`python -m mamba_ssm info` lists them"
    )


def load() -> None:
    """Loads what can be loaded, once; later calls do nothing.

    No CUDA context is made and no device is counted, so forking afterwards is safe.
    """
    if _status:
        return
    for device_type, key in _DISPATCH_KEYS.items():
        _status[device_type] = _load_library(device_type)
        if _status[device_type][0]:
            for name in torch._C._dispatch_get_registrations_for_dispatch_key(key):
                namespace, _, op = name.partition("::")
                if namespace == NAMESPACE:
                    _kernels[op.partition(".")[0], device_type] = True


def status() -> dict[str, tuple[bool, str]]:
    """For each device type: whether its library is loaded, and from where or why not."""
    return dict(_status)


def has_kernel(op_name: str, device_type: str) -> bool:
    """Whether the compiled library of a device type ("cpu", "cuda") has internal op ``op_name``.

    Only a dictionary lookup, so it may run while torch.compile traces.
    """
    return (op_name, device_type) in _kernels


@functools.cache
def _cpu_library() -> ctypes.CDLL:
    loaded, reason = status()["cpu"]
    if not loaded:
        raise RuntimeError(reason)
    library = ctypes.CDLL(str(library_path("cpu")))
    library.mamba_ssm_cpu_isa.restype = ctypes.c_char_p
    library.mamba_ssm_available_cpu_isa.restype = ctypes.c_char_p
    return library


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use now. Raises RuntimeError without them."""
    return _cpu_library().mamba_ssm_cpu_isa().decode()


def available_cpu_isas() -> list[str]:
    """The instruction sets that this machine has and the kernels are compiled for, worst first."""
    names, library = [], _cpu_library()
    while (name := library.mamba_ssm_available_cpu_isa(len(names))) is not None:
        names.append(name.decode())
    return [name for name in names if name]


def force_cpu_isa(name: str) -> None:
    """Makes the CPU kernels of this process use one instruction set; "auto" undoes it.

    Raises ValueError if this machine lacks it. The environment variable ``MAMBA_SSM_CPU_ISA`` does
    the same from the start.
    """
    if not _cpu_library().mamba_ssm_force_cpu_isa(name.encode()):
        have = ", ".join(["auto", *available_cpu_isas()])
        raise ValueError(f"instruction set {name!r} is not to be had; this machine has: {have}")


def _serves(archs: str, capability: tuple[int, int]) -> bool:
    """Whether a library with code for ``archs`` ("8.0;9.0+PTX") runs on this compute capability."""
    for major, minor, suffix, ptx in re.findall(r"(\d+)\.(\d+)([af]?)(\+PTX)?", archs):
        built = (int(major), int(minor))
        same_family = built[0] == capability[0] and built[1] <= capability[1]
        if (built == capability) if suffix else (same_family or (ptx and built <= capability)):
            return True
    return False


@functools.cache
def device_reason(device_index: int = 0) -> str | None:
    """Why the loaded CUDA library has no code for this GPU, or None when it has.

    Initialises CUDA in this process, so call it only where a CUDA device is in use anyway.
    """
    loaded, reason = status()["cuda"]
    if not loaded:
        return reason
    library = ctypes.CDLL(str(library_path("cuda")))
    library.mamba_ssm_cuda_archs.restype = ctypes.c_char_p
    archs = library.mamba_ssm_cuda_archs().decode()
    capability = torch.cuda.get_device_capability(device_index)
    if _serves(archs, capability):
        return None
    return (
        f"{_LIBRARIES['cuda']} holds code for compute capability {archs}, but GPU {device_index} "
        f"has {capability[0]}.{capability[1]}; {_BUILD_HINT} for it"
    )


_DECODE_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@functools.cache
def decode_refusal(device_index: int, dtype: torch.dtype, int8: bool, *sizes: int) -> str | None:
    """Why the CUDA library's fused decode step does not serve a call, or None when it does.

    ``int8``: whether the large weights are. ``sizes``: batch, layers, d_model, d_inner, d_state,
    d_conv, dt_rank. The library must be loaded, and ``dtype`` be fp32, fp16 or bf16.
    """
    library = ctypes.CDLL(str(library_path("cuda")))
    refusal = library.mamba_ssm_decode_refusal
    refusal.restype = ctypes.c_char_p
    reason = refusal(device_index, _DECODE_DTYPES[dtype], int(int8), *sizes)
    return None if reason is None else reason.decode()


@functools.cache
def _gpu_reason() -> str | None:
    reasons = (device_reason(index) for index in range(torch.cuda.device_count()))
    return next((reason for reason in reasons if reason), None)


def gpu_reason() -> str | None:
    """Why the CUDA library does not serve every visible GPU, or None when it does.

    One answer for all of them, because ops are chosen by device type; ``CUDA_VISIBLE_DEVICES``
    hides a GPU that should not count. Initialises CUDA, so call it only where CUDA tensors exist
    anyway.
    """
    return _gpu_reason()


# What torch.compiler.assume_constant_result sets; calling that would import the compiler.
gpu_reason._dynamo_marked_constant = True

load()
