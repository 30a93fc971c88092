"""Finds and runs what Markdown texts show: Python blocks, and shell blocks marked as runnable.

A shell block is preceded by a comment: ``<!-- run -->`` (``<!-- run: needs MODULE -->`` where it
takes an optional one) or ``<!-- skip: reason -->``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Folders that a fresh clone has and that the commands name.
NAMED = ("benchmarks", "evals", "examples", "tests", "tools", "mamba_generate.py")


def python_blocks(text: str) -> list[str]:
    """The code of every ```python block."""
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def shell_blocks(text: str) -> list[tuple[str, str]]:
    """(the comment before it, commands) of every ```bash block."""
    return re.findall(r"(?:^<!-- ([^\n]*) -->\n)?^```bash\n(.*?)^```", text, re.M | re.S)


def first_words(block: str) -> str:
    """A readable test id."""
    lines = [line for line in block.splitlines() if not line.startswith(("import", "from"))]
    return " ".join(" ".join(lines).split()[:4])


def run_python(code: str, name: str) -> None:
    """Runs a Python block, in the current directory."""
    torch.manual_seed(0)
    exec(compile(code, name, "exec"), {"__name__": "documentation"})


def run_shell(mark: str, command: str, folder: Path) -> None:
    """Runs a shell block in ``folder``, or skips the test with the reason that its mark gives."""
    assert re.match(r"(run|run: needs \w+|skip: .+)$", mark), f"say run or skip above: {command}"
    if mark.startswith("skip: "):
        pytest.skip(mark.removeprefix("skip: "))
    if "needs" in mark and importlib.util.find_spec(mark.split()[-1]) is None:
        pytest.skip(f"{mark.split()[-1]} is not installed")
    # A clone's folders beside an empty current directory: nothing is written into the real one.
    for name in NAMED:
        (folder / name).symlink_to(ROOT / name)
    scripts = Path(sys.executable).parent
    if "mamba-generate" in command and not (scripts / "mamba-generate").exists():
        pytest.skip("mamba-generate is not installed: pip install -e .")
    environment = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-3000:]
