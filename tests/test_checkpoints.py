"""Checkpoints: both formats read, converted both ways, written, and every damaged file refused.

The transformers models here run on transformers' own PyTorch code, never on this library's ops.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil

import pytest
import torch

from mamba_ssm.utils import hf
from mamba_ssm.utils.checkpoint import check_state_dict, load_into, read_weights
from mamba_ssm.utils.checkpoint_format import (
    CONFIG_DEFAULTS,
    hf_to_mamba_ssm_config,
    hf_to_mamba_ssm_state_dict,
    mamba_ssm_to_hf_config,
    mamba_ssm_to_hf_state_dict,
)
from mamba_ssm.utils.hf import CheckpointError

transformers = pytest.importorskip("transformers")

EMBEDDING, LM_HEAD = "backbone.embedding.weight", "lm_head.weight"
# Every field away from its default, so that none can be confused or lost.
UNUSUAL = {
    "state_size": 5,
    "conv_kernel": 3,
    "expand": 3,
    "time_step_rank": 7,
    "use_bias": True,
    "use_conv_bias": False,
    "residual_in_fp32": False,
    "tie_word_embeddings": False,
    "time_step_min": 0.002,
    "time_step_max": 0.2,
    "time_step_scale": 0.5,
    "time_step_floor": 1e-3,
    "time_step_init_scheme": "constant",
    "eos_token_id": 7,
}


@pytest.fixture(autouse=True)
def independent_transformers(monkeypatch):
    """transformers uses any importable mamba_ssm; make it use its own code instead."""
    from transformers.models.mamba import modeling_mamba

    for name in ("mamba_inner_fn", "mamba_selective_scan", "mamba_selective_state_update"):
        monkeypatch.setattr(modeling_mamba, name, inspect.unwrap(getattr(modeling_mamba, name)))
    for name in ("causal_conv1d_fn", "causal_conv1d_update"):
        monkeypatch.setattr(modeling_mamba, name, inspect.unwrap(getattr(modeling_mamba, name)))


def hf_model(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4}
    config = transformers.MambaConfig(**{**sizes, **changes})
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def token_ids():
    return torch.arange(22).reshape(2, 11) % 40


def our_model(directory, **options):
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    return MambaLMHeadModel.from_pretrained(str(directory), **options).eval()


def reference_checkpoint(directory, tied_twice=True):
    """A directory as the reference package writes it: config.json and pytorch_model.bin."""
    state = hf_to_mamba_ssm_state_dict(hf_model().state_dict())
    if not tied_twice:
        del state[LM_HEAD]
    directory.mkdir(exist_ok=True)
    torch.save(state, directory / "pytorch_model.bin")
    config = {"d_model": 24, "n_layer": 2, "vocab_size": 37, "ssm_cfg": {"d_state": 4}}
    (directory / "config.json").write_text(json.dumps(config))
    return state


def assert_same_state(left, right):
    assert list(left) == list(right) or set(left) == set(right)
    for key, value in left.items():
        assert value.dtype == right[key].dtype, key
        assert torch.equal(value, right[key]), key


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "sharded bin"])
@pytest.mark.parametrize("changes", [{}, UNUSUAL, {"vocab_size": 41}], ids=["plain", "all", "odd"])
def test_transformers_checkpoints_give_equal_logits(tmp_path, layout, changes):
    model = hf_model(**changes)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if layout == "sharded" else "5GB")
    state = model.state_dict()
    if "bin" in layout:
        (tmp_path / "model.safetensors").unlink()
        halves = [dict(list(state.items())[i::2]) for i in range(2)]
        names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        if layout == "bin":
            halves, names = [state], ["pytorch_model.bin"]
        else:
            index = {k: name for name, half in zip(names, halves, strict=True) for k in half}
            text = json.dumps({"metadata": {}, "weight_map": index})
            (tmp_path / "pytorch_model.bin.index.json").write_text(text)
        for name, half in zip(names, halves, strict=True):
            torch.save(half, tmp_path / name)
    assert len(list(tmp_path.glob("*0000?-of-*"))) > 1 or "sharded" not in layout

    assert_same_state(hf.load_state_dict_hf(tmp_path), hf_to_mamba_ssm_state_dict(state))
    with torch.no_grad():
        expected = model(token_ids()).logits
        ours = our_model(tmp_path)(token_ids()).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied_twice", [True, False])
@pytest.mark.parametrize("legacy", [True, False], ids=["legacy pickle", "zip"])
def test_reference_checkpoint(tmp_path, tied_twice, legacy):
    state = reference_checkpoint(tmp_path, tied_twice)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert hf.load_config_hf(str(tmp_path)) == json.loads((tmp_path / "config.json").read_text())
    loaded = hf.load_state_dict_hf(str(tmp_path))
    assert_same_state(loaded, {**state, LM_HEAD: state[EMBEDDING]})
    assert loaded[LM_HEAD] is loaded[EMBEDDING]
    model = our_model(tmp_path)
    assert model.lm_head.weight is model.backbone.embedding.weight
    with torch.no_grad():
        expected = hf_model()(token_ids()).logits
        torch.testing.assert_close(model(token_ids()).logits, expected, rtol=1e-5, atol=1e-5)


def test_dtype_is_honoured_except_for_the_recurrence(tmp_path):
    hf_model().to(torch.float16).save_pretrained(tmp_path)
    stored = hf.load_state_dict_hf(tmp_path)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = hf.load_state_dict_hf(tmp_path, dtype=torch.bfloat16)
    for key, value in loaded.items():
        fp32 = key.endswith((".A_log", ".D"))
        assert value.dtype == (torch.float32 if fp32 else torch.bfloat16), key
        assert torch.equal(value, stored[key].to(value.dtype)), key
    for dtype in (None, torch.bfloat16):
        model = our_model(tmp_path, dtype=dtype)
        for key, value in model.named_parameters():
            fp32 = dtype is None or key.endswith((".A_log", ".D"))
            assert value.dtype == (torch.float32 if fp32 else torch.bfloat16), key
            assert torch.equal(value, stored[key].to(value.dtype)), key


def test_device_is_honoured(tmp_path, device):
    reference_checkpoint(tmp_path)
    for wanted in (device, torch.device(device)):
        loaded = hf.load_state_dict_hf(tmp_path, device=wanted)
        assert {value.device.type for value in loaded.values()} == {device}
        model = our_model(tmp_path, device=wanted)
        assert {value.device.type for value in model.parameters()} == {device}


def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    for name in ("bin", "safetensors"):
        directory = tmp_path / name
        state = reference_checkpoint(directory)
        if name == "safetensors":
            hf.save_pretrained_dir(state, hf.load_config_hf(directory), directory)
        loaded = hf.load_state_dict_hf(directory)
        for file in directory.iterdir():
            file.write_bytes(b"\0" * file.stat().st_size)
        assert_same_state(loaded, {**state, LM_HEAD: state[EMBEDDING]})


def test_parameter_attributes_survive(tmp_path):
    reference_checkpoint(tmp_path)
    mixer = our_model(tmp_path).backbone.layers[0].mixer
    assert mixer.A_log._no_weight_decay
    assert mixer.D._no_weight_decay
    assert mixer.dt_proj.bias._no_reinit
    assert all(parameter.requires_grad for parameter in mixer.parameters())


def test_load_into_a_model_in_place():
    source, target = hf_model(), hf_model(initializer_range=0.2)
    before = dict(target.named_parameters())
    with torch.no_grad():
        for parameter in before.values():
            parameter.zero_()
    load_into(target, source.state_dict())
    assert_same_state(target.state_dict(), source.state_dict())
    assert all(target.get_parameter(name) is value for name, value in before.items())


def test_buffers_left_on_meta_are_reported():
    class WithBuffer(torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 2, device="meta")
            self.register_buffer("angles", torch.zeros(2, device="meta"), persistent=False)

    with pytest.raises(CheckpointError, match=r"meta device.*\n.*1 unset tensor: angles"):
        load_into(WithBuffer(), {"weight": torch.ones(2, 2), "bias": torch.ones(2)})


# --- configuration -------------------------------------------------------------------------------


def test_defaults_are_those_of_the_config_class():
    from mamba_ssm.models.config_mamba import MambaConfig

    assert vars(MambaConfig()) == CONFIG_DEFAULTS


@pytest.mark.parametrize("changes", [{}, UNUSUAL], ids=["plain", "all"])
def test_conversion_of_transformers_is_lossless(changes):
    model = hf_model(**changes)
    original = json.loads(model.config.to_json_string(use_diff=False))
    config, extras = hf_to_mamba_ssm_config(original)
    assert set(config) <= set(CONFIG_DEFAULTS)
    back = mamba_ssm_to_hf_config(config, extras)
    del back["mamba_ssm"]
    back.pop("transformers_version", None)
    original.pop("transformers_version", None)
    original.pop("_name_or_path", None)
    assert back == original
    state = hf_to_mamba_ssm_state_dict(model.state_dict())
    assert_same_state(mamba_ssm_to_hf_state_dict(state), model.state_dict())


def test_our_conversion_is_lossless():
    config = {
        **CONFIG_DEFAULTS,
        "d_model": 48,
        "vocab_size": 50277,
        "fused_add_norm": False,
        "ssm_cfg": {"layer": "Mamba1", "use_fast_path": False, "d_state": 8, "dt_rank": "auto"},
    }
    converted = mamba_ssm_to_hf_config(config, {"eos_token_id": 3})
    assert converted["vocab_size"] == 50280
    assert converted["time_step_rank"] == 3
    assert hf_to_mamba_ssm_config(converted) == (config, {"eos_token_id": 3})
    # Changed by others since: the note about the origin no longer applies.
    assert hf_to_mamba_ssm_config({**converted, "vocab_size": 50288})[0]["vocab_size"] == 50288


def test_the_released_hf_config_is_the_reference_config(tmp_path):
    released = {
        "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4,
        "d_inner": 1536, "d_model": 768, "eos_token_id": 0, "expand": 2, "fused_add_norm": True,
        "hidden_act": "silu", "hidden_size": 768, "intermediate_size": 1536,
        "layer_norm_epsilon": 1e-05, "model_type": "mamba", "n_layer": 24,
        "num_hidden_layers": 24, "pad_vocab_size_multiple": 8, "residual_in_fp32": True,
        "rms_norm": True, "ssm_cfg": {}, "state_size": 16, "time_step_rank": 48,
        "torch_dtype": "float32", "use_bias": False, "use_conv_bias": True, "vocab_size": 50280,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(released))
    expected = {**CONFIG_DEFAULTS, "d_model": 768, "n_layer": 24, "vocab_size": 50280}
    loaded = hf.load_config_hf(tmp_path)
    assert {**CONFIG_DEFAULTS, **loaded} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "falcon_mamba"}, "model_type 'falcon_mamba' is not supported"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*'silu' only"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"hidden_size": -3}, "hidden_size is -3; a positive integer"),
        ({"num_hidden_layers": float("nan")}, "num_hidden_layers is nan"),
        ({"vocab_size": "40"}, "vocab_size is '40'"),
        ({"quantization_config": {}}, "quantised"),
    ],
)
def test_configs_that_cannot_be_represented(tmp_path, changes, message):
    config = {"model_type": "mamba", "hidden_size": 24, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        hf.load_config_hf(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "describes no Mamba model"),
        ('{"foo": 1}', "Its fields: 'foo'"),
        ("[1]", "holds a JSON list"),
        ('{"d_model": 24', "not valid JSON.*truncated"),
        ("", "not valid JSON.*empty"),
        ("[" * 100_000, "not valid JSON"),
        ("<!DOCTYPE html><html>", "web page"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_damaged_config(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        hf.load_config_hf(tmp_path)


def test_unknown_config_key_is_named(tmp_path):
    reference_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_heads": 3}))
    with pytest.raises(CheckpointError, match=r"config.json: .*unexpected.*n_heads"):
        our_model(tmp_path)


# --- damaged weights -----------------------------------------------------------------------------


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path, legacy):
    reference_checkpoint(tmp_path)
    trap = tmp_path / "executed"
    data = {EMBEDDING: torch.ones(2), "x": Malicious(trap)}
    torch.save(data, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        hf.load_state_dict_hf(tmp_path)
    assert not trap.exists()


def _zip_of_something_else(path):
    archive = shutil.make_archive(str(path.parent / "other"), "zip", path.parent, "config.json")
    os.replace(archive, path)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "web page": lambda path: path.write_text("<!DOCTYPE html>\n<html></html>"),
    "lfs pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "other zip": _zip_of_something_else,
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 8),
}


# A zip archive's last byte is the length of a comment, which no reader needs.
@pytest.mark.parametrize(
    ("name", "damage"),
    [("model.safetensors", damage) for damage in DAMAGE]
    + [("pytorch_model.bin", damage) for damage in DAMAGE if damage != "one byte short"],
)
def test_damaged_weights(tmp_path, name, damage):
    state = reference_checkpoint(tmp_path)
    if name == "model.safetensors":
        hf.save_pretrained_dir(state, hf.load_config_hf(tmp_path), tmp_path)
    DAMAGE[damage](tmp_path / name)
    hint = {"web page": "web page", "lfs pointer": "git lfs pull", "empty": "empty"}.get(damage, "")
    with pytest.raises(CheckpointError, match=f"{name} is not a readable .*{hint}"):
        hf.load_state_dict_hf(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.ones(1)], "holds a list"),
        ({}, "holds a dict"),
        ({"model": {"a": torch.ones(1)}, "step": 3}, "training checkpoint.*'model', 'step'"),
        ({EMBEDDING: torch.ones(3, 3).to_sparse()}, "only dense"),
    ],
)
def test_foreign_content(tmp_path, data, message):
    reference_checkpoint(tmp_path)
    torch.save(data, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        hf.load_state_dict_hf(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "no 'weight_map'"),
        ([], "no 'weight_map'"),
        ({"a": "../model-1.bin"}, "'../model-1.bin'; allowed is the plain name"),
        ({"a": "/etc/model-1.bin"}, "allowed is the plain name"),
        ({"a": "c:\\model-1.bin"}, "allowed is the plain name"),
        ({"a": 3}, "allowed is the plain name"),
        ({"a": "model.safetensors"}, r"plain name of a \*.bin file"),
        ({"a": "lost.bin"}, "no lost.bin"),
    ],
)
def test_bad_index(tmp_path, weight_map, message):
    reference_checkpoint(tmp_path)
    os.replace(tmp_path / "pytorch_model.bin", tmp_path / "shard.bin")
    text = json.dumps({"weight_map": weight_map})
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        hf.load_state_dict_hf(tmp_path)
    if weight_map == {"a": "lost.bin"}:
        with pytest.raises(CheckpointError, match=r"lost.bin does not exist.*incomplete"):
            list(read_weights(tmp_path / "pytorch_model.bin.index.json"))


def test_a_shard_must_hold_what_the_index_says(tmp_path):
    state = reference_checkpoint(tmp_path)
    os.replace(tmp_path / "pytorch_model.bin", tmp_path / "shard.bin")
    weight_map = dict.fromkeys([*state, "extra"], "shard.bin")
    del weight_map[EMBEDDING]
    text = json.dumps({"weight_map": weight_map})
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="1 missing key: extra\n  1 unexpected key: "):
        hf.load_state_dict_hf(tmp_path)


def test_strictness_is_readable(tmp_path):
    state = reference_checkpoint(tmp_path)
    missing = [key for key in state if "layers.0" in key]
    for key in missing:
        del state[key]
    state["backbone.layers.9.extra"] = torch.ones(1)
    state["backbone.norm_f.weight"] = torch.ones(25)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        our_model(tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "1 unexpected key: backbone.layers.9.extra" in text
    assert "1 wrong shape: backbone.norm_f.weight is (25,) and must be (24,)" in text
    assert f"{len(missing)} missing keys: backbone.layers.0" in text


def test_long_lists_are_shortened():
    expected = {f"k{i}": (1,) for i in range(25)}
    with pytest.raises(CheckpointError, match=r"25 missing keys: k0, .*k9 … and 15 more$"):
        check_state_dict(expected, {})


def test_tied_tensors_that_differ_are_refused(tmp_path):
    state = reference_checkpoint(tmp_path)
    state[LM_HEAD] = state[EMBEDDING] + 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="differ, but the configuration ties them"):
        hf.load_state_dict_hf(tmp_path)
    model = hf_model()
    with pytest.raises(CheckpointError, match="differ, but the model ties them"):
        load_into(model, {**model.state_dict(), LM_HEAD: state[LM_HEAD]})


def test_integer_weights_are_refused():
    state = {**hf_model().state_dict(), "backbone.norm_f.weight": torch.ones(24, dtype=torch.int64)}
    with pytest.raises(CheckpointError, match=r"norm_f.weight has dtype torch.int64"):
        load_into(hf_model(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16'; a floating-point torch.dtype"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"device": "cpux"}, "device is 'cpux', which torch does not know"),
        ({"device": "cuda:99"}, "device is 'cuda:99', but torch sees"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        hf.load_state_dict_hf(tmp_path / "never looked at", **options)


def test_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        hf.load_config_hf(tmp_path)
    with pytest.raises(CheckpointError, match=r"no weights: none of model.safetensors"):
        hf.load_state_dict_hf(tmp_path)
    with pytest.raises(CheckpointError, match="there is no directory"):
        hf.load_config_hf(tmp_path / "nowhere")
    reference_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        hf.load_config_hf(str(tmp_path / "config.json"))
    assert hf.resolve_model(str(tmp_path)) == tmp_path
