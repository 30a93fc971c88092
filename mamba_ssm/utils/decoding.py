"""The loop behind `decode` and `generate`: arguments checked first, then prefill, then steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mamba_ssm.utils.choosing import Choice, Chooser, GraphedSteps
from mamba_ssm.utils.cuda_graph import update_graph_cache
from mamba_ssm.utils.generation_state import (
    GenerationState,
    InferenceParams,
    clone_cache,
    restore_rows,
    snapshot_rows,
)
from mamba_ssm.utils.sampling import check_sampling_arguments
from mamba_ssm.utils.text_stream import StopStrings, check_stop_strings

_INTEGERS = (torch.int64, torch.int32)
# Tokens before the first generated one that incremental decoding looks at.
_DECODER_CONTEXT = 8


@dataclass
class DecodeRequest:
    """The arguments of `mamba_ssm.utils.generation.decode`, where they are described.

    Creating one checks them: ValueError or TypeError, before anything is computed.
    """

    input_ids: Tensor
    model: nn.Module
    max_length: int
    top_k: int = 1
    top_p: float = 0.0
    min_p: float = 0.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_id: int | Sequence[int] | Tensor | None = None
    teacher_outputs: Tensor | None = None
    vocab_size: int | None = None
    cg: bool | None = None
    enable_timing: bool = False
    output_scores: bool = False
    streamer: Any = None
    attention_mask: Tensor | None = None
    pad_token_id: int | None = None
    stop_strings: str | Sequence[str] | None = None
    tokenizer: Any = None
    seed: int | None = None
    prefill_chunk_size: int | None = None
    state: GenerationState | None = None
    return_state: bool = False
    eos: list[int] = field(init=False)
    pad: int = field(init=False)

    def __post_init__(self) -> None:
        check_sampling_arguments(
            self.top_k, self.top_p, self.min_p, self.temperature, self.repetition_penalty
        )
        self._check_prompt()
        self._check_mask()
        self._check_others()
        eos = self.eos_token_id
        if isinstance(eos, Tensor):
            eos = eos.flatten().tolist()
        self.eos = [] if eos is None else [eos] if isinstance(eos, int) else [int(i) for i in eos]
        self.pad = self.pad_token_id if self.pad_token_id is not None else (self.eos or [0])[0]

    def _check_prompt(self) -> None:
        ids, state = self.input_ids, self.state
        if not isinstance(ids, Tensor) or ids.dtype not in _INTEGERS:
            raise TypeError(
                "input_ids must be an int64 tensor, got "
                + (str(ids.dtype) if isinstance(ids, Tensor) else type(ids).__name__)
            )
        if ids.dim() != 2 or ids.shape[0] == 0:
            raise ValueError(f"input_ids must be (batch > 0, length), got {tuple(ids.shape)}")
        if ids.shape[1] == 0 and state is None:
            raise ValueError("the prompt is empty: input_ids must hold at least one token per row")
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int):
            raise TypeError(f"max_length must be an int, got {self.max_length!r}")
        if ids.shape[1] > self.max_length:
            raise ValueError(
                f"the prompt has {ids.shape[1]} tokens and max_length, which counts the prompt, is "
                f"{self.max_length}: raise max_length or shorten the prompt"
            )
        device = next(iter(self.model.parameters())).device
        if ids.device != device:
            raise ValueError(f"input_ids are on {ids.device}, the model is on {device}")
        vocab = getattr(getattr(self.model, "lm_head", None), "out_features", None)
        if vocab is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise ValueError(
                f"input_ids must be in [0, {vocab}), got {int(ids.min())} to {int(ids.max())}"
            )
        if state is not None:
            if not isinstance(state, GenerationState):
                raise TypeError(f"state must be a GenerationState, got {type(state).__name__}")
            if state.batch_size != ids.shape[0]:
                raise ValueError(
                    f"state has {state.batch_size} rows, input_ids have {ids.shape[0]}"
                )

    def _check_mask(self) -> None:
        mask = self.attention_mask
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.shape != self.input_ids.shape:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask must have the shape of input_ids, "
                f"{tuple(self.input_ids.shape)}, got {got}"
            )
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("attention_mask must hold only 0 (padding) and 1 (token)")
        self.attention_mask = mask = mask.to(self.input_ids.device).bool()
        empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
        if empty and self.state is None:
            raise ValueError(f"the prompt is empty in rows {empty}: attention_mask is all padding")

    def _check_others(self) -> None:
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size must be >= 1, got {self.vocab_size}")
        if self.prefill_chunk_size is not None and self.prefill_chunk_size < 1:
            raise ValueError(f"prefill_chunk_size must be >= 1, got {self.prefill_chunk_size}")
        if self.stop_strings is not None:
            check_stop_strings(self.stop_strings)
            if self.tokenizer is None:
                raise ValueError("stop_strings need tokenizer=, to turn tokens into text")
        teacher = self.teacher_outputs
        if teacher is not None and (
            teacher.dim() != 2
            or teacher.shape[0] != self.input_ids.shape[0]
            or teacher.dtype not in _INTEGERS
        ):
            raise ValueError(
                f"teacher_outputs must be ({self.input_ids.shape[0]}, n) int64, got "
                f"{tuple(teacher.shape)} {teacher.dtype}"
            )


class DecodeLoop:
    """One run of a request: `run()` under inference mode, then `result()` outside it.

    The model is fed left-padded rows whatever side the prompt's padding was on, so that the last
    position is a token in every row.
    """

    def __init__(self, request: DecodeRequest) -> None:
        self.r = request
        self.batch, self.prompt_length = request.input_ids.shape
        self.device = request.input_ids.device
        self.ids, self.mask = _left_padded(request)
        self.limit = max(1, request.max_length - self.prompt_length)
        self.scores: list[Tensor] = []
        self.appended = 0
        self.chooser: Chooser | None = None
        self.snapshots: list[tuple[Tensor, dict]] = []
        self.native: Callable[[Tensor, dict[int, Any]], Tensor] | bool | None = None
        self.stops = None
        if request.stop_strings is not None:
            self.stops = StopStrings(request.stop_strings, request.tokenizer, self._contexts())

    def _contexts(self) -> list[list[int]]:
        tail = self.ids[:, -_DECODER_CONTEXT:].tolist()
        if self.mask is None:
            return tail
        kept = self.mask[:, -_DECODER_CONTEXT:].tolist()
        return [[i for i, k in zip(*row, strict=True) if k] for row in zip(tail, kept, strict=True)]

    def run(self) -> None:
        """Prefill, then steps until every row is finished or max_length is reached."""
        r = self.r
        try:
            if r.streamer is not None:
                r.streamer.put(r.input_ids.cpu())
            with getattr(r.model, "one_look", nullcontext)():
                self._prepare_caches()
                whole = self._whole_prefill()
            logits = self._prefill(whole)
            steps = self._prepare_chooser(logits.shape[-1])
            self._append(logits)
            if steps is not None:
                self._run_graphs(steps)
            else:
                for _ in range(1, self.limit):
                    if self._all_finished():
                        break
                    self._advance()
            self.chooser.settle()
        finally:
            if r.streamer is not None:
                r.streamer.end()

    def _prepare_chooser(self, vocab: int) -> GraphedSteps | None:
        """Make the chooser; the captured steps, where nothing needs the host at every token."""
        r = self.r
        choice = Choice(
            top_k=r.top_k,
            top_p=r.top_p,
            min_p=r.min_p,
            temperature=r.temperature,
            repetition_penalty=r.repetition_penalty,
            vocab_size=r.vocab_size,
            eos=tuple(r.eos),
            pad=r.pad,
            keeps_seen=r.repetition_penalty != 1.0 or r.return_state,
            ends=bool(r.eos) or self.stops is not None,
        )
        generator = None
        if r.seed is not None:
            generator = torch.Generator(self.device).manual_seed(r.seed)
        steps, greedy_into = None, getattr(r.model, "greedy_into", None)
        by_host = self.stops is not None or r.output_scores or r.teacher_outputs is not None
        if self.graph is not None and not (by_host or (r.return_state and r.eos)):
            steps = GraphedSteps(self.graph, choice, self.limit, generator, r.seed, greedy_into)
            self.chooser = steps.chooser
        else:
            size = (self.batch, vocab, self.limit)
            self.chooser = Chooser(choice, *size, self.device, generator, None, greedy_into)
        known = 0 if r.state is None else r.state.tokens_seen.to(self.device) - 1
        valid = self.ids.shape[1] if self.mask is None else self.mask.sum(dim=1)
        last = self.ids[:, -1]
        self.chooser.start(last, torch.zeros_like(last) + known + valid, self._seen(vocab))
        return steps

    def _run_graphs(self, steps: GraphedSteps) -> None:
        put = None
        if self.r.streamer is not None:

            def put(tokens: Tensor) -> None:
                self.r.streamer.put(tokens.to("cpu", copy=True))

        self.params.seqlen_offset += steps.run(self.limit - 1, put)

    def _prepare_caches(self) -> None:
        r = self.r
        offset = 0 if r.state is None else r.state.seqlen_offset
        max_seqlen = offset + self.ids.shape[1] + self.limit
        self.graph = None
        if self._uses_graphs():
            self.graph = update_graph_cache(
                r.model,
                getattr(r.model, "_decoding_cache", None),
                self.batch,
                offset + self.ids.shape[1],
                max_seqlen,
            )
            r.model._decoding_cache = self.graph
            self.params = self.graph.inference_params
        else:
            self.params = InferenceParams(max_seqlen, self.batch)
            self.params.key_value_memory_dict = _allocate(r.model, self.batch, max_seqlen)
        if r.state is not None:
            r.state.to(self.device).copy_into(self.params.key_value_memory_dict)
            self.params.seqlen_offset = offset

    def _uses_graphs(self) -> bool:
        if self.device.type != "cuda" or self.r.cg is not None:
            return self.device.type == "cuda" and bool(self.r.cg)
        plain = getattr(self.r.model, "steps_are_plain", None)
        return plain is not None and plain()

    def _whole_prefill(self) -> Any:
        """The model's own way to consume the prompt at once, or None where it has to be called."""
        make = getattr(self.r.model, "whole_prefill", None)
        size = self.r.prefill_chunk_size or self.ids.shape[1]
        if make is None or self.mask is not None or self.params.seqlen_offset > 0:
            return None
        if size < self.ids.shape[1]:
            return None
        whole = make()
        return (
            whole if whole and whole.serves(self.ids, self.params.key_value_memory_dict) else None
        )

    def _forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Consume ids (b, s); the last position's logits (b, vocab)."""
        start, length = self.params.seqlen_offset, ids.shape[1]
        positions = None
        if start > 0:
            positions = torch.arange(start, start + length, device=self.device)
            positions = positions.expand(self.batch, length)
        padding = {} if mask is None or bool(mask.all()) else {"attention_mask": mask}
        logits = self.r.model(
            ids, position_ids=positions, inference_params=self.params, num_last_tokens=1, **padding
        ).logits
        self.params.seqlen_offset += length
        return logits[:, -1]

    def _prefill(self, whole: Any) -> Tensor:
        if whole is not None:
            self.params.seqlen_offset += self.ids.shape[1]
            return whole.prefill(self.ids, self.params.key_value_memory_dict)
        size = self.r.prefill_chunk_size or self.ids.shape[1]
        for start in range(0, self.ids.shape[1], size):
            part = slice(start, start + size)
            mask = None if self.mask is None else self.mask[:, part]
            logits = self._forward(self.ids[:, part], mask)
        return logits

    def _advance(self) -> None:
        """Consume the tokens chosen last and choose the next ones."""
        if self.native is None:  # at the first step: prefill alone needs no packed weights
            self.native = self._native_step()
        r = self.r
        shows_logits = r.output_scores or r.teacher_outputs is not None
        if shows_logits or not hasattr(self.native, "choose"):
            self._append(self._step(self.chooser.tokens.unsqueeze(1)))
            return
        before = self._finished_before()
        tokens = self.chooser.choose_with(self.native, self.params.key_value_memory_dict)
        self.params.seqlen_offset += 1
        self._appended(tokens, before)

    def _step(self, tokens: Tensor) -> Tensor:
        if self.native:
            logits = self.native(tokens.squeeze(1), self.params.key_value_memory_dict)
            self.params.seqlen_offset += 1
            return logits
        if self.graph is None:
            return self._forward(tokens)
        offset = self.params.seqlen_offset
        logits = self.graph.run(tokens, torch.full_like(tokens, offset), offset)
        self.params.seqlen_offset += 1
        return logits[:, -1]

    def _native_step(self) -> Callable[[Tensor, dict[int, Any]], Tensor] | bool:
        """The model's own way to take one step, or False where it has to be called."""
        make = getattr(self.r.model, "decode_step", None)
        if make is None:
            return False
        return make(self.batch) or False

    def _seen(self, vocab: int) -> Tensor | None:
        """Which tokens the prompt and the state that it continues contain, if that is needed."""
        if self.r.repetition_penalty == 1.0 and not self.r.return_state:
            return None
        seen = torch.zeros(self.batch, vocab, dtype=torch.bool, device=self.device)
        if self.r.state is not None:
            seen |= self.r.state.seen.to(self.device)
        ids = self.ids
        if self.mask is not None:
            ids = torch.where(self.mask, ids, ids[:, -1:])
        return seen.scatter_(1, ids, True)

    def _append(self, logits: Tensor) -> None:
        """Choose each row's next token from logits (b, vocab) and note which rows it finishes."""
        r = self.r
        if r.output_scores:
            self.scores.append(logits[:, : r.vocab_size])
        forced, position = None, self.prompt_length + self.appended
        if r.teacher_outputs is not None and position < r.teacher_outputs.shape[1]:
            forced = r.teacher_outputs[:, position].to(self.device)
        before = self._finished_before()
        self._appended(self.chooser.choose(logits, forced), before)

    def _finished_before(self) -> Tensor | None:
        """Which rows are finished, where a step's effect on them has to be known."""
        watched = self.stops is not None or (self.r.eos and self.r.return_state)
        return self.chooser.finished.clone() if watched else None

    def _appended(self, tokens: Tensor, before: Tensor | None) -> None:
        self.appended += 1
        if self.r.streamer is not None:
            self.r.streamer.put(tokens.to("cpu", copy=True))
        if before is not None:
            self._finish_rows(tokens, before)

    def _finish_rows(self, tokens: Tensor, before: Tensor) -> None:
        finished = self.chooser.finished
        if self.stops is not None:
            done = before.tolist()
            hits = [
                not d and self.stops.push(i, t)
                for i, (t, d) in enumerate(zip(tokens.tolist(), done, strict=True))
            ]
            finished |= torch.tensor(hits, dtype=torch.bool, device=self.device)
        ending = finished & ~before
        # The others go on, and feed padding into this row's state: keep it as it is now.
        if self.r.return_state and bool(ending.any()) and not self._all_finished():
            rows = ending.nonzero().flatten()
            self.snapshots.append((rows, snapshot_rows(self.params.key_value_memory_dict, rows)))

    def _all_finished(self) -> bool:
        return bool(self.r.eos or self.stops is not None) and bool(self.chooser.finished.all())

    def result(self) -> dict[str, Any]:
        """sequences, scores and state; ordinary tensors that training code can use as well."""
        r = self.r
        # Graphs may have taken some steps after the last row was finished.
        count = int(self.chooser.count) if self.graph is not None else self.appended
        sequences = torch.cat([r.input_ids.long(), self.chooser.history[:, :count]], dim=1)
        scores = tuple(s.clone() for s in self.scores) if r.output_scores else None
        return {"sequences": sequences, "scores": scores, "state": self._state()}

    def _state(self) -> GenerationState | None:
        if not self.r.return_state:
            return None
        cache = self.params.key_value_memory_dict
        with torch.inference_mode():
            for rows, saved in self.snapshots:
                restore_rows(cache, rows, saved)
        return GenerationState(
            caches=clone_cache(cache),
            pending=self.chooser.last.unsqueeze(1).clone(),
            tokens_seen=self.chooser.tokens_seen.clone(),
            seqlen_offset=self.params.seqlen_offset,
            seen=self.chooser.seen.clone(),
        )


