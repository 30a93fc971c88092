"""Tokens chosen inside the decode step: those that the logits give, drawn as they should be."""

from __future__ import annotations

import math

import pytest
import torch
from decode_helpers import copied, make_model, needs_native, random_cache

from mamba_ssm.inference import cpu_decoder
from mamba_ssm.ops import native
from mamba_ssm.utils.sampling import filtered_logits, penalise_seen_, sample

pytestmark = needs_native
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

SETTINGS = [
    {"top_k": 1},
    {"top_k": 0},
    {"top_k": 1, "repetition_penalty": 1.8},
    {"top_k": 0, "temperature": 0.0},
    {"top_k": 40, "temperature": 0.7},
    {"top_k": 0, "top_p": 0.8},
    {"top_k": 0, "top_p": 0.05},
    {"top_k": 0, "min_p": 0.3, "temperature": 1.3},
    {"top_k": 25, "top_p": 0.9, "min_p": 0.02, "temperature": 1.7, "repetition_penalty": 1.3},
    {"top_k": 10_000, "top_p": 1.0},
]


def chosen(model, ids, cache, uniform=None, seen=None, vocab=None, **settings):
    """(tokens, logits) of one call."""
    with torch.no_grad():
        decoder = cpu_decoder.decoder_for(model)
        logits = decoder.new_logits(len(ids))
        tokens = torch.empty(len(ids), dtype=torch.long)
        choice = {"top_p": 0.0, "min_p": 0.0, "temperature": 1.0, "repetition_penalty": 1.0}
        vocab = vocab or logits.shape[1]
        decoder.choose(ids, cache, logits, tokens, seen, uniform, vocab, **(choice | settings))
    return tokens, logits


