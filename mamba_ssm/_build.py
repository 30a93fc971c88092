"""The one builder of the compiled kernels, used by setup.py and by ``python -m mamba_ssm build``.

It compiles ``csrc/`` against torch's stable ABI into up to two plain shared libraries without any
CPython symbol, so one build serves every Python and every torch from 2.10 on:

* ``_native_cpu.so``: g++ or clang++ and the headers of an installed torch;
* ``_native_cuda.so``: nvcc as well. Neither a GPU nor a CUDA build of torch is needed to compile.

Only the standard library is used and neither torch nor mamba_ssm is imported, so that setup.py can
load this file by path in an environment that has no torch. Nothing is ever downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent
LIBRARIES = {"cpu": "_native_cpu.so", "cuda": "_native_cuda.so"}
MIN_TORCH = (2, 10)
# The oldest torch that the libraries run on, as its stable headers expect it.
TORCH_TARGET_VERSION = "0x020a000000000000"
# Without a GPU to look at: real code for the common servers, PTX for whatever is newer.
PORTABLE_CUDA_ARCHS = "8.0;9.0+PTX"
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Neither changes a result; without them no loop with a comparison of floats is vectorised.
CXX_FLAGS += ["-fno-trapping-math", "-fno-math-errno"]
# Instead of -O3 with --sanitize: every load, store and overflow is checked at run time.
SANITIZE_FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
SANITIZE_FLAGS += ["-fno-sanitize-recover=all"]
# A file named *.isa.cpp is compiled once for each of these, in a namespace of that name, and chosen
# at run time (csrc/common/cpu_isa.h); *.isa_bf16.cpp for those with bf16 products as well.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_AVX512 += ["-mprefer-vector-width=512"]
_BF16 = [*_AVX512, "-mavx512bf16", "-mavx512vnni"]
X86_ISAS = {
    "baseline": (4, []),
    "avx2": (8, _AVX2),
    "avx512": (16, _AVX512),
    "avx512_bf16": (16, _BF16),
    "avx512_amx": (16, [*_BF16, "-mamx-tile", "-mamx-bf16"]),
}
WITH_BF16 = ("avx512_bf16", "avx512_amx")
OTHER_ISAS = {"baseline": (4, [])}
# Vectors wider than the baseline's registers never cross a call, so their ABI is moot; GCC 12 takes
# the undefined upper halves inside its own intrinsics for uninitialised variables.
ISA_WARNINGS = ["-Wno-psabi", "-Wno-maybe-uninitialized"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0"]


class BuildUnavailable(RuntimeError):
    """The build needs something that is not here; the message says what, and the remedy."""


class BuildFailed(RuntimeError):
    """A compiler ran and failed; the message holds its output."""


@dataclass(frozen=True)
class Toolchain:
    """What one library is built with: the compilers, and the folder of the installed torch."""

    device: str
    cxx: str
    torch_dir: Path
    nvcc: str | None = None
    cuda_archs: str = ""
    sanitize: bool = False

    @property
    def cxx_flags(self) -> list[str]:
        """Options of every C++ compilation."""
        return [*CXX_FLAGS, *(SANITIZE_FLAGS if self.sanitize else [])]


def csrc_dir() -> Path:
    """The C++ and CUDA sources: inside an installed package, next to it in a checkout."""
    for candidate in (PACKAGE_DIR / "csrc", PACKAGE_DIR.parent / "csrc"):
        if (candidate / "bindings_cpu.cpp").is_file():
            return candidate
    raise BuildUnavailable(f"the kernel sources (csrc) are not in {PACKAGE_DIR} or next to it")


def find_torch() -> Path:
    """The folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildUnavailable(
            "torch is not installed in the environment that builds (pip's isolated build "
            "environment has none: install torch, then use `pip install --no-build-isolation` "
            "or `python -m mamba_ssm build`)"
        )
    torch_dir = Path(next(iter(spec.submodule_search_locations)))
    found = re.search(r"__version__ = '([^']+)'", (torch_dir / "version.py").read_text())
    version = found.group(1) if found else "0"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
        wanted = ".".join(map(str, MIN_TORCH))
        raise BuildUnavailable(f"torch {version} is installed; the kernels need torch >= {wanted}")
    if not (torch_dir / "include/torch/csrc/stable/library.h").is_file():
        raise BuildUnavailable(f"torch {version} in {torch_dir} comes without its C++ headers")
    return torch_dir


