"""``python -m mamba_ssm info``: what is installed, and which backend serves which op, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__, _build
from .ops import backend, native

PACKAGES = (
    "triton", "transformers", "safetensors", "huggingface_hub", "einops", "numpy", "packaging",
    "tqdm", "lm_eval", "causal_conv1d",
)  # fmt: skip


def _versions() -> dict[str, str | None]:
    """Installed versions, None for a package that is not there; nothing is imported for it."""
    versions: dict[str, str | None] = {
        "mamba_ssm": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch.version.cuda": torch.version.cuda,
    }
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _devices() -> list[dict[str, Any]]:
    cpu = {
        "device": "cpu",
        "name": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "native": native.status()["cpu"][0],
        "reason": native.status()["cpu"][1],
    }
    devices = [cpu]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        reason = native.device_reason(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}",
                "native": reason is None,
                "reason": reason or native.status()["cuda"][1],
            }
        )
    if len(devices) == 1:
        loaded, reason = native.status()["cuda"]
        reason = f"{reason}; no GPU is visible" if loaded else reason
        devices.append({"device": "cuda", "name": "none", "native": False, "reason": reason})
    return devices


def _build_tools() -> dict[str, str]:
    """For each library, what it would be built with here, or what is missing."""
    tools = {}
    for device in _build.LIBRARIES:
        try:
            found = _build.find_toolchain(device)
        except _build.BuildUnavailable as error:
            tools[device] = f"cannot be built here: {error}"
            continue
        text = found.nvcc or found.cxx
        tools[device] = f"{text} for {found.cuda_archs}" if found.cuda_archs else text
    return tools


def collect() -> dict[str, Any]:
    """Everything that ``info`` prints, as plain dicts and lists that serialise to JSON."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("MAMBA_SSM_")}
    return {
        "versions": _versions(),
        "environment": variables,
        "devices": _devices(),
        "build": _build_tools(),
        "backend": backend.current(),
        "ops": backend.report(),
    }


def _op_lines(rows: list[dict[str, str]]) -> list[str]:
    """A line per op and device; dtypes with the same backend and reason share one."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        key = (row["op"], row["device"], row["backend"], row["reason"])
        groups.setdefault(key, []).append(row["dtype"])
    width = max((len(row["op"]) for row in rows), default=0)
    lines = []
    for (op, device, served, reason), dtypes in groups.items():
        why = f"  native: {reason}" if reason else ""
        lines.append(f"  {op:{width}}  {device:5} {served:9}  {', '.join(dtypes)}{why}")
    return lines


def render(facts: dict[str, Any]) -> str:
    """The facts of :func:`collect` as text for a terminal."""
    lines = ["Versions"]
    lines += [f"  {name}: {value or 'not installed'}" for name, value in facts["versions"].items()]
    if facts["environment"]:
        lines += ["Environment"]
        lines += [f"  {name}={value}" for name, value in sorted(facts["environment"].items())]
    lines += ["Devices"]
    for device in facts["devices"]:
        state = "native kernels" if device["native"] else "no native kernels"
        lines.append(f"  {device['device']}: {device['name']}")
        lines.append(f"    {state}: {device['reason']}")
    lines += ["Compilers (python -m mamba_ssm build)"]
    lines += [f"  {device}: {text}" for device, text in facts["build"].items()]
    lines += [f"Backends (chosen: {facts['backend']})", *_op_lines(facts["ops"])]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The ``info`` command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mamba_ssm info",
        description="Versions, devices, and the backend that serves each op, with reasons.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else render(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
