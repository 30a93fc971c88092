"""Writing checkpoints: read back equal, by transformers too, and never a damaged earlier one."""

from __future__ import annotations

import itertools
import json
import os
import sys

import pytest
import torch
from test_checkpoints import (
    EMBEDDING,
    LM_HEAD,
    UNUSUAL,
    assert_same_state,
    hf_model,
    hf_to_mamba_ssm_config,
    hf_to_mamba_ssm_state_dict,
    independent_transformers,  # noqa: F401 (an autouse fixture)
    our_model,
    reference_checkpoint,
    token_ids,
)

from mamba_ssm.utils import checkpoint_save, hf
from mamba_ssm.utils.hf import CheckpointError, save_pretrained_dir

transformers = pytest.importorskip("transformers")


def model_parts(**changes):
    model = hf_model(**changes)
    config, extras = hf_to_mamba_ssm_config(json.loads(model.config.to_json_string(False)))
    return model, hf_to_mamba_ssm_state_dict(model.state_dict()), config, extras


def snapshot(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("changes", [{}, UNUSUAL, {"vocab_size": 41}], ids=["plain", "all", "odd"])
def test_transformers_reads_what_we_write(tmp_path, changes, shard):
    model, state, config, extras = model_parts(**changes)
    save_pretrained_dir(state, config, tmp_path, "hf", shard, extras)
    assert (tmp_path / "model.safetensors").exists() == (shard == "5GB")
    loaded, report = transformers.MambaForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    assert loaded.config.eos_token_id == model.config.eos_token_id
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(loaded.eval()(token_ids()).logits, model(token_ids()).logits)
        ours = our_model(tmp_path)(token_ids()).logits
    torch.testing.assert_close(ours, model(token_ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["mamba_ssm", "hf"])
@pytest.mark.parametrize("shard", ["5GB", 20_000])
def test_our_model_comes_back(tmp_path, format, shard):
    reference_checkpoint(tmp_path / "first")
    model = our_model(tmp_path / "first", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "second", format=format, max_shard_size=shard)
    again = our_model(tmp_path / "second", dtype=torch.bfloat16)
    assert again.config == model.config
    assert_same_state(again.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


def test_a_hybrid_model_comes_back(tmp_path):
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    config = MambaConfig(
        d_model=32,
        n_layer=3,
        vocab_size=37,
        d_intermediate=48,
        attn_layer_idx=[1],
        attn_cfg={"num_heads": 4, "rotary_emb_dim": 8, "d_conv": 3},
        rms_norm=False,
        tie_embeddings=False,
    )
    torch.manual_seed(0)
    model = MambaLMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    again = our_model(tmp_path)
    assert again.config == config
    assert_same_state(again.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(token_ids() % 37).logits, model(token_ids() % 37).logits)
    with pytest.raises(CheckpointError, match="an MLP in each block"):
        model.save_pretrained(tmp_path, format="hf")
    assert_same_state(hf.load_state_dict_hf(tmp_path), model.state_dict())


def test_progress_is_shown_on_a_terminal_only(tmp_path, monkeypatch, capsys):
    _, state, config, _ = model_parts()
    for shard, terminal, shown in (
        (20_000, True, True),
        (20_000, False, False),
        (10**9, True, False),
    ):
        save_pretrained_dir(state, config, tmp_path, max_shard_size=shard)
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        hf.load_state_dict_hf(tmp_path)
        assert ("Loading weights: 100%" in capsys.readouterr().err) == shown


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)], ids=oct)
@pytest.mark.parametrize("shard", ["5GB", 20_000])
def test_files_have_the_mode_that_the_umask_allows(tmp_path, shard, mask, mode):
    _, state, config, _ = model_parts()
    previous = os.umask(mask)
    try:
        save_pretrained_dir(state, config, tmp_path, max_shard_size=shard)
        save_pretrained_dir(state, config, tmp_path, max_shard_size=shard)
    finally:
        os.umask(previous)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert len(modes) == 2 if shard == "5GB" else len(modes) > 3
    assert set(modes.values()) == {oct(mode)}, modes


def test_tied_weights_are_written_once_and_untied_ones_twice(tmp_path):
    for tied in (True, False):
        _, state, config, _ = model_parts(tie_word_embeddings=tied)
        save_pretrained_dir(state, config, tmp_path)
        assert (LM_HEAD in dict(hf.read_weights(tmp_path / "model.safetensors"))) == (not tied)
        assert_same_state(hf.load_state_dict_hf(tmp_path), state)


def test_shared_and_strided_tensors_are_written(tmp_path):
    _, state, config, _ = model_parts()
    buffer = torch.arange(48.0)
    state["backbone.norm_f.weight"] = buffer[::2]
    state["backbone.layers.0.norm.weight"] = buffer[1::2]
    save_pretrained_dir(state, config, tmp_path)
    assert_same_state(hf.load_state_dict_hf(tmp_path), state)


