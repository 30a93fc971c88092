"""The training example: its text, its n-gram baseline, its training loop, resume and export."""

from __future__ import annotations

import itertools
import json
import math
import random
import shlex
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import corpus
import heldout
import ngram
import train_lm
import train_options
import training_files

TINY = shlex.split(
    "--preset smoke --device cpu --d-model 16 --n-layer 2 --d-state 4 --seq-len 48 --batch-size 8"
    " --steps 40 --warmup 5 --lr 0.02 --log-every 10 --eval-every 20 --save-every 20"
)
WORDS = shlex.split("def return import self value if else for in range class None True name data")


def make_text(root: Path, num_files: int = 24) -> Path:
    """A folder of small, predictable files in two levels."""
    draw = random.Random(0)
    for number in range(num_files):
        folder = root / f"part{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [" ".join(draw.choices(WORDS, k=6)) for _ in range(draw.randint(4, 12))]
        (folder / f"file{number}.py").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """One uninterrupted tiny run: its folder and its metrics."""
    out = tmp_path_factory.mktemp("run") / "whole"
    metrics = train_lm.main([*TINY, "--text", str(text), "--out", str(out)])
    return out, metrics


class TestCorpus:
    def test_standard_library_is_found_sorted_and_split(self):
        documents = corpus.stdlib_documents()
        paths = [d.path for d in documents]
        assert paths == sorted(paths) and len(set(paths)) == len(paths)
        assert {"argparse.py", "json/decoder.py"} <= set(paths)
        assert not {"site-packages", "test", "tests"} & {f for p in paths for f in p.split("/")}
        assert not any(p.startswith("_sysconfigdata") for p in paths), "holds machine paths"
        training, held_out = corpus.split_documents(documents)
        assert sorted([*training, *held_out]) == documents
        assert 0.005 < len(held_out) / len(documents) < 0.08

    def test_equal_contents_and_empty_files_count_once(self, tmp_path):
        for name, data in (("b.py", b"x"), ("a.py", b"x"), ("c.py", b""), ("d.bin", b"y")):
            (tmp_path / name).write_bytes(data)
        assert corpus.read_folder(tmp_path) == [corpus.Document("a.py", b"x")]

    def test_split_does_not_move_files_when_others_are_added(self):
        documents = [corpus.Document(f"f{i}.py", b"%d" % i) for i in range(400)]
        some, all_of_them = (corpus.split_documents(d)[1] for d in (documents[:200], documents))
        assert some == [d for d in all_of_them if d in documents[:200]]
        assert 2 <= len(all_of_them) <= 25

    def test_one_file_is_split_at_its_tail(self):
        training, held_out = corpus.split_documents([corpus.Document("a", bytes(range(200)))])
        assert training[0].data + held_out[0].data == bytes(range(200))
        assert len(held_out[0].data) == 6

    def test_a_huge_file_is_never_held_out(self):
        big = [corpus.Document(f"{i}", b"x" * (corpus.MAX_HELD_OUT_BYTES + 1)) for i in range(60)]
        training, held_out = corpus.split_documents([*big, corpus.Document("small", b"y")])
        assert training == big and held_out[0].path == "small"

    def test_archive_round_trip_and_equal_bytes(self, tmp_path, text):
        documents = [*corpus.read_folder(text), corpus.Document("raw", b"\xff\x00\r\n caf\xc3\xa9")]
        first, second = tmp_path / "1.gz", tmp_path / "2.gz"
        corpus.write_corpus(documents, first)
        corpus.write_corpus(documents, second)
        assert corpus.read_corpus(first) == documents
        assert first.read_bytes() == second.read_bytes()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1.gz", "2.gz"]

    def test_ids_are_those_of_byt5(self):
        stream = corpus.token_stream([corpus.Document("a", b"\x00a\xff")])
        assert stream.tolist() == [1, 3, 100, 258, 1]
        assert corpus.decode(stream) == b"\x00a\xff"
        tokenizer = pytest.importorskip("transformers").ByT5Tokenizer()
        assert tokenizer("import é").input_ids == [*corpus.encode("import é".encode()), 1]

    @pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "empty"])
    def test_unreadable_archive(self, tmp_path, text, damage):
        path = tmp_path / "c.gz"
        if damage != "missing":
            corpus.write_corpus([] if damage == "empty" else corpus.read_folder(text), path)
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-20])
        if damage == "foreign":
            path.write_bytes(b"something else")
        with pytest.raises(corpus.CorpusError, match="--write-corpus"):
            corpus.read_corpus(path)

    def test_wrong_text_paths(self, tmp_path):
        (tmp_path / "empty.txt").touch()
        with pytest.raises(corpus.CorpusError, match="no such file or folder"):
            corpus.read_text(tmp_path / "nowhere")
        with pytest.raises(corpus.CorpusError, match="no text in"):
            corpus.read_text(tmp_path)
        with pytest.raises(corpus.CorpusError, match="is empty"):
            corpus.read_text(tmp_path / "empty.txt")


