"""int8 weights: their error, the fused step that streams them, and what such a model refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from decode_helpers import (
    copied,
    fused_step,
    make_model,
    module_step,
    needs_native,
    oracle_step,
    random_cache,
)

import mamba_ssm
from mamba_ssm.inference import Int8Linear, cpu_decoder, is_quantized
from mamba_ssm.inference.int8 import quantize_weight
from mamba_ssm.inference.pack import pack_model
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.ops import native
from mamba_ssm.utils.hf import CheckpointError

REPOSITORY = Path(__file__).parent.parent
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def sliced(cache, rows):
    """The first rows of a copy."""
    return {i: tuple(t[:rows].clone() for t in layer) for i, layer in cache.items()}


@pytest.mark.parametrize("group_size", [None, 8, 7])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rounding_error_is_at_most_half_a_step(dtype, group_size):
    weight = torch.randn(12, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    weight[4] *= 1e-30
    quantized, scales = quantize_weight(weight, group_size)
    groups = 4 if group_size == 8 else 1
    assert quantized.dtype == torch.int8 and scales.shape == (12, groups)
    assert quantized.min() >= -127
    steps = scales.repeat_interleave(32 // groups, 1)
    error = (quantized * steps - weight.float()).abs()
    assert bool((error <= 0.5001 * steps).all())
    largest = quantized.view(12, groups, -1).abs().amax(-1)
    assert bool((largest[scales > 0] == 127).all())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,), (1, 1, 1)])
def test_layer_is_a_linear_layer_of_the_rounded_weight(shape, group_size, bias, monkeypatch):
    from mamba_ssm.inference import int8

    monkeypatch.setattr(int8, "_MAX_FLOATS", 100)  # several pieces, the last one smaller
    linear = torch.nn.Linear(24, 33, bias=bias)
    layer = Int8Linear(linear, group_size)
    groups = layer.scales.shape[1]
    weight = (layer.quantized.view(33, groups, -1) * layer.scales[..., None]).view(33, 24)
    x = torch.randn(*shape, 24)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, weight, linear.bias))
        for dtype in (BF16, F16):
            out = layer(x.to(dtype))
            assert out.dtype == dtype
            torch.testing.assert_close(out.float(), layer(x), rtol=2e-2, atol=2e-2)


@needs_native
@pytest.mark.parametrize("group_size", [None, 8, 10, 16])  # of 40 and 80 inputs
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_fused_step_equals_modules(dtype, group_size):
    model = make_model(dtype).quantize_("int8", group_size)
    for isa in native.available_cpu_isas():
        native.force_cpu_isa(isa)
        try:
            for batch in (1, 2, 7, 33):
                ids = torch.arange(batch)
                cache = random_cache(model, batch, F32)
                expected_cache = copied(cache)
                expected = module_step(model, ids, expected_cache)
                actual = fused_step(model, ids, cache)
                tolerance = {F32: 1e-4, F16: 2e-2, BF16: 1e-1}[dtype]
                torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
                for i, layer in cache.items():
                    for ours, theirs in zip(layer, expected_cache[i], strict=True):
                        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        finally:
            native.force_cpu_isa("auto")


@needs_native
@pytest.mark.parametrize("group_size", [None, 10])
def test_integer_sums_are_as_good_as_floats(group_size):
    isas = native.available_cpu_isas()
    if "avx512_bf16" not in isas:
        pytest.skip("this processor lacks avx512_bf16 or avx512_vnni: sums are floats")
    model = make_model(d_model=160).quantize_("int8", group_size)
    with torch.no_grad():  # one input that dwarfs the others
        model.backbone.norm_f.weight[7] = 3000
    cache, errors = random_cache(model, 16, F32), {}
    ids = torch.arange(16)
    exact, _ = oracle_step(model, ids, cache)
    for isa in isas[isas.index("avx512") :]:
        native.force_cpu_isa(isa)
        try:
            logits = {n: fused_step(model, ids[:n], sliced(cache, n)) for n in (16, 12, 4, 3, 1)}
        finally:
            native.force_cpu_isa("auto")
        assert all(torch.equal(part, logits[16][:n]) for n, part in logits.items()), isa
        errors[isa] = (logits[16].double() - exact).abs().max()
    assert max(errors.values()) <= 2 * errors["avx512"], errors


@needs_native
def test_integer_sums_of_extreme_rows():
    """Tiny rows keep their digits; a row that is not finite gives NaN, and only that row."""
    model = make_model(n_layer=1).quantize_("int8")
    head = model.lm_head
    ids = torch.arange(4)
    for isa in native.available_cpu_isas():
        native.force_cpu_isa(isa)
        try:
            with torch.no_grad():
                model.backbone.norm_f.weight.fill_(1e-33)
                logits = fused_step(model, ids, random_cache(model, 4))
                expected = module_step(model, ids, random_cache(model, 4))
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-37)
                assert head.bias is None and bool((logits != 0).any())
                model.backbone.norm_f.weight.fill_(1.0)
                cache = random_cache(model, 4)
                cache[0][1][2] = float("inf")
                logits = fused_step(model, ids, cache)
            assert bool(logits[2].isnan().all()) and bool(logits[[0, 1, 3]].isfinite().all()), isa
        finally:
            native.force_cpu_isa("auto")


@needs_native
@pytest.mark.parametrize("odd_one", [0, 1])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("other_groups", [False, True])
def test_layers_that_differ_go_through_the_modules(odd_one, dtype, other_groups):
    model = make_model(dtype)
    if other_groups:
        model.quantize_("int8")
    mixer, plain = model.backbone.layers[odd_one].mixer, make_model(dtype)
    mixer.out_proj = Int8Linear(
        plain.backbone.layers[odd_one].mixer.out_proj, 10 if other_groups else None
    )
    with torch.no_grad():
        assert "differ in which weights are int8" in cpu_decoder.why_not(model)
        pack, layout = pack_model(model)
        states = zip(*random_cache(model, 2).values(), strict=True)
        with pytest.raises(RuntimeError, match="layers differ in a weight's kind or in its group"):
            torch.ops.mamba_ssm._decode_step(
                torch.arange(2), model.backbone.embedding.weight, pack, layout, *map(list, states)
            )
    assert model.generate(torch.tensor([[1, 2, 3]]), 9).shape == (1, 9)


@needs_native
def test_generate_gives_the_modules_tokens():
    model = make_model().quantize_("int8")
    prompt = torch.tensor([[1, 2, 3], [7, 8, 9]])
    fused = model.generate(prompt, 25)
    with mamba_ssm.backend("reference"):
        assert torch.equal(fused, model.generate(prompt, 25))


@needs_native
def test_changed_int8_weights_are_packed_again():
    model = make_model().quantize_("int8")
    ids, cache = torch.tensor([3]), random_cache(model, 1)
    before = fused_step(model, ids, copied(cache))
    model.load_state_dict(make_model(seed=9).quantize_("int8").state_dict())
    after = fused_step(model, ids, copied(cache))
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, module_step(model, ids, cache), rtol=1e-4, atol=1e-4)


def test_which_layers_and_how_much_memory():
    model = make_model()
    quantized = copy.deepcopy(model).quantize_("int8")
    assert is_quantized(quantized) and not is_quantized(model)
    mixer = quantized.backbone.layers[0].mixer
    layers = (mixer.in_proj, mixer.x_proj, mixer.out_proj, quantized.lm_head)
    assert all(type(layer) is Int8Linear for layer in layers)
    assert type(mixer.dt_proj) is not Int8Linear
    assert torch.equal(quantized.backbone.embedding.weight, model.backbone.embedding.weight)
    quantized.tie_weights()
    assert type(quantized.lm_head) is Int8Linear and "lm_head.weight" not in quantized.state_dict()
    in_proj = model.backbone.layers[0].mixer.in_proj.weight
    assert mixer.in_proj.quantized.nbytes * 4 == in_proj.nbytes


def test_prefill_and_logits_stay_close():
    model = make_model(d_model=64)
    quantized = copy.deepcopy(model).quantize_("int8")
    ids = torch.randint(0, 77, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, rounded = model(ids).logits, quantized(ids).logits
    error = (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-4 < error < 0.05


def test_scales_keep_their_precision_in_half():
    model = make_model().quantize_("int8")
    scales = model.lm_head.scales.clone()
    model.half()
    assert model.lm_head.scales.dtype == F32 and torch.equal(model.lm_head.scales, scales)
    assert model.lm_head.quantized.dtype == torch.int8
    assert model.generate(torch.tensor([[1, 2]]), 5).shape == (1, 5)


def test_training_is_refused():
    model = make_model().quantize_("int8")
    with pytest.raises(RuntimeError, match=r"cannot be trained.*without quantize_"):
        model(torch.tensor([[1, 2, 3]]))


def test_saving_is_refused_and_state_dicts_work(tmp_path):
    model = make_model().quantize_("int8")
    with pytest.raises(CheckpointError, match="save the model before quantize_"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    twin = make_model(seed=4).quantize_("int8")
    twin.load_state_dict(torch.load(tmp_path / "state.pt"))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
    with pytest.raises(RuntimeError, match="then call quantize_"):
        twin.load_state_dict(make_model().state_dict())


def test_bad_calls_change_nothing():
    model = make_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"scheme must be one of \('int8',\), got 'int4'"):
        model.quantize_("int4")
    for size in (0, -3, 2.5):
        with pytest.raises(ValueError, match="group_size must be a positive int or None"):
            model.quantize_("int8", group_size=size)
    handle = model.backbone.layers[2].mixer.out_proj.register_forward_hook(lambda m, i, o: o)
    with pytest.raises(ValueError, match=r"layers\.2\.mixer\.out_proj .* was replaced, hooked"):
        model.quantize_("int8")
    handle.remove()
    with torch.no_grad():
        model.backbone.layers[2].mixer.out_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.2\.mixer\.out_proj\.weight has infinite or NaN"):
        model.quantize_("int8")
    with torch.no_grad():
        model.backbone.layers[2].mixer.out_proj.weight.copy_(
            before["backbone.layers.2.mixer.out_proj.weight"]
        )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    model.quantize_("int8")
    with pytest.raises(ValueError, match="holds int8 weights already"):
        model.quantize_("int8")


def test_embedded_model_loses_little(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    from corpus import Document
    from heldout import bits_per_byte

    model = MambaLMHeadModel.from_pretrained("embedded").eval()
    data = (REPOSITORY / "mamba_ssm" / "ops" / "backend.py").read_bytes()[:3000]
    values = {"data": data}
    documents = [Document(**{n: values.get(n, "backend.py") for n in Document.__annotations__})]
    before = bits_per_byte(model, documents)
    after = bits_per_byte(model.quantize_("int8"), documents)
    assert before < 2.5 and abs(after - before) < 0.01 and after != before


def test_commands_take_int8(capsys):
    from mamba_ssm.commands.generate import main

    common = ["--device", "cpu", "--dtype", "int8", "--genlen", "4", "--temperature", "0"]
    assert main(["--prompt", "import", *common]) == 0
    out = capsys.readouterr().out
    assert "cpu, torch.float32, int8 weights)" in out and "Number of parameters: 3,602,688" in out
