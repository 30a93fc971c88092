"""The next-token loss, computed without ever holding the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mamba_ssm.models.fused_loss import fused_loss_applies, linear_cross_entropy

# Logits in memory at a time, in elements: 128 MB in fp32, and enough rows for efficient products.
MAX_LOGIT_ELEMENTS = 2**25


def shifted_targets(
    labels: torch.Tensor, ignore_index: int, seq_idx: torch.Tensor | None
) -> torch.Tensor:
    """What each position has to predict: labels (b, l) one to the left, (b, l) int64.

    The last position has nothing to predict. With ``seq_idx`` (b, l; < 0 is padding) neither has
    the last token of a sequence, nor padding.
    """
    targets = F.pad(labels[:, 1:].long(), (0, 1), value=ignore_index)
    if seq_idx is not None:
        following = F.pad(seq_idx[:, 1:], (0, 1), value=-1)
        targets = targets.masked_fill((seq_idx != following) | (seq_idx < 0), ignore_index)
    return targets


def rows_on_gpu(size: int) -> int:
    """Rows of logits that become their gradient in place: no fp32 copy, and whole tiles."""
    size *= 4
    return size - size % 256 if size >= 1024 else size


def chunked_cross_entropy(
    project: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Mean cross-entropy of ``project(hidden_states)`` against ``targets``, in fp32.

    Args:
        project: (t, d_model) → (t, vocab_size), the output projection.
        hidden_states: (b, l, d_model).
        targets: (b, l) int64; ``ignore_index`` does not count.

    Tokens go through the projection in chunks of about ``MAX_LOGIT_ELEMENTS`` logits, on a GPU in
    chunks of four times as many where they become their gradient in place. A plain Linear without
    bias gets its gradients in the same pass; others' logits are computed again in the backward.
    Without any target to predict the loss is 0 (with zero gradients).
    """
    hidden_states, targets = hidden_states.flatten(0, 1), targets.flatten()
    size = max(1, MAX_LOGIT_ELEMENTS // vocab_size)
    if fused_loss_applies(project, hidden_states):
        if hidden_states.is_cuda:
            size = rows_on_gpu(size)
        return linear_cross_entropy(hidden_states, project.weight, targets, ignore_index, size)

    def chunk_loss(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = project(hidden).float()
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")

    count = (targets != ignore_index).sum().clamp(min=1)
    if hidden_states.shape[0] <= size:
        return chunk_loss(hidden_states, targets) / count
    total = hidden_states.new_zeros((), dtype=torch.float32)
    for hidden, target in zip(hidden_states.split(size), targets.split(size), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(chunk_loss, hidden, target, use_reentrant=False)
        else:
            total = total + chunk_loss(hidden, target)
    return total / count
