"""The pages of docs/: code runs, links and quoted messages are real, the site has them all."""

from __future__ import annotations

import re

import pytest
from doc_blocks import ROOT, first_words, python_blocks, run_python, run_shell, shell_blocks

DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")
}
PYTHON = [(page, code) for page, text in sorted(PAGES.items()) for code in python_blocks(text)]
SHELL = [(page, *block) for page, text in sorted(PAGES.items()) for block in shell_blocks(text)]


def block_id(value: str) -> str:
    return value if value.endswith(".md") else first_words(value)


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=block_id)
def test_python_blocks(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(code, page)


@pytest.mark.parametrize(("page", "mark", "command"), SHELL, ids=block_id)
def test_shell_blocks(page, mark, command, tmp_path):
    run_shell(mark, command, tmp_path)


def test_every_fence_is_one_that_is_tested():
    for page, text in PAGES.items():
        fences = re.findall(r"^```(\w*)$", text, re.M)
        opened = [language for language in fences if language]
        assert len(fences) == 2 * len(opened), f"{page}: a block without a language"
        assert set(opened) <= {"python", "bash", "text"}, f"{page}: {set(opened)}"


def test_the_site_has_every_page():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    assert sorted(re.findall(r": (\S+\.md)$", nav, re.M)) == sorted(PAGES)


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            path = (DOCS / page).parent / target.split("#")[0]
            assert path.exists(), f"{page}: {target}"


def quoted_messages() -> list[str]:
    return re.findall(r"^`(.+)`$", PAGES["troubleshooting.md"], re.M)


def test_quoted_messages_are_in_the_code():
    # Strings that Python joins (`"a " "b"`, also across lines) become one.
    sources = ""
    for path in [*ROOT.glob("mamba_ssm/**/*.py"), *ROOT.glob("csrc/*.h")]:
        sources += re.sub(r'"\s*f?"', "", path.read_text(encoding="utf-8"))
    messages = quoted_messages()
    assert len(messages) >= 15
    for message in messages:
        assert message in sources, f"no code says {message!r}"
