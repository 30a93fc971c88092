"""The small examples, run with less to do; what they claim is asserted on what they return."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import bimamba
import packed
import stream
import tbptt

ROOT = Path(__file__).resolve().parent.parent


def test_both_directions_solve_what_one_cannot(capsys):
    accuracy = bimamba.main(["--steps", "60"])
    chance = 1 / bimamba.VOCABULARY
    assert accuracy["one direction"] < 1.5 * chance
    assert accuracy["both directions"] > 0.95
    printed = capsys.readouterr()
    assert "both directions" in printed.out and "100%" in printed.err


@pytest.mark.parametrize("share", [False, True])
def test_padded_rows_of_a_bidirectional_layer_are_as_alone(share):
    torch.manual_seed(0)
    layer = bimamba.BiMamba(8, share=share, d_state=4)
    assert len(list(layer.parameters())) == (9 if share else 18)
    x = torch.randn(2, 10, 8)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 6:], mask[1, :3] = False, False
    out = layer(x, attention_mask=mask)
    torch.testing.assert_close(out[:1, :6], layer(x[:1, :6]))
    torch.testing.assert_close(out[1:, 3:], layer(x[1:, 3:]))


@pytest.mark.parametrize("options", [[], ["--through", "2"], ["--reset"]], ids=str)
def test_truncated_backpropagation(options, capsys):
    results = tbptt.main(["--segments", "40", "--batch", "8", *options])
    assert "100%" in capsys.readouterr().err
    assert results["gradient difference"] < 1e-5
    assert results["bits, carried"] < results["bits, reset"] < 8


def test_what_detaching_cuts_off():
    """The gradient of a segment that starts from a detached state lacks what flows through it."""
    torch.manual_seed(0)
    model = packed.new_model()
    ids = tbptt.streams(2, 65)

    def gradient(cut):
        model.zero_grad()
        _, state = tbptt.segment_loss(model, ids[:, :32], ids[:, 1:33], None)
        state = tbptt.detached(state) if cut else state
        tbptt.segment_loss(model, ids[:, 32:64], ids[:, 33:65], state)[0].sum().backward()
        return model.backbone.embedding.weight.grad.clone()

    assert not torch.allclose(gradient(True), gradient(False))


def test_the_carry_of_a_wrong_choice_is_refused(capsys):
    with pytest.raises(SystemExit):
        tbptt.main(["--reset", "--through", "2"])
    assert "--reset carries no state" in capsys.readouterr().err


def test_packed_equals_padded(capsys):
    results = packed.main(["--steps", "2", "--documents", "8", "--longest", "128"])
    assert "100%" in capsys.readouterr().err
    assert results["loss difference"] < 1e-5
    assert results["gradient difference"] < 1e-5
    assert results["packed"] > 0 and results["padded"] > 0


def test_a_stream_is_one_pass_at_flat_memory():
    # In a process of its own: the peak of memory of this one says nothing any more.
    code = (
        "import json, stream\n"
        "print(json.dumps(stream.main(['--tokens', '200000', '--chunk', '1024'])))\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "streaming: 100%" in result.stderr
    results = json.loads(result.stdout.splitlines()[-1])
    assert results["difference"] < 1e-5
    # The document would be 50 MiB in activations of the first layer alone.
    assert results["growth of the peak, MiB"] < 16


def test_a_document_repeats_itself_when_it_must(monkeypatch):
    few = [stream.corpus.Document("a", b"abc"), stream.corpus.Document("b", b"de")]
    monkeypatch.setattr(stream.corpus, "stdlib_documents", lambda: few)
    assert (stream.document(8)[0] - stream.corpus.BYTE_OFFSET).tolist() == list(b"abcdeabc")
