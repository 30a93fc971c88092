"""Generation: streaming, CUDA graphs, signatures and bad calls."""

from __future__ import annotations

import inspect
import io
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from generation_helpers import BYTE_VOCAB, HYBRID, Letters, Recorder, padded, prompt, tiny_lm
from torch import nn

import mamba_ssm
from mamba_ssm.utils import cuda_graph, generation
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


@pytest.fixture(scope="module")
def byte_tokenizer():
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


# -- streaming -------------------------------------------------------------------------------------


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


class Replacing:
    """A byte tokenizer that shows what is no text, or not yet, as U+FFFD."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(i - 3 for i in ids).decode("utf-8", "replace")


@pytest.mark.parametrize("errors", ["ignore", "replace"])
def test_bytes_that_are_no_text_do_not_stop_the_stream(byte_tokenizer, errors):
    tokenizer = byte_tokenizer if errors == "ignore" else Replacing()
    for stray in range(12):
        raw = b"a\xff\xe2\x82\xffb" + b"\xff" * stray + "é🎉".encode()
        written = io.StringIO()
        streamer = TextStreamer(tokenizer, stream=written)
        streamer.put(torch.tensor([[raw[0] + 3]]))
        for byte in raw[1:]:
            streamer.put(torch.tensor([byte + 3]))
        assert written.getvalue() == raw.decode("utf-8", errors)
        streamer.end()


def test_an_interrupt_leaves_the_model_usable(model, device):
    ids = prompt(2, 4, device)
    expected = model.generate(ids, 12)
    recorder = Recorder(stop_after=3)
    graphs = device == "cpu" or not model.config.attn_layer_idx  # attention has no graphs
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, 12, streamer=recorder, cg=graphs)
    assert recorder.ended == 1
    assert torch.equal(model.generate(ids, 12), expected)
    assert torch.equal(model.generate(ids, 12, cg=graphs), expected)


# -- CUDA graphs -----------------------------------------------------------------------------------


def test_cg_means_nothing_on_the_cpu():
    model = tiny_lm()
    ids = prompt(2, 4, "cpu")
    assert torch.equal(model.generate(ids, 12, cg=True), model.generate(ids, 12))
    with pytest.raises(ValueError, match="need a model on a CUDA device"):
        generation.update_graph_cache(model, None, 1, 4, 8)


class PretendCuda:
    """As much of a model on a GPU as the choice between old and new graphs looks at."""

    def __init__(self):
        self.weight = torch.zeros(3)

    def parameters(self):
        address = self.weight.data_ptr()
        yield SimpleNamespace(device=torch.device("cuda", 0), data_ptr=lambda: address)

    def buffers(self):
        return ()

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None):
        return {0: (torch.zeros(batch_size, 2),)}


def test_which_graphs_are_kept(monkeypatch):
    """The historical cache was reused when the batch shrank."""
    captured = []

    def capture(model, params, batch_size, max_seqlen, length, **options):
        captured.append((batch_size, max_seqlen))
        rows = params.key_value_memory_dict[0][0].shape[0]
        return lambda ids, positions, seqlen: (rows, tuple(ids.shape))

    monkeypatch.setattr(cuda_graph, "capture_graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    zeros = torch.zeros_like
    monkeypatch.setattr(torch, "zeros", lambda *s, device=None, **o: zeros(torch.empty(s, **o)))
    model, cache = PretendCuda(), None
    for batch, length, again in (
        (4, 20, True),
        (4, 20, False),
        (4, 12, False),
        (4, 30, True),
        (2, 12, True),
        (4, 30, True),
    ):
        before = len(captured)
        cache = generation.update_graph_cache(model, cache, batch, 5, length)
        assert (len(captured) > before) == again, (batch, length)
        step = torch.ones(batch, 1, dtype=torch.long)
        assert cache.run(step, step, 5) == (batch, (batch, 1))
        cache.inference_params.seqlen_offset = 7
    assert captured == [(4, 20), (4, 30), (2, 12), (4, 30)]
    for change in ("weights", "dtype"):
        if change == "weights":
            model.weight = torch.zeros(3)
        dtype = torch.float16 if change == "dtype" else None
        cache = generation.update_graph_cache(model, cache, 4, 5, 30, dtype=dtype)
        assert cache.inference_params.seqlen_offset == 0
    assert len(captured) == 6


@pytest.fixture
def cuda_only():
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a CUDA device")


def test_graphs_serve_changing_batches_lengths_and_weights(cuda_only):
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


SIGNATURES = {
    "decode": "input_ids model max_length top_k=1 top_p=0.0 min_p=0.0 temperature=1.0 "
    "repetition_penalty=1.0 eos_token_id=None teacher_outputs=None vocab_size=None cg=False "
    "enable_timing=False output_scores=False streamer=None",
    "sample": "logits top_k=1 top_p=0.0 min_p=0.0 temperature=1.0",
    "GenerationMixin.generate": "self input_ids max_length top_k=1 top_p=0.0 min_p=0.0 "
    "temperature=1.0 return_dict_in_generate=False output_scores=False",
    "update_graph_cache": "model cache batch_size seqlen_og max_seqlen decoding_seqlens=(1,) "
    "dtype=None n_warmups=2",
    "capture_graph": "model inference_params batch_size max_seqlen decoding_seqlen=1 "
    "mempool=None n_warmups=2",
    "modify_logit_for_repetition_penalty": "logits prev_output_tokens repetition_penalty=1.0",
    "modify_logits_for_top_k_filtering": "logits top_k",
    "modify_logits_for_top_p_filtering": "logits top_p",
    "modify_logits_for_min_p_filtering": "logits min_p",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_historical_signatures(name):
    function = generation
    for part in name.split("."):
        function = getattr(function, part)
    found = [
        p.name if p.default is p.empty else f"{p.name}={p.default}"
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert found == SIGNATURES[name].split()


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
