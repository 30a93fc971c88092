"""Cross-entropy of rows of logits and its gradient, in pure PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Internal op ``_cross_entropy``: see ``ops/schema.py`` for shapes."""
    ignored = targets == ignore_index
    index = targets.masked_fill(ignored, 0)[:, None]
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = torch.log_softmax(logits, dim=1, dtype=wide)
    chosen = log_p.gather(1, index)
    torch.exp(log_p, out=logits)
    # p - 1 for the target without losing the digits of a p near 1
    logits.scatter_(1, index, torch.expm1(chosen).to(logits.dtype))
    if logits.device.type == "cpu":
        logits[ignored] = 0  # touches these rows only; elsewhere it would wait for the device
    else:
        logits.masked_fill_(ignored[:, None], 0)
    return -chosen.squeeze(1).masked_fill(ignored, 0)
