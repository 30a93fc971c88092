"""Generation: equal to the plain forward pass however the prompt is padded, cut or continued."""

from __future__ import annotations

import pytest
import torch
from generation_helpers import BYTE_VOCAB, HYBRID, Letters, padded, prompt, tiny_lm

from mamba_ssm.utils.generation import (
    GenerationState,
    decode,
)

MODELS = {"mamba": {}, "hybrid": HYBRID, "mlp": {"d_intermediate": 24}}


@pytest.fixture(params=list(MODELS))
def model(request, device):
    return tiny_lm(device=device, **MODELS[request.param])


def splitting_tokens(rows: torch.Tensor, count: int) -> list[int]:
    """`count` tokens of generated rows (b, n) at which the rows would end most differently."""

    def ends(tokens):
        return {
            next((i for i, t in enumerate(row) if t in tokens), len(row)) for row in rows.tolist()
        }

    chosen: list[int] = []
    for _ in range(count):
        rest = [t for t in rows.unique().tolist() if t not in chosen]
        chosen.append(max(rest, key=lambda t: (len(ends([*chosen, t])), min(ends([*chosen, t])))))
    return chosen


# -- against the forward pass ----------------------------------------------------------------------


def test_greedy_decoding_is_the_argmax_of_the_forward_pass(model, device):
    ids = prompt(3, 5, device)
    out = model.generate(ids, 25)
    assert out.shape == (3, 25) and torch.equal(out[:, :5], ids)
    logits = model(out[:, :-1]).logits[:, 4:]
    assert torch.equal(logits.argmax(-1), out[:, 5:])
    assert len(out[:, 5:].unique()) > 10, "the test model repeats itself: it would prove nothing"


def test_forced_decoding_gives_the_logits_of_the_forward_pass(model, device):
    ids, teacher = prompt(2, 4, device), prompt(2, 16, device, seed=1)
    out = model.generate(
        ids, 16, teacher_outputs=teacher, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(out.sequences[:, 4:], teacher[:, 4:])
    expected = model(out.sequences[:, :-1]).logits[:, 3:]
    torch.testing.assert_close(torch.stack(out.scores, 1), expected, rtol=1e-5, atol=1e-4)


def test_teacher_shorter_than_the_result_is_followed_by_free_tokens(device):
    model = tiny_lm(device=device)
    ids, teacher = prompt(2, 4, device), prompt(2, 6, device, seed=1)
    out = model.generate(ids, 12, teacher_outputs=teacher)
    assert torch.equal(out[:, 4:6], teacher[:, 4:])
    assert torch.equal(out, model.generate(out[:, :6], 12))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 11, 100])
def test_prefill_in_chunks_is_the_whole_prefill(model, device, chunk):
    ids = prompt(2, 11, device)
    assert torch.equal(model.generate(ids, 20, prefill_chunk_size=chunk), model.generate(ids, 20))


@pytest.mark.parametrize("sides", ["lll", "rrr", "lrl"])
@pytest.mark.parametrize("chunk", [None, 1, 2, 4])
def test_padded_rows_come_out_as_alone(model, device, sides, chunk):
    rows = [prompt(1, n, device, seed=n)[0] for n in (6, 1, 4)]
    ids, mask = padded(rows, sides)
    out = model.generate(ids, 16, attention_mask=mask, prefill_chunk_size=chunk)
    assert torch.equal(out[:, :6], ids), "the prompt must be given back as it was"
    for row, result in zip(rows, out, strict=True):
        alone = model.generate(row[None], len(row) + 10)[0]
        assert torch.equal(result[6:], alone[len(row) :])


def test_a_mask_may_have_holes_and_any_dtype(device):
    model = tiny_lm(device=device)
    ids = torch.tensor([[3, 9, 9, 4, 5]], device=device)
    expected = model.generate(torch.tensor([[3, 4, 5]], device=device), 10)[:, 3:]
    for dtype in (torch.bool, torch.int64, torch.float32):
        mask = torch.tensor([[1, 0, 0, 1, 1]], device=device).to(dtype)
        assert torch.equal(model.generate(ids, 12, attention_mask=mask)[:, 5:], expected)


# -- the end of a row ------------------------------------------------------------------------------


def test_rows_end_at_their_own_eos(model, device):
    """The historical loop stopped only when all rows emitted EOS on the same step."""
    ids = prompt(2, 5, device)
    free = model.generate(ids, 30)
    eos = splitting_tokens(free[:, 5:], 2)
    out = model.generate(ids, 30, eos_token_id=eos, pad_token_id=49)
    lengths = []
    for row, result in zip(free[:, 5:].tolist(), out[:, 5:].tolist(), strict=True):
        end = min((row.index(e) + 1 for e in eos if e in row), default=len(row))
        assert result[:end] == row[:end] and set(result[end:]) <= {49}
        lengths.append(end)
    assert lengths[0] != lengths[1], "the test needs rows of different lengths"
    assert out.shape[1] == 5 + max(lengths)


