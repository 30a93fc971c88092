"""int8 weights on a GPU: the fused step that streams them, other batches, generation."""

from __future__ import annotations

import copy

import pytest
import torch
from decode_helpers import copied, make_model, module_step, oracle_step, random_cache
from generation_helpers import prompt, tiny_lm
from helpers import assert_close_to_oracle
from test_cuda_decode import BF16, DTYPES, F16, F32, fused_step, ids_for, needs_cuda, on_device

import mamba_ssm
from mamba_ssm.inference import Int8Linear, cuda_decoder

# Widths of int8 weights are whole pieces of 16 bytes.
OPTIONS = [
    {},
    {"rms_norm": False},
    {"residual_in_fp32": False, "fused_add_norm": False},
    {"ssm_cfg": {"d_state": 5, "d_conv": 3, "bias": True, "dt_rank": 7, "conv_bias": False}},
    {"ssm_cfg": {"d_state": 33, "d_conv": 1, "expand": 1}},
    {"d_model": 16, "n_layer": 1, "vocab_size": 3, "ssm_cfg": {"d_state": 1, "dt_rank": 1}},
    {"d_model": 768, "n_layer": 5, "vocab_size": 2003},
    {"d_model": 784, "n_layer": 2, "vocab_size": 5003},
    {"d_model": 1024, "n_layer": 2, "vocab_size": 501},
    {"d_model": 1536, "n_layer": 2, "vocab_size": 501},
    {"d_model": 2048, "n_layer": 2, "vocab_size": 501},
    {"d_model": 2560, "n_layer": 2, "vocab_size": 301},
]

needs_one_row = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="the step of int8 weights needs compute capability 9.0",
)


def int8_model(dtype=F32, group_size=None, **changes):
    return make_model(dtype, **({"d_model": 48} | changes)).quantize_("int8", group_size)


def check(model, step, batch, cache_dtype=None):
    """Logits and states of `step`, against the modules' and those of the fp64 twin."""
    device = model.backbone.embedding.weight.device
    ids = ids_for(batch, model.backbone.embedding.num_embeddings, device)
    cache = on_device(random_cache(model, batch, cache_dtype), device)
    exact, exact_cache = oracle_step(model, ids, cache)
    by_modules = copied(cache)
    expected = module_step(model, ids, by_modules)
    assert_close_to_oracle(step(model, ids, cache), expected, exact, "logits")
    for i, layer in cache.items():
        for part, name in enumerate(("conv state", "ssm state")):
            assert_close_to_oracle(
                layer[part], by_modules[i][part], exact_cache[i][part], f"layer {i}'s {name}"
            )


@pytest.mark.parametrize("changes", OPTIONS[:5], ids=str)
def test_reference_equals_modules(changes):
    def step(model, ids, cache):
        decoder = cuda_decoder.CudaDecoder(model)
        decoder._step = torch.ops.mamba_ssm._decode_step_weights.reference
        return decoder.step(ids, cache)

    check(int8_model(**changes), step, 3)


