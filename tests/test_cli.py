"""The generate command under its three names, and the generation benchmark."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from generation_helpers import HYBRID, byte_model_dir

from mamba_ssm.commands import generate, loading

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "benchmarks" / "benchmark_generation_mamba_simple.py"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(byte_model_dir(tmp_path_factory.mktemp("cli") / "model"))


@pytest.fixture(scope="module")
def hybrid_directory(tmp_path_factory):
    return str(byte_model_dir(tmp_path_factory.mktemp("cli") / "hybrid", **HYBRID))


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_generation", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub that refuses connections, and nothing in its cache."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*args, **kwargs):
        raise ConnectionError("refused")

    def not_cached(*args, **kwargs):
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", not_cached)
    monkeypatch.setattr(loading, "KNOWN_SHAPES", {"state-spaces/mamba-130m": (16, 2)})


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        # An explicit backend: `auto` would say so once where the kernels are not compiled.
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MAMBA_SSM_BACKEND": "reference"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def one_line(capsys) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


# -- generate --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "mamba_ssm", "generate"),
        ("mamba_generate.py",),
        ("-c", "import sys; from mamba_ssm.commands.generate import main; sys.exit(main())"),
    ],
    ids=["module", "script", "entry point"],
)
def test_the_command_under_each_name(command, directory):
    done = python(
        *command, "--model-name", directory, "--prompt", "héllo", "--genlen", "6",
        "--seed", "1", "--temperature", "0.9", "--topk", "20", "--topp", "0.95", "--minp", "0.01",
        "--repetition-penalty", "1.1", "--batch", "1", "--device", "cpu", "--dtype", "float32",
        "--stream",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("héllo")
    assert "Number of parameters: 19,056\nPrompt length: 6, generated: " in done.stdout
    assert "tokens/s (cpu, torch.float32)" in done.stdout


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        generate.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    names = "model-name prompt promptlen genlen temperature topk topp minp repetition-penalty batch"
    for name in [*names.split(), "device", "dtype", "seed", "stream", "random-weights", "cg"]:
        assert f"--{name}" in text
    assert "examples:" in text


def test_without_options_the_embedded_model_writes(capsys):
    assert generate.main(["--genlen", "80", "--seed", "0"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(generate.DEFAULT_PROMPT)
    assert f"Prompt length: {len(generate.DEFAULT_PROMPT)}, generated: " in text


def test_streamed_and_unstreamed_text_are_the_same(directory, capsys):
    arguments = ["--model-name", directory, "--prompt", "ab", "--genlen", "40", "--seed", "3"]
    arguments += ["--temperature", "5", "--topp", "1"]
    texts = []
    for option in ("--stream", "--no-stream"):
        assert generate.main([*arguments, option]) == 0
        texts.append(capsys.readouterr().out.partition("\nNumber")[0])
    assert texts[0] == texts[1] and len(texts[0]) > 10


def test_seed_batch_and_prompt_length(directory, capsys):
    arguments = ["--model-name", directory, "--promptlen", "5", "--genlen", "8", "--batch", "2"]
    texts = []
    for seed in ("1", "1", "2"):
        assert generate.main([*arguments, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out.partition("\nNumber")[0])
    assert texts[0] == texts[1] != texts[2]
    assert "\n---\n" in texts[0]


def test_a_hybrid_model_generates(hybrid_directory, capsys):
    assert generate.main(["--model-name", hybrid_directory, "--genlen", "5"]) == 0
    assert "tokens/s" in capsys.readouterr().out


def test_random_weights_need_neither_hub_nor_tokenizer(no_hub, capsys):
    name = ["--model-name", "state-spaces/mamba-130m", "--random-weights"]
    assert generate.main([*name, "--promptlen", "4", "--genlen", "3"]) == 0
    ids, _, parameters, lengths, _ = capsys.readouterr().out.splitlines()
    assert len(ids.split()) == 7 and lengths == "Prompt length: 4, generated: 3 tokens"
    assert parameters.startswith("Number of parameters: 811,248")
    assert generate.main([*name, "--prompt", "text"]) == 2
    assert "--promptlen N without --prompt" in one_line(capsys)


def test_random_weights_of_a_local_shape(directory, capsys):
    texts = []
    for option in ([], ["--random-weights"]):
        arguments = ["--model-name", directory, "--prompt", "ab", "--temperature", "0"]
        assert generate.main([*arguments, "--genlen", "20", *option]) == 0
        texts.append(capsys.readouterr().out.partition("\nNumber")[0])
    assert texts[0] != texts[1]


USAGE = [
    (["--topp", "0"], r"--topp: must be in (0, 1], got '0'"),
    (["--topp", "1.5"], r"--topp: must be in (0, 1], got '1.5'"),
    (["--minp", "-1"], r"--minp: must be in [0, 1], got '-1'"),
    (["--temperature", "-0.5"], "--temperature: must be >= 0 and finite, got '-0.5'"),
    (["--temperature", "nan"], "--temperature: must be >= 0 and finite, got 'nan'"),
    (["--topk", "-1"], "--topk: must be an integer >= 0, got '-1'"),
    (["--topk", "1.5"], "--topk: must be an integer >= 0, got '1.5'"),
    (["--genlen", "0"], "--genlen: must be an integer >= 1, got '0'"),
    (["--promptlen", "0"], "--promptlen: must be an integer >= 1, got '0'"),
    (["--batch", "0"], "--batch: must be an integer >= 1, got '0'"),
    (["--repetition-penalty", "0"], "--repetition-penalty: must be > 0 and finite, got '0'"),
    (["--seed", "x"], "--seed: must be an integer >= 0, got 'x'"),
    (["--dtype", "int4"], "--dtype: invalid choice: 'int4'"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=str)
def test_wrong_options_are_one_line_and_exit_code_2(arguments, message, capsys, benchmark):
    for main in (generate.main, benchmark.main):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        line = one_line(capsys)
        assert message in line and line.endswith("(see --help)")


WRONG = [
    (["--prompt", ""], "the prompt is empty"),
    (["--stream", "--batch", "2"], "--batch 1"),
    (["--device", "nowhere"], "cannot use device 'nowhere'"),
    (["--model-name", "/no/such"], "there is no directory '/no/such'"),
    (["--model-name", "some/mamba"], "--random-weights"),
    (["--model-name", "some/mamba", "--random-weights"], "the hub cannot be reached"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=str)
def test_what_cannot_be_done_is_one_line_with_a_remedy(
    arguments, message, directory, no_hub, capsys, benchmark
):
    for main in (generate.main, benchmark.main):
        assert main(["--model-name", directory, *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and ": error: " in lines[0] and message in lines[0]


def test_a_missing_gpu_is_said(directory, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert generate.main(["--model-name", directory, "--device", "cuda"]) == 2
    assert "cannot use device 'cuda'" in one_line(capsys)


def test_an_interrupt_ends_the_command_quietly(directory, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "load_mamba", interrupted)
    assert generate.main(["--model-name", directory]) == 130
    assert capsys.readouterr().err == "\nmamba-generate: interrupted\n"


# -- benchmark -------------------------------------------------------------------------------------


def test_benchmark_as_a_command(directory):
    done = python(
        str(BENCHMARK), "--model-name", directory, "--prompt", "hello", "--genlen", "5",
        "--repeats", "2", "--topp", "0.9", "--topk", "0", "--seed", "1", "--batch", "2",
        "--device", "cpu", "--dtype", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no progress bar where there is no terminal"
    assert "Number of parameters: 19056\n" in done.stdout
    assert "Prompt length: 5, generation length: 5\n" in done.stdout
    assert f"{directory} prompt processing + decoding time: " in done.stdout
    assert "Throughput: " in done.stdout and done.stdout.count("hello") == 2


def test_benchmark_defaults(benchmark):
    args = vars(benchmark.build_parser().parse_args([]))
    expected = {
        "prompt": None, "promptlen": 100, "genlen": 100, "temperature": 1.0, "topk": 1,
        "topp": 1.0, "minp": 0.0, "repetition_penalty": 1.0, "batch": 1, "cg": True,
    }  # fmt: skip
    assert args.items() >= expected.items()
    assert benchmark.DEFAULT_MODEL == "state-spaces/mamba-130m"


def test_benchmark_json(benchmark, directory, capsys):
    arguments = ["--model-name", directory, "--genlen", "4", "--promptlen", "7", "--json"]
    assert benchmark.main(arguments) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["prompt_length"] == 7 and result["generation_length"] == 4
    assert result["parameters"] == 19056 and len(result["seconds"]) == 3
    assert sorted(result["seconds"])[1] == result["seconds_median"] > 0
    assert result["tokens_per_second"] == pytest.approx(4 / result["seconds_median"])
    assert not result["random_weights"] and "decoding time" in err


def test_benchmark_without_a_hub_times_the_default_shape(benchmark, no_hub, capsys):
    arguments = ["--genlen", "3", "--promptlen", "4", "--repeats", "1"]
    assert benchmark.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    said = [line for line in out.splitlines() if "random weights" in line]
    shape = "the shape of state-spaces/mamba-130m with random weights."
    assert said == [f"The hub cannot be reached: timing {shape}"]
    # The same name given explicitly is an error instead.
    assert benchmark.main([*arguments, "--model-name", "state-spaces/mamba-130m"]) == 2
    assert "--random-weights" in one_line(capsys)


@pytest.fixture(scope="module")
def neox_directory(tmp_path_factory):
    from transformers import ByT5Tokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    path = tmp_path_factory.mktemp("neox")
    config = GPTNeoXConfig(
        vocab_size=384,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    GPTNeoXForCausalLM(config).save_pretrained(path)
    ByT5Tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--prompt", "hello", "--topk", "0", "--topp", "0.9", "--minp", "0.1", "--seed", "1"],
        ["--random-weights", "--batch", "2", "--repetition-penalty", "1.2"],
    ],
    ids=["greedy", "sampling", "random weights"],
)
def test_benchmark_of_a_transformers_model(benchmark, neox_directory, capsys, options):
    arguments = ["--model-name", neox_directory, "--genlen", "6", "--promptlen", "5", "--json"]
    assert not benchmark.is_mamba(neox_directory)
    assert benchmark.main([*arguments, "--repeats", "1", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prompt_length"] == 5 and result["generation_length"] == 6


def test_benchmark_says_what_to_do_about_unreachable_transformers_models(
    benchmark, no_hub, neox_directory, tmp_path, capsys
):
    assert benchmark.main(["--model-name", "EleutherAI/pythia-2.8b"]) == 2
    assert "local directory" in capsys.readouterr().err.splitlines()[-1]
    config = json.loads((Path(neox_directory) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert benchmark.main(["--model-name", str(tmp_path), "--genlen", "2"]) == 2
    assert "--random-weights" in capsys.readouterr().err.splitlines()[-1]


def test_which_models_are_ours(benchmark, directory, tmp_path):
    assert benchmark.is_mamba("state-spaces/mamba-2.8b") and benchmark.is_mamba("embedded")
    assert benchmark.is_mamba("state-spaces/mamba-130m-hf") and benchmark.is_mamba(directory)
    assert not benchmark.is_mamba("EleutherAI/pythia-2.8b")
    (tmp_path / "config.json").write_text("{ damaged")
    assert benchmark.is_mamba(str(tmp_path))
