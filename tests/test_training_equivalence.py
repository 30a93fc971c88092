"""The backends train alike: 200 steps of a small language model from one seed, in fp32.

Backends round differently. Two loss curves agree if they are nowhere further apart than `BAND`, as
a fraction of the loss; the tests say what that band is worth: moving every weight by one rounding
before the training stays far inside it, an error of 10 % in one parameter's gradient leaves it.
"""

from __future__ import annotations

import functools

import pytest
import torch

import mamba_ssm
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.utils.optim import param_groups

STEPS, BATCH, LENGTH, VOCAB = 200, 4, 33, 64
BAND = 5e-6


@functools.cache
def text() -> torch.Tensor:
    """A text with something to learn: a random walk through a random graph, (20,000,) ids."""
    draw = torch.Generator().manual_seed(1)
    edges = torch.randint(VOCAB, (VOCAB, 3), generator=draw)
    turns = torch.randint(3, (20_000,), generator=draw).tolist()
    walk = [0]
    for turn in turns[1:]:
        walk.append(int(edges[walk[-1], turn]))
    return torch.tensor(walk)


def loss_curve(backend: str, device: str, moved: int = 0, wrong: str = "") -> torch.Tensor:
    """Losses (STEPS,) fp64 of one training run.

    `moved` > 0 seeds a change of every first weight by one rounding; the gradients of parameters
    whose name ends in `wrong` get an error of 10 %, of random sign.
    """
    torch.manual_seed(0)
    config = MambaConfig(d_model=32, n_layer=2, vocab_size=VOCAB, ssm_cfg={"d_state": 8})
    model = MambaLMHeadModel(config)
    if moved:
        draw = torch.Generator().manual_seed(moved)
        with torch.no_grad():
            for parameter in model.parameters():
                sign = torch.randint(2, parameter.shape, generator=draw) * 2 - 1
                parameter.mul_(1 + sign * 2.0**-23)
    model = model.to(device)
    noise = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if wrong and name.endswith(wrong):
            parameter.register_hook(
                lambda g: g * (1 + 0.1 * (torch.randint(2, g.shape, generator=noise) * 2 - 1))
            )
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.1), lr=5e-3)
    draw = torch.Generator().manual_seed(2)
    losses = []
    with mamba_ssm.backend(backend):
        for _ in range(STEPS):
            starts = torch.randint(len(text()) - LENGTH, (BATCH, 1), generator=draw)
            ids = text()[starts + torch.arange(LENGTH)].to(device)
            loss = model(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
    return torch.stack(losses).double().cpu()


@functools.cache
def kept_curve(backend: str, device: str) -> torch.Tensor:
    return loss_curve(backend, device)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest relative distance of two curves."""
    return float(((a - b).abs() / b).max())


def test_the_loss_falls():
    curve = kept_curve("reference", "cpu")
    assert curve[:5].mean() > 4.0 and curve[-20:].mean() < 1.7


def test_the_band_is_wider_than_rounding_noise():
    noise = [
        distance(loss_curve("reference", "cpu", moved=seed), kept_curve("reference", "cpu"))
        for seed in (1, 2)
    ]
    assert max(noise) < BAND / 4


@pytest.mark.parametrize("name", ["A_log", "D", "dt_proj.bias", "conv1d.weight"])
def test_the_band_shows_a_gradient_that_is_off_by_ten_per_cent(name):
    assert distance(loss_curve("native", "cpu", wrong=name), kept_curve("reference", "cpu")) > BAND


def test_loss_curves_agree(backend, device):
    apart = distance(kept_curve(backend, device), kept_curve("reference", "cpu"))
    print(f"{backend} on {device}: {apart:.1e} from the reference on the CPU")
    assert apart <= BAND


def test_a_run_repeats_bit_for_bit(backend, device):
    assert torch.equal(kept_curve(backend, device), loss_curve(backend, device))