@needs_cuda
@needs_one_row
@pytest.mark.parametrize("changes", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_step_equals_modules(changes, dtype):
    check(int8_model(dtype, **changes).cuda(), fused_step, 1)


@needs_cuda
@needs_one_row
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
def test_cache_dtypes(cache_dtype):
    check(int8_model(F16).cuda(), fused_step, 1, cache_dtype)


@needs_cuda
@needs_one_row
def test_repeats_are_bit_identical():
    model = int8_model(F16, d_model=256, n_layer=6).cuda()
    ids, cache = ids_for(1, 77, "cuda"), on_device(random_cache(model, 1), "cuda")
    results = []
    for _ in range(20):
        own = copied(cache)
        logits = fused_step(model, ids, own)
        results.append([logits, *(t for layer in own.values() for t in layer)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_cuda
def test_weights_are_rounded_as_on_the_cpu():
    model = make_model(F16, d_model=48)
    on_gpu = copy.deepcopy(model).cuda().quantize_("int8")
    model.quantize_("int8")
    for (name, ours), theirs in zip(
        on_gpu.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours.cpu(), theirs), name


@needs_cuda
@needs_one_row
def test_what_goes_through_the_modules():
    model = int8_model(F16).cuda()
    with torch.no_grad():
        assert cuda_decoder.why_not(model, 1) is None
        assert "one row" in cuda_decoder.why_not(model, 2)
        odd = int8_model(F16, d_model=40).cuda()
        assert "pieces of 16 bytes" in cuda_decoder.why_not(odd, 1)
        assert "fp16 and bf16" in cuda_decoder.why_not(int8_model(F32).cuda(), 1)
        groups = int8_model(F16, group_size=16).cuda()
        assert "scales of groups" in cuda_decoder.why_not(groups, 1)
        model.backbone.layers[1].mixer.conv1d.bias = None
        assert "biases that others lack" in cuda_decoder.why_not(model, 1)
        mixed = make_model(F16, d_model=48).cuda()
        mixed.lm_head = Int8Linear(mixed.lm_head)
        assert "others are not" in cuda_decoder.why_not(mixed, 1)


def module_prefill(model, ids):
    with torch.inference_mode():
        return model(ids).logits


@needs_cuda
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompts_and_other_batches_equal_the_rounded_weights(dtype, group_size):
    from decode_helpers import dequantized

    model = int8_model(dtype, group_size).cuda()
    ids = torch.randint(0, 77, (3, 20), device="cuda")
    wide = dequantized(model).cuda()
    for block in wide.backbone.layers:
        block.residual_in_fp32 = block.fused_add_norm = False
    wide.backbone.residual_in_fp32 = wide.backbone.fused_add_norm = False
    exact, narrow = module_prefill(wide, ids), dequantized(model).to(dtype).cuda()
    assert_close_to_oracle(module_prefill(model, ids), module_prefill(narrow, ids), exact)


@needs_cuda
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_greedy_tokens_are_those_of_the_reference(batch):
    model, ids = tiny_lm(device="cuda").quantize_("int8"), prompt(batch, 6, "cuda")
    with mamba_ssm.backend("reference"):
        expected = model.generate(ids, 60, cg=False)
    assert torch.equal(model.generate(ids, 60), expected)
    assert torch.equal(model.generate(ids, 60, cg=True), expected)
    assert torch.equal(model.generate(ids, 60, cg=False), expected)


def scored(model, ids, tokens=None, **options):
    options |= {"output_scores": True, "return_dict_in_generate": True, "teacher_outputs": tokens}
    return model.generate(ids, 40, **options)


@needs_cuda
@needs_one_row
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_generation_by_the_fused_step(dtype):
    model, ids = int8_model(dtype).cuda(), prompt(1, 6, "cuda")
    with torch.no_grad():
        assert cuda_decoder.why_not(model, 1) is None
    graph = scored(model, ids)
    again = scored(model, ids, cg=False)
    assert torch.equal(graph.sequences, again.sequences)
    assert all(torch.equal(a, b) for a, b in zip(graph.scores, again.scores, strict=True))
    with mamba_ssm.backend("reference"):
        expected = scored(model, ids, graph.sequences, cg=False)
    for ours, theirs in zip(graph.scores, expected.scores, strict=True):
        error = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        assert error < {F16: 2e-2, BF16: 0.15}[dtype]


@needs_cuda
@pytest.mark.parametrize("batch", [1, 2])
def test_a_captured_step_notices_that_weights_became_int8(batch):
    model, ids = tiny_lm(device="cuda"), prompt(batch, 6, "cuda")
    twin = copy.deepcopy(model).quantize_("int8")
    model.generate(ids, 40, cg=True)
    model.quantize_("int8")
    after = model.generate(ids, 40, cg=True, output_scores=True, return_dict_in_generate=True)
    with mamba_ssm.backend("reference"):
        expected = twin.generate(
            ids, 40, cg=False, output_scores=True, return_dict_in_generate=True
        )
    assert torch.equal(after.sequences, expected.sequences)
    torch.testing.assert_close(after.scores, expected.scores, rtol=1e-4, atol=1e-4)


@needs_cuda
@needs_one_row
def test_other_int8_weights_are_read_at_once():
    model = int8_model(F16).cuda()
    ids, cache = ids_for(1, 77, "cuda"), on_device(random_cache(model, 1), "cuda")
    before = fused_step(model, ids, copied(cache))
    model.load_state_dict(int8_model(F16, seed=9).state_dict())
    after = fused_step(model, ids, copied(cache))
    assert not torch.allclose(before, after, rtol=0.1)
    torch.testing.assert_close(after, module_step(model, ids, cache), rtol=2e-2, atol=2e-2)


@needs_cuda
@needs_one_row
def test_bad_scales_are_refused_before_a_launch():
    model = int8_model(F16).cuda()
    ids, cache = ids_for(1, 77, "cuda"), on_device(random_cache(model, 1), "cuda")
    decoder = cuda_decoder.CudaDecoder(model)
    good = decoder.scales
    for scales, message in (
        (good[:-1], "10 scales, got 9"),
        ([good[0].half(), *good[1:]], "in_proj's scales must be Float"),
        ([good[0][:-1], *good[1:]], "in_proj's scales must have shape"),
        ([*good[:-1], good[-1].cpu()], "lm_head's scales must be on the device"),
    ):
        decoder.scales = scales
        with pytest.raises(RuntimeError, match=message):
            decoder.step(ids, cache)
    decoder.scales = []
    with pytest.raises(RuntimeError, match=r"in_proj\.weight must be Half, got Char"):
        decoder.step(ids, cache)
