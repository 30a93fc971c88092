"""The shape of the code: which way dependencies point, sizes, docstrings, and who sees torch."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mamba_ssm"
LIBRARY = [*sorted(PACKAGE.rglob("*.py")), ROOT / "selective_scan_cuda.py"]
OTHER = [ROOT / "setup.py", ROOT / "mamba_generate.py"]
for _folder in ("benchmarks", "evals", "examples", "tests"):
    OTHER += sorted((ROOT / _folder).glob("*.py"))
CSRC = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())

# Whom each part of the package may import, besides itself and what lies outside the package.
ALLOWED = {
    "models": {"inference", "modules", "ops", "utils"},
    "inference": {"modules", "ops", "leaf of ops"},
    "modules": {"ops"},
    "ops": {"ops.reference", "ops.native", "leaf of ops"},
    "ops.native": set(),
    "ops.reference": {"leaf of ops"},
    "ops.triton": {"ops"},
    "leaf of ops": set(),
    "utils": set(),
    "compat": {"ops", "leaf of ops"},
    "commands": {"inference", "models", "utils", ""},
    "info": {"ops", "ops.native", "_build", ""},
    "_build": set(),
    "__main__": {"info", "_build", "commands", ""},
    "": {"models", "modules", "ops"},
}


def part(module: str) -> str:
    """The part of the package that a module (without the leading mamba_ssm) belongs to."""
    pieces = module.split(".")
    file = PACKAGE.joinpath(*pieces).with_suffix(".py")
    if pieces[0] == "ops" and len(pieces) == 2 and module not in ALLOWED and file.is_file():
        return "ops" if imports(file) else "leaf of ops"
    for length in (2, 1):
        if ".".join(pieces[:length]) in ALLOWED:
            return ".".join(pieces[:length])
    return ""


def module_name(path: Path) -> str:
    return (
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        .removesuffix("__init__")
        .rstrip(".")
    )


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, without the leading mamba_ssm."""
    inside = module_name(path).split(".")
    if path.name != "__init__.py":
        inside = inside[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = [*filter(None, inside)][: len([*filter(None, inside)]) - node.level + 1]
                base = ".".join(["mamba_ssm", *parents, *filter(None, [base])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                file = ROOT.joinpath(*name.split("."))
                is_module = file.is_dir() or file.with_suffix(".py").is_file()
                found.add(name if is_module else base)
    return {
        name.removeprefix("mamba_ssm").lstrip(".")
        for name in found
        if name.split(".")[0] == "mamba_ssm"
    }


@pytest.mark.parametrize("path", LIBRARY[:-1], ids=module_name)
def test_dependencies_point_one_way(path):
    own = part(module_name(path))
    for name in imports(path):
        other = part(name)
        allowed = ALLOWED[own] | {own}
        allowed |= {"leaf of ops"} if "ops" in allowed else set()
        assert other in allowed, f"{own or 'the root'} must not import {name or 'the root'}"


def test_the_import_finder_finds():
    assert "ops.native" in imports(PACKAGE / "ops" / "backend.py")
    assert "ops.reference.scan_oracle" in imports(PACKAGE / "ops" / "mamba_inner.py")
    assert "utils.hf" in imports(PACKAGE / "models" / "mixer_seq_simple.py")
    assert "ops.layer_norm" in imports(PACKAGE / "ops" / "triton" / "layernorm.py")
    assert "modules.mamba_simple" in imports(PACKAGE / "__init__.py")


def test_only_schema_and_plain_compositions_see_the_reference():
    # The public functions reach a backend through backend.resolve; what they take from the
    # reference directly is its differentiable oracle.
    users = {
        module_name(path): {name for name in imports(path) if name.startswith("ops.reference.")}
        for path in LIBRARY[:-1]
        if part(module_name(path)) != "ops.reference"
    }
    oracles = {"scan_oracle", "causal_conv1d", "state_update", "state_rows"}
    for module, names in users.items():
        if names and module != "ops.schema":
            assert {name.rsplit(".", 1)[1] for name in names} <= oracles, module
            assert module.startswith("ops."), module


@pytest.mark.parametrize("path", LIBRARY + OTHER + CSRC, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    lines = path.read_text().count("\n")
    limit = 800 if path.parent.name == "tests" else 500
    assert lines <= limit, f"{lines} lines"


def functions(path: Path):
    """(qualified name, node, public) of every function and class in a file."""

    def walk(node, prefix, public):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{prefix}{child.name}"
                visible = public and not child.name.startswith("_")
                yield name, child, visible
                inside = visible and isinstance(child, ast.ClassDef)
                yield from walk(child, f"{name}.", inside)
            elif not isinstance(child, ast.expr):
                yield from walk(child, prefix, public)

    yield from walk(ast.parse(path.read_text()), "", True)


def _code_lines(node) -> int:
    """Lines of a function without its docstring."""
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


@pytest.mark.parametrize("path", LIBRARY + OTHER, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path):
    long = [
        f"{name}: {_code_lines(node)} lines"
        for name, node, _ in functions(path)
        if not isinstance(node, ast.ClassDef) and _code_lines(node) > 80
    ]
    assert not long


def _is_autograd_function(path: Path, name: str) -> bool:
    """forward and backward of torch.autograd.Function are called by torch, not by people."""
    owner, _, method = name.rpartition(".")
    classes = {n: c for n, c, _ in functions(path) if isinstance(c, ast.ClassDef)}
    bases = [ast.unparse(base) for base in getattr(classes.get(owner), "bases", [])]
    return "torch.autograd.Function" in bases and method in ("forward", "backward")


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_names_have_docstrings_and_type_hints(path):
    assert ast.get_docstring(ast.parse(path.read_text())) or not path.read_text().strip()
    problems = []
    for name, node, public in functions(path):
        if not public or _is_autograd_function(path, name):
            continue
        overriding = "." in name and node.name in ("forward", "extra_repr", "reset_parameters")
        if ast.get_docstring(node) is None and not overriding:
            problems.append(f"{name}: docstring")
        if isinstance(node, ast.ClassDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        hinted = [a for a in arguments if a.arg not in ("self", "cls")]
        problems += [f"{name}: type of {a.arg}" for a in hinted if a.annotation is None]
        if node.returns is None:
            problems.append(f"{name}: type of its result")
    assert not problems


# Commands and the builder talk to a person; the streamer is asked to; enable_timing prints.
MAY_PRINT = {"_build", "info", "__main__"}
MAY_PRINT |= {"commands.convert", "commands.generate", "commands.loading"}
MAY_PRINT |= {"utils.text_stream", "utils.decoding"}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_does_not_print(path):
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("print", "breakpoint")
    ]
    assert not calls or module_name(path) in MAY_PRINT


def test_only_the_bindings_see_torch_and_only_its_stable_interface():
    for path in CSRC:
        headers = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(errors="replace"))
        foreign = [h for h in headers if re.match(r"(torch|ATen|c10|pybind11|Python\.h)", h)]
        if path.name.startswith("bindings") and path.parent == ROOT / "csrc":
            assert all(h.startswith("torch/csrc/stable/") for h in foreign), (path, foreign)
            assert "Python.h" not in headers
        else:
            assert not foreign, path


def test_kernels_do_not_include_bindings():
    for path in CSRC:
        if not path.name.startswith("bindings"):
            assert '#include "bindings' not in path.read_text(), path


def test_no_unfinished_notes():
    notes = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    for path in LIBRARY + OTHER + CSRC:
        assert not notes.search(path.read_text()), path


def test_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()