def places(batch, seed=3):
    return torch.rand(batch, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def is_random(setting):
    return setting["top_k"] != 1 and setting.get("temperature") != 0.0


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("vocab_size", [77, 5000])
def test_generate_takes_the_tokens_of_the_logits(setting, dtype, vocab_size):
    """With scores, which need the logits in Python, the choice is made there."""
    model = make_model(dtype, vocab_size=vocab_size)
    prompt = torch.randint(0, 77, (5, 4), generator=torch.Generator().manual_seed(0))
    inside = model.generate(prompt, 40, seed=2, **setting)
    outside = model.generate(
        prompt, 40, seed=2, return_dict_in_generate=True, output_scores=True, **setting
    )
    assert torch.equal(inside, outside.sequences)


def test_generate_chooses_inside_the_step(monkeypatch):
    model = make_model()
    prompt = torch.tensor([[1, 2], [3, 4]])
    monkeypatch.setattr(cpu_decoder.CpuDecoder, "step", None)
    texts = []

    class Streamer:
        def put(self, tokens):
            texts.append(tokens.clone())

        def end(self):
            pass

    first = model.generate(prompt, 12, streamer=Streamer(), top_k=5, seed=1)
    assert torch.equal(torch.stack(texts[1:], 1), first[:, 2:])
    ended = model.generate(prompt, 12, top_k=5, seed=1, eos_token_id=int(first[0, 5]))
    assert bool((ended[0, 6:] == first[0, 5]).all())
    state = model.generate(prompt, 7, top_k=5, seed=1, repetition_penalty=1.2, return_state=True)
    assert state.state.seen.sum(1).tolist() == [len(set(row)) for row in state.sequences.tolist()]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_filtered_distribution(setting):
    """As many rows as draws, all alike but for the place in the distribution: a chi-square test."""
    draws, vocab = 6000, 60
    model = make_model(n_layer=1, d_model=16)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    cache = random_cache(model, 1)
    cache = {i: tuple(t.expand(draws, -1, -1).clone() for t in c) for i, c in cache.items()}
    ids = torch.full((draws,), 7)
    seen = torch.zeros(draws, 77, dtype=torch.bool)
    seen[:, ::3] = True
    penalty = setting.get("repetition_penalty", 1.0)
    uniform = places(draws) if is_random(setting) else None
    tokens, logits = chosen(
        model, ids, cache, uniform, seen if penalty != 1.0 else None, vocab, **setting
    )
    row = logits[:1, :vocab].clone()
    if penalty != 1.0:
        penalise_seen_(row, seen[:1, :vocab], penalty)
    if uniform is None:
        assert bool((tokens == row.argmax()).all())
        return
    filters = {k: v for k, v in setting.items() if k != "repetition_penalty"}
    expected = torch.softmax(filtered_logits(row, **filters).double(), -1)[0] * draws
    counts = torch.bincount(tokens, minlength=vocab)
    assert bool((counts[expected == 0] == 0).all())
    # Cells of fewer than five expected draws count together.
    rare = (expected < 5) & (expected > 0)
    cells = [*zip(counts[expected >= 5].tolist(), expected[expected >= 5].tolist(), strict=True)]
    if bool(rare.any()):
        cells.append((int(counts[rare].sum()), float(expected[rare].sum())))
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    freedom = len(cells) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_native_and_reference_choose_alike_with_every_instruction_set(dtype):
    model = make_model(dtype, vocab_size=3001)
    ids = torch.randint(0, 3001, (33,), generator=torch.Generator().manual_seed(1))
    start, uniform = random_cache(model, 33), places(33)
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    seen = torch.rand(33, 3001, generator=torch.Generator().manual_seed(2)) < 0.3
    with torch.no_grad():
        decoder = cpu_decoder.decoder_for(model)
    default = decoder._step_and_choose
    try:
        for setting in SETTINGS[1:3] + SETTINGS[4:]:
            place = uniform if is_random(setting) else None
            call = (model, ids, copied(start), place, seen, 2999)
            decoder._step_and_choose = torch.ops.mamba_ssm._decode_and_choose.reference
            expected, reference_logits = chosen(*call, **setting)
            decoder._step_and_choose = default
            for isa in native.available_cpu_isas():
                native.force_cpu_isa(isa)
                actual, logits = chosen(*call[:2], copied(start), *call[3:], **setting)
                tolerance = 1e-4 if dtype == F32 else 0.15
                torch.testing.assert_close(logits, reference_logits, rtol=tolerance, atol=tolerance)
                # Logits differ in their last bits, and so may a token at the edge of its place.
                allowed = 1 if dtype == F32 else 6
                assert int((actual != expected).sum()) <= allowed, (setting, isa)
    finally:
        native.force_cpu_isa("auto")


@pytest.mark.parametrize("setting", SETTINGS[4:], ids=str)
def test_sampling_outside_takes_the_same_tokens(setting):
    model = make_model(vocab_size=3001)
    ids = torch.arange(64)
    generator = torch.Generator().manual_seed(9)
    uniform = torch.rand(64, dtype=torch.double, generator=generator)
    setting = {k: v for k, v in setting.items() if k != "repetition_penalty"}
    tokens, logits = chosen(model, ids, random_cache(model, 64), uniform, **setting)
    again = sample(logits, **setting, generator=generator.manual_seed(9))
    assert torch.equal(tokens, again)


def test_identical_at_any_number_of_threads():
    before = torch.get_num_threads()
    model = make_model(d_model=128, n_layer=2, vocab_size=9000)
    prompt = torch.randint(0, 9000, (5, 3), generator=torch.Generator().manual_seed(4))
    try:
        for setting in SETTINGS:
            results = []
            for count in (1, 2, 7):
                torch.set_num_threads(count)
                results.append(model.generate(prompt, 30, seed=5, **setting))
            assert all(torch.equal(r, results[0]) for r in results[1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_without_a_distribution(value):
    model = make_model()
    with torch.no_grad():
        model.backbone.embedding.weight[5] = value
    ids, cache = torch.tensor([5, 6]), random_cache(model, 2)
    with pytest.raises(RuntimeError, match="nothing to sample"):
        chosen(model, ids, copied(cache), places(2), top_k=0)
    with pytest.raises(RuntimeError, match="nothing to sample"):
        model.generate(ids[:, None], 6, top_k=0)
    tokens, logits = chosen(model, ids, copied(cache), top_k=1)
    assert torch.equal(tokens, logits.argmax(-1))


def test_ties():
    """Equal logits: the first is the most likely, all that equal the k-th stay, the nucleus takes
    the first ones."""
    model = make_model(n_layer=1, vocab_size=100)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    ids, cache = torch.full((2000,), 3), random_cache(model, 2000)
    assert not bool(chosen(model, ids, copied(cache), top_k=1)[0].any())
    uniform = places(2000)
    every = chosen(model, ids, copied(cache), uniform, top_k=5)[0]
    assert torch.equal(every, (uniform * 100).long())
    some = chosen(model, ids, copied(cache), uniform, top_k=0, top_p=0.255)[0]
    assert torch.equal(some, (uniform * 26).long())


def test_op_is_registered_properly():
    model = make_model()
    with torch.no_grad():
        d = cpu_decoder.decoder_for(model)
    cache = random_cache(model, 2)
    conv, ssm = ([cache[i][part] for i in range(3)] for part in (0, 1))
    for seen, uniform in ((None, None), (torch.ones(2, 77, dtype=torch.bool), places(2))):
        args = (
            torch.tensor([1, 2]), d.embedding, d.pack, d.layout, conv, ssm, d.new_logits(2),
            torch.zeros(2, dtype=torch.long), seen, uniform, 77, 9, 0.9, 0.01, 0.8, 1.2,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.mamba_ssm._decode_and_choose.default, args)


def test_bad_calls_say_what_is_wrong_and_write_nothing():
    model = make_model()
    start = random_cache(model, 2)
    cache, ids, seen = copied(start), torch.tensor([1, 2]), torch.ones(2, 77, dtype=torch.bool)
    for message, arguments in {
        "uniform must be contiguous": {"uniform": places(3)},
        "seen must be contiguous": {"seen": seen[:, :70]},
        "vocab_size must be in": {"vocab": 78},
        "temperature must be positive": {"uniform": places(2), "temperature": 0.0},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            chosen(model, ids, cache, **({"top_k": 0} | arguments))
    for i, layer in cache.items():
        assert all(torch.equal(a, b) for a, b in zip(layer, start[i], strict=True))
