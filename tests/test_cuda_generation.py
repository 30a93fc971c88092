"""Generation on a GPU: captured steps and choices against the plain loop and the reference."""

from __future__ import annotations

import gc

import pytest
import torch
from generation_helpers import Recorder, prompt, tiny_lm

import mamba_ssm
from mamba_ssm.inference import cuda_decoder
from mamba_ssm.ops import native
from mamba_ssm.utils.sampling import filtered_logits

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device"
)

SAMPLING = [
    {"top_k": 5, "temperature": 0.8},
    {"top_k": 0, "top_p": 0.7},
    {"top_k": 0, "min_p": 0.1, "temperature": 1.3},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.4},
]


def served(model, batch=1):
    with torch.no_grad():
        return cuda_decoder.why_not(model, batch) is None


@pytest.mark.parametrize("batch", [1, 3, 8, 9, 17])
def test_greedy_tokens_are_those_of_the_reference(batch):
    model = tiny_lm(device="cuda")
    assert served(model, batch) == (batch <= 8)
    ids = prompt(batch, 6, "cuda")
    fused = model.generate(ids, 60)
    with mamba_ssm.backend("reference"):
        expected = model.generate(ids, 60, cg=False)
    assert torch.equal(fused, expected)
    assert torch.equal(model.generate(ids, 60, cg=False), expected)


@pytest.mark.parametrize("options", SAMPLING, ids=str)
@pytest.mark.parametrize("batch", [1, 5])
def test_a_seed_draws_the_same_tokens_with_and_without_graphs(options, batch):
    model, ids = tiny_lm(device="cuda"), prompt(batch, 6, "cuda")
    graph = model.generate(ids, 40, seed=3, **options)
    assert torch.equal(graph, model.generate(ids, 40, seed=3, **options))
    assert torch.equal(graph, model.generate(ids, 40, seed=3, cg=False, **options))
    if options.get("top_k", 1) != 1:
        assert not torch.equal(graph, model.generate(ids, 40, seed=4, **options))


def test_the_global_generator_moves_on_and_is_obeyed():
    model, ids = tiny_lm(device="cuda"), prompt(4, 6, "cuda")
    options = {"top_k": 0, "temperature": 1.5}
    drawn = []
    for cg in (True, True, False):
        torch.manual_seed(11)
        drawn += [model.generate(ids, 40, cg=cg, **options) for _ in range(2)]
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[0], drawn[4])
    assert torch.equal(drawn[1], drawn[3]) and not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("length", [7, 9, 30])
def test_rows_end_and_pad_as_without_graphs(length):
    model, ids = tiny_lm(device="cuda"), prompt(3, 6, "cuda")
    free = model.generate(ids, 30)
    # Ends that stop the rows at different places, and all of them before the limit.
    for eos in ([int(free[0, 8]), int(free[1, 13]), int(free[2, 10])], int(free[1, 7])):
        options = {"eos_token_id": eos, "pad_token_id": 1}
        expected = model.generate(ids, length, cg=False, **options)
        streamed = Recorder()
        assert torch.equal(model.generate(ids, length, **options), expected)
        assert torch.equal(model.generate(ids, length, streamer=streamed, **options), expected)
        new = torch.stack(streamed.values[1:], 1)
        assert torch.equal(new, expected[:, 6:].cpu()) and streamed.ended == 1


def test_longer_outputs_than_captured_and_many_settings():
    model, ids = tiny_lm(device="cuda"), prompt(2, 6, "cuda")
    for length in (10, 200, 20, 300):
        expected = model.generate(ids, length, cg=False)
        assert torch.equal(model.generate(ids, length), expected)
    for top_k in range(2, 9):
        drawn = model.generate(ids, 20, top_k=top_k, seed=0)
        assert torch.equal(drawn, model.generate(ids, 20, top_k=top_k, seed=0, cg=False))
    assert len(model._decoding_cache.choosers) <= 4