def test_finished_rows_get_eos_when_there_is_no_pad_token(device):
    model = tiny_lm(device=device)
    ids = prompt(2, 5, device)
    eos = int(model.generate(ids, 30)[0, 5])
    out = model.generate(ids, 30, eos_token_id=torch.tensor(eos))
    assert out[0, 5] == eos and (out[0, 5:] == eos).all()


def test_at_least_one_token_and_max_length_counts_the_prompt(device):
    model = tiny_lm(device=device)
    ids = prompt(1, 5, device)
    assert model.generate(ids, 5).shape == (1, 6)
    assert model.generate(ids, 6).shape == (1, 6)
    assert model.generate(ids, 7).shape == (1, 7)


@pytest.fixture(scope="module")
def byte_tokenizer():
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def test_rows_end_at_their_own_stop_string(device):
    model = tiny_lm(device=device)
    ids = prompt(3, 5, device)
    free = model.generate(ids, 30)
    stops = [Letters().decode(free[0, 9:12].tolist()), Letters().decode(free[1, 20:21].tolist())]
    out = model.generate(ids, 30, stop_strings=stops, tokenizer=Letters(), pad_token_id=0)
    ends = []
    for row, result in zip(free[:, 5:].tolist(), out[:, 5:].tolist(), strict=True):
        text = Letters().decode(row)
        end = min((text.index(s) + len(s) for s in stops if s in text), default=len(row))
        assert result[:end] == row[:end] and set(result[end:]) <= {0}
        ends.append(end)
    assert len(set(ends)) > 1 and out.shape[1] == 5 + max(ends)


def test_a_stop_string_in_the_prompt_does_not_count(device):
    model = tiny_lm(device=device)
    ids = prompt(1, 5, device)
    free = model.generate(ids, 12)
    stop = Letters().decode(ids[0].tolist())
    assert torch.equal(model.generate(ids, 12, stop_strings=stop, tokenizer=Letters()), free)


def test_stop_strings_of_several_bytes(byte_tokenizer, device):
    model = tiny_lm(BYTE_VOCAB, device=device)
    ids = torch.tensor([byte_tokenizer("x", add_special_tokens=False).input_ids], device=device)
    text = "ab→cd"
    forced = byte_tokenizer(text, add_special_tokens=False).input_ids
    teacher = torch.tensor([ids[0].tolist() + forced], device=device)
    out = model.generate(
        ids, 50, teacher_outputs=teacher, stop_strings=["→"], tokenizer=byte_tokenizer
    )
    assert byte_tokenizer.decode(out[0]) == "xab→"


# -- sampling --------------------------------------------------------------------------------------


