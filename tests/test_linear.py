"""Products of many rows on a CPU go by way of fp32 or through oneDNN where that is faster."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from decode_helpers import make_model

from mamba_ssm.ops import linear as module
from mamba_ssm.ops.linear import is_slow, linear

HALVES = [torch.bfloat16, torch.float16]


def inputs(dtype, rows=64):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((rows, 48), (20, 48), (20,)))
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_products_are_those_of_exact_arithmetic(dtype, slow, monkeypatch):
    monkeypatch.setattr(module, "is_slow", lambda _: slow)
    x, weight, bias = inputs(dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    with torch.no_grad():
        actual = linear(x.view(2, 32, 48), weight, bias).flatten(0, 1)
    assert actual.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=eps, atol=4 * eps)


def test_when_it_goes_by_way_of_fp32(monkeypatch):
    monkeypatch.setattr(module, "is_slow", lambda _: True)
    monkeypatch.setattr(module, "prefers_onednn", lambda: False)
    seen = []
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(x.dtype) or plain(x, *rest))
    x, weight, bias = inputs(torch.bfloat16)
    with torch.no_grad():
        linear(x, weight, bias)
        linear(x[:8], weight, bias)
        linear(x.float(), weight.float())
    weight.requires_grad_()
    linear(x, weight, bias).sum().backward()
    assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]
    assert weight.grad.dtype == torch.bfloat16


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="needs oneDNN")
@pytest.mark.parametrize("with_bias", [False, True])
def test_onednn_gives_the_same_product(with_bias, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "prefers_onednn", lambda: calls.append(1) or True)
    x, weight, bias = inputs(torch.float32, 96)
    bias = bias if with_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    time_innermost = x.view(2, 48, 48).transpose(1, 2).contiguous().transpose(1, 2)
    with torch.no_grad():
        for rows in (x, x.view(2, 48, 48), time_innermost):
            actual = linear(rows, weight, bias)
            assert actual.shape == (*rows.shape[:-1], 20) and actual.is_contiguous()
            torch.testing.assert_close(actual.double().flatten(0, -2), exact, rtol=1e-5, atol=1e-5)
        assert torch.equal(linear(x[:8], weight, bias), F.linear(x[:8], weight, bias))
    assert len(calls) == 3
    assert linear(x.requires_grad_(), weight, bias).requires_grad
    assert len(calls) == 3


def test_only_16_bit_types_can_be_slow():
    assert not is_slow(torch.float32) and not is_slow(torch.float64)
    assert isinstance(is_slow(torch.bfloat16), bool)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_model_gives_the_same_logits(dtype, monkeypatch):
    model = make_model(dtype)
    ids = torch.randint(0, 77, (2, 100), generator=torch.Generator().manual_seed(1))
    logits, asked = [], []
    for slow in (False, True):
        monkeypatch.setattr(module, "is_slow", lambda d, slow=slow: asked.append(d) or slow)
        with torch.no_grad():
            logits.append(model(ids).logits.float())
    error = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert float(error) < 8 * torch.finfo(dtype).eps
    assert asked == [dtype] * (2 * 3 * 4)  # four projections of three layers
