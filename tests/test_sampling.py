"""Filters, penalty and sampling against their definitions, row by row, and as distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba_ssm.ops import native
from mamba_ssm.utils.generation import (
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / sum(weights) for w in weights]


def expected_distribution(row, top_k=0, top_p=0.0, min_p=0.0, temperature=1.0) -> list[float]:
    """The definition in plain Python: temperature, top-k, top-p, min-p, each renormalised."""
    probs = softmax([x / temperature for x in row])
    by_size = sorted(range(len(row)), key=lambda i: -probs[i])
    keep = set(by_size[:top_k] if top_k else by_size)

    def renormalised():
        total = sum(probs[i] for i in keep)
        return [p / total if i in keep else 0.0 for i, p in enumerate(probs)]

    if 0 < top_p < 1:
        current, mass, nucleus = renormalised(), 0.0, set()
        for i in by_size:
            if mass < top_p and i in keep:
                nucleus.add(i)
                mass += current[i]
        keep &= nucleus
    if min_p > 0:
        current = renormalised()
        keep = {i for i in keep if current[i] >= min_p * max(current)}
    return renormalised()


ROWS = [
    [2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0],
    [-3.0, 0.0, 0.25, 0.1, 3.0, 2.9, -1.0, 0.7],
    [0.3, 0.1, 0.2, 0.0, -0.1, 0.4, 0.5, 0.6],
]
SETTINGS = [
    {"top_k": 0},
    {"top_k": 3},
    {"top_k": 100},
    {"top_k": 0, "top_p": 0.8},
    {"top_k": 0, "top_p": 1.0, "temperature": 0.5},
    {"top_k": 0, "min_p": 0.3},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.2, "temperature": 1.7},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_samples_follow_the_filtered_distribution_of_each_row(setting):
    draws = 60_000
    logits = torch.tensor(ROWS)
    stacked = logits.repeat(draws, 1)
    before = stacked.clone()
    generator = torch.Generator().manual_seed(0)
    tokens = sample(stacked, **setting, generator=generator).view(draws, len(ROWS))
    assert torch.equal(stacked, before), "sample must not change the logits"
    for r, row in enumerate(ROWS):
        expected = expected_distribution(row, **setting)
        counts = torch.bincount(tokens[:, r], minlength=len(row)).tolist()
        assert all(c == 0 for c, p in zip(counts, expected, strict=True) if p == 0)
        cells = [(c, p * draws) for c, p in zip(counts, expected, strict=True) if p > 0]
        statistic = sum((c - e) ** 2 / e for c, e in cells)
        freedom = len(cells) - 1
        # Far beyond the 99.9 % point; a filter applied to the wrong row gives thousands.
        assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4, (r, counts)


@given(
    rows=st.lists(
        st.lists(st.integers(-40, 40), min_size=6, max_size=6, unique=True), min_size=1, max_size=4
    ),
    top_k=st.integers(0, 8),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_filters_keep_what_the_definition_keeps(rows, top_k, top_p, min_p):
    rows = [[x / 7 for x in row] for row in rows]
    logits = torch.tensor(rows, dtype=torch.float64)
    modify_logits_for_top_k_filtering(logits, top_k)
    modify_logits_for_top_p_filtering(logits, top_p)
    modify_logits_for_min_p_filtering(logits, min_p)
    for row, filtered in zip(rows, logits.tolist(), strict=True):
        kept = [x != -math.inf for x in filtered]
        assert kept == [p > 0 for p in expected_distribution(row, top_k, top_p, min_p)]
        assert all(x == y for x, y, k in zip(row, filtered, kept, strict=True) if k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_filters_work_in_every_dtype_and_keep_at_least_one_token(dtype):
    logits = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, -5.0]], dtype=dtype)
    for change, value in (
        (modify_logits_for_top_p_filtering, 1e-6),
        (modify_logits_for_min_p_filtering, 1.0),
        (modify_logits_for_top_k_filtering, 1),
    ):
        changed = logits.clone()
        change(changed, value)
        assert changed.dtype == dtype
        assert changed[0].tolist() == [-math.inf, -math.inf, 3.0]
        assert changed[1, 2] == -math.inf


def test_greedy_ways_all_give_the_likeliest_token():
    logits = torch.tensor(ROWS)
    best = logits.argmax(-1)
    assert torch.equal(sample(logits), best)
    assert torch.equal(sample(logits, top_k=1, temperature=0.0), best)
    assert torch.equal(sample(logits, top_k=1, temperature=100.0, top_p=0.9, min_p=0.1), best)
    assert torch.equal(sample(logits, top_k=0, temperature=0.0), best)


def test_the_generator_alone_decides():
    logits = torch.tensor(ROWS).repeat(20, 1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = sample(logits, top_k=0, generator=torch.Generator().manual_seed(3))
    again = sample(logits, top_k=0, generator=torch.Generator().manual_seed(3))
    other = sample(logits, top_k=0, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    globally = sample(logits, top_k=0)
    torch.manual_seed(5)
    assert torch.equal(globally, sample(logits, top_k=0))


def test_repetition_penalty_once_per_seen_token_with_the_right_sign():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0], [1.0, 1.0, -4.0, 3.0]])
    seen = torch.tensor([[0, 1, 0, 0], [2, 2, 3, 3]])
    result = modify_logit_for_repetition_penalty(logits, seen, 2.0)
    assert result is logits
    assert result.tolist() == [[1.0, -4.0, 1.0, 0.0], [1.0, 1.0, -8.0, 1.5]]
    assert modify_logit_for_repetition_penalty(logits, seen, 1.0) is logits


def test_an_empty_batch_gives_no_tokens():
    assert sample(torch.zeros(0, 5), top_k=0).shape == (0,)


BAD = [
    ({"top_k": -1}, "top_k must be an integer >= 0"),
    ({"top_k": 2.5}, "top_k must be an integer >= 0"),
    ({"top_k": 0, "top_p": -0.1}, r"top_p must be in \(0, 1\]"),
    ({"top_k": 0, "top_p": 1.1}, r"top_p must be in \(0, 1\]"),
    ({"top_k": 0, "top_p": math.nan}, r"top_p must be in \(0, 1\]"),
    ({"top_k": 0, "min_p": 1.5}, r"min_p must be in \(0, 1\]"),
    ({"top_k": 0, "temperature": -1.0}, "temperature must be >= 0"),
    ({"top_k": 0, "temperature": math.inf}, "temperature must be >= 0"),
    ({"top_k": 0, "temperature": math.nan}, "temperature must be >= 0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=str)
def test_bad_arguments_say_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.tensor(ROWS), **arguments)


@pytest.mark.parametrize("penalty", [0.0, -1.0, math.inf, math.nan])
def test_bad_penalty(penalty):
    with pytest.raises(ValueError, match="repetition_penalty must be > 0"):
        modify_logit_for_repetition_penalty(torch.zeros(1, 3), torch.zeros(1, 1).long(), penalty)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (2, 0)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match="logits must be"):
        sample(torch.zeros(shape))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])


@on_devices
@pytest.mark.parametrize("vocab", [1, 5, 2048, 11_264, 11_265, 50_280])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_greedy_takes_what_argmax_takes(vocab, dtype, device):
    """Also among equals, at both ends, beside infinities and with a NaN."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(14, vocab, generator=generator).to(device, dtype)
    logits[1], logits[2] = 0.0, -torch.inf
    logits[11], logits[11, vocab // 2 :], logits[12] = -0.0, 0.0, torch.nan
    logits[3, -1] = logits[4, 0] = 9.0
    logits[5, vocab // 2] = torch.nan
    logits[6, :: max(1, vocab // 7)] = 9.0
    logits[7, -2:] = 9.0
    logits[8, vocab // 3], logits[9, vocab // 3] = torch.inf, -torch.inf
    logits[10, vocab // 4], logits[10, -1] = torch.nan, torch.inf
    before = logits.clone()
    assert torch.equal(sample(logits), logits.argmax(-1))
    for part in (logits, logits[:, vocab // 3 :], logits[:, : vocab // 2 + 1]):
        places = torch.full((14,), -1, device=device)
        torch.ops.mamba_ssm._argmax_rows(part, places)
        assert torch.equal(places, part.argmax(-1))
    assert torch.equal(sample(logits[:, ::2]), logits[:, ::2].argmax(-1))
    assert sample(logits[:0]).shape == (0,)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)


@on_devices
def test_argmax_rows_is_registered_properly(device):
    arguments = (torch.randn(3, 50, device=device), torch.zeros(3, dtype=torch.long, device=device))
    op = torch.ops.mamba_ssm._argmax_rows
    torch.library.opcheck(op.default if device == "cuda" else op.reference, arguments)


@needs_cuda
@pytest.mark.skipif(not native.has_kernel("_argmax_rows", "cuda"), reason="no compiled kernel")
def test_argmax_rows_refuses_what_it_does_not_serve():
    values, places = torch.randn(3, 8, device="cuda"), torch.zeros(3, dtype=torch.long).cuda()
    for bad in (
        (values[:, ::2], places), (values[:, :0], places), (values.double(), places),
        (values, places[:2]), (values, places.int()), (values, places.cpu()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="_argmax_rows"):
            torch.ops.mamba_ssm._argmax_rows(*bad)
