"""The loss whose gradients come in the same pass, against torch's on all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_oracle
from torch import nn

from mamba_ssm.models import fused_loss
from mamba_ssm.models.loss import chunked_cross_entropy
from mamba_ssm.ops import native

OPS = torch.ops.mamba_ssm
T, M, V = 57, 24, 130


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


def _op_inputs(device, dtype, size, pitch=None):
    g = torch.Generator().manual_seed(size)
    rows = torch.zeros(9, pitch or size)
    rows[:, :size] = 4 * torch.randn(9, size, generator=g)
    rows[1, : size - 1] = -torch.inf  # nothing but the last column is possible
    rows[2, :size] += 100
    targets = torch.randint(size, (9,), generator=g)
    targets[1], targets[4] = size - 1, -100
    targets[5] = rows[5, :size].argmax()
    rows[5, targets[5]] += 20  # almost sure
    return rows.to(device, dtype)[:, :size], targets.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 5, 64, 1000, 50280, 57344, 57352])
def test_op_against_the_oracle(device, dtype, size):
    op, reference = OPS._cross_entropy.default, OPS._cross_entropy.reference
    for pitch in (None, size + 8, size + 3):
        logits, targets = _op_inputs(device, dtype, size, pitch)
        exact, plain, again = (
            logits.double(),
            logits.clone(),
            _op_inputs(device, dtype, size, pitch)[0],
        )
        outside = logits.untyped_storage().size()
        expected = reference(exact, targets, -100), reference(plain, targets, -100)
        losses = op(logits, targets, -100)
        assert losses.dtype == torch.float32 and logits.untyped_storage().size() == outside
        assert_close_to_oracle(losses, expected[1], expected[0], "losses")
        assert_close_to_oracle(logits, plain, exact, "d logits")
        assert losses[4] == 0 and logits[4].eq(0).all()
        assert torch.equal(op(again, targets, -100), losses) and torch.equal(again, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_check(device, dtype):
    for overload in ("default", "reference"):
        inputs = (*_op_inputs(device, dtype, 40), -100)
        checks = {"test_utils": ("test_schema", "test_faketensor")}
        torch.library.opcheck(getattr(OPS._cross_entropy, overload), inputs, **checks)


def test_op_leaves_what_lies_between_rows_alone(device):
    logits, targets = _op_inputs(device, torch.bfloat16, 64, pitch=72)
    storage = logits.as_strided((9, 72), (72, 1))
    storage[:, 64:] = 7
    OPS._cross_entropy.default(logits, targets, -100)
    assert storage[:, 64:].eq(7).all()


@pytest.mark.skipif(
    not (torch.cuda.is_available() and native.has_kernel("_cross_entropy", "cuda")),
    reason="needs the CUDA kernel",
)
def test_wrong_calls_of_the_kernel_say_so():
    logits, targets = _op_inputs("cuda", torch.bfloat16, 64)
    op = OPS._cross_entropy.default
    for call, message in (
        ((logits.t(), targets), "logits must have contiguous rows"),
        ((logits[:1].expand(9, 64), targets), "must not overlap"),
        ((logits, targets.int()), "targets must be int64"),
        ((logits, targets[1:]), "targets must be int64 of shape"),
        ((logits[0], targets), "must have 2 dimensions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*call, -100)
