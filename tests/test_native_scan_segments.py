"""A long row of few channels on the CPU: threads share the length, to the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_matches, evaluate
from scan_cases import BASE, make_inputs

import mamba_ssm
from mamba_ssm.ops import native
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

pytestmark = pytest.mark.skipif(
    not native.has_kernel("_selective_scan_fwd", "cpu"), reason="no native scan on the CPU"
)

LONG = replace(BASE, b=1, d=20, length=2500, n=5)
CASES = {
    "base": LONG,
    "32 channels, 16 states": replace(LONG, d=32, n=16, length=2304),
    "one channel, one state": replace(LONG, d=1, n=1),
    "19 states": replace(LONG, d=3, n=19, length=2049),
    "initial state": replace(LONG, initial_state=True),
    "bf16": replace(LONG, dtype=torch.bfloat16, initial_state=True),
    "constant B": replace(LONG, groups_B=0),
    "constant B, C": replace(LONG, groups_B=0, groups_C=0),
    "nothing optional": replace(LONG, D=False, z=False, delta_bias=False, softplus=False),
    "channel last": replace(LONG, layout="channel last"),
    "packed": replace(LONG, packing="packed", initial_state=True),
    "packed, from zero": replace(LONG, packing="packed"),
    "returning": replace(LONG, packing="returning", initial_state=True),
    "holes": replace(LONG, packing="holes", initial_state=True),
    "all padding": replace(LONG, packing="padding", initial_state=True),
}


def inputs_for(case):
    """Inputs whose states live for thousands of steps: what segments hand on must be right."""
    inputs = make_inputs(case)
    inputs["A"] = inputs["A"] * 1e-3
    return inputs


def _fn(**inputs):
    return selective_scan_fn(**inputs, return_last_state=True)


def _ref(**inputs):
    return selective_scan_ref(**inputs, return_last_state=True)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_results_are_those_of_one_walk_at_any_number_of_threads(case, threads):
    inputs = inputs_for(case)
    with mamba_ssm.backend("native"):
        assert_matches(_fn, _ref, inputs)
        results = []
        for count in (1, 2, 7):
            threads(count)
            results.append(evaluate(_fn, inputs))
    for other in results[1:]:
        assert results[0].keys() == other.keys()
        assert all(torch.equal(results[0][key], other[key]) for key in other)


@pytest.mark.parametrize("chunk_size", [1, 16, 24, 64, 128, 256, 5000])
def test_any_chunk_size(chunk_size, threads, monkeypatch):
    threads(2)
    chunk_size_for = "mamba_ssm.ops.selective_scan_interface.chunk_size_for"
    monkeypatch.setattr(chunk_size_for, lambda *_: chunk_size)
    with mamba_ssm.backend("native"):
        assert_matches(_fn, _ref, inputs_for(CASES["initial state"]))


def test_gradients_or_not_the_outputs_are_the_same():
    inputs = inputs_for(CASES["initial state"])
    with mamba_ssm.backend("native"):
        plain = _fn(**inputs)
        followed = _fn(**(inputs | {"u": inputs["u"].requires_grad_()}))
    assert all(torch.equal(a, b.detach()) for a, b in zip(plain, followed, strict=True))


@pytest.mark.parametrize("isa", native.available_cpu_isas())
@pytest.mark.parametrize("name", ["base", "32 channels, 16 states", "holes", "constant B, C"])
def test_every_instruction_set(name, isa):
    native.force_cpu_isa(isa)
    try:
        with mamba_ssm.backend("native"):
            assert_matches(_fn, _ref, inputs_for(CASES[name]))
    finally:
        native.force_cpu_isa("auto")


def test_states_that_grow_out_of_range_meet_no_zero():
    """What is left of a state can be infinite; of a state of zero, zero is left."""
    inputs = make_inputs(replace(LONG, d=2, n=1))
    inputs["A"] = inputs["A"].abs()
    inputs["u"] = torch.zeros_like(inputs["u"])
    with mamba_ssm.backend("native"):
        out, last = _fn(**inputs)
    assert not bool(out.any()) and not bool(last.any())


def test_segments_are_used():
    """A row in a batch, which is one walk, may differ from the row alone in its last bits."""
    inputs = inputs_for(replace(LONG, b=2))
    alone = {
        key: value[:1] if torch.is_tensor(value) and value.dim() > 2 else value
        for key, value in inputs.items()
    }
    with mamba_ssm.backend("native"):
        together, one = _fn(**inputs)[0][:1], _fn(**alone)[0]
    assert not torch.equal(together, one)
    assert float((together - one).abs().max()) < 1e-5 * float(one.abs().max())
