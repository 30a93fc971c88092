"""transformers as a client: its Mamba models call this library's ops and agree with their own."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from test_mamba_inner import plain
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

MODULES = {
    "Mamba": "transformers.models.mamba.modeling_mamba",
    "FalconMamba": "transformers.models.falcon_mamba.modeling_falcon_mamba",
}
# The names under which the models' files keep the ops.
OPS = ("mamba_inner_fn", "mamba_selective_scan", "mamba_selective_state_update")
SCAN, STEP = "_selective_scan_fwd", "_state_update"


def globals_of(kind: str):
    module = importlib.import_module(MODULES[kind])
    if not all(hasattr(getattr(module, name, None), "__wrapped__") for name in OPS):
        pytest.skip(f"transformers {transformers.__version__} takes no ops from mamba_ssm here")
    return module


def make(kind: str, dtype: torch.dtype = torch.float32, **options):
    globals_of(kind)
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": 40,
            "hidden_size": 16,
            "state_size": 4,
            "num_hidden_layers": 2,
            "time_step_rank": 3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        }
        | options
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "dt_proj.bias")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


@pytest.fixture
def own_path(monkeypatch):
    """A function that switches a model's file to transformers' own implementations."""

    def switch(kind: str) -> None:
        module = globals_of(kind)
        for name in OPS:
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


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(2, 40, shape, generator=torch.Generator().manual_seed(1))


BOTH = pytest.mark.parametrize("kind", MODULES)
BIAS = pytest.mark.parametrize("use_bias", [False, True])


@BOTH
@BIAS
def test_forward(kind, use_bias, own_path):
    model, x = make(kind, use_bias=use_bias, use_conv_bias=not use_bias), ids(2, 13)
    with torch.no_grad(), OurOps() as ours:
        results = [model(x, use_cache=cache).logits for cache in (False, True)]
    assert SCAN in ours.names
    own_path(kind)
    with torch.no_grad(), OurOps() as theirs:
        expected = model(x).logits
    assert not theirs.names
    for logits in results:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@BOTH
def test_greedy_generation(kind, own_path):
    model, x = make(kind), ids(2, 5)
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    with OurOps() as ours:
        result = model.generate(x, attention_mask=torch.ones_like(x), **options)
    assert ours.names >= {SCAN, STEP}
    own_path(kind)
    expected = model.generate(x, attention_mask=torch.ones_like(x), **options)
    assert torch.equal(result.sequences, expected.sequences)
    for a, e in zip(result.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@BOTH
def test_left_padded_batch(kind, own_path):
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


@BIAS
def test_training_step(use_bias, own_path):
    model, x = make("Mamba", use_bias=use_bias), ids(3, 11)
    with OurOps() as ours:
        results = _training_step(model, x)
    assert ours.names >= {SCAN, "_selective_scan_bwd", "_causal_conv1d_bwd"}
    own_path("Mamba")
    for name, expected in _training_step(model, x).items():
        torch.testing.assert_close(
            results[name], expected, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@BIAS
def test_training_step_of_falcon(use_bias, monkeypatch):
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


@BOTH
@BIAS
def test_bf16(kind, use_bias, own_path):
    model, x = make(kind, torch.bfloat16, use_bias=use_bias), ids(2, 13)
    exact_model = make(kind, use_bias=use_bias)
    exact_model.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    train = kind == "Mamba"  # the other kind's own training path is another function

    def run(model):
        with torch.no_grad():
            logits = model.eval()(x, use_cache=True).logits
            text = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=3)
        return {"logits": logits} | (_training_step(model, x) if train else {}), text

    results, text = run(model)
    assert text.shape == (2, 16)
    if not train:
        _training_step(model, x)
    own_path(kind)
    own, _ = run(model)
    exact, _ = run(exact_model)
    for name in exact:
        assert results[name].dtype == own[name].dtype, name
        error, own_error = (_relative_error(r[name], exact[name]) for r in (results, own))
        assert error <= 2 * own_error + torch.finfo(torch.bfloat16).eps, name


def test_our_functions_are_the_ones_called():
    import mamba_ssm

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
