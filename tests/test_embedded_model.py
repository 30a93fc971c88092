"""The model inside the package: its size, its record, and that it really writes Python."""

from __future__ import annotations

import ast
import hashlib
import json
import keyword
import re
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import mamba_ssm
from mamba_ssm import MambaLMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import corpus
import heldout

ASSETS = Path(mamba_ssm.__file__).parent / "assets" / "embedded"
SIZE_LIMIT = 8_000_000
KEYWORDS = {*keyword.kwlist, "self"}


@pytest.fixture(scope="module")
def metrics() -> dict:
    return json.loads((ASSETS / "metrics.json").read_text())


@pytest.fixture(scope="module")
def model() -> MambaLMHeadModel:
    return MambaLMHeadModel.from_pretrained("embedded", dtype=torch.float32).eval()


def complete(model: MambaLMHeadModel, prompt: str, length: int) -> str:
    """Greedy continuation by the library's own generate, prompt included."""
    ids = torch.from_numpy(corpus.encode(prompt.encode())).long()[None]
    out = model.generate(ids, max_length=ids.shape[1] + length, top_k=1)
    sequences = out if torch.is_tensor(out) else out.sequences
    return corpus.decode(sequences[0].tolist()).decode("utf-8", "replace")


def test_files_are_there_and_small():
    names = {path.name for path in ASSETS.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer_config.json", "metrics.json"} <= names
    assert (ASSETS / "model.safetensors").stat().st_size <= SIZE_LIMIT
    tokenizer = json.loads((ASSETS / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "ByT5Tokenizer"


def test_weights_are_16_bit_except_the_recurrence():
    from safetensors.torch import load_file

    for name, tensor in load_file(ASSETS / "model.safetensors").items():
        assert torch.isfinite(tensor).all(), name
        wanted = {torch.float32} if name.endswith(("A_log", ".D")) else {torch.half, torch.bfloat16}
        assert tensor.dtype in wanted, name


def test_record_says_how_it_was_made_and_that_it_beats_the_baseline(metrics):
    assert "examples/train_lm.py" in metrics["command"]
    assert isinstance(metrics["settings"]["seed"], int)
    assert re.fullmatch("[0-9a-f]{64}", metrics["corpus"]["sha256"])
    assert metrics["steps_done"] == metrics["settings"]["steps"]
    assert metrics["corpus"]["heldout_bytes"] > 300_000
    baseline = metrics["baseline"]["heldout_bits_per_byte"]
    for precision in ("fp32", "bf16"):
        assert metrics["heldout_bits_per_byte"][precision] < baseline


def test_bits_per_byte_is_what_the_record_says(metrics, model):
    """On the recorded beginnings of held-out files, where this Python ships the same files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    checked = 0
    for row in metrics["heldout_slices"]:
        path = root / row["path"]
        piece = path.read_bytes()[: row["bytes"]] if path.exists() else b""
        if hashlib.sha256(piece).hexdigest() == row["sha256"]:
            got = heldout.bits_per_byte(model, [corpus.Document(row["path"], piece)])
            assert got == pytest.approx(row["bits_per_byte"], abs=2e-3), row["path"]
            checked += 1
    if not checked:
        pytest.skip("this Python's standard library has none of the recorded files unchanged")


def test_unseen_python_costs_few_bits(model):
    """Files of this repository's own tests can be in no standard library."""
    data = Path(__file__).read_bytes()[:3000]
    assert heldout.bits_per_byte(model, [corpus.Document("test", data)]) < 2.4


PROMPTS = {
    "imports": "import ",
    "class": '"""Small containers."""\n\n\nclass Stack:\n    """Last in, first out."""\n\n'
    "    def __init__(self):\n",
    "function": '"""Numbers."""\n\n\ndef largest(values):\n    """Return the largest value."""\n',
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_greedy_text_is_recognisable_python(model, kind):
    prompt = PROMPTS[kind]
    text = complete(model, prompt, 200)
    assert text.startswith(prompt) and text.isascii()
    written = text[len(prompt) :]
    lines = written.splitlines()[:-1]  # the last one may be cut off
    assert len(lines) >= 3, text
    assert set(re.findall(r"[A-Za-z_]+", written)) & KEYWORDS, text
    if kind == "imports":
        assert len(re.findall(r"^(import|from) \w", text, re.M)) >= 3, text
        ast.parse("import " + "\n".join(lines))
    else:
        # It goes on in the body that the prompt began; a body of one statement may end there.
        assert next(line for line in lines if line).startswith("    "), text
        # As far as the last complete statement, it is Python that compiles.
        parsed = 0
        for end in range(len(lines), 0, -1):
            try:
                ast.parse(prompt + "\n".join(lines[:end]))
            except SyntaxError:
                continue
            parsed = end
            break
        assert parsed >= 3, text
