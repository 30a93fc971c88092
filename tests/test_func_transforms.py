"""torch.func: functional_call, grad, vmap, jvp and per-sample gradients; second derivatives."""

from __future__ import annotations

import warnings

import pytest
import torch
from module_helpers import assert_same, scrambled
from scan_cases import BASE, make_inputs
from torch.func import functional_call, grad, jacrev, jvp, vmap

import mamba_ssm
from mamba_ssm import Mamba, MambaLMHeadModel, selective_scan_fn
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.ops import backend as backends
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn

# What the transforms run on is said once a process; these tests are not about that.
quiet = pytest.mark.filterwarnings("ignore:.*inside a torch.func transform:RuntimeWarning")


@pytest.fixture
def model(device) -> MambaLMHeadModel:
    torch.manual_seed(0)
    config = MambaConfig(d_model=8, n_layer=2, vocab_size=24, ssm_cfg={"d_state": 4})
    return scrambled(MambaLMHeadModel(config)).to(device)


@pytest.fixture
def ids(device) -> torch.Tensor:
    return torch.randint(0, 24, (3, 9), generator=torch.Generator().manual_seed(0)).to(device)


def parameters_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def loss_of(model, parameters, ids):
    return functional_call(model, parameters, (ids,), {"labels": ids}).loss