def naive_kneser_ney(documents: list[bytes], order: int, history: tuple, symbol: int) -> float:
    """The textbook recursion with dictionaries, one probability at a time."""
    counts = [defaultdict(int) for _ in range(order + 1)]
    for data in documents:
        symbols = (ngram.END,) * (order - 1) + tuple(data) + (ngram.END,)
        for end in range(order, len(symbols) + 1):
            counts[order][symbols[end - order : end]] += 1
    for length in range(order - 1, 0, -1):
        for gram in counts[length + 1]:
            counts[length][gram[1:]] += 1

    def p(context: tuple, length: int) -> float:
        if length == 0:
            return 1 / ngram.NUM_SYMBOLS
        lower = p(context[1:], length - 1)
        followers = {g[-1]: c for g, c in counts[length].items() if g[:-1] == context}
        if not followers:
            return lower
        n = [sum(c == k for c in counts[length].values()) for k in range(5)]
        if 0 in n[1:]:
            discount = [0.0, 0.5, 0.75, 0.75]
        else:
            y = n[1] / (n[1] + 2 * n[2])
            discount = [0.0] + [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
            discount = [min(max(d, 0.05 * (k > 0)), k - 0.05) for k, d in enumerate(discount)]
            discount[0] = 0.0
        total = sum(followers.values())
        direct = followers.get(symbol, 0) - discount[min(followers.get(symbol, 0), 3)]
        removed = sum(discount[min(c, 3)] for c in followers.values())
        return (max(direct, 0.0) + removed * lower) / total

    return p(history, order)


class TestNGram:
    @pytest.mark.parametrize("order", [1, 2, 5, 7])
    def test_probabilities_sum_to_one(self, text, order):
        model = ngram.NGramModel(order).fit([d.data for d in corpus.read_folder(text)])
        draw = random.Random(order)
        contexts = [b"", b"def return", b"return self \n", bytes(range(256))]
        contexts += [bytes(draw.choices(range(256), k=draw.randint(1, 9))) for _ in range(20)]
        contexts += ["".join(draw.choices(WORDS, k=2)).encode() for _ in range(20)]
        for context in contexts:
            p = model.next_symbol(context)
            assert p.shape == (257,) and (p > 0).all()
            assert abs(p.sum() - 1) < 1e-12

    @pytest.mark.parametrize("order", [1, 3, 5])
    def test_equals_the_textbook_recursion(self, text, order):
        documents = [d.data for d in corpus.read_folder(text)][:5]
        model = ngram.NGramModel(order).fit(documents)
        for beginning in (b"", b"d", b"def ret", b"in range zq", b"None True\nn"):
            padded = (ngram.END,) * (order - 1) + tuple(beginning)
            history = padded[len(padded) - order + 1 :]
            got = model.next_symbol(beginning)
            for symbol in (*b"def zq\n\xff", ngram.END):
                want = naive_kneser_ney(documents, order, history, symbol)
                assert got[symbol] == pytest.approx(want, rel=1e-12), (beginning, symbol)

    def test_scoring_a_document_is_the_product_of_its_steps(self, text):
        model = ngram.NGramModel(4).fit([d.data for d in corpus.read_folder(text)])
        data = b"def value zz\n"
        steps = [model.next_symbol(data[:i])[data[i]] for i in range(len(data))]
        steps.append(model.next_symbol(data)[ngram.END])
        np.testing.assert_allclose(model.log2_probabilities(data), np.log2(steps), rtol=1e-13)
        bits = -np.log2(steps).sum() / len(data)
        assert model.bits_per_byte([data]) == pytest.approx(bits, rel=1e-13)

    def test_more_context_helps_on_structured_text(self, text):
        documents = corpus.read_folder(text)
        short, long = (ngram.baseline_bits_per_byte(documents, order) for order in (1, 4))
        assert long < 0.6 * short

    def test_wrong_use(self):
        for order in (0, 8):
            with pytest.raises(ValueError, match="order must be from 1 to 7"):
                ngram.NGramModel(order)
        with pytest.raises(ValueError, match="no documents"):
            ngram.NGramModel(2).fit([])
        with pytest.raises(RuntimeError, match="call fit"):
            ngram.NGramModel(2).next_symbol(b"a")


class TestTraining:
    def test_loss_falls(self, finished):
        out, metrics = finished
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = [row["train_bits_per_byte"] for row in rows if "train_bits_per_byte" in row]
        held_out = [row["heldout_bits_per_byte"] for row in rows if "heldout_bits_per_byte" in row]
        assert [row["step"] for row in rows if "heldout_bits_per_byte" in row] == [20, 40]
        assert losses[0] > 5 and losses[-1] < 0.75 * losses[0]
        assert held_out[-1] < held_out[0]
        assert metrics["heldout_bits_per_byte"]["fp32"] == pytest.approx(held_out[-1], abs=0.01)

    def test_resumed_run_equals_the_uninterrupted_one(self, finished, text, tmp_path):
        whole, _ = finished
        out = tmp_path / "parts"
        options = [*TINY, "--text", str(text), "--out", str(out)]
        no_time = ["--minutes", "1e-9"]  # over after one step
        train_lm.main([*options, *no_time])
        assert training_files.load_checkpoint(out / "checkpoint.pt")["step"] == 1
        train_lm.main([*options, *no_time, "--resume"])
        train_lm.main([*options, "--resume"])

        a, b = (training_files.load_checkpoint(d / "checkpoint.pt") for d in (whole, out))
        assert a["step"] == b["step"] == 40
        for name, tensor in a["model"].items():
            assert torch.equal(tensor, b["model"][name]), name
        for key, moments in a["optimizer"]["state"].items():
            for name, tensor in moments.items():
                assert torch.equal(tensor, b["optimizer"]["state"][key][name]), (key, name)
        assert torch.equal(a["data_generator"], b["data_generator"])
        stored = [(d / "model" / "model.safetensors").read_bytes() for d in (whole, out)]
        assert stored[0] == stored[1]
        steps = [json.loads(x)["step"] for x in (out / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps)

    def test_seed_decides_the_run(self, finished, text, tmp_path):
        _, metrics = finished
        other = [*TINY, "--text", str(text), "--out", str(tmp_path / "o"), "--seed", "1"]
        changed = train_lm.main([*other, "--steps", "2", "--warmup", "0"])
        assert changed["heldout_bits_per_byte"] != metrics["heldout_bits_per_byte"]

    def test_pieces_begin_where_documents_do(self, text):
        options = [*TINY, "--text", str(text), "--out", "unused", "--batch-size", "8"]
        documents = corpus.read_folder(text)
        marks = (torch.from_numpy(corpus.token_stream(documents)) == corpus.EOS_ID).nonzero()
        at_beginnings = {int(mark) + behind for mark in marks for behind in (0, 1)}

        def starts(*more):
            crops = train_lm.Crops(documents, train_options.parse_options("", [*options, *more]))
            drawn = []
            for _ in range(20):
                crops.advance()
                assert crops.batch()[0].shape == (8, crops.window.numel())
                drawn.append(crops.starts.flatten().clone())
            return torch.stack(drawn)

        some = starts("--document-starts", "0.25")
        assert set(some[:, :2].flatten().tolist()) <= at_beginnings
        assert len(set(some[:, :2].flatten().tolist())) > 5
        assert not set(some[:, 2:].flatten().tolist()) <= at_beginnings
        assert torch.equal(some, starts("--document-starts", "0.25"))
        plain = starts()
        assert torch.equal(plain, starts("--document-starts", "0.0"))
        assert torch.equal(plain[0, 2:], some[0, 2:])  # the other pieces are drawn as before

    def test_hidden_bytes_are_read_as_unknown_and_still_predicted(self, text):
        options = [*TINY, "--text", str(text), "--out", "unused", "--batch-size", "8"]
        documents = corpus.read_folder(text)

        def batches(*more):
            crops = train_lm.Crops(documents, train_options.parse_options("", [*options, *more]))
            drawn = []
            for _ in range(20):
                crops.advance()
                drawn.append(crops.batch())
            return (torch.stack(part) for part in zip(*drawn, strict=True))

        read, predicted = batches("--hidden-bytes", "0.2")
        hidden = read == corpus.UNKNOWN_ID
        assert torch.equal(read[~hidden], predicted[~hidden])
        assert (predicted[hidden] != corpus.EOS_ID).all()
        assert (predicted != corpus.UNKNOWN_ID).all()
        assert 0.15 < hidden.float().mean() < 0.25
        again, _ = batches("--hidden-bytes", "0.2")
        assert torch.equal(read, again)
        read, predicted = batches()
        assert torch.equal(read, predicted)

    def test_learning_rate_schedule(self):
        args = train_options.parse_options("", [*TINY, "--out", "unused", "--min-lr-ratio", "0.1"])
        rates = [train_lm.learning_rate(step, args) for step in range(args.steps)]
        assert rates[0] == pytest.approx(0.004) and max(rates) == rates[4] == pytest.approx(0.02)
        assert rates[-1] == pytest.approx(0.002)
        assert all(a >= b for a, b in itertools.pairwise(rates[4:]))

    @pytest.mark.parametrize("amp", ["bf16", "fp16"])
    def test_mixed_precision_trains(self, text, tmp_path, amp):
        options = [*TINY, "--text", str(text), "--out", str(tmp_path / "o"), "--amp", amp]
        train_lm.main([*options, "--steps", "12", "--log-every", "1"])
        rows = [json.loads(x) for x in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
        losses = [row["train_bits_per_byte"] for row in rows if "train_bits_per_byte" in row]
        assert losses[-1] < losses[0] - 0.5

    def test_weight_decay_spares_the_marked_parameters(self, text, tmp_path):
        args = train_options.parse_options("", [*TINY, "--out", str(tmp_path / "o")])
        trainer = train_lm.Trainer(args, corpus.read_folder(text))
        decay = {
            id(p): group["weight_decay"]
            for group in trainer.optimizer.param_groups
            for p in group["params"]
        }
        for name, parameter in trainer.model.named_parameters():
            if name.endswith(("A_log", ".D", "bias", "norm.weight", "norm_f.weight")):
                assert decay[id(parameter)] == 0, name
            if name.endswith("in_proj.weight"):
                assert decay[id(parameter)] == 0.1, name

    def test_loss_curve_is_a_picture(self, finished, tmp_path):
        pytest.importorskip("matplotlib", reason="the loss curve needs matplotlib")
        rows = [json.loads(x) for x in (finished[0] / "metrics.jsonl").read_text().splitlines()]
        training_files.plot_loss(rows, tmp_path / "loss.png", baseline=2.0)
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


class TestHeldOut:
    def model(self, out: Path):
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        return MambaLMHeadModel.from_pretrained(str(out / "model"), dtype=torch.float32)

    @pytest.mark.parametrize("tokens_per_pass", [3, 7, 600, 8192])
    def test_streaming_equals_one_full_pass(self, finished, text, tokens_per_pass):
        model = self.model(finished[0])
        few = corpus.read_folder(text)[: 2 if tokens_per_pass < 9 else 6]
        documents = [*few, corpus.Document("x", b"q")]
        nats = 0.0
        for document in documents:
            ids = torch.from_numpy(corpus.token_stream([document])).long()[None]
            with torch.no_grad():
                logp = model(ids[:, :-1]).logits.double().log_softmax(-1)
            nats -= logp.gather(-1, ids[:, 1:, None]).sum().item()
        want = nats / math.log(2) / corpus.total_bytes(documents)
        got = heldout.bits_per_byte(model, documents, tokens_per_pass)
        assert got == pytest.approx(want, rel=2e-6)

    def test_sampling_equals_recomputing_the_whole_text(self, finished):
        model = self.model(finished[0])
        text = heldout.sample_text(model, "def ", 12)
        ids = [corpus.EOS_ID, *corpus.encode(b"def ").tolist()]
        while len(ids) < 17:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1, 3:259].argmax()) + 3)
        assert text == corpus.decode(ids).decode("utf-8", "replace")

    def test_sampling_with_a_seed_repeats(self, finished):
        model = self.model(finished[0])
        texts = [heldout.sample_text(model, "a", 20, temperature=1.0, seed=s) for s in (3, 3, 4)]
        assert texts[0] == texts[1] != texts[2]

    def test_command_line_scores_the_held_out_files(self, finished, text):
        out, metrics = finished
        options = ["--model", str(out / "model"), "--text", str(text), "--device", "cpu"]
        found = heldout.main([*options, "--dtype", "fp32", "bf16", "int8"])
        want = metrics["heldout_bits_per_byte"]
        assert found["fp32"] == pytest.approx(want["fp32"], rel=1e-6)
        assert found["bf16"] == pytest.approx(want["bf16"], rel=1e-6)
        assert (
            found["int8"] == pytest.approx(want["fp32"], rel=1e-2)
            and found["int8"] != found["fp32"]
        )

    def test_nothing_to_score(self, finished):
        with pytest.raises(ValueError, match="no documents"):
            heldout.bits_per_byte(self.model(finished[0]), [])


