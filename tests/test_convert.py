"""The convert command: both ways, sharded, .bin, tied and untied, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from generation_helpers import BYTE_VOCAB, byte_model_dir, tiny_lm
from test_checkpoints import (
    UNUSUAL,
    assert_same_state,
    hf_model,
    independent_transformers,  # noqa: F401 (an autouse fixture)
    our_model,
    reference_checkpoint,
    token_ids,
)

from mamba_ssm.__main__ import main
from mamba_ssm.commands import convert as command
from mamba_ssm.utils.hf import CheckpointError, load_state_dict_hf

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHARDS = pytest.mark.parametrize("shard", ["5GB", "20KB"])


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def failure(capsys, *arguments: object) -> str:
    """The one line on standard error of a conversion that fails."""
    assert convert(*arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def weights_files(directory) -> set[str]:
    return {path.name for path in directory.glob("*.safetensors*")}


@SHARDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, UNUSUAL, {"vocab_size": 41}], ids=["plain", "all", "odd"])
def test_from_transformers_and_back(tmp_path, capsys, changes, dtype, shard):
    model = hf_model(**changes).to(dtype)
    model.save_pretrained(tmp_path / "hf", max_shard_size=shard)
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert convert(tmp_path / "hf", tmp_path / "ours", "--to", "mamba_ssm") == 0
    assert "equal bit for bit" in capsys.readouterr().out
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "model_type" not in config and config["d_model"] == 24
    command_line = ("--to", "hf", "--max-shard-size", shard)
    assert convert(tmp_path / "ours", tmp_path / "back", *command_line) == 0
    if shard != "5GB":
        assert "model.safetensors.index.json" in weights_files(tmp_path / "back")
    else:
        assert weights_files(tmp_path / "back") == {"model.safetensors"}
    loaded, report = transformers.MambaForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, dtype="auto"
    )
    assert not any(report.values()), report
    assert_same_state(loaded.state_dict(), model.state_dict())
    theirs, ours = (
        {k: v for k, v in m.config.to_dict().items() if k not in ("_name_or_path", "mamba_ssm")}
        for m in (model, loaded)
    )
    theirs["use_cache"] = ours["use_cache"]  # eval and training set it
    assert theirs == ours | {"transformers_version": theirs.get("transformers_version")}
    for name in ("tokenizer_config.json", "generation_config.json"):
        originals = (tmp_path / "hf" / name).read_bytes()
        assert (tmp_path / "ours" / name).read_bytes() == originals
        assert (tmp_path / "back" / name).read_bytes() == originals


@pytest.mark.parametrize("tied_twice", [True, False])
def test_from_the_historical_package_and_back(tmp_path, tied_twice):
    reference_checkpoint(tmp_path / "bin", tied_twice)
    assert convert(tmp_path / "bin", tmp_path / "hf", "--to", "hf") == 0
    assert convert(tmp_path / "hf", tmp_path / "ours", "--to", "mamba_ssm") == 0
    before, after = (load_state_dict_hf(tmp_path / name) for name in ("bin", "ours"))
    assert_same_state(after, before)
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("bin", "ours")]
    assert configs[0] == configs[1]  # the unpadded vocabulary too
    model = transformers.MambaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        theirs, ours = model(token_ids()).logits, our_model(tmp_path / "ours")(token_ids()).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_embedded_model_gives_the_same_text(tmp_path, capsys):
    assert convert("embedded", tmp_path / "hf", "--to", "hf") == 0
    model = transformers.MambaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert type(tokenizer).__name__ == "ByT5Tokenizer"
    ids = torch.tensor([[b + 3 for b in b"def main("]])
    theirs = model.eval().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    ours = our_model("embedded", dtype=torch.float32).generate(ids, ids.shape[1] + 8)
    assert torch.equal(theirs, ours)


def test_an_existing_checkpoint_is_kept_unless_told_otherwise(tmp_path, capsys):
    byte_model_dir(tmp_path / "a")
    byte_model_dir(tmp_path / "b")
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    line = failure(capsys, tmp_path / "a", tmp_path / "b", "--to", "hf")
    assert "holds a checkpoint already" in line and "--overwrite" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before
    assert convert(tmp_path / "a", tmp_path / "b", "--to", "hf", "--overwrite") == 0
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == "mamba"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_intermediate": 32}, "an MLP in each block"),
        ({"rms_norm": False}, "LayerNorm"),
        ({"d_model": 24}, "wrong shape"),
        ({"n_layer": 3}, "missing key"),
        ({"n_layer": -1}, "n_layer must be at least 1"),
        ({"colour": "red"}, "colour"),
        ({"model_type": "mamba2"}, "model_type 'mamba2' is not supported"),
        ({"quantization_config": {}}, "quantised"),
    ],
)
def test_what_cannot_be_converted(tmp_path, capsys, change, message):
    source = byte_model_dir(tmp_path / "a")
    if change == {"d_intermediate": 32} or change == {"rms_norm": False}:
        tiny_lm(BYTE_VOCAB, **change).save_pretrained(source)
    else:
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in failure(capsys, source, tmp_path / "b", "--to", "hf")
    assert not (tmp_path / "b").exists()


def test_wrong_places(tmp_path, capsys):
    source = byte_model_dir(tmp_path / "a")
    assert "DST is SRC" in failure(capsys, source, source, "--to", "hf", "--overwrite")
    file = tmp_path / "file"
    file.write_text("")
    assert "DST is a file" in failure(capsys, source, file, "--to", "hf")
    assert "is a file" in failure(capsys, file, tmp_path / "b", "--to", "hf")
    assert "no directory" in failure(capsys, tmp_path / "none", tmp_path / "b", "--to", "hf")
    (source / "model.safetensors").write_bytes(b"\x00" * 7)
    assert "model.safetensors" in failure(capsys, source, tmp_path / "b", "--to", "hf")
    size = ("--to", "hf", "--max-shard-size", "many")
    assert "max_shard_size is 'many'" in failure(capsys, "embedded", tmp_path / "b", *size)
    assert not (tmp_path / "b").exists()
    with pytest.raises(SystemExit) as stop:
        convert("embedded", tmp_path / "b")
    assert stop.value.code == 2 and "--to" in capsys.readouterr().err


def test_what_comes_back_is_compared(tmp_path, monkeypatch):
    written = command.save_pretrained_dir

    def damaging(state, *rest):
        state = dict(state)
        state["backbone.norm_f.weight"] = state["backbone.norm_f.weight"] * 1.01
        written(state, *rest)

    monkeypatch.setattr(command, "save_pretrained_dir", damaging)
    with pytest.raises(CheckpointError, match=r"norm_f\.weight did not come back"):
        command.convert("embedded", str(tmp_path / "b"), "hf")
