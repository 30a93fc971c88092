"""A real lm-eval run, in a process of its own, against numbers computed directly from the model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from generation_helpers import BYTE_VOCAB, byte_model_dir, tiny_lm

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.inference import is_quantized

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "evals" / "lm_harness_eval.py"
TASKS = ROOT / "tests" / "lm_eval_tasks"
NAMES = ("local_choice", "local_rolling", "local_generate")
# Shorter than the longest document, so that it is scored in windows.
MAX_LENGTH = 100
EOS = 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return byte_model_dir(tmp_path_factory.mktemp("lm_eval") / "model")


@pytest.fixture(scope="module")
def started(directory):
    """The command, running in another directory while this process does its own share."""
    elsewhere = directory.parent
    command = [
        sys.executable, str(SCRIPT), "--model", "mamba",
        "--model_args", f"pretrained={directory},max_length={MAX_LENGTH},dtype=float32",
        "--tasks", ",".join(NAMES), "--include_path", str(TASKS), "--device", "cpu",
        "--batch_size", "3", "--output_path", str(elsewhere / "out"), "--log_samples",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=elsewhere,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process
    if process.poll() is None:
        process.kill()


@pytest.fixture(scope="module")
def harness(started):
    """The script as a module: it registers `mamba` with this process's lm-eval as well."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install mamba_ssm[eval]")
    spec = importlib.util.spec_from_file_location("lm_harness_eval", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def samples(started, harness, directory):
    """{task: {document: its logged sample}} of the command's run."""
    output, _ = started.communicate(timeout=240)
    assert started.returncode == 0, output[-3000:]
    assert "bits_per_byte" in output and "exact_match" in output and "acc_norm" in output
    return {name: read_samples(directory.parent / "out", name) for name in NAMES}


def read_samples(folder: Path, task: str) -> dict[int, dict]:
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["doc_id"]: row for row in rows}


def documents(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS / name).read_text(encoding="utf-8").splitlines()]


def byte_ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


@torch.no_grad()
def log_probs(model: MambaLMHeadModel, inputs: list[int], targets: list[int]) -> torch.Tensor:
    """Log-probabilities of targets, the tokens after the last len(targets) positions of inputs."""
    logits = model(torch.tensor([inputs])).logits[0, -len(targets) :].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(targets)[:, None])[:, 0]


def test_log_likelihoods(samples, directory):
    model = MambaLMHeadModel.from_pretrained(directory).eval()
    for i, doc in enumerate(documents("choice.jsonl")):
        # lm-eval gives the context's last spaces to the continuation; bytes do not mind.
        code = doc["code"].rstrip()
        space = doc["code"][len(code) :]
        scores = samples["local_choice"][i]["resps"]
        for choice, [[got, greedy]] in zip(doc["choices"], scores, strict=True):
            context, continuation = byte_ids(code), byte_ids(space + choice)
            whole = context + continuation
            expected = log_probs(model, whole[:-1], continuation)
            assert float(got) == pytest.approx(float(expected.sum()), rel=1e-5)
            best = model(torch.tensor([whole[:-1]])).logits[0, -len(continuation) :].argmax(-1)
            assert str(greedy) == str(best.tolist() == continuation)


def test_rolling_log_likelihoods_in_windows(samples, directory):
    model = MambaLMHeadModel.from_pretrained(directory).eval()
    lengths = []
    for i, doc in enumerate(documents("rolling.jsonl")):
        tokens = byte_ids(doc["text"])
        stream, expected = [EOS, *tokens], 0.0
        for start in range(0, len(tokens), MAX_LENGTH):
            end = min(start + MAX_LENGTH, len(tokens))
            inputs = stream[max(0, end - MAX_LENGTH) : end]
            expected += float(log_probs(model, inputs, tokens[start:end]).sum())
        [[got]] = samples["local_rolling"][i]["resps"]
        assert float(got) == pytest.approx(expected, rel=1e-5)
        lengths.append(len(tokens))
    assert max(lengths) > MAX_LENGTH > min(lengths)


def test_batched_generation_stops_at_stop_strings(samples, directory):
    from transformers import ByT5Tokenizer

    model, tokenizer = MambaLMHeadModel.from_pretrained(directory).eval(), ByT5Tokenizer()
    for i, doc in enumerate(documents("generate.jsonl")):
        ids = torch.tensor([byte_ids(doc["code"])])
        new = model.generate(ids, ids.shape[1] + 24)[0, ids.shape[1] :].tolist()
        new = new[: new.index(EOS)] if EOS in new else new
        text = tokenizer.decode(new, skip_special_tokens=True).split("\n")[0]
        assert samples["local_generate"][i]["resps"] == [[text]]


