"""Runs what README.md shows (tests/doc_blocks.py), and compares what it states with the code."""

from __future__ import annotations

import json
import re

import pytest
from doc_blocks import ROOT, first_words, python_blocks, run_python, run_shell, shell_blocks

from mamba_ssm.ops.backend import SHIPPED_KERNELS
from mamba_ssm.ops.schema import OPS

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON, SHELL = python_blocks(README), shell_blocks(README)
# Built, not shipped: absent from a clone that has not compiled them.
BUILT = {"mamba_ssm/_native_cpu.so", "mamba_ssm/_native_cuda.so"}


@pytest.mark.parametrize("code", PYTHON, ids=first_words)
def test_python_blocks(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(code, "README.md")


@pytest.mark.parametrize(("mark", "command"), SHELL, ids=lambda value: first_words(value))
def test_shell_blocks(mark, command, tmp_path):
    run_shell(mark, command, tmp_path)


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
            exists = "NAME" in path or path in BUILT or (ROOT / path).exists()
            assert exists, f"{name} names {path}"
