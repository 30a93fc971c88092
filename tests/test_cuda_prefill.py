"""A prompt in one native call on a GPU against its reference, the modules and fp64."""

from __future__ import annotations

import pytest
import torch
from decode_helpers import copied, make_like, make_model, random_cache
from helpers import assert_close_to_oracle

from mamba_ssm.inference import cuda_prefill
from mamba_ssm.inference.served import check_model, one_look
from mamba_ssm.modules import mamba_simple
from mamba_ssm.ops import native
from mamba_ssm.ops.decode_weights import LAYER_WEIGHTS
from mamba_ssm.utils.generation import InferenceParams

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPTIONS = [
    {},
    {"rms_norm": False},
    {"residual_in_fp32": False},
    {"tie_embeddings": False},
    {"ssm_cfg": {"d_state": 5, "d_conv": 3, "dt_rank": 7, "conv_bias": False}},
    {"ssm_cfg": {"d_state": 33, "d_conv": 1, "expand": 1}},
    {"n_layer": 11, "d_model": 64},
    {"d_model": 8, "n_layer": 1, "vocab_size": 3, "ssm_cfg": {"d_state": 1, "dt_rank": 1}},
]

needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and native.has_kernel("_prefill_layers", "cuda")),
    reason=f"no CUDA device or no CUDA library: {native.status()['cuda'][1]}",
)


def prompt(model, batch, length, device="cpu"):
    generator = torch.Generator().manual_seed(length)
    vocab = model.backbone.embedding.num_embeddings
    return torch.randint(0, vocab, (batch, length), generator=generator).to(device)


def by_modules(model, ids, cache):
    """Logits (b, V) of the last position; the cache is filled."""
    params = InferenceParams(ids.shape[1], len(ids), key_value_memory_dict=cache)
    with torch.no_grad():
        return model(ids, inference_params=params, num_last_tokens=1).logits[:, -1]


def exactly(model, ids, cache):
    """The same in fp64: (logits, cache)."""
    wide = make_like(model).double().to(ids.device)
    for part in (wide.backbone, *wide.backbone.layers):
        part.residual_in_fp32 = part.fused_add_norm = False
    cache = {i: tuple(t.double() for t in layer) for i, layer in cache.items()}
    return by_modules(wide, ids, cache), cache


def cache_on(model, batch, device, dtype=None):
    """A cache that holds something: a prompt starts from nothing all the same."""
    cache = random_cache(model, batch, dtype)
    return {i: tuple(t.to(device) for t in layer) for i, layer in cache.items()}


def whole(model, ids, cache):
    with torch.no_grad():
        made = cuda_prefill.prefill_for(model)
        assert made is not None, cuda_prefill.why_not(model)
        assert made.serves(ids, cache)
        return made.prefill(ids, cache)


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_reference_equals_modules(changes):
    model = make_model(**changes)
    ids = prompt(model, 2, 9)
    cache = cache_on(model, 2, "cpu")
    exact, exact_cache = exactly(model, ids, cache)
    others = copied(cache)
    expected = by_modules(model, ids, others)
    made = cuda_prefill.CudaPrefill(model)
    made._layers = torch.ops.mamba_ssm._prefill_layers.reference
    with torch.no_grad():
        actual = made.prefill(ids, cache)
    assert_close_to_oracle(actual, expected, exact, "logits")
    for i, layer in cache.items():
        for part in (0, 1):
            assert_close_to_oracle(
                layer[part], others[i][part], exact_cache[i][part], f"layer {i}, state {part}"
            )


def test_op_is_registered_properly():
    model = make_model()
    made = cuda_prefill.CudaPrefill(model)
    cache = random_cache(model, 2)
    conv, ssm = ([cache[i][part] for i in range(3)] for part in (0, 1))
    hidden = model.backbone.embedding(prompt(model, 2, 5)).detach()
    weights = [w.detach() for w in made.weights]
    args = (hidden, weights, made.eps, made.is_rms_norm, made.residual_dtype, conv, ssm)
    torch.library.opcheck(torch.ops.mamba_ssm._prefill_layers.default, args)


@needs_cuda
@pytest.mark.parametrize("changes", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("batch", "length"), [(1, 4), (3, 37), (2, 300)])
def test_same_bits_as_the_modules(changes, dtype, batch, length):
    model = make_model(dtype, **changes).cuda()
    ids = prompt(model, batch, length, "cuda")
    cache = cache_on(model, batch, "cuda")
    others = copied(cache)
    expected, actual = by_modules(model, ids, others), whole(model, ids, cache)
    assert actual.dtype == expected.dtype and actual.isfinite().all()
    assert torch.equal(actual, expected)
    for i, layer in cache.items():
        assert torch.equal(layer[0], others[i][0]) and torch.equal(layer[1], others[i][1])