def find_cxx() -> str:
    """The C++ compiler: $CXX (one program), else the first of g++, clang++, c++ on the PATH."""
    if platform.system() != "Linux":
        raise BuildUnavailable(f"the kernels are built on Linux only, not on {platform.system()}")
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        path = shutil.which(name)
        if path:
            return path
    looked = f"$CXX = {wanted}" if wanted else "g++, clang++ or c++"
    raise BuildUnavailable(f"no C++ compiler was found ({looked}); install g++ >= 9")


def find_nvcc() -> str:
    """The CUDA compiler: $CUDA_HOME or $CUDA_PATH, else the PATH, else /usr/local/cuda."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:
            path = shutil.which("nvcc", path=str(Path(home) / "bin"))
            if path is None:
                raise BuildUnavailable(f"${variable} = {home} holds no bin/nvcc")
            return path
    path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if path is None:
        raise BuildUnavailable("nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
    return path


def find_cuda_archs() -> str:
    """GPU architectures: $TORCH_CUDA_ARCH_LIST, else the visible GPUs', else a portable list."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if wanted:
        return ";".join(wanted.replace(";", " ").replace(",", " ").split())
    smi = shutil.which("nvidia-smi")
    if smi:
        query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return PORTABLE_CUDA_ARCHS
        caps = set(re.findall(r"^\d+\.\d+$", answer.stdout, flags=re.M))
        if answer.returncode == 0 and caps:
            return ";".join(sorted(caps, key=lambda cap: tuple(map(int, cap.split(".")))))
    return PORTABLE_CUDA_ARCHS


def nvcc_arch_flags(archs: str) -> list[str]:
    """nvcc's options for a list such as "8.0;9.0+PTX". Raises BuildUnavailable for another form."""
    flags = []
    for arch in archs.split(";"):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if found is None:
            raise BuildUnavailable(
                f"TORCH_CUDA_ARCH_LIST has {arch!r}; write compute capabilities such as 8.0;9.0+PTX"
            )
        number = "".join(found.group(1, 2, 3))
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found.group(4):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_toolchain(device: str) -> Toolchain:
    """What building for ``device`` ("cpu" or "cuda") takes; raises BuildUnavailable."""
    csrc_dir()
    torch_dir, cxx = find_torch(), find_cxx()
    if device == "cpu":
        return Toolchain(device, cxx, torch_dir)
    nvcc, archs = find_nvcc(), find_cuda_archs()
    nvcc_arch_flags(archs)
    return Toolchain(device, cxx, torch_dir, nvcc, archs)


def _build_dir(device: str) -> Path:
    """Object files live here between builds: in the checkout, else in the user's cache."""
    if (PACKAGE_DIR.parent / "csrc/bindings_cpu.cpp").is_file():
        return PACKAGE_DIR.parent / "build" / "native" / device
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(str(PACKAGE_DIR).encode()).hexdigest()[:12]
    return cache / "mamba_ssm" / f"build-{key}" / device


