"""The builder, the wheels, the loader's reasons, and ``python -m mamba_ssm``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import mamba_ssm
from mamba_ssm import _build
from mamba_ssm.ops import native

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = (
    "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "selective_scan_cuda.py",
    "mamba_generate.py", "csrc", "mamba_ssm",
)  # fmt: skip


def unavailable(device: str) -> str | None:
    """Why this machine cannot compile the library of a device, or None."""
    try:
        _build.find_toolchain(device)
    except _build.BuildUnavailable as error:
        return str(error)
    return None


needs_compiler = pytest.mark.skipif(
    unavailable("cpu") is not None, reason=f"no CPU build here: {unavailable('cpu')}"
)


def run(*command, cwd, check=True, **environment):
    """A fresh process without the suite's own choice of backend; returns it with its output."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAMBA_SSM_", "PYTHONPATH"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    if check:
        assert done.returncode == 0, done.stdout
    return done


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources, so that building in it leaves this checkout alone."""
    root = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, root / name)
    return root


def build_wheel(checkout: Path, output: Path, **environment) -> tuple[Path, str]:
    """The wheel that pip builds in this environment, and everything that the build printed."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-v", "wheel", ".")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-w", output)
    printed = run(*pip, *options, cwd=checkout, **environment).stdout
    (wheel,) = output.glob("*.whl")
    return wheel, printed


@pytest.fixture(scope="module")
def pure_wheel(checkout, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("pure")
    return build_wheel(checkout, output, MAMBA_SSM_BUILD="skip")[0]


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def shipped_files() -> set[str]:
    csrc = {f"mamba_ssm/{p.relative_to(ROOT)}" for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assets = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "mamba_ssm" / "assets").rglob("*")
        if p.suffix in (".json", ".safetensors")
    }
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "mamba_ssm").rglob("*.py")}
    return csrc | assets | modules | {"selective_scan_cuda.py", "mamba_ssm/py.typed"}


def test_pure_wheel(pure_wheel):
    assert pure_wheel.name == f"mamba_ssm-{mamba_ssm.__version__}-py3-none-any.whl"
    assert not [name for name in contents(pure_wheel) if name.endswith(".so")]
    assert shipped_files() <= contents(pure_wheel)


@needs_compiler
def test_wheel_with_kernels(checkout, tmp_path):
    wheel, printed = build_wheel(checkout, tmp_path, MAMBA_SSM_BUILD_DEVICES="cpu")
    version = mamba_ssm.__version__
    assert wheel.name.startswith(f"mamba_ssm-{version}-py3-none-linux_"), printed
    assert "mamba_ssm/_native_cpu.so" in contents(wheel)
    assert "mamba_ssm/_native_cuda.so" not in contents(wheel)
    assert shipped_files() <= contents(wheel)
    assert "kernels: built _native_cpu.so" in printed


