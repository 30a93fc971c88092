"""A long row of few channels on CUDA: blocks share its length."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_matches, evaluate, to_double
from scan_cases import BASE, make_inputs

import mamba_ssm
from mamba_ssm.ops import native
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(native.gpu_reason()),
    reason="no CUDA device that the native kernels serve",
)

BF16, FP16 = torch.bfloat16, torch.float16
# Eight segments, the last one shorter than the others and no multiple of a tile.
LONG = replace(BASE, b=1, d=40, length=8504, dtype=BF16)
CASES = {
    "bf16": LONG,
    "channel last": replace(LONG, d=64, layout="channel last", initial_state=True),
    "fp16, initial state": replace(LONG, b=2, d=33, length=8512, dtype=FP16, initial_state=True),
    "not aligned": replace(LONG, length=8501, initial_state=True),
    "5 states, groups": replace(LONG, d=70, n=5, groups_B=2, groups_C=2),
    "20 states": replace(LONG, d=32, n=20, initial_state=True),
    "nothing optional": replace(LONG, D=False, z=False, delta_bias=False, softplus=False),
    "fp32, which is not divided": replace(LONG, d=8, dtype=torch.float32),
}


def _fn(**inputs):
    with mamba_ssm.backend("native"):
        return selective_scan_fn(**inputs, return_last_state=True)


def _ref(**inputs):
    """On the CPU, where so many small steps take less time."""
    there = {
        name: value.cpu() if torch.is_tensor(value) else value for name, value in inputs.items()
    }
    return tuple(t.cuda() for t in selective_scan_ref(**there, return_last_state=True))


def _many_rows(inputs):
    """The first row so often that each is one walk."""
    rows = torch.cuda.get_device_properties(0).multi_processor_count
    return {
        name: value[:1].expand(rows, *value.shape[1:])
        if torch.is_tensor(value) and value.dim() > 2
        else value
        for name, value in inputs.items()
    }


def _distance(actual, right):
    return float((actual.double() - right.double()).norm() / right.double().norm())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_outputs_and_states(case):
    inputs = make_inputs(case, "cuda")
    assert_matches(_fn, _ref, inputs, without_grad=list(inputs))
    first, second = evaluate(_fn, inputs), evaluate(_fn, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["bf16", "fp16, initial state", "5 states, groups"])
def test_states_that_outlive_segments(name):
    inputs = make_inputs(CASES[name], "cuda")
    inputs["A"] = inputs["A"] * 1e-3
    _, exact = _ref(**{name: to_double(value) for name, value in inputs.items()})
    # The roundings of thousands of decays; 1e-5 was measured.
    assert _distance(_fn(**inputs)[1], exact) < 5e-5


@pytest.mark.parametrize("name", ["bf16", "channel last", "not aligned"])
def test_gradients_are_those_of_one_walk(name):
    """The backward starts from states that the segments' walks kept."""
    alone = make_inputs(CASES[name], "cuda")
    grads = []
    for inputs in (alone, _many_rows(alone)):
        leaves = {
            name: value.detach().requires_grad_()
            for name, value in inputs.items()
            if torch.is_tensor(value) and value.dim() > 2
        }
        out, _ = _fn(**inputs | leaves)
        seed = torch.linspace(-1, 1, out[0].numel(), device="cuda").view_as(out[0]).to(out.dtype)
        found = torch.autograd.grad(out, list(leaves.values()), seed.expand_as(out))
        grads.append(dict(zip(leaves, (grad[0] for grad in found), strict=True)))
    for name, grad in grads[0].items():
        assert _distance(grad, grads[1][name]) < 2e-3, name


def test_gradients_or_not_the_outputs_are_the_same():
    inputs = make_inputs(CASES["fp16, initial state"], "cuda")
    plain = _fn(**inputs)
    followed = _fn(**(inputs | {"u": inputs["u"].requires_grad_()}))
    assert all(torch.equal(a, b.detach()) for a, b in zip(plain, followed, strict=True))


def test_states_that_grow_out_of_range_meet_no_zero():
    """What is left of a state can be infinite; of a state of zero, zero is left."""
    inputs = make_inputs(LONG, "cuda")
    inputs["A"] = inputs["A"].abs()
    inputs["u"] = torch.zeros_like(inputs["u"])
    out, last = _fn(**inputs)
    assert not bool(out.any()) and not bool(last.any())


def test_segments_are_used():
    """A row alone differs from one of many in its states' last bits."""
    alone = make_inputs(LONG, "cuda")
    alone["A"] = alone["A"] * 1e-3
    together, one = _fn(**_many_rows(alone))[1][:1], _fn(**alone)[1]
    assert not torch.equal(together, one)
    assert _distance(one, together) < 5e-5