@contextlib.contextmanager
def _locked(build_dir: Path) -> Iterator[None]:
    """One build at a time in a folder: a second process waits for the first."""
    import fcntl  # not on Windows, where this module must import but never builds

    with (build_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class _Step:
    """One compiler call. With ``depfile`` set, the call also writes the headers it read there."""

    command: list[str]
    output: Path
    inputs: list[Path]
    depfile: Path | None = None


def _isa_variants(source: Path) -> dict[str, list[str]]:
    """Extra flags for each object file made of ``source``, by the name of its instruction set."""
    if not source.name.endswith((".isa.cpp", ".isa_bf16.cpp")):
        return {"": []}
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = dict(X86_ISAS if x86 else OTHER_ISAS)
    if source.name.endswith(".isa.cpp"):
        isas = {name: isa for name, isa in isas.items() if name not in WITH_BF16}
    return {
        isa: [f"-DMAMBA_ISA={isa}", f"-DMAMBA_LANES={lanes}", *ISA_WARNINGS, *flags]
        for isa, (lanes, flags) in isas.items()
    }


def _compile_steps(tools: Toolchain, build_dir: Path) -> list[_Step]:
    csrc = csrc_dir()
    sources = sorted(csrc.glob(f"bindings_{tools.device}*.cpp"))
    sources += sorted(csrc.glob(f"*/{tools.device}/*.cpp"))
    sources += sorted(csrc.glob(f"*/{tools.device}/*.cu"))
    target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
    steps = []
    for source, isa, flags in [(s, i, f) for s in sources for i, f in _isa_variants(s).items()]:
        name = "_".join(source.relative_to(csrc).parts) + (f".{isa}" if isa else "")
        output = build_dir / f"{name}.o"
        depfile = build_dir / f"{name}.d"
        if source.suffix == ".cu":
            assert tools.nvcc is not None
            command = [tools.nvcc, *NVCC_FLAGS, "-ccbin", tools.cxx]
            command += nvcc_arch_flags(tools.cuda_archs)
        else:
            command = [tools.cxx, *tools.cxx_flags, *flags]
            if source.parent == csrc:  # the bindings, the only files that see torch
                command += [target, "-isystem", str(tools.torch_dir / "include")]
                if tools.device == "cuda":
                    command += ["-DUSE_CUDA", f'-DMAMBA_CUDA_ARCHS="{tools.cuda_archs}"']
        command += ["-MD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
        steps.append(_Step(command, output, [source], depfile))
    return steps


def _link_steps(tools: Toolchain, objects: list[Path], build_dir: Path) -> list[_Step]:
    output = build_dir / LIBRARIES[tools.device]
    torch_libs = ["-L", str(tools.torch_dir / "lib"), "-ltorch_cpu", "-lc10"]
    if tools.device == "cpu":
        sanitizers = SANITIZE_FLAGS if tools.sanitize else []
        command = [tools.cxx, "-shared", *sanitizers, "-o", str(output), *map(str, objects)]
        command += torch_libs
        return [_Step(command, output, objects)]
    # The current CUDA stream comes from libtorch_cuda, which a CPU build of torch does not have. An
    # empty library of that name leaves the DT_NEEDED entry that finds the real one at load time.
    stub = build_dir / "stub" / "libtorch_cuda.so"
    stub_command = [tools.cxx, "-shared", "-nostdlib", "-Wl,-soname,libtorch_cuda.so"]
    stub_step = _Step([*stub_command, "-x", "c", "/dev/null", "-o", str(stub)], stub, [])
    assert tools.nvcc is not None
    command = [tools.nvcc, "-shared", "-cudart", "static", "-ccbin", tools.cxx]
    command += ["-o", str(output), *map(str, objects), *torch_libs]
    command += ["-Xlinker", "--no-as-needed", "-L", str(stub.parent), "-l:libtorch_cuda.so"]
    return [stub_step, _Step(command, output, [*objects, stub])]


def _ninja_text(steps: Iterable[_Step]) -> str:
    def path(p: Path) -> str:
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["ninja_required_version = 1.3"]
    for number, step in enumerate(steps):
        command = shlex.join(step.command).replace("$", "$$")
        lines += [f"rule step{number}", f"  command = {command}", f"  description = {step.output}"]
        if step.depfile:
            lines += [f"  depfile = {path(step.depfile)}", "  deps = gcc"]
        inputs = " ".join(path(p) for p in step.inputs)
        lines.append(f"build {path(step.output)}: step{number} {inputs}")
    return "\n".join(lines) + "\n"


def _find_ninja() -> str | None:
    beside_python = Path(sys.executable).parent / "ninja"
    return str(beside_python) if beside_python.is_file() else shutil.which("ninja")


def _run(command: Sequence[str], verbose: bool) -> None:
    if verbose:
        print("+", shlex.join(command), flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if verbose and result.stdout:
        print(result.stdout, end="", flush=True)
    if result.returncode != 0:
        raise BuildFailed(f"{shlex.join(command)}\nfailed:\n{result.stdout.strip()}")


def _install(source: Path, target: Path) -> None:
    """Replaces ``target`` in one step, so that no process ever maps a half-written library."""
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copyfile(source, temporary)
        temporary.chmod(0o755)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _compile(tools: Toolchain, build_dir: Path, verbose: bool) -> None:
    compiles = _compile_steps(tools, build_dir)
    steps = compiles + _link_steps(tools, [step.output for step in compiles], build_dir)
    ninja = _find_ninja()
    if ninja is None:
        for step in steps:
            _run(step.command, verbose)
        return
    (build_dir / "build.ninja").write_text(_ninja_text(steps))
    command = [ninja, "-C", str(build_dir)]
    _run([*command, "-v"] if verbose else command, verbose)


def build_library(tools: Toolchain, output_dir: Path, verbose: bool = False) -> Path:
    """Compiles one library into ``output_dir`` and returns its path.

    With ninja, sources whose text and options did not change are not compiled again; without it
    the compilers are called one after another for all of them. Raises BuildFailed.
    """
    build_dir = _build_dir(tools.device + ("-sanitize" if tools.sanitize else ""))
    target = output_dir / LIBRARIES[tools.device]
    try:
        (build_dir / "stub").mkdir(parents=True, exist_ok=True)
        with _locked(build_dir):
            _compile(tools, build_dir, verbose)
            _install(build_dir / LIBRARIES[tools.device], target)
    except OSError as error:
        raise BuildFailed(f"{target} could not be made: {error}") from error
    return target


def requested_devices(text: str) -> list[str]:
    """Devices named in ``text``: "cpu", "cuda", "cpu,cuda" or "all". Raises ValueError."""
    names = [name for name in re.split(r"[\s,;]+", text.strip().lower()) if name]
    unknown = [name for name in names if name not in (*LIBRARIES, "all")]
    if unknown or not names:
        raise ValueError(f"devices to build for are cpu, cuda or all, got {text!r}")
    return [device for device in LIBRARIES if device in names or "all" in names]


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m mamba_ssm build``. Returns the exit status: 0, or 1 when a library is missing.

    Without ``--device``, the CUDA library is built only where nvcc is found; a device that was
    named must build.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mamba_ssm build",
        description="Compile the kernels for the installed torch, next to the installed package.",
    )
    parser.add_argument("--device", help="cpu, cuda or all; default: cpu, and cuda if nvcc is here")
    parser.add_argument("--output", type=Path, default=PACKAGE_DIR, help="folder of the libraries")
    parser.add_argument("--verbose", action="store_true", help="print the compiler calls")
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="CPU kernels that check themselves (AddressSanitizer, UBSan), for --output elsewhere",
    )
    args = parser.parse_args(argv)
    if args.sanitize and (args.device != "cpu" or args.output == PACKAGE_DIR):
        parser.error("--sanitize needs --device cpu and an --output other than the package")
    try:
        named = requested_devices(args.device) if args.device else []
    except ValueError as error:
        parser.error(str(error))
    failed = False
    for device in named or list(LIBRARIES):
        try:
            tools = replace(find_toolchain(device), sanitize=args.sanitize)
        except BuildUnavailable as error:
            needed = device == "cpu" or device in named
            failed |= needed
            stream = sys.stderr if needed else sys.stdout
            print(f"{LIBRARIES[device]}: not built: {error}", file=stream)
            continue
        try:
            library = build_library(tools, args.output, args.verbose)
        except BuildFailed as error:
            failed = True
            print(f"{LIBRARIES[device]}: not built: {error}", file=sys.stderr)
            continue
        archs = f" for compute capability {tools.cuda_archs}" if tools.cuda_archs else ""
        print(f"{library} ({library.stat().st_size / 1e3:.0f} kB){archs}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
