"""Runs what docs/clients.md and docs/converting.md show, as tests/test_readme.py does README.md."""

from __future__ import annotations

import re

import pytest
import torch
from test_readme import ROOT, first_words, test_shell_blocks

PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("converting.md",)}
PYTHON = [
    (name, code)
    for name, text in PAGES.items()
    for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
]
SHELL = [
    block
    for text in PAGES.values()
    for block in re.findall(r"(?:^<!-- ([^\n]*) -->\n)?^```bash\n(.*?)^```", text, re.M | re.S)
]
run_shell_block = test_shell_blocks
del test_shell_blocks  # README's own cases are collected there


@pytest.mark.parametrize(("name", "code"), PYTHON, ids=lambda value: first_words(value))
def test_python(name, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, name, "exec"), {"__name__": "docs"})


@pytest.mark.parametrize(("mark", "command"), SHELL, ids=lambda value: first_words(value))
def test_shell(mark, command, tmp_path):
    run_shell_block(mark, command, tmp_path)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", PAGES[name]):
        assert target.startswith("http") or (ROOT / "docs" / target).exists(), target
