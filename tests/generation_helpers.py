"""Tiny language models for the tests of generation, commands and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig

BYTE_VOCAB = 384
HYBRID = {
    "attn_layer_idx": [1],
    "attn_cfg": {"num_heads": 2, "causal": True, "rotary_emb_dim": 4, "d_conv": 4},
}


def tiny_lm(
    vocab_size: int = 50,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> MambaLMHeadModel:
    """Two layers with random weights, loud enough that its text depends on everything it read."""
    torch.manual_seed(seed)
    shape = MambaConfig(
        d_model=16, n_layer=2, vocab_size=vocab_size, tie_embeddings=False, **config
    )
    # Drawn on the CPU: another device's generator would draw another model.
    model = MambaLMHeadModel(shape, dtype=dtype).to(device).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(20)
        model.lm_head.weight.mul_(8)
        for name, parameter in model.named_parameters():
            for layer, factor in (("out_proj", 10), ("x_proj", 3), ("in_proj", 2)):
                if name.endswith(f"{layer}.weight"):
                    parameter.mul_(factor)
    return model


def byte_model_dir(path: Path, **config: Any) -> Path:
    """A directory with a byte-level model of random weights and its tokenizer's name."""
    tiny_lm(BYTE_VOCAB, **config).save_pretrained(path)
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    return path


def prompt(batch: int, length: int, device: str, seed: int = 0) -> torch.Tensor:
    """Random token ids (batch, length)."""
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


class Letters:
    """A tokenizer whose token i is one printable letter; each token is its own text."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(0x100 + i) for i in ids)


class Recorder:
    """A streamer that keeps what it gets and may interrupt."""

    def __init__(self, stop_after: int | None = None):
        self.values, self.ended, self.stop_after = [], 0, stop_after

    def put(self, value):
        self.values.append(value)
        if self.stop_after is not None and len(self.values) > self.stop_after:
            raise KeyboardInterrupt

    def end(self):
        self.ended += 1