@needs_cuda
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("cache_dtype", [F32, BF16, F16], ids=str)
def test_cache_dtypes(dtype, cache_dtype):
    model = make_model(dtype).cuda()
    ids = prompt(model, 2, 21, "cuda")
    cache = cache_on(model, 2, "cuda", cache_dtype)
    others = copied(cache)
    assert torch.equal(whole(model, ids, cache), by_modules(model, ids, others))
    for i, layer in cache.items():
        assert layer[0].dtype == cache_dtype
        assert torch.equal(layer[0], others[i][0]) and torch.equal(layer[1], others[i][1])


@needs_cuda
def test_released_size():
    model = make_model(F16, d_model=768, n_layer=3, vocab_size=501).cuda()
    ids, cache = prompt(model, 1, 100, "cuda"), cache_on(model, 1, "cuda")
    others = copied(cache)
    assert torch.equal(whole(model, ids, cache), by_modules(model, ids, others))


@needs_cuda
def test_generate_uses_it(monkeypatch):
    model = make_model().cuda()
    ids, seen = prompt(model, 2, 6, "cuda"), []
    plain = cuda_prefill.CudaPrefill.prefill

    def watched(self, *args):
        seen.append(1)
        return plain(self, *args)

    monkeypatch.setattr(cuda_prefill.CudaPrefill, "prefill", watched)
    for cg in (None, False):
        seen.clear()
        tokens = model.generate(ids, max_length=12, cg=cg)
        assert len(seen) == 1
        with monkeypatch.context() as without:
            without.setattr(type(model), "whole_prefill", lambda self: None)
            assert torch.equal(tokens, model.generate(ids, max_length=12, cg=cg))
        assert len(seen) == 1
    seen.clear()
    model.generate(ids, max_length=12, prefill_chunk_size=3)
    model.generate(ids[:, :3], max_length=12)  # does not fill the convolution's window
    model.generate(ids, max_length=12, attention_mask=torch.tensor([[0] + [1] * 5, [1] * 6]))
    assert not seen


@needs_cuda
def test_bad_arguments():
    model = make_model().cuda()
    with torch.no_grad():
        made = cuda_prefill.prefill_for(model)
    ids, cache = prompt(model, 2, 6, "cuda"), cache_on(model, 2, "cuda")
    before = copied(cache)
    with pytest.raises(RuntimeError, match="conv_states must have shape"):
        made.prefill(ids[:1], cache)
    with pytest.raises(RuntimeError, match="do not fill a convolution of width"):
        made.prefill(ids[:, :2], cache)
    last = (
        len(made.weights) - len(LAYER_WEIGHTS) - 2
    )  # what the last layer lacks is found first, too
    for i, bad, message in (
        (2, made.weights[2].half(), "in_proj must be"),
        (last + LAYER_WEIGHTS.index("D"), made.weights[last + 10][:-1], "D must have shape"),
        (-2, made.weights[-2][:-1], "norm_f.weight must have shape"),
    ):
        good, made.weights[i] = made.weights[i], bad
        with pytest.raises(RuntimeError, match=message):
            made.prefill(ids, cache)
        made.weights[i] = good
    for i, layer in cache.items():
        assert torch.equal(layer[0], before[i][0]) and torch.equal(layer[1], before[i][1])


def refused(model):
    with torch.no_grad():
        assert cuda_prefill.prefill_for(model) is None
        return cuda_prefill.why_not(model)


@needs_cuda
def test_what_it_does_not_serve(monkeypatch):
    assert "gradients" in cuda_prefill.why_not(make_model().cuda())
    assert "bias" in refused(make_model(ssm_cfg={"bias": True}).cuda())
    assert "fused_add_norm" in refused(make_model(fused_add_norm=False).cuda())
    assert "use_fast_path" in refused(make_model(ssm_cfg={"use_fast_path": False}).cuda())
    hooked = make_model().cuda()
    hooked.backbone.layers[1].mixer.in_proj.register_forward_hook(lambda *a: None)
    assert "hooks" in refused(hooked)
    monkeypatch.setattr(mamba_simple, "mamba_inner_fn", lambda *a: None)
    assert "mamba_inner_fn" in refused(make_model().cuda())


def test_it_is_refused_on_a_cpu():
    model = make_model()
    assert model.whole_prefill() is None
    with torch.no_grad():
        assert cuda_prefill.why_not(model) is not None


def test_one_look(monkeypatch):
    model, other = make_model(), make_model()
    with one_look(model):
        first = check_model(model, "cpu", False)
        assert check_model(model, "cpu", False) is first
        assert check_model(other, "cpu", False) is not check_model(other, "cpu", False)
    model.backbone.layers[0].mixer.in_proj = torch.nn.Identity()
    with pytest.raises(Exception, match="in_proj is a Identity"):
        check_model(model, "cpu", False)
    with one_look(model):
        for _ in range(2):
            with pytest.raises(Exception, match="in_proj is a Identity"):
                check_model(model, "cpu", False)
