"""benchmarks/cpu.py: verdicts, bounded rounds, absent peers, and that a run without peers works."""

from __future__ import annotations

import csv
import itertools
import json
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("the benchmarks are not beside the tests", allow_module_level=True)
sys.path.insert(0, str(FOLDER))
import cases_lm  # noqa: E402
import cpu  # noqa: E402
import measuring  # noqa: E402
import peers_llama  # noqa: E402
import peers_torch  # noqa: E402
from bandwidth import Reader  # noqa: E402
from measuring import OURS, Contest, Contestant, Target  # noqa: E402
from models import SHAPES, Lab, OurModel  # noqa: E402

from mamba_ssm import MambaLMHeadModel  # noqa: E402
from mamba_ssm.models.config_mamba import MambaConfig  # noqa: E402


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(measuring, "_SETTLE", 0.0)


def fixed(name: str, seconds: list[float]) -> Contestant:
    endless = itertools.cycle(seconds)
    return Contestant(name, lambda: next(endless), warm=lambda: None)


@pytest.mark.parametrize(("factor", "verdict"), [(2.9, "met"), (3.1, "MISSED")])
def test_ratios_are_paired_by_round(factor, verdict):
    # The machine slows down fourfold after the first round; the ratio is 3 in every round.
    ours, peer = fixed(OURS, [1.0, 4.0, 4.0]), fixed("peer", [3.0, 12.0, 12.0])
    contest = Contest("c", "tokens/s", 6, [ours, peer], [Target("peer", factor)])
    first, second = measuring.measure([contest], 3, 60)
    assert (first.value, first.low, first.high, first.rounds) == (1.5, 1.5, 6.0, 3)
    assert second.ours_is_times == pytest.approx(3)
    assert (second.target, second.verdict) == (f">= {factor:g} x", verdict)


@pytest.mark.parametrize(("bound", "verdict"), [(0.5, "met"), (0.4, "MISSED")])
def test_bounded_values(bound, verdict):
    contest = Contest("c", "ns/update", 2e9, [fixed(OURS, [0.9])], [Target(at_most=bound)])
    (row,) = measuring.measure([contest], 1, 60)
    assert (row.value, row.verdict) == (pytest.approx(0.45), verdict)


def test_rounds_stop_at_the_budget_and_at_a_contestants_own_limit():
    slow = Contestant("slow", lambda: time.sleep(0.02), max_rounds=1)
    quick = Contestant(OURS, lambda: time.sleep(0.02))
    measuring.interleave([Contest("c", "ms", 1, [quick, slow])], 1000, 0.2)
    assert len(slow.seconds) == 1 and 2 <= len(quick.seconds) <= 12


def test_an_absent_peer_is_a_row_that_says_what_to_type():
    absent = [("peer", "not installed: pip install peer")]
    contest = Contest("c", "ms", 1, [fixed(OURS, [1.0])], [Target("peer", 2)], absent)
    row = measuring.measure([contest], 1, 60)[-1]
    assert (row.value, row.note, row.verdict) == (None, absent[0][1], "no verdict")
    assert "pip install peer" in measuring.table([row])


def test_a_run_without_peers(monkeypatch, tmp_path, capsys):
    for module in (peers_llama, peers_torch):
        monkeypatch.setattr(module, "why_absent", lambda *_: "not installed: pip install it")
    table, rows = tmp_path / "x" / "rows.csv", tmp_path / "rows.json"
    arguments = ["--cases", "decode,prefill", "--shape", "tiny", "--rounds", "1", "--threads"]
    arguments += [str(torch.get_num_threads()), "--csv", str(table), "--json", str(rows)]
    assert cpu.main(arguments) == 0
    with table.open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(json.loads(rows.read_text())["rows"])
    ours = [row for row in written if row["implementation"] == OURS and row["value"]]
    assert len(ours) >= 5 and all(float(row["value"]) > 0 for row in ours)
    assert all(row["cpu"] and row["torch"] == torch.__version__ for row in written)
    assert "pip install it" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--cases", "decode,x"], ["--rounds", "0"], ["--threads", "-1"]])
def test_wrong_arguments(wrong, capsys):
    with pytest.raises(SystemExit) as error:
        cpu.main(wrong)
    assert error.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_another_models_logits_are_noticed(monkeypatch):
    lab = Lab("tiny", torch.get_num_threads())
    monkeypatch.setattr(lab, "_expected", lab._expected + 1)
    lab.ours("fp32")
    assert lab.disagreements and "mamba_ssm fp32" in lab.disagreements[0]
    lab.close()


def test_weight_bytes_counts_tied_weights_once():
    lab = Lab("tiny", 1)
    parameters = sum(p.numel() for p in lab._base.parameters())
    assert lab.weight_bytes("fp32") == 4 * parameters
    assert parameters < lab.weight_bytes("int8") < lab.weight_bytes("bf16") < 4 * parameters
    lab.close()


def test_chunks_continue_one_sequence():
    torch.manual_seed(0)
    model = OurModel(MambaLMHeadModel(MambaConfig(**SHAPES["tiny"])).eval())
    ids = torch.randint(0, 384, (1, 24))
    consume = model.chunk_runner(8)
    pieces = [consume(part) for part in ids.split(8, dim=1)]
    torch.testing.assert_close(pieces[-1][:, -1], model.prefill(ids), rtol=1e-4, atol=1e-5)


def test_a_stream_tells_whether_it_reached_its_end(monkeypatch):
    torch.manual_seed(0)
    model = OurModel(MambaLMHeadModel(MambaConfig(**SHAPES["tiny"])).eval())
    speed, flat, memory = cases_lm._stream("c", model, 384, 96, 8, 60)
    assert "96 tokens" in speed.note and speed.rounds == 10 and flat.value > 0
    assert not flat.note and flat.verdict != "no verdict"
    clock = itertools.count()
    monkeypatch.setattr(cases_lm.time, "perf_counter", lambda: float(next(clock)))
    speed, flat, memory = cases_lm._stream("c", model, 384, 96, 8, 10)
    assert speed.rounds < 10 and "stopped after 10 s" in flat.note
    assert flat.verdict == memory.verdict == "no verdict"


def test_reading_takes_longer_for_more():
    reader = Reader(2**26, 2)
    assert min(reader.read(2**26) for _ in range(5)) > min(reader.read(2**16) for _ in range(5)) > 0
    reader.close()


def test_peak_memory_sees_a_large_tensor():
    peak = measuring.peak_memory_mb(lambda: torch.ones(2**24).sum())
    if peak is None:
        pytest.skip("the peak cannot be told on this system")
    assert 60 < peak < 130
