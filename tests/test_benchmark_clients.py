"""benchmarks/clients.py runs, checks what it times, and writes what it says."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, code: str = "") -> subprocess.CompletedProcess:
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import clients; {code}"
    tiny = [
        "--layers",
        "1",
        "--width",
        "16",
        "--length",
        "33",
        "--batch",
        "1",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    return subprocess.run(
        [sys.executable, "-c", f"{script}\nclients.main({[*tiny, *arguments]!r})"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_rows(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    result = run("--models", "Mamba", "--csv", str(tmp_path / "out.csv"))
    assert result.returncode == 0, result.stderr
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 == len(result.stdout.splitlines())
    assert {row["path"] for row in rows} == {"transformers", "ours", "ours + conv"}
    assert all(float(row["median_ms"]) > 0 and row["transformers"] for row in rows)


def test_a_wrong_result_is_not_timed():
    pytest.importorskip("transformers", reason="transformers is not installed")
    wrong = (
        "own = clients.Client.forward; "
        "clients.Client.forward = lambda self, x: "
        "own(self, x) + 0.1 * (self.path != 'transformers'); "
        "use = clients.Client.use; "
        "clients.Client.use = lambda self, p: (setattr(self, 'path', p), use(self, p))"
    )
    result = run("--models", "Mamba", "--work", "forward", code=wrong)
    assert result.returncode == 1 and "Mamba, forward, ours: relative error" in result.stderr
