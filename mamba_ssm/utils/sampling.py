"""Turning next-token logits into tokens: filters, repetition penalty, sampling.

Every function works on logits of shape (batch, vocab) and treats each row by itself. The filters
work in place, as callers of the historical API expect: what is filtered out becomes -inf.
The order in `sample` is temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_sampling_arguments(
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
) -> None:
    """Raise ValueError, naming the argument and its allowed range, for values that mean nothing.

    `top_k` is an integer ≥ 0 (0 = unlimited); `top_p` in (0, 1], or 0 for "off"; `min_p` in [0, 1];
    `temperature` ≥ 0 and finite (0 = greedy); `repetition_penalty` > 0 and finite (1 = off).
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k must be an integer >= 0 (0 = unlimited), got {top_k!r}")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in (0, 1] (or 0 to switch it off), got {value!r}")
    if not (0.0 <= temperature < math.inf):
        raise ValueError(f"temperature must be >= 0 and finite (0 = greedy), got {temperature!r}")
    if not (0.0 < repetition_penalty < math.inf):
        raise ValueError(
            f"repetition_penalty must be > 0 and finite (1 = off), got {repetition_penalty!r}"
        )


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Keep the `top_k` largest logits of each row, in place; ties with the k-th stay.

    Args:
        logits: (..., vocab), any floating dtype.
        top_k: 0 keeps everything; values above vocab keep everything.
    """
    check_sampling_arguments(top_k=top_k)
    if top_k == 0 or top_k >= logits.shape[-1]:
        return
    threshold = torch.topk(logits, top_k, dim=-1).values[..., -1:]
    logits.masked_fill_(logits < threshold, -torch.inf)


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Keep each row's fewest, most likely tokens whose probabilities reach `top_p`, in place.

    The most likely token always stays. 0 and 1 keep everything.

    Args:
        logits: (..., vocab), any floating dtype; probabilities are computed in fp32.
    """
    check_sampling_arguments(top_p=top_p)
    if top_p <= 0.0 or top_p >= 1.0:
        return
    ordered, indices = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
    probs = torch.softmax(ordered, dim=-1)
    # A token goes when the more likely ones reach top_p without it; for the first that sum is 0.
    remove_ordered = probs.cumsum(dim=-1) - probs >= top_p
    remove_ordered[..., 0] = False
    remove = torch.zeros_like(remove_ordered).scatter_(-1, indices, remove_ordered)
    logits.masked_fill_(remove, -torch.inf)


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """Keep the tokens at least `min_p` times as likely as their row's most likely one, in place.

    Args:
        logits: (..., vocab), any floating dtype.
        min_p: in [0, 1]; 0 keeps everything, 1 only the most likely token (and its ties).
    """
    check_sampling_arguments(min_p=min_p)
    if min_p <= 0.0:
        return
    # p >= min_p * p_max, written in logits: the row's normaliser cancels.
    threshold = logits.float().amax(dim=-1, keepdim=True) + math.log(min_p)
    logits.masked_fill_(logits.float() < threshold, -torch.inf)


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """Make tokens that were already seen less likely, in place; returns `logits`.

    Positive logits are divided by the penalty and negative ones multiplied with it, once per
    token however often it occurred (CTRL, arXiv 1909.05858, section 4.1).

    Args:
        logits: (batch, vocab).
        prev_output_tokens: (batch, length) int64, every entry in [0, vocab).
    """
    check_sampling_arguments(repetition_penalty=repetition_penalty)
    if repetition_penalty == 1.0:
        return logits
    seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    return penalise_seen_(logits, seen.scatter_(1, prev_output_tokens, True), repetition_penalty)


def penalise_seen_(logits: Tensor, seen: Tensor, repetition_penalty: float) -> Tensor:
    """`modify_logit_for_repetition_penalty` with the seen tokens as a (batch, vocab) bool mask."""
    penalised = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
    return logits.copy_(torch.where(seen, penalised, logits))


def filtered_logits(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """The fp32 logits whose softmax is the distribution that `sample` draws from; a new tensor.

    Args as in `sample`, with temperature > 0.
    """
    logits = logits.float() / temperature
    modify_logits_for_top_k_filtering(logits, top_k)
    modify_logits_for_top_p_filtering(logits, top_p)
    modify_logits_for_min_p_filtering(logits, min_p)
    return logits


# Logits in a piece of a row, whose maximum is found by whole vectors; how many make that worth it.
_PIECE = 512
_MANY = 2**17


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of every row (batch, vocab): the first one among equals, or a NaN.

    On the CPU ``argmax`` compares number by number, which takes up to a tenth of a decode step of
    16 rows; maxima alone are several times as fast, and tell where to look.
    """
    vocab = logits.shape[-1]
    if logits.device.type != "cpu" or vocab < 4 * _PIECE or logits.numel() < _MANY:
        return logits.argmax(dim=-1)
    whole = vocab // _PIECE * _PIECE
    maxima = logits[:, :whole].unflatten(-1, (-1, _PIECE)).amax(-1)
    if whole < vocab:
        maxima = torch.cat([maxima, logits[:, whole:].amax(-1, keepdim=True)], -1)
    start = maxima.argmax(-1, keepdim=True) * _PIECE
    # The last number again beyond the end: never the first one among equals.
    inside = (start + torch.arange(_PIECE)).clamp_(max=vocab - 1)
    return start.squeeze(-1) + logits.gather(-1, inside).argmax(-1)


def _draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token for each row of probabilities (b, vocab).

    On the CPU from one number for each row, the place of the token in the running sum: multinomial
    draws one for every token of the vocabulary, which takes longer than the model's step.
    """
    if probs.device.type != "cpu":
        return torch.multinomial(probs, num_samples=1, generator=generator).squeeze(-1)
    uniform = torch.rand(len(probs), 1, dtype=torch.double, generator=generator)
    sums = probs.double().cumsum(-1)
    total = sums[:, -1:].contiguous()
    if not bool(total.isfinite().all()):
        raise RuntimeError("the logits contain NaN or infinity: there is nothing to sample")
    tokens = torch.searchsorted(sums, uniform * total, right=True)
    # Rounding can put the place at the very end, which is that of the last possible token.
    return tokens.minimum(torch.searchsorted(sums, total)).squeeze(-1)


def sample(
    logits: Tensor,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row. `logits` is not changed.

    Args:
        logits: (batch, vocab), any floating dtype; probabilities are computed in fp32.
        top_k: 1 is greedy whatever the temperature; 0 is unlimited.
        top_p: nucleus mass in (0, 1]; 0 or 1 is off.
        min_p: in [0, 1], relative to the most likely token after temperature; 0 is off.
        temperature: 0 is greedy.
        generator: source of randomness on the logits' device; None uses torch's global one.

    Returns:
        (batch,) int64.

    Raises:
        ValueError: for an argument outside its range, or logits that are not 2-D with vocab > 0.
    """
    check_sampling_arguments(top_k, top_p, min_p, temperature)
    if logits.dim() != 2 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (batch, vocab > 0), got shape {tuple(logits.shape)}")
    if top_k == 1 or temperature == 0.0:
        return greedy(logits)
    if logits.shape[0] == 0:
        return torch.empty(0, dtype=torch.long, device=logits.device)
    probs = torch.softmax(filtered_logits(logits, top_k, top_p, min_p, temperature), dim=-1)
    return _draw(probs, generator)