def test_a_save_supersedes_earlier_weights_and_keeps_other_files(tmp_path):
    reference_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("kept")
    _, state, config, _ = model_parts()
    save_pretrained_dir(state, config, tmp_path, max_shard_size=20_000)
    names = {path.name for path in tmp_path.iterdir()}
    shards = {name for name in names if "-of-" in name}
    assert len(shards) > 1
    assert names == {*shards, "model.safetensors.index.json", "config.json", "tokenizer.json"}
    changed = {key: value + 1 for key, value in state.items()}
    save_pretrained_dir(changed, config, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json"}
    assert_same_state(hf.load_state_dict_hf(tmp_path), changed)


@pytest.mark.parametrize("shard", ["5GB", 20_000])
@pytest.mark.parametrize("same_config", [True, False])
def test_interrupted_save_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, shard, same_config):
    """Break at every file that is written or renamed, in turn, until a save gets through."""
    import safetensors.torch

    _, state, config, _ = model_parts()
    save_pretrained_dir(state, config, tmp_path, max_shard_size=20_000)
    before = snapshot(tmp_path)
    changed = {key: value + 1 for key, value in state.items()}
    new_config = config if same_config else {**config, "fused_add_norm": False}
    remaining = 0

    def breaking(function):
        def wrapper(*args, **kwargs):
            nonlocal remaining
            remaining -= 1
            if remaining == -1:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(safetensors.torch, "save_file", breaking(safetensors.torch.save_file))
    monkeypatch.setattr(checkpoint_save.os, "replace", breaking(os.replace))
    for interruptions in itertools.count():
        remaining = interruptions
        try:
            save_pretrained_dir(changed, new_config, tmp_path, max_shard_size=shard)
            break
        except KeyboardInterrupt:
            assert snapshot(tmp_path) == before
    assert interruptions >= 6
    assert hf.load_config_hf(tmp_path) == new_config
    assert_same_state(hf.load_state_dict_hf(tmp_path), changed)


def test_repeated_saves_replace_one_file_only(tmp_path, monkeypatch):
    _, state, config, _ = model_parts()
    save_pretrained_dir(state, config, tmp_path)
    replaced = []
    original = os.replace
    monkeypatch.setattr(
        checkpoint_save.os, "replace", lambda a, b: (replaced.append(b), original(a, b))
    )
    save_pretrained_dir({k: v + 1 for k, v in state.items()}, config, tmp_path)
    assert replaced == [tmp_path / "model.safetensors"]


def test_a_failed_first_save_leaves_nothing(tmp_path, monkeypatch):
    import safetensors.torch

    def full_disk(*args, **kwargs):
        raise safetensors.SafetensorError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    _, state, config, _ = model_parts()
    with pytest.raises(CheckpointError, match=r"cannot write into .*no space left"):
        save_pretrained_dir(state, config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_intermediate": 64}, "an MLP in each block"),
        ({"attn_layer_idx": [1]}, "attention layers"),
        ({"rms_norm": False}, "LayerNorm"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "another layer.*'Mamba2'.*format='mamba_ssm'"),
        ({"ssm_cfg": {"expand": 1.5}}, "a fractional expand"),
        ({"ssm_cfg": {"headdim": 64}}, r"ssm_cfg\['headdim'\]"),
        ({"n_heads": 3}, "unknown configuration fields: 'n_heads'"),
    ],
)
def test_what_transformers_cannot_represent(tmp_path, changes, message):
    _, state, config, _ = model_parts()
    with pytest.raises(CheckpointError, match=message):
        save_pretrained_dir(state, {**config, **changes}, tmp_path / "new", "hf")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gguf"}, "format is 'gguf'; allowed are"),
        ({"max_shard_size": 0}, "max_shard_size is 0; a positive"),
        ({"max_shard_size": "5 parsecs"}, "max_shard_size is '5 parsecs'"),
        ({"max_shard_size": -1}, "max_shard_size is -1"),
        ({"max_shard_size": True}, "max_shard_size is True"),
        ({"extras": {"eos_token_id": 1}}, "extras belong to format='hf'"),
        ({"state_dict": {}}, "the state dict is empty"),
        ({"state_dict": {"a": 3}}, "'a' is a int; only tensors"),
        ({"state_dict": {"a": torch.ones(1, device="meta")}}, "on the meta device"),
        ({"state_dict": {"a": torch.ones(1, 1).to_sparse()}}, "only dense tensors"),
        ({"config": {"ssm_cfg": {"dtype": torch.float16}}}, "cannot be written as JSON"),
        (
            {"state_dict": {EMBEDDING: torch.ones(1), LM_HEAD: torch.zeros(1)}},
            "differ, but the configuration has tie_embeddings=True",
        ),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    arguments = {"state_dict": {"a": torch.ones(1)}, "config": {}, **options}
    with pytest.raises(CheckpointError, match=message):
        save_pretrained_dir(directory=tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_target_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("something")
    with pytest.raises(CheckpointError, match="cannot write into"):
        save_pretrained_dir({"a": torch.ones(1)}, {}, tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "something"
