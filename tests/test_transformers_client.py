"""transformers as a client: its Mamba models call this library's ops and agree with their own."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import warnings

import pytest
import torch
from test_mamba_inner import plain
from torch.utils._python_dispatch import TorchDispatchMode

import mamba_ssm
import mamba_ssm.compat

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

MODULES = {
    "Mamba": "transformers.models.mamba.modeling_mamba",
    "FalconMamba": "transformers.models.falcon_mamba.modeling_falcon_mamba",
    "Jamba": "transformers.models.jamba.modeling_jamba",
}
# The names under which the models' files keep the ops.
OPS = ("mamba_inner_fn", "mamba_selective_scan", "mamba_selective_state_update")
CONV_OPS = ("causal_conv1d_fn", "causal_conv1d_update")
FEW = 64
SCAN, STEP = "_selective_scan_fwd", "_state_update"
CONV, CONV_STEP = "_causal_conv1d_fwd", "_causal_conv1d_update"
# One attention layer with experts among three Mamba layers.
JAMBA = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "mamba_d_state": 4, "mamba_dt_rank": 3, "num_experts": 2,
    "attn_layer_period": 4, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "attn_implementation": "eager",
}  # fmt: skip
MAMBA = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 3}


def globals_of(kind: str):
    module = importlib.import_module(MODULES[kind])
    if not all(hasattr(getattr(module, name, None), "__wrapped__") for name in OPS):
        pytest.skip(f"transformers {transformers.__version__} takes no ops from mamba_ssm here")
    return module


def make(kind: str, dtype: torch.dtype = torch.float32, **options):
    globals_of(kind)
    if kind == "Jamba":
        names = {"use_bias": "mamba_proj_bias", "use_conv_bias": "mamba_conv_bias"}
        options = JAMBA | {names.get(name, name): value for name, value in options.items()}
    else:
        options = MAMBA | options
    ids = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**ids | options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "dt_proj.bias")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


@pytest.fixture(params=["own conv", "our conv"])
def conv(request, monkeypatch):
    """The convolution too: transformers' own, or ours through mamba_ssm.compat.causal_conv1d().

    transformers decides when a model's file is imported, so its decorator is applied once more.
    """
    if request.param == "own conv":
        return False
    if importlib.util.find_spec("causal_conv1d") is not None:
        pytest.skip("the real causal_conv1d is installed, so the compatibility module is not used")
    from transformers.integrations import use_kernel_func_from_hub_with_fallback as decorate

    # Before the copy: a file first imported into that would be imported once more by later tests.
    for path in MODULES.values():
        importlib.import_module(path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the models' files are imported already
        mamba_ssm.compat.causal_conv1d()
    for path in MODULES.values():
        module = importlib.import_module(path)
        for name in CONV_OPS:
            own = inspect.unwrap(getattr(module, name))
            monkeypatch.setattr(module, name, decorate(name, "causal_conv1d")(own))
    return True


@pytest.fixture
def own_path(monkeypatch):
    """A function that switches a model's file to transformers' own implementations."""

    def switch(kind: str) -> None:
        module = globals_of(kind)
        for name in (*OPS, *CONV_OPS):
            monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))

    return switch


class OurOps(TorchDispatchMode):
    """Collects the names of this library's internal ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mamba_ssm":
            self.names.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


ALL = pytest.mark.parametrize("kind", MODULES)
# FalconMamba's own training path is another function than the fused op it calls when there is one.
OWN_TRAINING = ("Mamba", "Jamba")
BIAS = pytest.mark.parametrize("use_bias", [False, True])


@ALL
@BIAS
def test_forward(kind, use_bias, backend, conv, own_path):
    model, x = make(kind, use_bias=use_bias, use_conv_bias=not use_bias), ids(2, 13)
    with torch.no_grad(), OurOps() as ours:
        results = [model(x, use_cache=cache).logits for cache in (False, True)]
    assert SCAN in ours.names and (CONV in ours.names) == conv
    own_path(kind)
    with torch.no_grad(), OurOps() as theirs:
        expected = model(x).logits
    assert not theirs.names
    for logits in results:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@ALL
