"""Choosing each row's next token from logits, and keeping track of which rows are finished.

Everything stays on the device, in tensors that are written in place, so that the same code runs
token by token and as a CUDA graph (:class:`GraphedSteps`), where the host looks in only now and
then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mamba_ssm.utils.cuda_graph import DecodingCGCache, record
from mamba_ssm.utils.sampling import penalise_seen_, sample

# Tokens between two looks at whether every row is finished.
_LOOK_EVERY = 8
# Captured choosers that a model's graph cache keeps.
_MAX_CHOOSERS = 4


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen; the arguments of `decode`, where they are described."""

    top_k: int
    top_p: float
    min_p: float
    temperature: float
    repetition_penalty: float
    vocab_size: int | None
    eos: tuple[int, ...]
    pad: int
    keeps_seen: bool
    ends: bool  # rows may be finished, by eos or by who looks at the text

    @property
    def is_random(self) -> bool:
        """Whether it draws numbers."""
        return self.top_k != 1 and self.temperature != 0.0


class Chooser:
    """The rows of one generation: what was chosen last and who is finished.

    Attributes:
        tokens: (b,) int64, what the last call chose; padding in rows that were finished before.
        last: (b,) int64, each row's last token that is no padding.
        finished: (b,) bool.
        tokens_seen: (b,) int64, tokens of each row, those that it was started with included; like
            count, up to date after ``settle``.
        seen: (b, vocab) bool, the tokens that occurred, or None where nothing needs them.
        count: () int64, the calls that found a row unfinished.
        history: (b, capacity) int64, the tokens of those calls.
    """

    def __init__(
        self,
        choice: Choice,
        batch: int,
        vocab: int,
        capacity: int,
        device: torch.device,
        generator: torch.Generator | None = None,
        tokens: Tensor | None = None,
        greedy_into: Callable[[Tensor, Tensor], bool] | None = None,
    ) -> None:
        """``tokens``: where the choices go, if not to a tensor of its own. ``greedy_into``: the
        model's own way to find the likeliest tokens, see its ``greedy_into``."""
        self.choice, self.generator, self._greedy_into = choice, generator, greedy_into
        # No row pads: the common case, in few operations.
        self._is_plain = not choice.ends and not choice.keeps_seen
        long = {"dtype": torch.long, "device": device}
        self.eos = torch.tensor(choice.eos, **long)
        self.tokens = torch.zeros(batch, **long) if tokens is None else tokens
        self.last = self.tokens if self._is_plain else torch.zeros(batch, **long)
        self._numbers = torch.zeros(1 + batch, **long)
        self.count, self.tokens_seen = self._numbers[0], self._numbers[1:]
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self._rows = torch.zeros(capacity, batch, **long)
        self.history = self._rows.t()
        self.seen = None
        if choice.keeps_seen:
            self.seen = torch.zeros(batch, vocab, dtype=torch.bool, device=device)
        self._chosen: Tensor | None = None  # with _logits and _uniform, of choose_with
        # Steps of choose_with that `count` and `tokens_seen` miss, and `count` before them.
        self._uncounted = self._counted = 0

    def start(self, last: Tensor, tokens_seen: Tensor, seen: Tensor | None) -> None:
        """Begin a generation: each row's last token, its tokens so far, those that occurred."""
        self.last.copy_(last)
        self.tokens_seen.copy_(tokens_seen)
        self.finished.zero_()
        self.count.zero_()
        self._uncounted = 0
        if self.seen is not None:
            self.seen.copy_(seen)

    def choose(self, logits: Tensor, forced: Tensor | None = None) -> Tensor:
        """The next token of each row from logits (b, vocab), or ``forced`` (b,) instead."""
        choice = self.choice
        if forced is None:
            logits = logits[:, : choice.vocab_size]
            if choice.repetition_penalty != 1.0:
                seen = self.seen[:, : logits.shape[1]]
                logits = penalise_seen_(logits.clone(), seen, choice.repetition_penalty)
            forced = self._choose(logits)
        self._note(forced)
        return self.tokens

    def _choose(self, logits: Tensor) -> Tensor:
        choice = self.choice
        if not choice.is_random and self._greedy_into is not None:
            tokens = self.tokens if self._is_plain else torch.empty_like(self.tokens)
            if self._greedy_into(logits, tokens):
                return tokens
        return sample(
            logits,
            choice.top_k,
            choice.top_p,
            choice.min_p,
            choice.temperature,
            generator=self.generator,
        )

    def choose_with(self, decoder: Any, caches: dict[int, Any]) -> Tensor:
        """The next token of each row, by a step that consumes the last ones and chooses itself.

        The tokens are those of ``choose`` from the step's logits, with as many numbers drawn.
        """
        choice, batch = self.choice, len(self.tokens)
        if self._chosen is None:
            self._chosen = torch.empty_like(self.tokens)
            self._logits = decoder.new_logits(batch)
            self._uniform = torch.empty(batch, dtype=torch.double) if choice.is_random else None
        if self._uniform is not None:
            self._uniform.uniform_(generator=self.generator)
        vocab = self._logits.shape[1]
        # Between two steps a torch call costs ten times what it does in a loop of its own: the
        # step has taken its code and data out of the caches. So the common case makes but one.
        chosen = self._next_row() if self._is_plain else self._chosen
        decoder.choose(
            self.tokens,
            caches,
            self._logits,
            chosen,
            self.seen if choice.repetition_penalty != 1.0 else None,
            self._uniform,
            vocab if choice.vocab_size is None else min(vocab, choice.vocab_size),
            top_k=choice.top_k,
            top_p=choice.top_p,
            min_p=choice.min_p,
            temperature=choice.temperature,
            repetition_penalty=choice.repetition_penalty,
        )
        if chosen is self._chosen:
            self._note(chosen)
        else:
            self.tokens = self.last = chosen
            self._uncounted += 1
        return self.tokens

    def _next_row(self) -> Tensor:
        """Where in the history the tokens of the next step of choose_with belong."""
        if self._uncounted == 0:
            self._counted = int(self.count)
        return self._rows[self._counted + self._uncounted]

    def settle(self) -> None:
        """Let ``count`` and ``tokens_seen`` include every step of ``choose_with``."""
        if self._uncounted:
            self.count += self._uncounted
            self.tokens_seen += self._uncounted
            self.tokens = self.last = self.tokens.clone()  # out of the history
            self._uncounted = 0

    def _note(self, tokens: Tensor) -> None:
        self.settle()
        if self._is_plain:
            if tokens is not self.tokens:
                self.tokens.copy_(tokens)
        else:
            torch.where(self.finished, self.last, tokens, out=self.last)
            self.tokens_seen += ~self.finished
            self.tokens.copy_(torch.where(self.finished, self.choice.pad, tokens))
        position = self.count.expand(len(self.tokens), 1)
        self.history.scatter_(1, position, self.tokens.unsqueeze(1))
        if self._is_plain:
            self._numbers += 1
            return
        self.count += ~self.finished.all() if self.choice.ends else 1
        if self.seen is not None:
            self.seen.scatter_(1, self.last.unsqueeze(1), True)
        if self.choice.eos:
            self.finished |= torch.isin(self.tokens, self.eos)


