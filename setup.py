"""Packaging. pyproject.toml holds the metadata; this file adds the compiled kernels.

The environment variable MAMBA_SSM_BUILD decides about the kernels:

* ``auto`` (default): build what this machine can build, else install pure Python and say why;
* ``require``: fail the installation when the kernels cannot be built;
* ``skip``: do not try.

MAMBA_SSM_BUILD_DEVICES limits what is tried: ``cpu``, ``cuda`` or ``all`` (default: ``cpu``, and
``cuda`` where nvcc is found). Nothing is ever downloaded.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "require", "skip")


def load_builder():
    """mamba_ssm/_build.py by path: importing mamba_ssm would need torch."""
    spec = importlib.util.spec_from_file_location("mamba_build", ROOT / "mamba_ssm" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


builder = load_builder()


def say(message):
    """One line that pip shows with -v, and that a direct call of setup.py always shows."""
    print(f"mamba_ssm: {message}", file=sys.stderr, flush=True)


def build_mode():
    mode = os.environ.get("MAMBA_SSM_BUILD", "").strip().lower() or "auto"
    if mode not in MODES:
        raise SetupError(f"MAMBA_SSM_BUILD is {mode!r}; allowed: {', '.join(MODES)}")
    return mode


def build_kernels(output_dir):
    """Builds the libraries that MAMBA_SSM_BUILD asks for; returns their paths."""
    mode = build_mode()
    if mode == "skip":
        say("kernels: skipped (MAMBA_SSM_BUILD=skip); installing pure Python")
        return []
    named = os.environ.get("MAMBA_SSM_BUILD_DEVICES", "").strip()
    try:
        devices = builder.requested_devices(named or "all")
    except ValueError as error:
        raise SetupError(f"MAMBA_SSM_BUILD_DEVICES: {error}") from None
    built = []
    for device in devices:
        try:
            built.append(builder.build_library(builder.find_toolchain(device), output_dir))
            say(f"kernels: built {built[-1].name}")
        except (builder.BuildUnavailable, builder.BuildFailed) as error:
            optional = device == "cuda" and not named and not isinstance(error, builder.BuildFailed)
            if mode == "require" and not optional:
                raise SetupError(
                    f"MAMBA_SSM_BUILD=require, but the {device} kernels were not built: {error}"
                ) from None
            say(f"kernels: no {device} kernels: {error}")
    if not built:
        say("kernels: none; installing pure Python (`python -m mamba_ssm build` adds them later)")
    return built


class KernelDistribution(Distribution):
    """A distribution that has platform code exactly when a kernel library was built."""

    kernels = ()

    def has_ext_modules(self):
        return bool(self.kernels)


class BuildWithKernels(build_py):
    """Copies the sources in csrc into the package and compiles them."""

    def run(self):
        package = Path(self.build_lib) / "mamba_ssm"
        if not self.editable_mode:
            shutil.rmtree(package, ignore_errors=True)  # leftovers of files that are gone
        super().run()
        if self.editable_mode:
            package = ROOT / "mamba_ssm"
        else:
            shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)
        self.distribution.kernels = build_kernels(package)


class KernelWheel(bdist_wheel):
    """The libraries use no CPython symbol: any Python 3, no Python ABI, this platform."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self):
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(
    distclass=KernelDistribution,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": KernelWheel},
)
