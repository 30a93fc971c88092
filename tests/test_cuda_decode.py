"""The fused decode step on a GPU against its reference and the modules."""

from __future__ import annotations

import pytest
import torch
from decode_helpers import copied, make_model, module_step, oracle_step, random_cache
from helpers import assert_close_to_oracle

from mamba_ssm.inference import cuda_decoder
from mamba_ssm.ops import native

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]

needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and native.has_kernel("_decode_step_weights", "cuda")),
    reason=f"no CUDA device or no CUDA library: {native.status()['cuda'][1]}",
)

OPTIONS = [
    {"rms_norm": False},
    {"residual_in_fp32": False, "fused_add_norm": False},
    {"tie_embeddings": False},
    {"ssm_cfg": {"d_state": 5, "d_conv": 3, "bias": True, "dt_rank": 7, "conv_bias": False}},
    {"ssm_cfg": {"d_state": 33, "d_conv": 1, "expand": 1}},
    {"d_model": 64, "ssm_cfg": {"d_state": 16, "d_conv": 2}},
    {"d_model": 8, "n_layer": 1, "vocab_size": 3, "ssm_cfg": {"d_state": 1, "dt_rank": 1}},
    {"d_model": 768, "n_layer": 5, "vocab_size": 2003},
    {"d_model": 776, "n_layer": 2, "vocab_size": 5003},
    {"d_model": 2560, "n_layer": 1, "vocab_size": 301},
]


def on_device(cache, device):
    return {i: tuple(t.to(device) for t in layer) for i, layer in cache.items()}


def ids_for(batch, vocab, device="cpu"):
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, vocab, (batch,), generator=generator).to(device)


def fused_step(model, ids, cache):
    with torch.no_grad():
        decoder = cuda_decoder.decoder_for(model, len(ids))
        assert decoder is not None, cuda_decoder.why_not(model, len(ids))
        return decoder.step(ids, cache)


def check_step(model, batch, cache_dtype=None):
    """Logits and states of the fused step, of the modules and of the fp64 modules."""
    vocab = model.backbone.embedding.num_embeddings
    ids, cache = (
        ids_for(batch, vocab, "cuda"),
        on_device(random_cache(model, batch, cache_dtype), "cuda"),
    )
    exact, exact_cache = oracle_step(model, ids, cache)
    by_modules = copied(cache)
    expected = module_step(model, ids, by_modules)
    actual = fused_step(model, ids, cache)
    assert_close_to_oracle(actual, expected, exact, "logits")
    for i, layer in cache.items():
        for part, name in enumerate(("conv state", "ssm state")):
            assert_close_to_oracle(
                layer[part], by_modules[i][part], exact_cache[i][part], f"layer {i}'s {name}"
            )


@pytest.mark.parametrize("changes", [{}, *OPTIONS], ids=str)
def test_reference_equals_modules(changes):
    model = make_model(**changes)
    vocab = model.backbone.embedding.num_embeddings
    ids, cache = ids_for(3, vocab), random_cache(model, 3)
    exact, exact_cache = oracle_step(model, ids, cache)
    by_modules = copied(cache)
    expected = module_step(model, ids, by_modules)
    decoder = cuda_decoder.CudaDecoder(model)
    decoder._step = torch.ops.mamba_ssm._decode_step_weights.reference
    actual = decoder.step(ids, cache)
    assert_close_to_oracle(actual, expected, exact, "logits")
    for i, layer in cache.items():
        for part in (0, 1):
            assert_close_to_oracle(
                layer[part], by_modules[i][part], exact_cache[i][part], f"layer {i}, state {part}"
            )


@pytest.mark.parametrize("int8", [False, True])
def test_op_is_registered_properly(int8):
    model = make_model()
    if int8:
        model.quantize_("int8")
    decoder = cuda_decoder.CudaDecoder(model)
    cache = random_cache(model, 2)
    conv, ssm = ([cache[i][part] for i in range(3)] for part in (0, 1))
    args = (
        ids_for(2, 77), decoder.embedding, decoder.weights, decoder.scales, decoder.eps,
        decoder.is_rms_norm, decoder.residual_dtype, conv, ssm,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.mamba_ssm._decode_step_weights.default, args)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 7, 8])
def test_step_equals_modules(batch, dtype):
    check_step(make_model(dtype).cuda(), batch)


@needs_cuda
@pytest.mark.parametrize("changes", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 5, 8])
def test_options(changes, dtype, batch):
    check_step(make_model(dtype, **changes).cuda(), batch)


@needs_cuda
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_cache_dtypes(dtype, cache_dtype, batch):
    check_step(make_model(dtype).cuda(), batch, cache_dtype)