def test_greedy_generation(kind, backend, conv, own_path):
    model, x = make(kind), ids(2, 5)
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    with OurOps() as ours:
        result = model.generate(x, attention_mask=torch.ones_like(x), **options)
    assert ours.names >= {SCAN, STEP}
    assert (ours.names >= {CONV, CONV_STEP}) == conv
    own_path(kind)
    expected = model.generate(x, attention_mask=torch.ones_like(x), **options)
    assert torch.equal(result.sequences, expected.sequences)
    for a, e in zip(result.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@ALL
def test_left_padded_batch(kind, backend, conv, own_path):
    model, x = make(kind), ids(2, 9)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    x[0, :4] = 0
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        logits = model(x, attention_mask=mask).logits[mask.bool()]
        alone = model(x[:1, 4:]).logits
        generated = model.generate(x, attention_mask=mask, **options)
        generated_alone = model.generate(
            x[:1, 4:], attention_mask=torch.ones(1, 5, dtype=torch.long), **options
        )
        own_path(kind)
        expected = model(x, attention_mask=mask).logits[mask.bool()]
        expected_text = model.generate(x, attention_mask=mask, **options)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[:5], alone[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(generated, expected_text)
    assert torch.equal(generated[:1, 9:], generated_alone[:, 5:])


def _training_step(model, x) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model.train()(x, labels=x).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values()), grads
    return {"loss": loss.detach()} | {name: grad.clone() for name, grad in grads.items()}


@pytest.mark.parametrize("kind", OWN_TRAINING)
@BIAS
def test_training_step(kind, use_bias, backend, conv, own_path):
    model, x = make(kind, use_bias=use_bias), ids(3, 11)
    with OurOps() as ours:
        results = _training_step(model, x)
    assert ours.names >= {SCAN, "_selective_scan_bwd"}
    # Mamba's fused op has its convolution inside.
    assert ("_causal_conv1d_bwd" in ours.names) == (conv or kind == "Mamba")
    own_path(kind)
    for name, expected in _training_step(model, x).items():
        torch.testing.assert_close(
            results[name], expected, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@BIAS
def test_training_step_of_falcon(use_bias, backend, monkeypatch):
    # Its own path normalises delta before the projection, the fused op after it (as the historical
    # one does), so the plain composition stands in for it.
    model, x = make("FalconMamba", use_bias=use_bias), ids(3, 11)
    with OurOps() as ours:
        results = _training_step(model, x)
    assert ours.names >= {SCAN, "_selective_scan_bwd", "_add_norm_bwd"}

    def composed(*args, **kwargs):
        absent = {"B_proj_bias": None, "C_proj_bias": None, "checkpoint_lvl": 0}
        return plain(*args, **absent, **kwargs)

    monkeypatch.setattr(globals_of("FalconMamba"), "mamba_inner_fn", composed)
    with OurOps() as theirs:
        expected = _training_step(model, x)
    assert not theirs.names
    for name in expected:
        torch.testing.assert_close(
            results[name],
            expected[name],
            rtol=1e-3,
            atol=2e-5,
            msg=lambda text, n=name: f"{n}: {text}",
        )


def _relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


@ALL
@BIAS
def test_bf16(kind, use_bias, backend, conv, own_path):
    model, x = make(kind, torch.bfloat16, use_bias=use_bias), ids(2, 13)
    exact_model = make(kind, use_bias=use_bias)
    exact_model.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    train = kind in OWN_TRAINING

    def run(model, x=x):
        with torch.no_grad():
            logits = model.eval()(x, use_cache=True).logits
            text = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=3)
        return {"logits": logits} | (_training_step(model, x) if train else {}), text

    results, text = run(model)
    assert text.shape == (2, 16)
    if not train:
        _training_step(model, x)
    own_path(kind)
    # A few numbers' error in one run is luck: the largest of four runs on other inputs counts.
    runs = [
        (run(model, y)[0], run(exact_model, y)[0]) for y in (x, *(ids(2, 13, n) for n in (2, 3, 4)))
    ]
    own, exact = runs[0]
    for name in exact:
        assert results[name].dtype == own[name].dtype, name
        own_errors = [_relative_error(o[name], e[name]) for o, e in runs]
        own_error = own_errors[0] if exact[name].numel() >= FEW else max(own_errors)
        error = _relative_error(results[name], exact[name])
        assert error <= 2 * own_error + torch.finfo(torch.bfloat16).eps, name


def test_our_functions_are_the_ones_called():
    expected = {
        "mamba_inner_fn": mamba_ssm.mamba_inner_fn,
        "mamba_selective_scan": mamba_ssm.selective_scan_fn,
        "mamba_selective_state_update": mamba_ssm.selective_state_update,
    }
    for kind in MODULES:
        for name, function in expected.items():
            wrapped = getattr(globals_of(kind), name)
            values = [cell.cell_contents for cell in wrapped.__closure__ or ()]
            assert any(value is function for value in values), (kind, name)
