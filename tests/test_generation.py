"""Generation: equal to the plain forward pass however the prompt is padded, cut or continued."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from generation_helpers import BYTE_VOCAB, HYBRID, tiny_lm
from torch import nn

import mamba_ssm
from mamba_ssm.utils import generation
from mamba_ssm.utils.generation import (
    GenerationMixin,
    GenerationState,
    InferenceParams,
    TextStreamer,
    decode,
)

MODELS = {"mamba": {}, "hybrid": HYBRID, "mlp": {"d_intermediate": 24}}


@pytest.fixture(params=list(MODELS))
def model(request, device):
    return tiny_lm(device=device, **MODELS[request.param])


def prompt(batch: int, length: int, device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 50, (batch, length), generator=generator).to(device)


def padded(
    rows: list[torch.Tensor], sides: str, pad_token: int = 7
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as one batch and its mask; 'l' or 'r' says on which side a row's padding goes."""
    longest = max(len(row) for row in rows)
    ids, mask = [], []
    for row, side in zip(rows, sides, strict=True):
        pad = row.new_full((longest - len(row),), pad_token)
        order = (pad, row) if side == "l" else (row, pad)
        ids.append(torch.cat(order))
        mask.append(torch.cat([torch.zeros_like(p) if p is pad else p * 0 + 1 for p in order]))
    return torch.stack(ids), torch.stack(mask)


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