def test_weights_changed_in_place_are_seen_without_a_new_capture():
    model, ids = tiny_lm(device="cuda"), prompt(2, 6, "cuda")
    before = model.generate(ids, 30)
    cache = model._decoding_cache
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    changed = model.generate(ids, 30)
    assert model._decoding_cache is cache and not torch.equal(before, changed)
    assert torch.equal(changed, model.generate(ids, 30, cg=False))
    with mamba_ssm.backend("reference"):
        assert torch.equal(changed, model.generate(ids, 30, cg=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_moved_to_another_dtype_is_captured_again(dtype):
    model, ids = tiny_lm(device="cuda"), prompt(2, 6, "cuda")
    model.generate(ids, 20)
    model.to(dtype)
    assert torch.equal(model.generate(ids, 20), model.generate(ids, 20, cg=False))
    model.cpu().float().cuda()
    assert torch.equal(model.generate(ids, 20), model.generate(ids, 20, cg=False))


def test_hooks_and_replaced_modules_are_obeyed():
    model, ids = tiny_lm(device="cuda"), prompt(1, 6, "cuda")
    expected = model.generate(ids, 20)
    calls = []
    mixer = model.backbone.layers[1].mixer
    handle = mixer.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(ids, 20), expected)
    assert len(calls) == 14, "the prompt and every step but the last one"
    handle.remove()
    assert torch.equal(model.generate(ids, 20), expected) and len(calls) == 14


def test_generation_under_autocast_sees_new_weights():
    model, ids = tiny_lm(device="cuda"), prompt(2, 6, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        for _ in range(2):
            graph = model.generate(ids, 16, cg=True)
            assert torch.equal(graph, model.generate(ids, 16, cg=False))
            with torch.no_grad():
                model.lm_head.weight.mul_(-1)


def test_memory_does_not_grow_over_a_thousand_calls():
    model = tiny_lm(device="cuda")
    prompts = [prompt(batch, 4, "cuda") for batch in (1, 4, 2, 17)]
    used = []
    for call in range(1000):
        model.generate(prompts[call // 5 % len(prompts)], 6)
        if call in (199, 999):
            gc.collect()
            torch.cuda.synchronize()
            used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert used[1][0] <= used[0][0] and used[1][1] <= used[0][1]


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 3, "temperature": 3.0},
        {"top_k": 0, "top_p": 0.8, "min_p": 0.02, "temperature": 2.0},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(options):
    """Chi-square over the first two tokens, a plain and a captured choice, of many equal rows."""
    model, vocab = tiny_lm(device="cuda"), 50
    ids = prompt(1, 6, "cuda")
    with torch.no_grad():
        first = torch.softmax(
            filtered_logits(model(ids).logits[:, -1, :vocab], **options), -1
        ).squeeze(0)
        longer = torch.cat([ids.repeat(vocab, 1), torch.arange(vocab, device="cuda")[:, None]], 1)
        second = torch.softmax(filtered_logits(model(longer).logits[:, -1, :vocab], **options), -1)
    probs = (first[:, None] * second).double().flatten().cpu()
    counts, rows, calls = torch.zeros(vocab * vocab, dtype=torch.float64), 16, 150
    for seed in range(calls):
        out = model.generate(ids.repeat(rows, 1), 8, seed=seed, vocab_size=vocab, **options)
        pairs = out[:, 6] * vocab + out[:, 7]
        counts += torch.bincount(pairs.cpu(), minlength=vocab * vocab)
    assert counts[probs == 0].sum() == 0, "a filtered token was drawn"
    expected = probs * rows * calls
    large = expected >= 5
    observed = torch.cat([counts[large], counts[~large].sum().view(1)])
    wanted = torch.cat([expected[large], expected[~large].sum().view(1).clamp_min(1e-9)])
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    # Four standard deviations above the mean of a chi-square variable; the seeds are fixed.
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom)


@pytest.mark.skipif(not native.has_kernel("_argmax_rows", "cuda"), reason="no compiled kernel")
@pytest.mark.parametrize("cg", [None, False])
def test_greedy_choices_of_a_kernel_are_those_of_torch(cg, monkeypatch):
    model, ids, chosen = tiny_lm(device="cuda"), prompt(20, 6, "cuda"), []
    plain = type(model).greedy_into
    monkeypatch.setattr(
        type(model), "greedy_into", lambda *a: chosen.append(plain(*a)) or chosen[-1]
    )
    tokens = model.generate(ids, 20, cg=cg)
    assert chosen and all(chosen)
    ended = model.generate(ids, 20, cg=cg, eos_token_id=int(tokens[0, 9]))
    monkeypatch.setattr(type(model), "greedy_into", lambda *a: False)
    model._decoding_cache = None
    assert torch.equal(tokens, model.generate(ids, 20, cg=cg))
    assert torch.equal(ended, model.generate(ids, 20, cg=cg, eos_token_id=int(tokens[0, 9])))