class GraphedSteps:
    """Decode steps and choices replayed as CUDA graphs, without a look from the host in between.

    Made from a graph cache whose step for this batch is captured. What the choice captured is kept
    there as well, so later calls with the same settings replay it.
    """

    def __init__(
        self,
        cache: DecodingCGCache,
        choice: Choice,
        limit: int,
        generator: Any,
        seed: int | None,
        greedy_into: Callable[[Tensor, Tensor], bool] | None = None,
    ) -> None:
        self.cache = cache
        self.step = cache.callables[cache.max_batch_size, 1]
        logits = self.step.logits[:, 0]
        key = (choice, generator is not None)
        entry = cache.choosers.pop(key, None)
        if entry is None or entry[0].history.shape[1] < limit:
            batch, vocab = logits.shape
            capacity = max(64, 1 << (limit - 1).bit_length())
            # What it chooses is the step's next input.
            ids = self.step.input_ids.view(-1)
            size = (batch, vocab, capacity)
            chooser = Chooser(choice, *size, logits.device, generator, ids, greedy_into)
            state = None
            if generator is None and choice.is_random:
                state = torch.cuda.get_rng_state(logits.device)
            graph, _ = record(lambda: chooser.choose(logits), logits.device, cache.mempool,
                              generator=generator)  # fmt: skip
            if state is not None:
                torch.cuda.set_rng_state(state, logits.device)  # the warm-up drew numbers
            entry = (chooser, graph)
            while len(cache.choosers) >= _MAX_CHOOSERS:
                cache.choosers.pop(next(iter(cache.choosers)))
        cache.choosers[key] = entry
        self.chooser, self.graph = entry
        if seed is not None:
            self.chooser.generator.manual_seed(seed)

    def run(self, count: int, on_token: Any = None) -> int:
        """Up to ``count`` steps after a first token was chosen; how many were taken.

        Stops soon after every row is finished. ``on_token(tokens (b,))`` sees each step's choice.
        """
        tokens = self.chooser.tokens
        for step in range(count):
            look = step % _LOOK_EVERY == 0 or on_token is not None
            if self.chooser.choice.ends and look and bool(self.chooser.finished.all()):
                return step
            self.step.graph.replay()
            self.graph.replay()
            if on_token is not None:
                on_token(tokens)
        return count
