"""Models and tokenizers by name: a real hub client against a local server, and without any hub."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from mamba_ssm.utils import hf, hub
from mamba_ssm.utils.hf import CheckpointError, HubUnreachableError

CONFIG = {"d_model": 8, "n_layer": 1, "vocab_size": 16}
STATE = {"backbone.embedding.weight": torch.arange(128.0).reshape(16, 8)}


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Serves ``owner/model`` from a directory the way the hub does (HEAD and GET of resolve/)."""

    directory = None

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        owner, _, filename = self.path.lstrip("/").partition("/resolve/main/")
        path = self.directory / filename
        found = owner == "owner/model" and bool(filename)
        data = path.read_bytes() if found and path.is_file() else None
        self.send_response(404 if data is None else 200)
        self.send_header("X-Repo-Commit", "a" * 40)
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound" if found else "RepoNotFound")
        self.send_header("ETag", f'"{hashlib.sha256(data or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if body:
            self.wfile.write(data or b"")

    def log_message(self, *arguments):
        """Quiet."""


@pytest.fixture
def fake_hub(tmp_path):
    (tmp_path / "served").mkdir()
    handler = type("Handler", (FakeHub,), {"directory": tmp_path / "served"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def client(tmp_path, server, script, **environment):
    """Run ``script`` in a fresh process whose hub is ``server``; returns its last line as JSON."""
    environment = {
        **{key: value for key, value in os.environ.items() if "proxy" not in key.lower()},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        **environment,
    }
    script = f"import json\nfrom mamba_ssm.utils import hf\n{script}"
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


LOAD = """
state = hf.load_state_dict_hf("owner/model")
loaded = [
    hf.load_config_hf("owner/model"),
    {key: value.tolist() for key, value in state.items()},
    sorted(path.name for path in hf.resolve_model("owner/model").iterdir()),
]
print(json.dumps(loaded))
"""
FAIL = """
try:
    hf.load_state_dict_hf("{name}")
except hf.CheckpointError as error:
    failure = type(error).__name__, str(error)
    print(json.dumps(failure))
"""


def test_hub_then_its_cache_then_offline(tmp_path, fake_hub):
    served = tmp_path / "served"
    (served / "config.json").write_text(json.dumps(CONFIG))
    torch.save(STATE, served / "pytorch_model.bin")
    (served / "README.md").write_text("not needed")
    values = STATE["backbone.embedding.weight"].tolist()
    tied = {"backbone.embedding.weight": values, "lm_head.weight": values}
    expected = [CONFIG, tied, ["config.json", "pytorch_model.bin"]]
    assert client(tmp_path, fake_hub, LOAD) == expected
    kind, text = client(tmp_path, fake_hub, FAIL.format(name="owner/other"))
    assert kind == "CheckpointError"
    assert "neither a local directory nor a model on the hub" in text

    fake_hub.shutdown()
    fake_hub.server_close()
    new = f"import time\nstarted = time.monotonic()\n{FAIL.format(name='owner/new')}"
    for offline in ("0", "1"):
        script = f"{LOAD}{new}print(json.dumps([loaded, failure, time.monotonic() - started]))"
        loaded, (kind, text), seconds = client(tmp_path, fake_hub, script, HF_HUB_OFFLINE=offline)
        assert loaded == expected
        assert kind == "HubUnreachableError"
        assert "--random-weights" in text
        assert "local directory" in text
        assert seconds < 10


def test_shards_come_from_the_hub_too(tmp_path, fake_hub):
    served = tmp_path / "served"
    state = {**STATE, "lm_head.weight": torch.zeros(16, 8)}
    config = {**CONFIG, "tie_embeddings": False}
    hf.save_pretrained_dir(state, config, served, max_shard_size=600)
    (served / "model-00002-of-00002.safetensors").rename(served / "lost")
    kind, text = client(tmp_path, fake_hub, FAIL.format(name="owner/model"))
    assert (kind, "model-00002-of-00002.safetensors" in text) == ("CheckpointError", True)
    (served / "lost").rename(served / "model-00002-of-00002.safetensors")
    loaded = client(tmp_path, fake_hub, LOAD)
    assert loaded[0] == config
    assert loaded[1] == {key: value.tolist() for key, value in state.items()}


@pytest.fixture
def no_hub(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*arguments, **options):
        raise ConnectionError("no route")

    def not_cached(*arguments, **options):
        assert options == {"local_files_only": True}
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", not_cached)


@pytest.mark.parametrize("load", [hf.load_config_hf, hf.load_state_dict_hf, hf.resolve_model])
def test_no_hub(no_hub, load):
    with pytest.raises(HubUnreachableError, match=r"'owner/model'.*no route.*--random-weights"):
        load("owner/model")


def test_names_that_are_no_models(no_hub):
    for name, message in (
        ("", "the model name is empty"),
        ("./runs/a", "there is no directory"),
        ("runs/a/b", "there is no directory"),
        ("~/runs", "there is no directory"),
        ("runs\\a", "there is no directory"),
        ("not a name", "nor a valid hub name"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            hf.load_config_hf(name)
        assert not isinstance(caught.value, HubUnreachableError)


def test_embedded_name(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "_ASSETS", tmp_path)
    with pytest.raises(CheckpointError, match="no embedded model"):
        hf.load_config_hf("embedded")
    hf.save_pretrained_dir(STATE, CONFIG, tmp_path)
    assert hf.load_config_hf("embedded") == CONFIG
    assert hf.resolve_model("embedded") == tmp_path


def write_model(directory, vocab_size=384, **files):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": vocab_size}))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def test_byte_level_tokenizer_needs_no_vocabulary(no_hub, tmp_path):
    write_model(tmp_path, tokenizer_config={"tokenizer_class": "ByT5Tokenizer"})
    tokenizer = hf.load_tokenizer(str(tmp_path))
    assert tokenizer("hé").input_ids == [107, 198, 172, 1]
    assert tokenizer.decode([107, 198, 172]) == "hé"
    (tmp_path / "tokenizer_config.json").unlink()
    write_model(tmp_path, config={**CONFIG, "tokenizer_class": "ByT5Tokenizer"})
    assert hf.load_tokenizer(str(tmp_path))("a").input_ids == [100, 1]
    assert hf.load_config_hf(str(tmp_path)) == CONFIG


def write_word_tokenizer(directory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"mamba": 0, "scan": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    write_model(directory, tokenizer=json.loads(tokenizer.to_str()), tokenizer_config=settings)


def test_the_models_own_tokenizer(no_hub, tmp_path):
    write_word_tokenizer(tmp_path)
    assert hf.load_tokenizer(tmp_path)("scan mamba x").input_ids == [1, 0, 2]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer files in .* cannot be loaded"):
        hf.load_tokenizer(tmp_path)


def test_default_tokenizer_without_a_hub(no_hub, tmp_path):
    write_model(tmp_path, vocab_size=50277)
    for name in (str(tmp_path), "state-spaces/mamba-130m"):
        with pytest.raises(HubUnreachableError, match=r"default tokenizer is on the hub.*no route"):
            hf.load_tokenizer(name)
    write_model(tmp_path, vocab_size=384)
    with pytest.raises(CheckpointError, match=r"vocabulary of 384 is too small.*ByT5Tokenizer"):
        hf.load_tokenizer(str(tmp_path))


def test_default_tokenizer_comes_from_the_hub(monkeypatch, tmp_path):
    tokenizer = tmp_path / "neox"
    write_word_tokenizer(tokenizer)
    asked = []

    def find(self, filename):
        asked.append((self.name, filename))
        path = tokenizer / filename
        return path if self.name == "EleutherAI/gpt-neox-20b" and path.exists() else None

    monkeypatch.setattr(hub.HubFiles, "find", find)
    write_model(tmp_path / "model", vocab_size=50277)
    assert hf.load_tokenizer(str(tmp_path / "model"))("scan x").input_ids == [1, 2]
    assert {name for name, _ in asked} == {"EleutherAI/gpt-neox-20b"}


def test_amp_decorators_in_both_forms():
    from mamba_ssm.utils.torch import custom_amp_decorator, custom_bwd, custom_fwd

    class Plain(torch.autograd.Function):
        @staticmethod
        @custom_fwd
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @custom_bwd
        def backward(ctx, gradient):
            return 2 * gradient

    class OnCpu(torch.autograd.Function):
        @staticmethod
        @custom_fwd(device_type="cpu", cast_inputs=torch.float16)
        def forward(ctx, x):
            ctx.seen = x.dtype
            assert not torch.is_autocast_enabled("cpu")
            return 2 * x

        @staticmethod
        @custom_bwd(device_type="cpu")
        def backward(ctx, gradient):
            assert ctx.seen == torch.float16
            return 3 * gradient

    x = torch.ones(3, requires_grad=True)
    Plain.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = OnCpu.apply(x)
    assert y.dtype == torch.float16
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [3, 3, 3]
    assert custom_amp_decorator(lambda **options: options)() == {"device_type": "cuda"}
    assert custom_amp_decorator(lambda **options: options, False)() == {}