class TestExport:
    def test_directory_holds_the_model_and_its_record(self, finished):
        from safetensors.torch import load_file

        out, metrics = finished
        stored = load_file(out / "model" / "model.safetensors")
        for name, tensor in stored.items():
            fp32 = name.endswith(("A_log", ".D"))
            assert tensor.dtype == (torch.float32 if fp32 else torch.float16), name
        tokenizer = json.loads((out / "model" / "tokenizer_config.json").read_text())
        assert tokenizer == {"tokenizer_class": "ByT5Tokenizer"}
        assert json.loads((out / "model" / "metrics.json").read_text()) == metrics
        assert metrics["settings"]["seed"] == 0 and len(metrics["corpus"]["sha256"]) == 64
        assert not list(out.rglob("*.partial"))

    def test_too_large_is_refused_before_training(self, text, tmp_path, capsys):
        options = [*TINY, "--text", str(text), "--out", str(tmp_path / "o")]
        with pytest.raises(SystemExit) as stop:
            train_lm.main([*options, "--max-bytes", "10000"])
        assert stop.value.code == 2
        assert "above the limit of 10,000" in capsys.readouterr().err
        assert not (tmp_path / "o").exists()

    def test_embedded_preset_fits_its_limit(self, tmp_path):
        args = train_options.parse_options("", ["--preset", "embedded", "--out", str(tmp_path)])
        args.device = "meta"
        model = train_lm.build_model(args)
        assert training_files.check_export_size(model, torch.float16, 8_000_000) > 6_000_000

    def test_overflow_is_refused(self, finished, tmp_path):
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        model = MambaLMHeadModel.from_pretrained(str(finished[0] / "model"), dtype=torch.float32)
        with torch.no_grad():
            model.backbone.norm_f.weight[0] = 1e6
        with pytest.raises(ValueError, match="weight has values that"):
            training_files.export_model(model, tmp_path / "m", torch.float16, 8_000_000)
        assert not (tmp_path / "m").exists()


class TestBadOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--steps 0", "--steps must be at least 1, got 0"),
            ("--d-model -4", "--d-model must be at least 1, got -4"),
            ("--seq-len 1", "--seq-len must be at least 2, got 1"),
            ("--lr 0", "--lr must be above 0"),
            ("--min-lr-ratio 2", "--min-lr-ratio must be 0 to 1"),
            ("--warmup -1", "--warmup must not be negative"),
            ("--document-starts 1.5", "--document-starts must be 0 to 1, got 1.5"),
            ("--hidden-bytes 1", "--hidden-bytes must be 0 to below 1, got 1"),
            ("--weight-decay -1", "--weight-decay must not be negative"),
            ("--grad-clip -1", "--grad-clip must not be negative"),
            ("--minutes 0", "--minutes must be above 0"),
            ("--device tpu9", "torch knows no device 'tpu9'"),
            ("--amp fp8", "invalid choice: 'fp8'"),
            ("--resume", "start the run without --resume"),
            ("--seq-len 999999", "fewer than --seq-len 999999"),
            ("--corpus nowhere.gz", "not allowed with argument"),
        ],
    )
    def test_message_and_nothing_written(self, text, tmp_path, capsys, options, message):
        out = tmp_path / "o"
        with pytest.raises(SystemExit) as stop:
            train_lm.main([*TINY, "--text", str(text), "--out", str(out), *options.split()])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
        assert not out.exists()

    def test_folder_of_another_run(self, finished, text, capsys):
        with pytest.raises(SystemExit):
            train_lm.main([*TINY, "--text", str(text), "--out", str(finished[0])])
        assert "already holds a run; add --resume" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (["--lr", "0.5"], "--lr 0.02 (now 0.5)"),
            (["--text", __file__], "started on other text"),
        ],
    )
    def test_resuming_a_different_run(self, finished, text, capsys, change, message):
        out = finished[0]
        before = (out / "metrics.jsonl").read_bytes()
        with pytest.raises(SystemExit):
            train_lm.main([*TINY, "--text", str(text), "--out", str(out), "--resume", *change])
        assert message in capsys.readouterr().err
        assert (out / "metrics.jsonl").read_bytes() == before

    def test_damaged_checkpoint(self, finished, text, tmp_path, capsys):
        data = (finished[0] / "checkpoint.pt").read_bytes()
        (tmp_path / "checkpoint.pt").write_bytes(data[: len(data) // 2])
        with pytest.raises(SystemExit):
            train_lm.main([*TINY, "--text", str(text), "--out", str(tmp_path), "--resume"])
        assert "cannot read the checkpoint" in capsys.readouterr().err

    def test_divergence_stops_the_run(self, text, tmp_path, capsys):
        options = [*TINY, "--text", str(text), "--out", str(tmp_path / "o"), "--grad-clip", "0"]
        with pytest.raises(SystemExit):
            train_lm.main([*options, "--lr", "1e30", "--warmup", "0", "--log-every", "1"])
        assert "lower --lr" in capsys.readouterr().err
