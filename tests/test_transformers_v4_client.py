"""transformers 4.x as a client: the path it takes on a GPU, run on the CPU, against its own torch.

Version 4 takes our ops on CUDA only, by imports of its own. Here those imports are made as if there
were a GPU, and the mixers' ``cuda_kernels_forward`` is called in place of ``slow_forward``. Needs
an environment with transformers 4: ``make test-transformers4``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from unittest.mock import patch

import pytest
import torch
from test_mamba_inner import plain

import mamba_ssm.compat

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if int(transformers.__version__.split(".")[0]) != 4:
    pytest.skip(
        f"transformers is {transformers.__version__}; 4.x is tested by `make test-transformers4`",
        allow_module_level=True,
    )

KINDS = {"Mamba": "mamba", "FalconMamba": "falcon_mamba", "Jamba": "jamba"}
SIZES = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 3}
JAMBA = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "mamba_d_state": 4, "mamba_dt_rank": 3, "num_experts": 2,
    "attn_layer_period": 4, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "attn_implementation": "eager", "use_mamba_kernels": False,
}  # fmt: skip
ALL = pytest.mark.parametrize("kind", KINDS)
BIAS = pytest.mark.parametrize("use_bias", [False, True])


@pytest.fixture(scope="module")
def files():
    """The models' files, imported as on a machine with a GPU and with the packages there."""
    if importlib.util.find_spec("causal_conv1d") is None:
        mamba_ssm.compat.causal_conv1d()
    names = {kind: f"transformers.models.{name}.modeling_{name}" for kind, name in KINDS.items()}
    assert not set(names.values()) & set(sys.modules), "imported too early to find our ops"
    with patch("torch.cuda.is_available", lambda: True):
        modules = {kind: importlib.import_module(name) for kind, name in names.items()}
        for module in modules.values():
            if hasattr(module, "_lazy_load_causal_conv1d"):
                assert module._lazy_load_causal_conv1d()[0] is not None
    return modules


def make(kind, files, dtype=torch.float32, **options):
    if kind == "Jamba":
        names = {"use_bias": "mamba_proj_bias", "use_conv_bias": "mamba_conv_bias"}
        options = JAMBA | {names.get(name, name): value for name, value in options.items()}
    else:
        options = SIZES | options
    ids = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**ids | options)
    model = getattr(files[kind], f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "dt_proj.bias")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


@pytest.fixture
def kernels(files, monkeypatch):
    """A function that makes a kind's mixers take the path of CUDA tensors."""

    def switch(kind):
        mixer = getattr(files[kind], f"{kind}{'Mamba' * (kind == 'Jamba')}Mixer")
        forward = mixer.cuda_kernels_forward
        monkeypatch.setattr(mixer, "slow_forward", forward)

    return switch


def ids(rows, length, seed=1):
    return torch.randint(2, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded():
    x = ids(2, 9)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    x[0, :4] = 0
    return x, mask


@ALL
def test_the_imports_find_our_functions(kind, files):
    module = files[kind]
    assert module.selective_scan_fn is mamba_ssm.selective_scan_fn
    assert module.selective_state_update is mamba_ssm.selective_state_update
    if kind != "FalconMamba":  # it has a fused function of its own, on selective_scan_cuda
        assert module.mamba_inner_fn is mamba_ssm.mamba_inner_fn


@ALL
@BIAS
def test_forward_and_padding(kind, use_bias, backend, files, kernels):
    model = make(kind, files, use_bias=use_bias, use_conv_bias=not use_bias)
    x, mask = padded()
    with torch.no_grad():
        expected = [model(x).logits, model(x, attention_mask=mask).logits[mask.bool()]]
        kernels(kind)
        results = [model(x).logits, model(x, attention_mask=mask).logits[mask.bool()]]
    for actual, e in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, e, rtol=1e-4, atol=1e-5)


@ALL
def test_generation(kind, backend, files, kernels):
    model = make(kind, files)
    x, mask = padded()
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    expected = model.generate(x, **options)
    kernels(kind)
    assert torch.equal(model.generate(x, **options), expected)


def training_step(model, x):
    model.zero_grad()
    loss = model.train()(x, labels=x).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_same_gradients(results, expected):
    for name, e in expected.items():
        error = (results[name] - e).norm() / e.norm().clamp_min(1e-12)
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("kind", ["Mamba", "Jamba"])
@BIAS
def test_training_step(kind, use_bias, backend, files, kernels):
    model, x = make(kind, files, use_bias=use_bias), ids(3, 11)
    expected = training_step(model, x)
    kernels(kind)
    assert_same_gradients(training_step(model, x), expected)


def test_training_step_of_falcon(backend, files, kernels, monkeypatch):
    # Its fused function (a file of transformers' own, over selective_scan_cuda and
    # causal_conv1d_cuda) normalises delta after the projection, its torch path before: the plain
    # composition stands in for the latter. That file's backward leaves its norms out, so only what
    # comes after them in the last layer can agree. With use_bias=True it cannot train: it gives the
    # bias of out_proj a gradient without dimensions.
    model, x = make("FalconMamba", files), ids(3, 11)
    kernels("FalconMamba")
    results = training_step(model, x)

    def composed(*args, **kwargs):
        absent = {"B_proj_bias": None, "C_proj_bias": None, "checkpoint_lvl": 0}
        return plain(*args, **absent, **kwargs)

    monkeypatch.setattr(files["FalconMamba"], "mamba_inner_fn", composed)
    expected = training_step(model, x)
    after = ("loss", "norm_f.weight", "1.mixer.out_proj.weight", "1.mixer.D", "1.mixer.A_log")
    after = (*after, "1.mixer.dt_proj.bias")
    expected = {name: value for name, value in expected.items() if name.endswith(after)}
    assert len(expected) == len(after)
    assert_same_gradients(results, expected)
    assert all(value.isfinite().all() and value.any() for value in results.values())


@ALL
def test_bf16(kind, backend, files, kernels):
    model, x = make(kind, files, torch.bfloat16), ids(2, 13)
    exact = make(kind, files)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    with torch.no_grad():
        expected, own = exact(x).logits, model(x).logits
        kernels(kind)
        result = model(x).logits
    assert result.dtype == own.dtype
    error, own_error = ((t.float() - expected).norm() / expected.norm() for t in (result, own))
    assert error <= 2 * own_error + torch.finfo(torch.bfloat16).eps
    assert training_step(model, x)["loss"].isfinite()