def test_a_seed_repeats_the_text_and_leaves_the_global_generator_alone(device):
    model = tiny_lm(device=device)
    ids = prompt(2, 5, device)
    before = torch.get_rng_state()
    first = model.generate(ids, 40, top_k=0, temperature=3.0, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert torch.equal(first, model.generate(ids, 40, top_k=0, temperature=3.0, seed=1))
    assert not torch.equal(first, model.generate(ids, 40, top_k=0, temperature=3.0, seed=2))
    assert not torch.equal(first[0, 5:], first[1, 5:])


def test_scores_are_the_logits_before_penalty_and_filters(device):
    model = tiny_lm(device=device)
    ids = prompt(2, 5, device)
    out = decode(
        ids, model, 15, top_k=2, temperature=2.0, repetition_penalty=5.0, seed=0, output_scores=True
    )
    expected = model(out.sequences[:, :-1]).logits[:, 4:]
    torch.testing.assert_close(torch.stack(out.scores, 1), expected, rtol=1e-5, atol=1e-4)
    assert decode(ids, model, 15).scores is None


def test_vocab_size_leaves_out_the_padding_of_the_vocabulary(device):
    model = tiny_lm(device=device)
    with torch.no_grad():
        model.lm_head.weight[20:] *= 100
    ids = prompt(2, 5, device)
    assert int(model.generate(ids, 30)[:, 5:].max()) >= 20
    out = decode(ids, model, 30, vocab_size=20, output_scores=True)
    assert int(out.sequences[:, 5:].max()) < 20
    assert out.scores[0].shape == (2, 20)


def test_a_huge_repetition_penalty_never_repeats_and_does_not_see_padding(device):
    model = tiny_lm(device=device)
    with torch.no_grad():
        model.backbone.norm_f.weight.abs_()
    rows = [prompt(1, n, device, seed=n)[0] for n in (6, 3)]
    # What the padded row wants to say first: counted as seen, it could not.
    wanted = int(model.generate(rows[1][None], 4, repetition_penalty=1e9)[0, 3])
    ids, mask = padded(rows, "lr", pad_token=wanted)
    out = model.generate(ids, 26, attention_mask=mask, repetition_penalty=1e9)
    for row, result in zip(rows, out, strict=True):
        alone = model.generate(row[None], len(row) + 20, repetition_penalty=1e9)[0]
        assert torch.equal(result[6:], alone[len(row) :])
        tokens = result[6:].tolist()
        assert len(set(tokens)) == len(tokens) and not set(tokens) & set(row.tolist())


# -- saved states ----------------------------------------------------------------------------------


def test_a_continued_state_is_one_long_generation(model, device):
    ids = prompt(2, 6, device)
    whole = model.generate(ids, 26)
    first = model.generate(ids, 12, return_state=True)
    more = model.generate(ids[:, :0], 14, state=first.state)
    assert torch.equal(torch.cat([first.sequences, more], 1), whole)
    assert first.state.tokens_seen.tolist() == [12, 12]


def test_a_chat_turn_costs_its_own_length(model, device):
    ids, turn = prompt(2, 6, device), prompt(2, 3, device, seed=9)
    first = model.generate(ids, 12, return_state=True)
    consumed = []
    hook = model.backbone.embedding.register_forward_hook(
        lambda module, args, out: consumed.append(args[0].shape[1])
    )
    second = model.generate(turn, 9, state=first.state, return_state=True)
    hook.remove()
    assert consumed == [1 + 3, 1, 1, 1, 1, 1], "the pending token, the turn, then step by step"
    history = torch.cat([first.sequences, turn], 1)
    assert torch.equal(second.sequences[:, 3:], model.generate(history, 21)[:, 15:])
    assert second.state.tokens_seen.tolist() == [21, 21]


def test_rows_that_end_early_keep_the_state_they_ended_with(model, device):
    """Rows of different prompts, ends and turns together, each against its own conversation."""
    rows = [prompt(1, n, device, seed=n)[0] for n in (6, 3, 5)]
    ids, mask = padded(rows, "lrr")
    free = model.generate(ids, 24, attention_mask=mask)
    eos = splitting_tokens(free[:, 6:], 2)
    both = model.generate(ids, 24, attention_mask=mask, eos_token_id=eos, return_state=True)
    turns = [prompt(1, n, device, seed=20 + n)[0] for n in (2, 4, 1)]
    turn_ids, turn_mask = padded(turns, "rll")
    answer = model.generate(turn_ids, 14, attention_mask=turn_mask, state=both.state)
    counts = set()
    for i, (row, turn) in enumerate(zip(rows, turns, strict=True)):
        alone = model.generate(row[None], len(row) + 18, eos_token_id=eos, return_state=True)
        counts.add(alone.sequences.shape[1] - len(row))
        assert both.state.tokens_seen[i] == alone.sequences.shape[1]
        reply = model.generate(turn[None], len(turn) + 10, state=alone.state)
        assert torch.equal(answer[i, 4:], reply[0, len(turn) :])
    assert len(counts) > 1, "the test needs rows of different lengths"


def test_states_are_copies_that_can_be_continued_many_times(model, device):
    first = model.generate(prompt(2, 6, device), 12, return_state=True)
    caches = {
        i: [None if t is None else t.clone() for t in c] for i, c in first.state.caches.items()
    }
    turn = prompt(2, 3, device, seed=4)
    a = model.generate(turn, 20, state=first.state)
    model.generate(prompt(2, 2, device, seed=5), 20, state=first.state)
    assert torch.equal(a, model.generate(turn, 20, state=first.state))
    for layer, tensors in caches.items():
        for before, after in zip(tensors, first.state.caches[layer], strict=True):
            assert before is after is None or torch.equal(before, after)


def test_a_state_survives_saving_under_weights_only(model, device, tmp_path):
    first = model.generate(prompt(2, 6, device), 12, return_state=True)
    torch.save(first.state.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu")
    state = GenerationState.from_state_dict(loaded).to(device)
    turn = prompt(2, 3, device, seed=4)
    assert torch.equal(
        model.generate(turn, 12, state=state), model.generate(turn, 12, state=first.state)
    )


def test_the_repetition_penalty_remembers_a_continued_state(device):
    model = tiny_lm(device=device)
    ids = prompt(2, 6, device)
    whole = model.generate(ids, 22, repetition_penalty=1e9)
    first = model.generate(ids, 14, repetition_penalty=1e9, return_state=True)
    more = model.generate(ids[:, :0], 8, repetition_penalty=1e9, state=first.state)
    assert torch.equal(torch.cat([first.sequences, more], 1), whole)


def test_results_and_states_are_ordinary_tensors(device):
    model = tiny_lm(device=device)
    out = model.generate(prompt(1, 4, device), 8, return_state=True)
    assert not out.sequences.is_inference() and not out.state.pending.is_inference()
    assert not any(t.is_inference() for c in out.state.caches.values() for t in c)
    model(out.sequences).logits.sum().backward()
    assert model.backbone.embedding.weight.grad.abs().sum() > 0