@needs_cuda
@pytest.mark.parametrize("name", ["A_log", "D"])
@pytest.mark.parametrize("batch", [1, 2])
def test_other_dtypes_of_the_scan_parameters(name, batch):
    model = make_model(BF16).cuda()
    for block in model.backbone.layers:
        parameter = getattr(block.mixer, name)
        parameter.data = parameter.data.bfloat16()
    check_step(model, batch)


@needs_cuda
def test_layers_with_and_without_a_bias():
    """One row has a kernel of its own, which takes layers that are alike."""
    model = make_model(F16).cuda()
    model.backbone.layers[1].mixer.conv1d.bias = None
    ids, cache = ids_for(1, 77, "cuda"), on_device(random_cache(model, 1), "cuda")
    two = {i: tuple(t.repeat(2, 1, 1) for t in layer) for i, layer in cache.items()}
    alone, both = fused_step(model, ids, cache), fused_step(model, ids.repeat(2), two)
    assert torch.equal(alone, both[:1]) and torch.equal(both[0], both[1])


@needs_cuda
@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
@pytest.mark.parametrize("d_model", [768, 1536, 2048])
def test_rows_in_pieces(d_model, dtype):
    """Widths of released models: rows of weights are cut in one way or another for the warps."""
    check_step(make_model(dtype, d_model=d_model, n_layer=2, vocab_size=501).cuda(), 1)


@needs_cuda
def test_many_layers_and_many_steps_in_flight():
    """Words are written again in every layer and step: nobody may take those of another one."""
    model = make_model(F16, d_model=16, n_layer=128).cuda()
    ids, cache = ids_for(1, 77, "cuda"), on_device(random_cache(model, 1), "cuda")
    first = fused_step(model, ids, copied(cache))
    for _ in range(200):
        logits = fused_step(model, ids, copied(cache))
    assert torch.equal(first, logits)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_many_steps_follow_the_modules(dtype, batch):
    """Twenty steps, greedy, from zero states; the same tokens are fed to both."""
    model = make_model(dtype, d_model=64, n_layer=4).cuda()
    caches = [model.allocate_inference_cache(batch, 8) for _ in range(2)]
    ids = ids_for(batch, 77, "cuda")
    for _ in range(20):
        expected = module_step(model, ids, caches[0])
        actual = fused_step(model, ids, caches[1])
        error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
        assert error < {F32: 1e-5, F16: 2e-2, BF16: 0.15}[dtype]
        ids = expected.argmax(-1)


@needs_cuda
@pytest.mark.parametrize("batch", [1, 8])
def test_repeats_are_bit_identical(batch):
    model = make_model(F16, d_model=256, n_layer=6).cuda()
    ids, cache = ids_for(batch, 77, "cuda"), on_device(random_cache(model, batch), "cuda")
    results = []
    for _ in range(5):
        own = copied(cache)
        logits = fused_step(model, ids, own)
        results.append([logits, *(t for layer in own.values() for t in layer)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_cuda
def test_an_id_outside_the_vocabulary_makes_its_row_nan():
    model = make_model(F16).cuda()
    for bad in (-1, 77, 1 << 40):
        cache = on_device(random_cache(model, 2), "cuda")
        expected = fused_step(model, torch.tensor([3, 3], device="cuda"), copied(cache))
        logits = fused_step(model, torch.tensor([bad, 3], device="cuda"), cache)
        assert logits[0].isnan().all()
        assert torch.equal(logits[1], expected[1])


@needs_cuda
def test_refusals():
    model = make_model(F16).cuda()
    with torch.no_grad():
        assert cuda_decoder.why_not(model, 8) is None
        assert "1 to 8 rows, not 9" in cuda_decoder.why_not(model, 9)
        wide = make_model(F32, d_model=5120, n_layer=1).cuda()
        assert cuda_decoder.why_not(wide, 4) is None
        assert "shared memory" in cuda_decoder.why_not(wide, 8)
        assert "pieces of 16 bytes" in cuda_decoder.why_not(make_model(F16, d_model=4).cuda())
        handle = model.backbone.layers[1].register_forward_hook(lambda *_: None)
        assert "hooks" in cuda_decoder.why_not(model)
        handle.remove()
        with torch.autocast("cuda"):
            assert "autocast" in cuda_decoder.why_not(model)
        assert "CPU" not in (cuda_decoder.why_not(make_model(F16)) or "CPU")
    assert "gradients" in cuda_decoder.why_not(model)


@needs_cuda
def test_bad_states_are_refused_before_a_launch():
    model = make_model(F16).cuda()
    ids, good = ids_for(2, 77, "cuda"), on_device(random_cache(model, 2), "cuda")
    conv, ssm = good[0]
    for entry, message in (
        ((conv[:1], ssm), "conv_states"),
        ((conv, ssm.float()), "ssm_states must have one dtype"),
        ((conv.cpu(), ssm), "on the device"),
        ((conv, ssm.transpose(1, 2).contiguous().transpose(1, 2)), "contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fused_step(model, ids, good | {1: entry})