def test_functional_call_keeps_the_kernels(model, ids):
    doubled = {name: 2 * p for name, p in parameters_of(model).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*torch.func transform")
        called = functional_call(model, doubled, (ids,)).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(called, model(ids).logits)


@quiet
def test_grad_equals_backward(model, ids):
    grads = grad(lambda p: loss_of(model, p, ids))(parameters_of(model))
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert_same(grads[name], parameter.grad, name, scale=4.0)


@quiet
def test_per_sample_gradients(model, ids):
    one = grad(lambda p, row: loss_of(model, p, row[None]))
    grads = vmap(one, in_dims=(None, 0))(parameters_of(model), ids)
    for i in range(3):
        model.zero_grad()
        model(ids[i : i + 1], labels=ids[i : i + 1]).loss.backward()
        for name, parameter in model.named_parameters():
            assert_same(grads[name][i], parameter.grad, name, scale=4.0)


@quiet
@pytest.mark.parametrize("in_dim", [0, 2])
def test_vmap_over_a_batch_of_scans(in_dim, device):
    cases = [make_inputs(BASE, device) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    names = [name for name, value in cases[0].items() if isinstance(value, torch.Tensor)]
    options = {name: value for name, value in cases[0].items() if name not in names}
    for i, case in enumerate(cases):
        for name in names:
            noise = torch.randn(case[name].shape, generator=generator)
            case[name] = case[name] + 0.1 * i * noise.to(device)
    stacked = {name: torch.stack([case[name] for case in cases]) for name in names}
    moved = {
        name: value.movedim(0, in_dim) if value.dim() > 2 else value
        for name, value in stacked.items()
    }
    dims = {name: in_dim if value.dim() > 2 else 0 for name, value in stacked.items()}
    out, state = vmap(
        lambda inputs: selective_scan_fn(**inputs, **options, return_last_state=True),
        in_dims=(dims,),
    )(moved)
    for i, case in enumerate(cases):
        expected = selective_scan_fn(**case, return_last_state=True)
        assert_same(out[i], expected[0], scale=4.0)
        assert_same(state[i], expected[1], scale=4.0)


@quiet
def test_vmap_over_models_and_over_decode_steps(device):
    layers = [scrambled(Mamba(6, d_state=4), seed).to(device) for seed in range(3)]
    stacked = {
        name: torch.stack([dict(layer.named_parameters())[name].detach() for layer in layers])
        for name in parameters_of(layers[0])
    }
    x = torch.randn(2, 7, 6).to(device)
    together = vmap(lambda p: functional_call(layers[0], p, (x,)))(stacked)
    for out, layer in zip(together, layers, strict=True):
        assert_same(out, layer(x).detach(), scale=4.0)

    layer, tokens = layers[0], torch.randn(3, 2, 1, 6).to(device)
    caches = [
        torch.stack(t) for t in zip(*(layer.allocate_inference_cache(2, 1),) * 3, strict=True)
    ]
    with torch.no_grad():
        steps = vmap(lambda x, conv, ssm: layer.step(x, conv, ssm)[0])(tokens, *caches)
        for out, x in zip(steps, tokens, strict=True):
            assert_same(out, layer(x), scale=4.0)
    assert caches[1].abs().sum() > 0


@quiet
def test_packing_inside_a_transform(model, device):
    ids = torch.randint(0, 24, (1, 12)).to(device)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)

    def loss(parameters):
        return functional_call(
            model, parameters, (ids,), {"labels": ids, "cu_seqlens": bounds}
        ).loss

    grads = grad(loss)(parameters_of(model))
    model(ids, labels=ids, cu_seqlens=bounds).loss.backward()
    for name, parameter in model.named_parameters():
        assert_same(grads[name], parameter.grad, name, scale=4.0)


@quiet
def test_forward_mode_and_jacobian(device):
    x = torch.randn(1, 2, 5, dtype=torch.float64).to(device)
    weight = torch.randn(2, 3, dtype=torch.float64).to(device)
    tangent = torch.randn_like(x)

    def conv(x):
        return causal_conv1d_fn(x, weight, activation="silu")

    _, moved = jvp(conv, (x,), (tangent,))
    jacobian = jacrev(conv)(x)
    assert_same(moved, torch.einsum("bdlxyz,xyz->bdl", jacobian, tangent))
    step = 1e-6
    numeric = (conv(x + step * tangent) - conv(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(moved, numeric, rtol=1e-6, atol=1e-8)


def test_it_is_said_once_and_an_explicit_backend_decides(model, ids, monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    gradient = grad(lambda p: loss_of(model, p, ids))
    with pytest.warns(RuntimeWarning, match=r"inside a torch\.func transform") as seen:
        gradient(parameters_of(model))
        gradient(parameters_of(model))
    assert len(seen) == 1
    monkeypatch.setattr(backends, "_warned", set())
    with mamba_ssm.backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient(parameters_of(model))
    with (
        mamba_ssm.backend("native"),
        pytest.raises(
            backends.BackendError,
            match=r"inside a torch\.func transform .* choose 'auto' or 'reference'",
        ),
    ):
        gradient(parameters_of(model))


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_second_derivatives_of_the_model(model, ids, choice):
    """A Hessian-vector product against differences of first derivatives, in fp64."""
    model = model.double()
    for layer in model.backbone.layers:
        layer.mixer.A_log.data = layer.mixer.A_log.data.double()
        layer.mixer.D.data = layer.mixer.D.data.double()
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]

    def gradient(create_graph=False):
        # The model's own loss is in fp32.
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        return torch.autograd.grad(loss, parameters, create_graph=create_graph)

    with mamba_ssm.backend(choice):
        slope = sum((g * v).sum() for g, v in zip(gradient(True), direction, strict=True))
        products = torch.autograd.grad(slope, parameters)
        step, around = 1e-5, []
        for sign in (1, -2):
            with torch.no_grad():
                for parameter, v in zip(parameters, direction, strict=True):
                    parameter.add_(sign * step * v)
            around.append(gradient())
    for p, hi, lo in zip(products, *around, strict=True):
        torch.testing.assert_close(p, (hi - lo) / (2 * step), rtol=1e-5, atol=1e-7)


def test_second_derivatives_on_native_are_refused(model, ids):
    with mamba_ssm.backend("native"):
        try:
            loss = model(ids, labels=ids).loss
        except backends.BackendError as error:
            pytest.skip(str(error))
        with pytest.raises(
            backends.BackendError, match=r"differentiated again is served by the reference"
        ):
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


@quiet
def test_a_transform_inside_a_graph_is_refused_or_left_outside_it(model, ids):
    """Traced as they are, the fused functions would give wrong gradients there, silently."""
    parameters = parameters_of(model)
    expected = grad(lambda p: loss_of(model, p, ids))(parameters)

    def gradient(parameters):
        return grad(lambda p: loss_of(model, p, ids))(parameters)

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave the transform outside"):
        torch.compile(gradient, backend="aot_eager", fullgraph=True)(parameters)
    torch._dynamo.reset()
    for name, value in torch.compile(gradient, backend="aot_eager")(parameters).items():
        assert_same(value, expected[name], name)
    torch._dynamo.reset()