@needs_compiler
def test_pure_install_gains_kernels_by_the_build_command(pure_wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(site)
    environment = {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = (sys.executable, "-m", "mamba_ssm")
    before = json.loads(run(*command, "info", "--json", cwd=tmp_path, **environment).stdout)
    assert before["devices"][0]["native"] is False
    assert "python -m mamba_ssm build" in before["devices"][0]["reason"]
    run(*command, "build", "--device", "cpu", cwd=tmp_path, **environment)
    after = json.loads(run(*command, "info", "--json", cwd=tmp_path, **environment).stdout)
    assert after["devices"][0]["native"] is True, after["devices"]
    assert not list((site / "mamba_ssm").glob(".*")), "temporary files stay behind"

    if _build._find_ninja() is None:
        return  # without ninja every build compiles everything
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.[so]*") if path.is_file()}
    assert len([path for path in stamps if path.suffix == ".o"]) >= 2
    run(*command, "build", "--device", "cpu", cwd=tmp_path, **environment)
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}, "unchanged, yet rebuilt"


def test_without_torch_the_install_is_pure_and_says_so(checkout, tmp_path):
    """As in pip's isolated build environment: setuptools is there, torch is not."""
    tools = tmp_path / "tools"
    tools.mkdir()
    packages = Path(importlib.util.find_spec("setuptools").origin).parent.parent
    for path in [*packages.glob("setuptools*"), packages / "_distutils_hack"]:
        (tools / path.name).symlink_to(path, target_is_directory=True)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    build = (python, "setup.py", "bdist_wheel", "--dist-dir", tmp_path / "dist")
    printed = run(*build, cwd=checkout, PYTHONPATH=str(tools)).stdout
    assert "no cpu kernels: torch is not installed in the environment that builds" in printed
    assert "installing pure Python" in printed
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    done = run(*build, cwd=checkout, check=False, PYTHONPATH=str(tools), MAMBA_SSM_BUILD="require")
    assert done.returncode != 0
    assert (
        "MAMBA_SSM_BUILD=require, but the cpu kernels were not built: torch is not" in done.stdout
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"MAMBA_SSM_BUILD": "require", "CXX": "no-such-compiler"},
            "no C++ compiler was found ($CXX = no-such-compiler)",
        ),
        ({"MAMBA_SSM_BUILD": "yes"}, "MAMBA_SSM_BUILD is 'yes'; allowed: auto, require, skip"),
        ({"MAMBA_SSM_BUILD_DEVICES": "gpu"}, "devices to build for are cpu, cuda or all"),
    ],
)
def test_install_fails_with_the_reason(checkout, tmp_path, environment, message):
    build = (sys.executable, "setup.py", "bdist_wheel", "--dist-dir", tmp_path)
    done = run(*build, cwd=checkout, check=False, **environment)
    assert done.returncode != 0
    assert message in done.stdout
    assert not list(tmp_path.iterdir())


def test_source_distribution_holds_the_kernel_sources(checkout, tmp_path):
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for path in (ROOT / "csrc").rglob("*"):
        assert (unpacked / path.relative_to(ROOT)).exists(), path
    assert (unpacked / "selective_scan_cuda.py").exists()
    assert not list(unpacked.rglob("*.so"))


def test_the_installed_version_is_the_package_version():
    assert importlib.metadata.version("mamba_ssm") == mamba_ssm.__version__
    assert mamba_ssm.__version__.startswith("1.")


def fake_compiler(folder: Path, status: int, message: str) -> str:
    script = folder / "g++"
    script.write_text(f"#!/bin/sh\necho '{message}' >&2\nexit {status}\n")
    script.chmod(0o755)
    return str(script)


@needs_compiler
@pytest.mark.parametrize("with_ninja", [True, False])
def test_failed_compile_shows_the_compiler_and_keeps_the_old_library(
    tmp_path, monkeypatch, capsys, with_ninja
):
    old = tmp_path / "_native_cpu.so"
    old.write_bytes(b"old")
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, 1, "error: this compiler is broken"))
    monkeypatch.setattr(_build, "_build_dir", lambda device: tmp_path / "build")
    if not with_ninja:
        monkeypatch.setattr(_build, "_find_ninja", lambda: None)
    assert _build.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    assert "error: this compiler is broken" in capsys.readouterr().err
    assert old.read_bytes() == b"old"


