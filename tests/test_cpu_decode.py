"""The fused decode step on the CPU: equal to the modules, and never from stale weights."""

from __future__ import annotations

import copy
import os
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
from decode_helpers import (
    copied,
    fused_step,
    make_model,
    module_step,
    needs_native,
    oracle_step,
    random_cache,
)
from helpers import assert_close_to_oracle

import mamba_ssm
from mamba_ssm.inference import cpu_decoder
from mamba_ssm.inference.pack import zeroed_buffer
from mamba_ssm.ops import native

pytestmark = needs_native
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BATCHES = (1, 2, 7, 16, 33)


@pytest.fixture
def threads():
    """Sets torch's threads; back to what it was afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def each_isa():
    """The instruction sets of this machine; the choice is undone afterwards."""
    yield native.available_cpu_isas()
    native.force_cpu_isa("auto")


def ids_for(batch, vocab=77, seed=2):
    return torch.randint(0, vocab, (batch,), generator=torch.Generator().manual_seed(seed))


def check_step(model, batch, cache_dtype=None):
    """Logits and states of the fused step against the modules and the fp64 oracle."""
    ids, cache = ids_for(batch), random_cache(model, batch, cache_dtype)
    exact, exact_cache = oracle_step(model, ids, cache)
    by_modules, fused_cache = copied(cache), copied(cache)
    expected = module_step(model, ids, by_modules)
    actual = fused_step(model, ids, fused_cache)
    assert_close_to_oracle(actual, expected, exact, "logits")
    for i, layer in fused_cache.items():
        for part, name in enumerate(("conv state", "ssm state")):
            assert_close_to_oracle(
                layer[part], by_modules[i][part], exact_cache[i][part], f"layer {i}'s {name}"
            )


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("batch", BATCHES)
def test_step_equals_modules(batch, dtype):
    check_step(make_model(dtype), batch)


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm": False},
        {"fused_add_norm": False},
        {"residual_in_fp32": False},
        {"fused_add_norm": False, "residual_in_fp32": False, "rms_norm": False},
        {"tie_embeddings": False},
        {"ssm_cfg": {"d_state": 5, "d_conv": 3, "bias": True, "dt_rank": 7, "conv_bias": False}},
        {"ssm_cfg": {"d_state": 33, "d_conv": 1, "expand": 1}},
        {"d_model": 64, "ssm_cfg": {"d_state": 16, "d_conv": 4}},
        {"d_model": 1, "n_layer": 1, "vocab_size": 3, "ssm_cfg": {"d_state": 1, "dt_rank": 1}},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_options(changes, dtype):
    model = make_model(dtype, **changes)
    vocab = model.backbone.embedding.num_embeddings
    ids, cache = ids_for(3, vocab), random_cache(model, 3)
    exact, _ = oracle_step(model, ids, cache)
    expected = module_step(model, ids, copied(cache))
    assert_close_to_oracle(fused_step(model, ids, cache), expected, exact, "logits")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("cache_dtype", [F32, BF16, F16])
def test_cache_dtypes(dtype, cache_dtype):
    check_step(make_model(dtype), 2, cache_dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_every_instruction_set(each_isa, dtype):
    model = make_model(dtype)
    for isa in each_isa:
        native.force_cpu_isa(isa)
        for batch in (1, 7, 33):
            check_step(model, batch)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_native_equals_reference_op(dtype):
    model = make_model(dtype)
    ids, cache = ids_for(3), random_cache(model, 3)
    with torch.no_grad():
        d = cpu_decoder.decoder_for(model)
    args = (ids, d.embedding, d.pack, d.layout)
    results = []
    for op in (
        torch.ops.mamba_ssm._decode_step.default,
        torch.ops.mamba_ssm._decode_step.reference,
    ):
        own = copied(cache)
        conv, ssm = ([own[i][part] for i in range(3)] for part in (0, 1))
        results.append([op(*args, conv, ssm), *conv, *ssm])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            actual,
            expected,
            rtol=2e-2 if dtype == BF16 else 1e-4,
            atol=2e-2 if dtype == BF16 else 1e-5,
        )


def test_op_is_registered_properly():
    model = make_model()
    with torch.no_grad():
        d = cpu_decoder.decoder_for(model)
    cache = random_cache(model, 2)
    conv, ssm = ([cache[i][part] for i in range(3)] for part in (0, 1))
    args = (ids_for(2), d.embedding, d.pack, d.layout, conv, ssm)
    torch.library.opcheck(torch.ops.mamba_ssm._decode_step.default, args)
    weight = torch.randn(20, 6)
    torch.library.opcheck(torch.ops.mamba_ssm._pack_weight.default, (weight, torch.zeros(32 * 6)))


@pytest.mark.parametrize("dtype", [F32, F16, BF16, torch.int8])
@pytest.mark.parametrize("shape", [(16, 8), (1, 1), (37, 5), (15, 64), (48, 130)])
def test_packing_and_back(shape, dtype):
    from mamba_ssm.ops.decode_layout import padded, unpack_weight

    weight = torch.randn(shape).mul(50).to(dtype)
    width = padded(shape[1], 2) if dtype == BF16 else shape[1]
    packed, reference = torch.zeros(2, padded(shape[0]) * width, dtype=dtype)
    torch.ops.mamba_ssm._pack_weight.default(weight, packed)
    torch.ops.mamba_ssm._pack_weight.reference(weight, reference)
    assert torch.equal(packed, reference)
    assert torch.equal(unpack_weight(packed, *shape), weight)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_identical_at_any_number_of_threads(threads, dtype):
    model = make_model(dtype, d_model=128, n_layer=2, vocab_size=9000)
    results = []
    for count in (1, 2, 7):
        threads(count)
        cache = random_cache(model, 5)
        logits = [fused_step(model, ids_for(5, 9000), cache) for _ in range(3)]
        results.append(logits + [t for layer in cache.values() for t in layer])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_row_does_not_depend_on_its_company():
    model = make_model()
    ids, cache = ids_for(33), random_cache(model, 33)
    alone = [
        fused_step(
            model,
            ids[i : i + 1],
            {k: tuple(t[i : i + 1].clone() for t in v) for k, v in cache.items()},
        )
        for i in (0, 16, 31, 32)
    ]
    together = fused_step(model, ids, cache)
    assert torch.equal(torch.cat(alone), together[[0, 16, 31, 32]])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_generate_uses_it_and_gives_the_modules_tokens(monkeypatch, dtype):
    model = make_model(dtype)
    prompt = torch.randint(0, 77, (2, 5), generator=torch.Generator().manual_seed(0))
    calls = []
    step = cpu_decoder.CpuDecoder.step

    def counted(self, *args):
        calls.append(1)
        return step(self, *args)

    monkeypatch.setattr(cpu_decoder.CpuDecoder, "step", counted)
    fused = model.generate(prompt, 30, return_dict_in_generate=True, output_scores=True)
    assert len(calls) == 24
    with mamba_ssm.backend("reference"):
        plain = model.generate(
            prompt,
            30,
            return_dict_in_generate=True,
            output_scores=True,
            teacher_outputs=fused.sequences,
        )
    assert len(calls) == 24
    for ours, theirs in zip(fused.scores, plain.scores, strict=True):
        tolerance = 1e-4 if dtype == F32 else 0.15
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    if dtype == F32:
        with mamba_ssm.backend("reference"):
            assert torch.equal(fused.sequences, model.generate(prompt, 30))


def test_generation_continues_from_a_state():
    model = make_model()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    whole = model.generate(prompt, 23)
    first = model.generate(prompt, 13, return_state=True)
    more = model.generate(prompt[:, :0], 10, state=first.state)
    assert torch.equal(torch.cat([first.sequences, more], 1), whole)


def changed_by_optimizer(model):
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.eval()


def changed_by_optimizer_in_eval_mode(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def replaced_parameter(model):
    proj = model.backbone.layers[1].mixer.in_proj
    proj.weight = torch.nn.Parameter(proj.weight * 1.5)


CHANGES = {
    "optimizer": changed_by_optimizer,
    "optimizer, eval": changed_by_optimizer_in_eval_mode,
    "load_state_dict": lambda m: m.load_state_dict(make_model(seed=5).state_dict()),
    "in place": lambda m: m.backbone.layers[2].mixer.A_log.detach().add_(0.5),
    "through data": lambda m: m.backbone.layers[0].mixer.out_proj.weight.data.mul_(1.5),
    "parameter replaced": replaced_parameter,
    "assigned data": lambda m: setattr(m.backbone.norm_f.weight, "data", torch.randn(40)),
    "bf16": lambda m: m.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_weights_are_packed_again_after_a_change(change):
    model = make_model()
    ids, cache = ids_for(2), random_cache(model, 2, F32)
    before = fused_step(model, ids, copied(cache))
    change(model)
    expected = module_step(model, ids, copied(cache))
    actual = fused_step(model, ids, copied(cache))
    tolerance = 1e-4 if actual.dtype == F32 else 0.1
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert actual.dtype != before.dtype or not torch.allclose(actual, before)


def test_unchanged_weights_are_packed_once():
    model = make_model()
    with torch.no_grad():
        first = cpu_decoder.decoder_for(model)
        assert cpu_decoder.decoder_for(model) is first
        model.release_inference_packs()
        second = cpu_decoder.decoder_for(model)
        assert second is not first
        model.train()
        assert model not in cpu_decoder._decoders


def test_nothing_is_packed_while_gradients_are_enabled():
    model = make_model()
    assert cpu_decoder.decoder_for(model) is None
    assert cpu_decoder.why_not(model) == "gradients are enabled"


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux's /proc")
def test_a_large_pack_asks_for_huge_pages():
    buffer = zeroed_buffer(16 << 20)
    mapping, found = "", None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            mapping = line
        begin, end = (int(part, 16) for part in mapping.split()[0].split("-"))
        if line.startswith("VmFlags:") and begin <= buffer.data_ptr() < end:
            found = line.split()
    assert found is not None
    assert "sh" not in found, "shared memory gets no huge pages"
    if not os.path.exists("/sys/kernel/mm/transparent_hugepage"):
        pytest.skip("this kernel has no transparent huge pages")
    assert "hg" in found


class Adapted(torch.nn.Linear):
    """Stands for LoRA and its like."""

    def forward(self, x):
        return super().forward(x) * 2


def adapt(model):
    mixer = model.backbone.layers[1].mixer
    adapted = Adapted(mixer.d_model, 2 * mixer.d_inner, bias=False)
    adapted.weight = mixer.in_proj.weight
    mixer.in_proj = adapted


def hook(model):
    model.backbone.layers[0].mixer.out_proj.register_forward_hook(lambda m, i, o: o * 2)


def hook_block(model):
    model.backbone.layers[0].register_forward_hook(lambda m, i, o: (o[0] * 2, o[1]))


def parametrize(model):
    from torch.nn.utils import parametrizations

    parametrizations.weight_norm(model.backbone.layers[0].mixer.in_proj)


def patch_step(model):
    mixer = model.backbone.layers[0].mixer
    step = mixer.step
    mixer.step = lambda h, c, s: tuple(t * 2 if i == 0 else t for i, t in enumerate(step(h, c, s)))


FALLBACKS = {
    "LoRA": (adapt, "in_proj is a Adapted"),
    "hook": (hook, "out_proj has hooks"),
    "hook on a block": (hook_block, "layer 0 has hooks"),
    "parametrized": (parametrize, "in_proj is a Parametrized"),
    "patched": (patch_step, "step was replaced"),
    "fp64": (lambda m: m.double(), "not all fp32"),
    "mixed dtypes": (lambda m: m.backbone.layers[0].bfloat16(), "not all fp32"),
}


@pytest.mark.parametrize("change, reason", FALLBACKS.values(), ids=FALLBACKS.keys())
def test_modules_are_used_where_the_step_would_differ(change, reason):
    model = make_model()
    prompt = torch.tensor([[1, 2, 3]])
    model.generate(prompt, 8)
    change(model)
    with torch.no_grad():
        assert reason in cpu_decoder.why_not(model)
        assert cpu_decoder.decoder_for(model) is None
    if reason != "not all fp32":
        with mamba_ssm.backend("reference"):
            expected = model.generate(prompt, 12)
        assert torch.equal(model.generate(prompt, 12), expected)


def test_other_reasons(monkeypatch):
    model = make_model()
    with torch.no_grad():
        with mamba_ssm.backend("reference"):
            assert "'reference' was chosen" in cpu_decoder.why_not(model)
        with torch.autocast("cpu"):
            assert cpu_decoder.why_not(model) == "autocast is on"
        hybrid = make_model(attn_layer_idx=[1], attn_cfg={"num_heads": 2})
        assert "mixer is a MHA" in cpu_decoder.why_not(hybrid)
        assert "has an MLP" in cpu_decoder.why_not(make_model(d_intermediate=16))
        with torch.inference_mode():
            born = make_model()
            assert "inference mode" in cpu_decoder.why_not(born)
        from mamba_ssm.modules import mamba_simple

        monkeypatch.setattr(mamba_simple, "selective_state_update", None)
        assert "selective_state_update was replaced" in cpu_decoder.why_not(model)


def test_copies_and_pickles_hold_no_pack():
    model = make_model()
    size = len(pickle.dumps(model))
    keys = set(model.state_dict())
    model.generate(torch.tensor([[1, 2]]), 6)
    assert model in cpu_decoder._decoders
    assert len(pickle.dumps(model)) == size and set(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert twin not in cpu_decoder._decoders
    with torch.no_grad():
        twin.backbone.embedding.weight.mul_(0.5)
    ids, cache = ids_for(1), random_cache(model, 1)
    assert not torch.allclose(
        fused_step(twin, ids, copied(cache)), fused_step(model, ids, copied(cache))
    )


def test_several_python_threads_at_once(threads):
    threads(2)
    model = make_model(d_model=96, vocab_size=4000)
    prompts = [torch.randint(0, 4000, (b, 4)) for b in (1, 3, 2, 5)]
    expected = [model.generate(p, 20) for p in prompts]
    results: list = [None] * len(prompts)

    def work(i):
        for _ in range(3):
            results[i] = model.generate(prompts[i], 20)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_first_use(threads):
    threads(2)
    model = make_model(d_model=96, n_layer=2, vocab_size=9000)
    ids, cache = ids_for(2, 9000), random_cache(model, 2)
    expected = fused_step(model, ids, copied(cache))
    pid = os.fork()
    if pid == 0:
        with torch.no_grad():
            step = cpu_decoder._decoders[model].step
            os._exit(0 if torch.equal(step(ids, copied(cache)), expected) else 1)
    for _ in range(600):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        threading.Event().wait(0.05)
    else:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def test_bad_calls_say_what_is_wrong_and_write_nothing():
    model = make_model()
    with torch.no_grad():
        decoder = cpu_decoder.decoder_for(model)
    good = random_cache(model, 2)

    def cache_with(part, tensor):
        layer = list(good[1])
        layer[part] = tensor
        return {**good, 1: tuple(layer)}

    shapes = r"\(2, 80, 4\), got \(1, 80, 4\)"
    calls = [
        (torch.tensor([0, 77]), good, r"ids\[1\] is 77, outside the vocabulary of 77"),
        (torch.tensor([-1, 0]), good, r"ids\[0\] is -1"),
        (torch.tensor([[0], [1]]), good, r"ids must have 1 dimensions"),
        (torch.tensor([0, 1]).int(), good, "contiguous int64"),
        (torch.tensor([0, 1]), cache_with(0, good[1][0][:1]), shapes),
        (torch.tensor([0, 1]), cache_with(1, good[1][1].double()), "float32, float16 or bfloat16"),
        (torch.tensor([0, 1]), cache_with(1, good[1][1][:1].expand(2, -1, -1)), "its own"),
    ]
    before = copied(good)
    for ids, cache, message in calls:
        with pytest.raises(RuntimeError, match=message):
            decoder.step(ids, cache)
    for i, layer in good.items():
        assert all(torch.equal(a, b) for a, b in zip(layer, before[i], strict=True))


def test_damaged_layouts_are_refused():
    model = make_model(n_layer=1)
    with torch.no_grad():
        decoder = cpu_decoder.decoder_for(model)
    layout, cache, ids = decoder.layout.clone(), random_cache(model, 1), ids_for(1)
    for i in range(len(layout)):
        for value in (-7, 1 << 40):
            decoder.layout = layout.clone()
            decoder.layout[i] = value
            with pytest.raises(RuntimeError, match="_decode_step: "):
                decoder.step(ids, cache)
    decoder.layout = layout[:-1]
    with pytest.raises(RuntimeError, match="entries after its header"):
        decoder.step(ids, cache)