class Letters:
    """A tokenizer whose token i is one printable letter; each token is its own text."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(0x100 + i) for i in ids)


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


# -- streaming -------------------------------------------------------------------------------------


class Recorder:
    def __init__(self, stop_after: int | None = None):
        self.values, self.ended, self.stop_after = [], 0, stop_after

    def put(self, value):
        self.values.append(value)
        if self.stop_after is not None and len(self.values) > self.stop_after:
            raise KeyboardInterrupt

    def end(self):
        self.ended += 1


def test_a_streamer_gets_the_prompt_and_then_every_step(device):
    model = tiny_lm(device=device)
    recorder = Recorder()
    out = model.generate(prompt(2, 4, device), 10, streamer=recorder)
    assert [tuple(v.shape) for v in recorder.values] == [(2, 4)] + [(2,)] * 6
    assert all(v.device.type == "cpu" for v in recorder.values)
    streamed = torch.cat([recorder.values[0], torch.stack(recorder.values[1:], 1)], 1)
    assert torch.equal(streamed, out.cpu()) and recorder.ended == 1


@pytest.mark.parametrize("own", [True, False])
def test_text_is_streamed_without_breaking_characters(byte_tokenizer, own, device):
    from transformers import TextStreamer as TransformersStreamer

    model = tiny_lm(BYTE_VOCAB, device=device)
    text = "naïve 世界 🎉 done\nnext"
    forced = byte_tokenizer("x" + text, add_special_tokens=False).input_ids
    teacher = torch.tensor([forced], device=device)
    written = io.StringIO()
    if own:
        streamer = TextStreamer(byte_tokenizer, skip_prompt=True, stream=written)
    else:
        streamer = TransformersStreamer(byte_tokenizer, skip_prompt=True)
        streamer.on_finalized_text = lambda t, stream_end=False: written.write(
            t + "\n" * stream_end
        )
    model.generate(teacher[:, :1], len(forced), teacher_outputs=teacher, streamer=streamer)
    assert written.getvalue() == text + "\n"


def test_own_streamer_prints_each_character_as_soon_as_it_is_complete(byte_tokenizer):
    written = io.StringIO()
    streamer = TextStreamer(byte_tokenizer, stream=written)
    streamer.put(torch.tensor([byte_tokenizer("é", add_special_tokens=False).input_ids]))
    seen = []
    for token in byte_tokenizer("a→\udc00".encode("utf-8", "ignore").decode()).input_ids[:-1]:
        streamer.put(torch.tensor([token]))
        seen.append(written.getvalue())
    assert seen == ["éa", "éa", "éa", "éa→"]
    streamer.end()
    assert written.getvalue() == "éa→\n"
    with pytest.raises(ValueError, match="batch size 1"):
        TextStreamer(byte_tokenizer).put(torch.zeros(2, 3, dtype=torch.long))


def test_bytes_that_are_no_text_do_not_stop_the_stream(byte_tokenizer):
    raw = b"a\xff\xff\xe2\x82\xffb" + b"\xff" * 20 + "é".encode()
    written = io.StringIO()
    streamer = TextStreamer(byte_tokenizer, stream=written)
    streamer.put(torch.tensor([[raw[0] + 3]]))
    for byte in raw[1:]:
        streamer.put(torch.tensor([byte + 3]))
    streamer.end()
    assert written.getvalue() == raw.decode("utf-8", "ignore") + "\n"


def test_an_interrupt_leaves_the_model_usable(model, device):
    ids = prompt(2, 4, device)
    expected = model.generate(ids, 12)
    recorder = Recorder(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, 12, streamer=recorder, cg=True)
    assert recorder.ended == 1
    assert torch.equal(model.generate(ids, 12), expected)
    assert torch.equal(model.generate(ids, 12, cg=True), expected)


# -- CUDA graphs -----------------------------------------------------------------------------------


def test_cg_means_nothing_on_the_cpu():
    model = tiny_lm()
    ids = prompt(2, 4, "cpu")
    assert torch.equal(model.generate(ids, 12, cg=True), model.generate(ids, 12))
    with pytest.raises(ValueError, match="need a model on a CUDA device"):
        generation.update_graph_cache(model, None, 1, 4, 8)


@pytest.fixture
def cuda_only():
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a CUDA device")


def test_graphs_serve_changing_batches_lengths_and_weights(cuda_only):
    """The historical cache was reused when the batch shrank."""
    model = tiny_lm(device="cuda")
    for batch, length in ((4, 12), (2, 12), (4, 30), (1, 8), (4, 12)):
        ids = prompt(batch, 5, "cuda", seed=batch)
        assert torch.equal(model.generate(ids, length, cg=True), model.generate(ids, length))
    kept = model._decoding_cache
    model.generate(prompt(4, 5, "cuda"), 12, cg=True)
    assert model._decoding_cache is kept, "an unchanged call must not capture again"
    other = tiny_lm(device="cuda", seed=1)
    model.load_state_dict(other.state_dict(), assign=True)
    ids = prompt(4, 5, "cuda")
    assert torch.equal(model.generate(ids, 12, cg=True), other.generate(ids, 12))


def test_graphs_are_captured_again_for_another_backend(cuda_only):
    model = tiny_lm(device="cuda")
    ids = prompt(2, 5, "cuda")
    expected = model.generate(ids, 12, cg=True)
    before = model._decoding_cache
    with mamba_ssm.backend("reference"):
        assert torch.equal(model.generate(ids, 12, cg=True), expected)
    assert model._decoding_cache is not before


def test_graphs_with_states_padding_and_eos(cuda_only):
    model = tiny_lm(device="cuda")
    ids, mask = padded([prompt(1, n, "cuda", seed=n)[0] for n in (6, 3)], "lr")
    eos = int(model.generate(ids, 24, attention_mask=mask)[0, 9])
    options = {"attention_mask": mask, "eos_token_id": eos, "return_state": True}
    eager = model.generate(ids, 24, **options)
    graph = model.generate(ids, 24, cg=True, **options)
    assert torch.equal(eager.sequences, graph.sequences)
    turn = prompt(2, 3, "cuda", seed=4)
    assert torch.equal(
        model.generate(turn, 12, state=eager.state),
        model.generate(turn, 12, state=graph.state, cg=True),
    )


def test_graphs_refuse_attention_layers(cuda_only):
    with pytest.raises(ValueError, match="pass cg=False"):
        tiny_lm(device="cuda", **HYBRID).generate(prompt(1, 4, "cuda"), 8, cg=True)


# -- the surface -----------------------------------------------------------------------------------


def test_result_is_transformers_output(device):
    from transformers.generation import GenerateDecoderOnlyOutput

    model = tiny_lm(device=device)
    out = model.generate(prompt(1, 4, device), 8, return_dict_in_generate=True, output_scores=True)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert len(out.scores) == 4 and out.state is None and out["sequences"] is out.sequences
    assert isinstance(model.generate(prompt(1, 4, device), 8), torch.Tensor)
    assert isinstance(decode(prompt(1, 4, device), model, 8), GenerateDecoderOnlyOutput)


def test_timing_is_printed_without_cuda(capsys):
    tiny_lm().generate(prompt(1, 4, "cpu"), 8, enable_timing=True)
    assert "Prompt processing + decoding time: " in capsys.readouterr().out


def test_generation_needs_no_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from generation_helpers import tiny_lm\n"
        "import torch\n"
        "print(tiny_lm().generate(torch.tensor([[1, 2]]), 6).shape)\n"
    )
    root = Path(mamba_ssm.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "torch.Size([1, 6])\n", done.stderr


def test_inference_params_reset():
    params = InferenceParams(10, 2, seqlen_offset=4, lengths_per_sample=torch.ones(2))
    params.key_value_memory_dict[0] = "kept"
    params.reset(20, 3)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (20, 3, 0)
    assert params.lengths_per_sample.tolist() == [0, 0] and params.key_value_memory_dict
    assert InferenceParams(1, 1).key_value_memory_dict is not params.key_value_memory_dict


class Foreign(nn.Module, GenerationMixin):
    """A client's own model: the historical forward, no caches allocated beforehand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 8)
        self.head = nn.Linear(8, 30)

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
        x = self.embedding(input_ids).cumsum(1)
        memory = inference_params.key_value_memory_dict
        if inference_params.seqlen_offset > 0:
            assert position_ids.tolist() == [[inference_params.seqlen_offset]] * len(x)
            x = x + memory[0]
        memory[0] = x[:, -1:]
        logits = self.head(torch.tanh(x[:, -num_last_tokens:]) * 5)
        return type("Output", (), {"logits": logits})()