def test_missing_compilers_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(_build.BuildUnavailable, match=r"no-such-compiler.*install g\+\+"):
        _build.find_cxx()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_build.BuildUnavailable, match="holds no bin/nvcc"):
        _build.find_nvcc()
    monkeypatch.setattr(_build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(_build.BuildUnavailable, match="torch is not installed"):
        _build.find_torch()


def test_cuda_architectures(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a,10.0+PTX")
    assert _build.find_cuda_archs() == "8.0;9.0a;10.0+PTX"
    assert _build.nvcc_arch_flags("9.0a;10.0+PTX") == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    with pytest.raises(_build.BuildUnavailable, match="TORCH_CUDA_ARCH_LIST has 'Hopper'"):
        _build.nvcc_arch_flags("Hopper")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(_build.shutil, "which", lambda *args, **kwargs: None)
    assert _build.find_cuda_archs() == _build.PORTABLE_CUDA_ARCHS


@pytest.mark.parametrize(
    ("archs", "capability", "serves"),
    [
        ("8.0;9.0+PTX", (8, 0), True),
        ("8.0;9.0+PTX", (8, 9), True),
        ("8.0;9.0+PTX", (12, 0), True),
        ("8.0;9.0+PTX", (7, 5), False),
        ("9.0", (10, 0), False),
        ("9.0", (8, 6), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
    ],
)
def test_which_gpu_a_library_serves(archs, capability, serves):
    assert native._serves(archs, capability) is serves


@pytest.mark.parametrize("text", ["gpu", "", "cpu,tpu"])
def test_unknown_devices(text):
    with pytest.raises(ValueError, match="cpu, cuda or all"):
        _build.requested_devices(text)


def test_cuda_library_needs_torch_cuda_at_load_time():
    library = native.library_path("cuda")
    if not library.is_file():
        pytest.skip("the CUDA library is not built in this checkout (make cuda)")
    data = library.read_bytes()
    assert b"libtorch_cuda.so\0" in data
    assert b"mamba_ssm_cuda_archs\0" in data
    assert b"libcudart.so" not in data, "the CUDA runtime must be linked statically"


def load_status(monkeypatch, device="cpu", **changes) -> tuple[bool, str]:
    for name, value in changes.items():
        monkeypatch.setattr(native, name, value)
    return native._load_library(device)


def test_reasons_of_the_loader(monkeypatch, tmp_path):
    monkeypatch.delenv(native.DISABLE_VARIABLE, raising=False)
    loaded, reason = load_status(monkeypatch, _PACKAGE_DIR=tmp_path)
    assert not loaded and "was not built" in reason and "python -m mamba_ssm build" in reason

    (tmp_path / "_native_cpu.so").write_bytes(b"not a library" * 100)
    loaded, reason = load_status(monkeypatch)
    assert not loaded and "does not fit this machine" in reason and "invalid ELF header" in reason

    loaded, reason = load_status(monkeypatch, _torch_version=lambda: (2, 6))
    assert not loaded and "is too old" in reason and "2.10" in reason

    monkeypatch.setattr(native.platform, "system", lambda: "Darwin")
    loaded, reason = load_status(monkeypatch)
    assert not loaded and "Linux only, not for Darwin" in reason


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_reason_of_a_cpu_torch(monkeypatch):
    monkeypatch.delenv(native.DISABLE_VARIABLE, raising=False)
    loaded, reason = load_status(monkeypatch, "cuda")
    assert not loaded and "built without CUDA" in reason


def test_blocked_libraries_leave_a_working_package():
    program = """
import torch, mamba_ssm
from mamba_ssm.ops import native
for device, (loaded, reason) in native.status().items():
    assert not loaded and "MAMBA_SSM_DISABLE_NATIVE=1" in reason, (device, reason)
assert not native.has_kernel("_state_update", "cpu")
state = torch.zeros(1, 4, 2)
mamba_ssm.selective_state_update(
    state, torch.ones(1, 4), torch.ones(1, 4), -torch.ones(4, 2), torch.ones(1, 2), torch.ones(1, 2)
)
assert torch.equal(state, torch.ones(1, 4, 2))
"""
    run(sys.executable, "-c", program, cwd=ROOT, MAMBA_SSM_DISABLE_NATIVE="1")


def test_info_lists_every_op():
    printed = run(sys.executable, "-m", "mamba_ssm", "info", cwd=ROOT).stdout
    assert f"mamba_ssm: {mamba_ssm.__version__}" in printed
    facts = json.loads(run(sys.executable, "-m", "mamba_ssm", "info", "--json", cwd=ROOT).stdout)
    assert facts["versions"]["torch"] == str(torch.__version__)
    for row in facts["ops"]:
        assert row["op"] in printed
        assert row["backend"] == "native" or row["reason"], row


def test_unknown_command_lists_the_commands():
    done = run(sys.executable, "-m", "mamba_ssm", "train", cwd=ROOT, check=False)
    assert done.returncode == 2
    assert all(name in done.stdout for name in ("info", "build", "generate"))