def evaluate(harness, model: str, arguments: str, task: str, batch_size: int = 2) -> dict:
    """lm-eval's results in this process, without indexing the thousands of tasks it ships."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[task],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        device="cpu",
        batch_size=batch_size,
    )


def test_transformers_models_give_the_same_log_likelihoods(harness, samples, tmp_path):
    tiny_lm(BYTE_VOCAB).save_pretrained(tmp_path, format="hf")
    tokenizer = {"tokenizer_class": "ByT5Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    arguments = f"pretrained={tmp_path},add_bos_token=False,dtype=float32"
    theirs = evaluate(harness, "hf", arguments, "local_choice")["samples"]["local_choice"]
    ours = samples["local_choice"]
    assert len(theirs) == len(ours)
    for sample in theirs:
        pairs = zip(sample["resps"], ours[sample["doc_id"]]["resps"], strict=True)
        for [[a, _]], [[b, _]] in pairs:
            assert float(a) == pytest.approx(float(b), rel=1e-4)


@pytest.mark.parametrize("task", ["local_choice", "local_generate"])
def test_lm_evals_own_client_of_this_library_agrees(harness, samples, directory, task):
    arguments = f"pretrained={directory},tokenizer={directory},add_bos_token=False,dtype=float32"
    # One row at a time: that client pads prompts without a mask.
    results = evaluate(harness, "mamba_ssm", arguments, task, batch_size=1)["samples"][task]
    assert len(results) == len(samples[task])
    assert task == "local_choice" or any(s["resps"][0][0] for s in samples[task].values())
    for sample in results:
        theirs, ours = sample["resps"], samples[task][sample["doc_id"]]["resps"]
        if task == "local_generate":
            # It goes on after the end of text, and leaves the token itself out of the text.
            assert theirs[0][0].startswith(ours[0][0])
        else:
            for [[a, _]], [[b, _]] in zip(theirs, ours, strict=True):
                assert float(a) == pytest.approx(float(b), rel=1e-4)


@pytest.mark.parametrize("task", ["local_choice", "local_rolling"])
def test_lm_evals_own_client_gives_equal_scores_in_batches(harness, task):
    tokenizer = ROOT / "mamba_ssm" / "assets" / "embedded"
    own = f"pretrained=embedded,tokenizer={tokenizer},add_bos_token=False,dtype=float32"
    theirs = evaluate(harness, "mamba_ssm", own, task, batch_size=3)["results"][task]
    ours = evaluate(harness, "mamba", "pretrained=embedded,dtype=float32", task, batch_size=3)
    ours = ours["results"][task]
    scores = [name for name in ours if isinstance(ours[name], float) and "stderr" not in name]
    assert len(scores) >= 2
    for name in scores:
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5), name


def test_the_embedded_model_is_evaluated(harness):
    results = evaluate(harness, "mamba", "pretrained=embedded", "local_rolling")["results"]
    # Untrained bytes cost 8 bits; Python text costs a model that knows it less than half of them.
    assert results["local_rolling"]["bits_per_byte,none"] < 4


def test_sampling_and_sequence_options_reach_the_model(harness, directory):
    model = harness.MambaEvalWrapper(str(directory), device="cpu", batch_size=2)
    assert model.max_length == 2048 and model.device.type == "cpu"
    context = torch.tensor([byte_ids("ab")] * 2)
    options = {"stop": [], "max_length": 30, "do_sample": True, "temperature": 2.0}
    torch.manual_seed(0)
    first = model._model_generate(context, **options)
    assert not torch.equal(first[0], first[1]), "do_sample must sample"
    greedy = model._model_generate(context, stop=[], max_length=30, temperature=0.0)
    assert torch.equal(greedy[0], greedy[1])
    with pytest.raises(TypeError, match="does not know"):
        model._model_generate(context, stop=[], max_length=30, num_beams=4)


def test_int8_weights(harness):
    wrapper = harness.MambaEvalWrapper(pretrained="embedded", device="cpu", dtype="int8")
    assert is_quantized(wrapper.model)
    assert wrapper.get_model_info()["model_num_parameters"] == 3602688
    assert wrapper.model.backbone.embedding.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": "/no/such/directory"}, "there is no directory '/no/such/directory'"),
        (
            {"dtype": "int4"},
            "dtype must be auto or one of ('float32', 'float16', ",
        ),
    ],
    ids=str,
)
def test_bad_models_are_one_line_and_exit_code_2(
    harness, directory, monkeypatch, capsys, options, message
):
    def command():
        harness.MambaEvalWrapper(**{"pretrained": str(directory), "device": "cpu", **options})

    monkeypatch.setattr(harness, "cli_evaluate", command)
    assert harness.main() == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("lm_harness_eval.py: error: ") and message in line
