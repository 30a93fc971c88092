"""Runs what README.md shows: every Python block, and the shell blocks marked as runnable.

A shell block is preceded by a comment: ``<!-- run -->`` (``<!-- run: needs MODULE -->`` where it
takes an optional one) or ``<!-- skip: reason -->``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba_ssm.ops.backend import SHIPPED_KERNELS
from mamba_ssm.ops.schema import OPS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
SHELL = re.findall(r"(?:^<!-- ([^\n]*) -->\n)?^```bash\n(.*?)^```", README, re.M | re.S)
# Folders that a fresh clone has and that the commands name.
NAMED = ("benchmarks", "evals", "examples", "tests", "tools", "mamba_generate.py")


def first_words(block: str) -> str:
    """A readable test id."""
    lines = [line for line in block.splitlines() if not line.startswith(("import", "from"))]
    return " ".join(" ".join(lines).split()[:4])


@pytest.mark.parametrize("code", PYTHON, ids=first_words)
def test_python_blocks(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize(("mark", "command"), SHELL, ids=lambda value: first_words(value))
def test_shell_blocks(mark, command, tmp_path):
    assert re.match(r"(run|run: needs \w+|skip: .+)$", mark), f"say run or skip above: {command}"
    if mark.startswith("skip: "):
        pytest.skip(mark.removeprefix("skip: "))
    if "needs" in mark and importlib.util.find_spec(mark.split()[-1]) is None:
        pytest.skip(f"{mark.split()[-1]} is not installed")
    # A clone's folders beside an empty current directory: nothing is written into the real one.
    for name in NAMED:
        (tmp_path / name).symlink_to(ROOT / name)
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
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_blocks_are_found():
    assert len(PYTHON) >= 6
    assert sum(mark.startswith("run") for mark, _ in SHELL) >= 2
    assert README.count("```") == 2 * len(re.findall(r"^```\w+$", README, re.M))


def test_the_table_of_backends_is_what_is_shipped():
    table = README.split("<!-- backends -->\n")[1].split("\n\n")[0].splitlines()[2:]
    stated = {}
    for row in table:
        names, cpu, cuda = (cell.strip() for cell in row.strip("|").split("|"))
        for name in re.findall(r"`(\w+)`", names):
            stated[name] = {"cpu": cpu, "cuda": cuda}
    for op in OPS:
        assert op.name in stated, f"README.md's table of backends lacks {op.name}"
        for device, backend in stated.pop(op.name).items():
            shipped = "native" if op.name in SHIPPED_KERNELS[device] else "reference"
            wrong = (
                f"README.md's table says {backend} for {op.name} on {device}, but {shipped} runs"
            )
            assert backend == shipped, wrong
    assert not stated, f"README.md's table of backends names unknown ops: {sorted(stated)}"


def test_figures_of_the_embedded_model_are_those_of_its_record():
    record = json.loads((ROOT / "mamba_ssm/assets/embedded/metrics.json").read_text())
    section = README.split("## The embedded model")[1].split("\n## ")[0]
    bits, model = record["heldout_bits_per_byte"], record["model"]
    for figure in (
        f"{model['parameters']:,}",
        f"{model['safetensors_bytes'] / 1e6:.2f} MB",
        f"{record['corpus']['files']:,} files, {record['corpus']['bytes'] / 1e6:.2f} MB",
        f"{record['corpus']['heldout_files']} files, {record['corpus']['heldout_bytes'] / 1e6:.2f}",
        f"**{bits['fp32']:.4f}** (bf16: {bits['bf16']:.4f})",
        f"{record['baseline']['heldout_bits_per_byte']:.4f}",
        f"{record['steps_done']} steps of {record['settings']['batch_size']} × "
        f"{record['settings']['seq_len']} bytes, seed {record['settings']['seed']}",
        f"{record['seconds'] / 60:.0f} minutes on one {record['device']}",
    ):
        assert figure in section, f"README.md does not say {figure!r}, which the record does"


def test_the_version_is_the_packages():
    import mamba_ssm

    assert f"version {mamba_ssm.__version__}" in README
    assert f"## [{mamba_ssm.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md",)}
    for text in (README, *texts.values()):
        headings = {
            re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.+)$", text, re.M)
        }
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in headings, target
            elif not target.startswith("http"):
                assert (ROOT / target).exists(), target


def test_named_files_exist():
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        named = re.findall(r"`((?:mamba_ssm|csrc|tests|tools|examples|evals)/[\w./]+)`", text)
        for path in named:
            # NAME stands for the name of an op or kernel to be added.
            assert "NAME" in path or (ROOT / path).exists(), f"{name} names {path}"
