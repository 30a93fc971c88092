"""The synthetic tasks of the Mamba paper (arXiv 2312.00752, section 4.1 and appendix E.1), as data.

Every batch is drawn anew on the device, from torch's default generator of that device. Both tasks
have a vocabulary of 16 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

VOCAB_SIZE = 16

NOISE = 0  # selective copying: the token to leave out ...
RECALL = VOCAB_SIZE - 1  # ... and the one that asks for the next memorised token
SPECIAL = 0  # induction heads: the token whose successor is to be remembered


@dataclass(frozen=True)
class SelectiveCopying:
    """Remember `memorize` tokens that lie at random places among `length` tokens of noise.

    The input is `length` positions, of which `memorize` random ones hold data (tokens 1 to 14) and
    the others noise, followed by `memorize` recall tokens, at which the data are due in order
    (figure 2 of the paper, right).
    """

    length: int
    memorize: int = 16

    def batch(self, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(ids (b, length + memorize), targets (b, memorize) for the last positions), int64."""
        shape = (batch_size, self.memorize)
        data = torch.randint(1, RECALL, shape, device=device)
        lottery = torch.rand(batch_size, self.length, device=device)
        places = lottery.topk(self.memorize, dim=1).indices.sort(dim=1).values
        ids = torch.full((batch_size, self.length + self.memorize), NOISE, device=device)
        ids[:, self.length :] = RECALL
        return ids.scatter_(1, places, data), data


@dataclass(frozen=True)
class InductionHeads:
    """Remember the token that followed the special token, when that comes up again at the end.

    The input is `length` random tokens (1 to 15), except that one random place holds the special
    token, and the last place too; due at the end is the token after the first special one.
    """

    length: int

    def batch(self, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(ids (b, length), targets (b, 1) for the last position), int64."""
        ids = torch.randint(1, VOCAB_SIZE, (batch_size, self.length), device=device)
        place = torch.randint(self.length - 2, (batch_size, 1), device=device)
        ids.scatter_(1, place, SPECIAL)
        ids[:, -1] = SPECIAL
        return ids, ids.gather(1, place + 1)

    def stream(
        self, batch_size: int, chunk: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same in chunks of at most `chunk` tokens, so that no length needs much memory.

        Yields (ids (b, ≤ chunk), targets (b, 1)).
        """
        place = torch.randint(self.length - 2, (batch_size, 1), device=device)
        targets = torch.randint(1, VOCAB_SIZE, (batch_size, 1), device=device)
        for start in range(0, self.length, chunk):
            stop = min(start + chunk, self.length)
            ids = torch.randint(1, VOCAB_SIZE, (batch_size, stop - start), device=device)
            position = torch.arange(start, stop, device=device)
            ids = torch.where(position == place, SPECIAL, ids)
            ids = torch.where(position == place + 1, targets, ids)
            if stop == self.length:
                ids[:, -1] = SPECIAL
            yield ids, targets
