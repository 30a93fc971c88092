"""The Mamba layer: construction, wrong calls, and its paths."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from mamba_cases import OPTIONS, inputs, make, params
from module_helpers import assert_all_same, assert_same, run_with_grads
from torch import nn
from torch.nn.utils import parametrize

from mamba_ssm import Mamba
from mamba_ssm.modules import mamba_simple
from mamba_ssm.modules.dt_projection import DtProjection

# -- construction ----------------------------------------------------------------------------------


def test_state_dict_keys_shapes_and_dtypes():
    layer = Mamba(20, d_state=7, d_conv=3, expand=2, bias=True, dtype=torch.bfloat16)
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in layer.state_dict().items()}
    b, f = torch.bfloat16, torch.float32
    assert list(shapes.items()) == [
        ("A_log", ((40, 7), f)),
        ("D", ((40,), f)),
        ("in_proj.weight", ((80, 20), b)),
        ("in_proj.bias", ((80,), b)),
        ("conv1d.weight", ((40, 1, 3), b)),
        ("conv1d.bias", ((40,), b)),
        ("x_proj.weight", ((2 + 14, 40), b)),
        ("dt_proj.weight", ((40, 2), b)),
        ("dt_proj.bias", ((40,), b)),
        ("out_proj.weight", ((20, 40), b)),
        ("out_proj.bias", ((20,), b)),
    ]
    assert (layer.d_model, layer.d_inner, layer.d_state, layer.d_conv) == (20, 40, 7, 3)
    assert (layer.expand, layer.dt_rank, layer.activation) == (2, 2, "silu")
    assert isinstance(layer.act, nn.SiLU) and layer.use_fast_path and layer.layer_idx is None


@pytest.mark.parametrize("dt_init", ["random", "constant"])
def test_random_draws_in_the_historical_order(dt_init):
    d_model, d_state, d_inner, rank = 24, 5, 48, 3
    torch.manual_seed(7)
    layer = Mamba(d_model, d_state=d_state, dt_rank=rank, dt_init=dt_init, dt_scale=0.7, bias=True)
    after = torch.rand(3)

    torch.manual_seed(7)
    in_proj = nn.Linear(d_model, 2 * d_inner)
    conv1d = nn.Conv1d(d_inner, d_inner, 4, groups=d_inner)
    x_proj = nn.Linear(d_inner, rank + 2 * d_state, bias=False)
    dt_proj = nn.Linear(rank, d_inner)
    std = rank**-0.5 * 0.7
    weight = torch.full_like(dt_proj.weight, std)
    if dt_init == "random":
        weight.uniform_(-std, std)
    dt = torch.exp(torch.rand(d_inner) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
    out_proj = nn.Linear(d_inner, d_model)
    assert torch.equal(layer.in_proj.weight, in_proj.weight)
    assert torch.equal(layer.in_proj.bias, in_proj.bias)
    assert torch.equal(layer.conv1d.weight, conv1d.weight)
    assert torch.equal(layer.conv1d.bias, conv1d.bias)
    assert torch.equal(layer.x_proj.weight, x_proj.weight)
    assert torch.equal(layer.dt_proj.weight, weight)
    torch.testing.assert_close(F.softplus(layer.dt_proj.bias), dt)
    assert torch.equal(layer.out_proj.weight, out_proj.weight)
    assert torch.equal(layer.out_proj.bias, out_proj.bias)
    assert torch.equal(after, torch.rand(3))
    torch.testing.assert_close(
        layer.A_log.exp(), torch.arange(1.0, d_state + 1).expand(d_inner, -1)
    )
    assert torch.equal(layer.D, torch.ones(d_inner))


def test_dt_stays_in_its_range_and_above_the_floor():
    layer = Mamba(64, dt_min=1e-5, dt_max=1e-2, dt_init_floor=1e-3)
    dt = F.softplus(layer.dt_proj.bias.double())
    assert dt.min() >= 1e-3 * (1 - 1e-4) and dt.max() <= 1e-2 * (1 + 1e-4)


def _marks(layer: Mamba) -> list[bool]:
    return [
        getattr(layer.A_log, "_no_weight_decay", False),
        getattr(layer.D, "_no_weight_decay", False),
        getattr(layer.dt_proj.bias, "_no_reinit", False),
    ]


def test_marks_survive_copying_moving_and_loading():
    layer = Mamba(8)
    assert all(_marks(layer))
    assert all(_marks(copy.deepcopy(layer)))
    assert all(_marks(pickle.loads(pickle.dumps(layer))))
    assert all(_marks(Mamba(8, device="meta").to_empty(device="cpu")))
    loaded = Mamba(8, device="meta")
    loaded.load_state_dict(layer.state_dict(), assign=True)
    assert all(_marks(loaded))
    assert_same(loaded(torch.ones(1, 3, 8)), layer(torch.ones(1, 3, 8)))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert all(_marks(torch.load(buffer, weights_only=False)))


@pytest.mark.parametrize("parents_first", [True, False])
def test_a_framework_that_resets_every_module_keeps_dt_and_A(parents_first):
    layer = Mamba(32, device="meta").to_empty(device="cpu")
    modules = list(layer.modules())
    for module in modules if parents_first else modules[::-1]:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    dt = F.softplus(layer.dt_proj.bias)
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1 * 1.001 and dt.std() > 0
    assert layer.dt_proj.weight.abs().max() <= 2**-0.5
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 17).expand(64, -1))
    assert torch.equal(layer.D, torch.ones(64)) and all(_marks(layer))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"d_model": 0}, ValueError, "d_model must be at least 1"),
        ({"d_model": 2.5}, TypeError, "d_model must be an int"),
        ({"d_state": -1}, ValueError, "d_state must be at least 1"),
        ({"d_state": 257}, ValueError, "at most 256"),
        ({"d_conv": 0}, ValueError, "d_conv"),
        ({"d_conv": "4"}, TypeError, "d_conv"),
        ({"expand": 0.01}, ValueError, "int\\(expand \\* d_model\\)"),
        ({"expand": float("nan")}, ValueError, "expand must be positive and finite"),
        ({"expand": "2"}, TypeError, "expand must be a number"),
        ({"dt_rank": "full"}, TypeError, "dt_rank must be 'auto' or an int"),
        ({"dt_rank": 0}, ValueError, "dt_rank"),
        ({"dt_min": 0.2}, ValueError, "dt_min must not exceed dt_max"),
        ({"dt_min": float("nan")}, ValueError, "dt_min"),
        ({"dt_max": float("inf")}, ValueError, "dt_max"),
        ({"dt_init_floor": -1.0}, ValueError, "dt_init_floor"),
        ({"dt_init": "zeros"}, NotImplementedError, "'random' or 'constant'"),
        ({"headdim": 64}, TypeError, "headdim"),
    ],
)
def test_bad_constructor_arguments(options, error, message):
    with pytest.raises(error, match=message):
        Mamba(**{"d_model": 16} | options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.ones(2, 3, 5)), "d_model=6"),
        (lambda m: m(torch.ones(3, 6)), "shape"),
        (lambda m: m(inputs(2, 3, 6), attention_mask=torch.ones(2, 4)), "attention_mask must have"),
        (lambda m: m(inputs(2, 3, 6), seq_idx=torch.ones(1, 3)), "seq_idx must have"),
        (lambda m: m(inputs(2, 3, 6), cu_seqlens=torch.tensor([0, 3])), "packed batch of 1"),
        (lambda m: m(inputs(1, 3, 6), cu_seqlens=torch.tensor([1, 3])), "cu_seqlens"),
        (
            lambda m: m(
                inputs(1, 3, 6), cu_seqlens=torch.tensor([0, 3]), attention_mask=torch.ones(1, 3)
            ),
            "cu_seqlens and attention_mask",
        ),
        (
            lambda m: m(
                inputs(2, 3, 6), initial_state=(torch.ones(2, 12, 4), torch.ones(2, 12, 4))
            ),
            "conv_state must have shape \\(2, 12, 3\\)",
        ),
        (
            lambda m: m(
                inputs(2, 3, 6), initial_state=(torch.ones(3, 12, 3), torch.ones(3, 12, 4))
            ),
            "initial_state has 3 sequences",
        ),
        (lambda m: m.step(inputs(2, 0, 6), *m.allocate_inference_cache(2, 1)), "at least one"),
        (lambda m: m.step(inputs(2, 1, 6), *m.allocate_inference_cache(3, 1)), "conv_state must"),
        (
            lambda m: m(
                inputs(2, 1, 6),
                params(3),
                initial_state=(torch.ones(2, 12, 3), torch.ones(2, 12, 4)),
            ),
            "pass one of the two",
        ),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call(make())


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating-point"):
        make()(torch.ones(1, 2, 6, dtype=torch.int64))


def test_a_cache_needs_a_layer_index_and_enough_rows():
    with pytest.raises(ValueError, match="layer_idx"):
        make(layer_idx=None)(inputs(1, 3, 6), params())
    layer, state = make(), params()
    layer(inputs(2, 3, 6), state)
    with pytest.raises(ValueError, match="has 2 rows"):
        layer(inputs(3, 3, 6), state)


# -- paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fast_and_slow_path_agree_and_train_everything(options, dtype):
    layer, x = make(dtype=dtype, **options), inputs(2, 9, 6, dtype=dtype)
    fast = run_with_grads(layer, layer, x)
    layer.use_fast_path = False
    slow = run_with_grads(layer, layer, x)
    assert_all_same(fast, slow)
    for name, _ in layer.named_parameters():
        grad = fast[f"grad of {name}"]
        assert grad.isfinite().all() and grad.abs().sum() > 0, name


def test_fast_path_is_used_for_a_plain_layer_and_only_then(monkeypatch):
    layer, calls = make(), []
    fused = mamba_simple.mamba_inner_fn
    monkeypatch.setattr(
        mamba_simple, "mamba_inner_fn", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    layer(inputs(1, 4, 6))
    assert len(calls) == 1
    layer(inputs(1, 4, 6), params())
    layer(inputs(1, 4, 6), attention_mask=torch.ones(1, 4))
    layer(inputs(1, 4, 6), return_final_state=True)
    layer.out_proj.register_forward_hook(lambda *_: None)
    layer(inputs(1, 4, 6))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "missing",
    [
        ("mamba_inner_fn",),
        ("causal_conv1d_fn",),
        ("causal_conv1d_update",),
        ("selective_state_update",),
        ("mamba_inner_fn", "causal_conv1d_fn", "causal_conv1d_update", "selective_state_update"),
    ],
    ids=" ".join,
)
def test_a_name_patched_to_none_means_another_path(monkeypatch, missing):
    layer, x = make(), inputs(2, 7, 6)
    expected = run_with_grads(layer, layer, x)
    for name in missing:
        monkeypatch.setattr(mamba_simple, name, None)
    assert_all_same(run_with_grads(layer, layer, x), expected)
    with torch.no_grad():
        cache = layer.allocate_inference_cache(2, 7)
        out = [layer.step(x[:, t : t + 1], *cache)[0] for t in range(7)]
    assert_same(torch.cat(out, 1), expected["output 0"])


class LowRank(nn.Module):
    """What an adapter does to a layer: the base and a learned addition; shows the base weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_an_adapter_is_never_bypassed(name):
    layer, x = make(bias=True), inputs(2, 5, 6)
    merged = copy.deepcopy(layer)
    adapter = LowRank(getattr(layer, name))
    setattr(layer, name, adapter)
    with torch.no_grad():
        getattr(merged, name).weight += adapter.up.weight @ adapter.down.weight
    actual, expected = run_with_grads(layer, layer, x), run_with_grads(merged, merged, x)
    assert_same(actual["output 0"], expected["output 0"])
    assert_same(actual["grad of input 0"], expected["grad of input 0"])
    for part in ("up", "down"):
        assert actual[f"grad of {name}.{part}.weight"].abs().sum() > 0
    assert_same(_stepped(layer, x), expected["output 0"])


