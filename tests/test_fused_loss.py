"""The loss whose gradients come in the same pass, against torch's on all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_oracle
from torch import nn

from mamba_ssm.models import fused_loss
from mamba_ssm.models.loss import chunked_cross_entropy

T, M, V = 57, 24, 130


@pytest.fixture(autouse=True)
def on_every_device(monkeypatch):
    monkeypatch.setattr(fused_loss, "DEVICES", {"cpu", "cuda"})


def make(device: str, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, T // 3, M, generator=g).to(device, dtype)
    head = nn.Linear(M, V, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(0.3 * torch.randn(V, M, generator=g))
    targets = torch.randint(V, (3, T // 3), generator=g)
    targets[0, 3:6] = -100
    # One token is predicted almost surely: p - 1 must keep its digits.
    with torch.no_grad():
        head.weight[targets[1, 2]] += hidden[1, 2].cpu().to(head.weight) * 0.5
    return hidden.requires_grad_(), head, targets.to(device)


def whole(hidden, weight, targets):
    logits = F.linear(hidden, weight).flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets.flatten())


def grads(loss, hidden, weight):
    return (loss.detach(), *torch.autograd.grad(3 * loss, (hidden, weight)))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 10, 1000])
def test_loss_and_gradients(device, size, dtype, autocast, monkeypatch):
    monkeypatch.setattr("mamba_ssm.models.loss.MAX_LOGIT_ELEMENTS", size * V)
    hidden, head, targets = make(device, dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head.weight)]
    expected = grads(whole(*exact, targets), *exact)
    with torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None):
        assert fused_loss.fused_loss_applies(head, hidden)
        actual = grads(chunked_cross_entropy(head, hidden, targets, V), hidden, head.weight)
        plain = grads(whole(hidden, head.weight, targets), hidden, head.weight)
    for name, *values in zip(
        ("loss", "d hidden", "d weight"), actual, plain, expected, strict=True
    ):
        assert_close_to_oracle(*values, name)


def test_frozen_parts_and_no_grad(device):
    hidden, head, targets = make(device)
    expected = grads(whole(hidden, head.weight, targets), hidden, head.weight)
    head.weight.requires_grad_(False)
    loss = chunked_cross_entropy(head, hidden, targets, V)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, hidden)[0], expected[1])
    head.weight.requires_grad_(True)
    loss = chunked_cross_entropy(head, hidden.detach(), targets, V)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, head.weight)[0], expected[2])
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(head, hidden, targets, V), expected[0])


def test_twice_through_the_graph_and_second_derivatives(device):
    hidden, head, targets = make(device)
    results = []
    for loss_of in (
        lambda: chunked_cross_entropy(head, hidden, targets, V),
        lambda: whole(hidden, head.weight, targets),
    ):
        loss = loss_of()
        first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(loss, hidden, retain_graph=True)[0])
        (again,) = torch.autograd.grad(loss, hidden, create_graph=True)
        results.append((first, *torch.autograd.grad(again.square().sum(), (hidden, head.weight))))
    torch.testing.assert_close(results[0], results[1])


def test_other_projections_are_called(device):
    hidden, head, targets = make(device)
    expected = whole(hidden, head.weight, targets)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    assert not fused_loss.fused_loss_applies(head, hidden)
    torch.testing.assert_close(chunked_cross_entropy(head, hidden, targets, V), expected)
    assert calls


def test_a_target_outside_the_vocabulary_is_an_error():
    hidden, head, targets = make("cpu")
    targets[0, 0] = V
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        chunked_cross_entropy(head, hidden, targets, V)