def test_a_clients_own_model_generates():
    model = Foreign()
    out = model.generate(torch.tensor([[1, 2, 3], [4, 5, 6]]), 20)
    hidden = torch.tanh(model.embedding(out[:, :-1]).cumsum(1)[:, 2:]) * 5
    assert torch.equal(model.head(hidden).argmax(-1), out[:, 3:])
    with pytest.raises(NotImplementedError, match="must define allocate_inference_cache"):
        model.allocate_inference_cache(1, 1)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
BAD = [
    ({"input_ids": IDS[:, :0]}, ValueError, "the prompt is empty"),
    ({"input_ids": IDS[:0]}, ValueError, r"must be \(batch > 0, length\)"),
    ({"input_ids": IDS[0]}, ValueError, r"must be \(batch > 0, length\)"),
    ({"input_ids": IDS.float()}, TypeError, "int64 tensor, got torch.float32"),
    ({"input_ids": [[1, 2]]}, TypeError, "int64 tensor, got list"),
    ({"input_ids": IDS + 1000}, ValueError, r"must be in \[0, 56\), got 1001 to 1006"),
    ({"input_ids": -IDS}, ValueError, r"must be in \[0, 56\), got -6 to -1"),
    ({"input_ids": IDS.to("meta")}, ValueError, "input_ids are on meta, the model is on cpu"),
    ({"max_length": 2}, ValueError, "prompt has 3 tokens and max_length, .* is 2"),
    ({"max_length": 8.0}, TypeError, "max_length must be an int"),
    ({"top_p": 1.5}, ValueError, "top_p must be in"),
    ({"top_p": -0.5}, ValueError, "top_p must be in"),
    ({"temperature": -1.0}, ValueError, "temperature must be >= 0"),
    ({"temperature": math.nan}, ValueError, "temperature must be >= 0"),
    ({"top_k": -1}, ValueError, "top_k must be an integer >= 0"),
    ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty must be > 0"),
    ({"vocab_size": 0}, ValueError, "vocab_size must be >= 1"),
    ({"prefill_chunk_size": 0}, ValueError, "prefill_chunk_size must be >= 1"),
    (
        {"attention_mask": torch.ones(2, 4)},
        ValueError,
        r"shape of input_ids, \(2, 3\), got \(2, 4\)",
    ),
    ({"attention_mask": IDS}, ValueError, "only 0 .* and 1"),
    ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, ValueError, r"empty in rows \[1\]"),
    ({"stop_strings": "x"}, ValueError, "stop_strings need tokenizer="),
    ({"stop_strings": ["x", ""], "tokenizer": Letters()}, ValueError, "non-empty strings"),
    ({"stop_strings": [], "tokenizer": Letters()}, ValueError, "non-empty strings"),
    ({"teacher_outputs": IDS[:1]}, ValueError, r"teacher_outputs must be \(2, n\) int64"),
    ({"teacher_outputs": IDS.float()}, ValueError, r"teacher_outputs must be \(2, n\) int64"),
    ({"state": 3}, TypeError, "state must be a GenerationState, got int"),
    ({"max_tokens": 3}, TypeError, r"does not know \['max_tokens'\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_calls_say_what_is_wrong_before_anything_runs(change, error, message):
    recorder = Recorder()
    arguments = {"input_ids": IDS, "max_length": 8, "streamer": recorder, **change}
    with pytest.raises(error, match=message):
        tiny_lm().generate(**arguments)
    assert not recorder.values


def test_states_of_another_model_batch_or_dtype_are_refused():
    state = tiny_lm().generate(IDS, 6, return_state=True).state
    with pytest.raises(ValueError, match="state has 2 rows, input_ids have 1"):
        tiny_lm().generate(IDS[:1], 8, state=state)
    with pytest.raises(ValueError, match=r"the model needs .* torch.bfloat16"):
        tiny_lm(dtype=torch.bfloat16).generate(IDS, 8, state=state)
    with pytest.raises(ValueError, match=r"the state of layer 0 is .*the model needs"):
        tiny_lm(ssm_cfg={"d_state": 8}).generate(IDS, 8, state=state)
    with pytest.raises(ValueError, match="the state of layer 1 has 2 tensors"):
        tiny_lm(**HYBRID).generate(IDS, 8, state=state)
    one_layer = state.state_dict()
    one_layer["caches"] = {0: one_layer["caches"][0]}
    with pytest.raises(ValueError, match=r"caches for layers \[0\], the model for \[0, 1\]"):
        tiny_lm().generate(IDS, 8, state=GenerationState.from_state_dict(one_layer))
    for wrong in ({}, {"caches": {}}, 7):
        with pytest.raises(ValueError, match="not a saved generation state"):
            GenerationState.from_state_dict(wrong)