def _stepped(layer: Mamba, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        cache = layer.allocate_inference_cache(x.shape[0], x.shape[1], dtype=x.dtype)
        return torch.cat([layer.step(t, *cache)[0] for t in x.split(1, 1)], 1)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", ["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"])
def test_parametrizations_hooks_and_replaced_forwards_are_respected(name):
    layer, x = make(), inputs(2, 5, 6)
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        getattr(doubled, name).weight.mul_(2)
    expected = doubled(x).detach()

    changed = copy.deepcopy(layer)
    parametrize.register_parametrization(getattr(changed, name), "weight", Doubled())
    assert_same(changed(x).detach(), expected)
    assert_same(_stepped(changed, x), expected)

    hooked, fired = copy.deepcopy(layer), []
    getattr(hooked, name).register_forward_hook(lambda *_: fired.append(1))
    assert_same(hooked(x).detach(), layer(x).detach())
    assert len(fired) == 1
    assert_same(_stepped(hooked, x), layer(x).detach())
    assert len(fired) == 1 + x.shape[1]

    wrapped = copy.deepcopy(layer)
    inner = getattr(wrapped, name)
    original = inner.forward
    inner.forward = lambda t: original(t) * 2
    if name != "dt_proj" and name != "conv1d":  # these have a bias, which doubles as well
        assert_same(wrapped(x).detach(), expected)
    assert not torch.allclose(wrapped(x), layer(x))


def test_a_bias_or_a_tensor_subclass_in_a_projection_is_not_lost(monkeypatch):
    layer, x = make(), inputs(2, 5, 6)
    biased = copy.deepcopy(layer)
    biased.x_proj = nn.Linear(layer.d_inner, layer.x_proj.out_features, dtype=x.dtype)
    with torch.no_grad():
        biased.x_proj.weight.copy_(layer.x_proj.weight)
    slow = copy.deepcopy(biased)
    slow.use_fast_path = False
    assert_all_same(run_with_grads(biased, biased, x), run_with_grads(slow, slow, x))
    assert_same(_stepped(biased, x), biased(x).detach())
    assert not torch.allclose(biased(x), layer(x))

    class Twice(torch.Tensor):
        """A weight that means something else than its numbers, as quantised ones do."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            plain = [2 * a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args]
            with torch._C.DisableTorchFunctionSubclass():
                return func(*plain, **(kwargs or {}))

    quantised = copy.deepcopy(layer)
    weight = quantised.out_proj.weight.detach()
    del quantised.out_proj.weight
    quantised.out_proj.weight = weight.as_subclass(Twice)
    monkeypatch.setattr(mamba_simple, "mamba_inner_fn", lambda *_, **__: pytest.fail("fused"))
    layer.use_fast_path = False
    assert_same(quantised(x).detach(), 2 * layer(x).detach())


def test_decoding_under_autocast():
    layer, x = make(16, dtype=torch.float32), inputs(2, 9, 16, dtype=torch.float32)
    expected = layer(x).detach()
    for cache_dtype in (torch.float32, torch.bfloat16):
        cache = layer.allocate_inference_cache(2, 9, dtype=cache_dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outs = [layer.step(chunk, *cache)[0] for chunk in x.split((1, 1, 4, 1, 1, 1), 1)]
        out = torch.cat(outs, 1)
        assert out.dtype == torch.bfloat16 and cache[0].dtype == cache_dtype
        assert (out.float() - expected).abs().max() <= 0.04 * expected.abs().max()


def test_packing_on_a_replaced_convolution_is_refused():
    layer = make()
    layer.conv1d.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="run the sequences one by one"):
        layer(inputs(1, 4, 6), attention_mask=torch.ones(1, 4))
    out, state = layer(inputs(1, 4, 6), return_final_state=True)
    expected = make()(inputs(1, 4, 6), return_final_state=True)
    assert_same((out, state), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    exact, x = make(16, dtype=torch.float32), inputs(2, 33, 16, dtype=torch.float32)
    reference = exact(x)
    low = copy.deepcopy(exact).to(dtype)(x.to(dtype))
    with torch.autocast("cpu", dtype):
        cast = run_with_grads(exact, exact, x)
        exact.use_fast_path = False
        slow = run_with_grads(exact, exact, x)
    assert low.dtype == cast["output 0"].dtype == slow["output 0"].dtype == dtype
    bound = 8 * torch.finfo(dtype).eps * reference.abs().max()
    for out in (low, cast["output 0"], slow["output 0"]):
        assert (out.float() - reference).abs().max() <= bound
    for name, grad in slow.items():
        assert cast[name].dtype == grad.dtype, name
        difference = (cast[name].float() - grad.float()).abs().max()
        assert difference <= 16 * torch.finfo(dtype).eps * grad.float().abs().max(), name


@pytest.mark.parametrize("shape", [(0, 3, 6), (2, 0, 6), (2, 1, 6)])
def test_empty_and_single_token_inputs(shape):
    layer, x = make(), inputs(*shape)
    for fast in (True, False):
        layer.use_fast_path = fast
        results = run_with_grads(layer, layer, x)
        assert results["output 0"].shape == shape
    out, state = layer(x, return_final_state=True)
    assert out.shape == shape and state[1].shape == (shape[0], 12, 4)


def test_dt_projection_is_a_linear_layer():
    layer = make(dtype=torch.float32)
    assert isinstance(layer.dt_proj, nn.Linear) and type(layer.dt_proj) is DtProjection
    replaced = copy.deepcopy(layer)
    replaced.dt_proj = nn.Linear(layer.dt_rank, layer.d_inner)
    replaced.dt_proj.load_state_dict(layer.dt_proj.state_dict())
    x = inputs(1, 4, 6, dtype=torch.float32)
    assert torch.equal(replaced(x), layer(x))