def _left_padded(request: DecodeRequest) -> tuple[Tensor, Tensor | None]:
    """What the model has to consume, (b, length), and its mask (None without padding)."""
    ids, mask = request.input_ids.long(), request.attention_mask
    if request.state is not None:
        pending = request.state.pending.to(ids.device)
        ids = torch.cat([pending, ids], dim=1)
        if mask is not None:
            mask = torch.cat([torch.ones_like(pending, dtype=torch.bool), mask], dim=1)
    if mask is None or bool(mask.all()):
        return ids, None
    order = torch.argsort(mask.byte(), dim=1, stable=True)
    longest = int(mask.sum(dim=1).max())
    ids, mask = ids.gather(1, order)[:, -longest:], mask.gather(1, order)[:, -longest:]
    return ids, None if bool(mask.all()) else mask


def _allocate(model: nn.Module, batch: int, max_seqlen: int) -> dict[int, Any]:
    """The model's caches; empty for a model whose layers make their own at the first call."""
    try:
        return model.allocate_inference_cache(batch, max_seqlen)
    except NotImplementedError:
        return {}


def run_request(request: DecodeRequest) -> dict[str, Any]:
    """Run a checked request; the fields of the result as a dict."""
    cuda = request.input_ids.device.type == "cuda"
    if request.enable_timing and cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loop = DecodeLoop(request)
    with torch.inference_mode():
        loop.run()
    if request.enable_timing:
        if cuda:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        print(f"Prompt processing + decoding time: {elapsed * 1000:.0f}ms")
    with torch.no_grad():
        return loop.result()
