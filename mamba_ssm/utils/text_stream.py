"""Text from tokens while they arrive: incremental decoding, a streamer, stop strings.

Tokens and characters do not line up: a byte-level tokenizer needs up to four tokens for one
character. Text is therefore held back until its characters are complete.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TextIO

from torch import Tensor

# What decoders put in place of bytes that are not (yet) a character.
_INCOMPLETE = "\ufffd"
# More context than any tokenizer looks back when it decides about spaces between tokens.
_CONTEXT_TOKENS = 8
# A UTF-8 character has at most four bytes; what is still incomplete after more never completes.
_MAX_HELD_TOKENS = 8


class IncrementalDecoder:
    """Decodes a growing token sequence; each token costs the decoding of a few tokens only.

    Args:
        tokenizer: anything with `decode(list[int], skip_special_tokens=...) -> str`.
        context: tokens before the first one, so that a leading space comes out right.
        skip_special_tokens: leave out <pad>, </s> and their kind.
    """

    def __init__(
        self, tokenizer: Any, context: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = list(context)[-_CONTEXT_TOKENS:]
        self._read = len(self._window)
        self._read_length = len(self._decode(self._window)) if self._window else 0

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is incomplete."""
        self._window.append(int(token))
        text = self._decode(self._window)
        held = len(self._window) - self._read
        if len(text) > self._read_length and not text.endswith(_INCOMPLETE):
            return self._emit(len(self._window))
        # Long held means stray bytes; only the last three can still begin a character.
        return self._emit(len(self._window) - 3) if held >= _MAX_HELD_TOKENS else ""

    def flush(self) -> str:
        """What is still held back, as the tokenizer shows it."""
        return self._emit(len(self._window)) if self._read < len(self._window) else ""

    def _emit(self, end: int) -> str:
        """The text between the last emitted token and token `end` of the window."""
        text = self._decode(self._window[:end])[self._read_length :]
        # The next window begins with the tokens just emitted: with whole characters.
        self._window, self._read = self._window[self._read :], end - self._read
        self._read_length = len(self._decode(self._window[: self._read]))
        return text


class TextStreamer:
    """Prints one sequence's text while it is generated: pass it as `streamer=`.

    The same interface as transformers' streamers (`put`, `end`); characters are never broken,
    whatever the tokenizer, and nothing waits for a space.

    Args:
        tokenizer: see `IncrementalDecoder`.
        skip_prompt: print only what is new.
        stream: where to write; None is standard output at the time of writing.
        skip_special_tokens: leave out <pad>, </s> and their kind.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        stream: TextIO | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_prompt = skip_prompt
        self._stream = stream
        self._skip_special_tokens = skip_special_tokens
        self._decoder: IncrementalDecoder | None = None

    def put(self, value: Tensor) -> None:
        """First the prompt (1, length) or (length,), then each new token (1,).

        Raises:
            ValueError: for more than one sequence.
        """
        rows = value.shape[0] if value.dim() > 1 or self._decoder else 1
        if rows > 1:
            raise ValueError("TextStreamer prints one sequence: use batch size 1")
        ids = value.flatten().tolist()
        if self._decoder is None:
            context = ids if self._skip_prompt else ()
            self._decoder = IncrementalDecoder(
                self._tokenizer, context, skip_special_tokens=self._skip_special_tokens
            )
            if self._skip_prompt:
                return
        self._write("".join(self._decoder.push(token) for token in ids))

    def end(self) -> None:
        """Write what is held back, and a line end; the streamer can then be used again."""
        if self._decoder is not None:
            self._write(self._decoder.flush() + "\n")
        self._decoder = None

    def _write(self, text: str) -> None:
        if text:
            print(text, end="", file=self._stream or sys.stdout, flush=True)


class StopStrings:
    """Tells, row by row, when the generated text contains one of the stop strings.

    Only generated text counts, not the prompt. The stop string stays part of the sequence.

    Args:
        stop_strings: one or several non-empty strings.
        tokenizer: see `IncrementalDecoder`; special tokens take part, so that they can stop too.
        contexts: for each row, the tokens before the first generated one.
    """

    def __init__(
        self, stop_strings: str | Sequence[str], tokenizer: Any, contexts: Sequence[Sequence[int]]
    ) -> None:
        self._stops = check_stop_strings(stop_strings)
        self._keep = max(len(stop) for stop in self._stops) - 1
        self._decoders = [
            IncrementalDecoder(tokenizer, context, skip_special_tokens=False)
            for context in contexts
        ]
        self._tails = [""] * len(self._decoders)

    def push(self, row: int, token: int) -> bool:
        """Whether row `row` is finished once `token` is appended to it."""
        text = self._tails[row] + self._decoders[row].push(token)
        self._tails[row] = text[-self._keep :] if self._keep else ""
        return any(stop in text for stop in self._stops)


def check_stop_strings(stop_strings: str | Sequence[str]) -> list[str]:
    """The stop strings as a list. Raises ValueError unless they are non-empty strings."""
    stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    if not stops or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"stop_strings must be one or several non-empty strings, got {stops!r}")
    return stops
