"""The compiled CPU kernels on every instruction set and at any number of threads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import assert_close_to_oracle, assert_matches, evaluate, to_double
from scan_cases import BASE, CASES, make_inputs
from test_selective_scan import _fn, _ref

import mamba_ssm
from mamba_ssm.ops import native
from mamba_ssm.ops.selective_state_update import (
    selective_state_update,
    selective_state_update_ref,
)

NATIVE = native.has_kernel("_selective_scan_fwd", "cpu")
pytestmark = pytest.mark.skipif(
    not NATIVE, reason=f"no compiled CPU kernels: {native.status()['cpu'][1]}"
)
ISAS = ["baseline", "avx2", "avx512", "avx512_bf16", "avx512_amx"]
ROWS = [
    "base",
    "n=17",
    "d=67",
    "many channels",
    "groups",
    "constant B, C",
    "channel last",
    "holes",
    "bf16",
    "fp16",
]


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set in turn, forced."""
    if request.param not in native.available_cpu_isas():
        pytest.skip(f"this CPU or this build has no {request.param} kernels")
    native.force_cpu_isa(request.param)
    yield request.param
    native.force_cpu_isa("auto")


@pytest.mark.parametrize("row", ROWS)
def test_scan_on_every_instruction_set(row, isa):
    with mamba_ssm.backend("native"):
        assert native.cpu_isa() == isa
        assert_matches(_fn, _ref, make_inputs(CASES[row]))


@pytest.mark.parametrize("n", [1, 7, 16, 33])
@pytest.mark.parametrize("shared_A", [False, True], ids=["A (d, n)", "A expanded"])
def test_state_update_on_every_instruction_set(n, shared_A, isa):
    generator = torch.Generator().manual_seed(n)
    b, d = 2, 19

    def rand(*shape):
        return torch.randn(shape, generator=generator)

    A = -rand(d, 1).exp().expand(d, n) if shared_A else -rand(d, n).exp()
    inputs = {"x": rand(b, d), "dt": rand(b, d), "A": A, "B": rand(b, n), "C": rand(b, n)}
    inputs |= {"D": rand(d), "z": rand(b, d), "dt_bias": rand(d), "dt_softplus": True}
    state = rand(b, d, n)

    def step(fn, state, inputs):
        moved = state.clone()
        return {"out": fn(moved, **inputs), "state": moved}

    with mamba_ssm.backend("native"):
        actual = step(selective_state_update, state, inputs)
    plain = step(selective_state_update_ref, state, inputs)
    doubled = {name: to_double(value) for name, value in inputs.items()}
    exact = step(selective_state_update_ref, state.double(), doubled)
    for name, value in actual.items():
        assert_close_to_oracle(value, plain[name], exact[name], name)


def test_exponentials_far_from_zero(isa):
    # Decays that underflow, grow to infinity, or are NaN must come out as such, not as garbage.
    delta = torch.tensor([0.0, 1e-30, 5.0, 60.0, 90.0, 1e30, -60.0, -1e30, float("nan")])
    n = len(delta)
    shape = (1, n, 1)
    inputs = {
        "u": torch.zeros(shape),
        "delta": delta.view(shape),
        "A": -torch.ones(n, 1),
        "B": torch.ones(1, 1, 1),
        "C": torch.ones(1, 1, 1),
        "initial_state": torch.ones(1, n, 1),
    }
    with mamba_ssm.backend("native"):
        state = _fn(**inputs)[1].flatten()
    expected = torch.exp(-delta.double()).float()
    # The argument itself is rounded: at 90 that is 90 * 2^-24 of the result.
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-43, equal_nan=True)


@pytest.mark.parametrize(
    "row", ["many channels", "d=67", "l=1000", "packed, groups", "shared by rows"]
)
def test_thread_counts_give_identical_bits(row):
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            with mamba_ssm.backend("native"):
                results.append(evaluate(_fn, make_inputs(CASES[row])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


def test_a_batch_row_does_not_depend_on_its_batch():
    inputs = make_inputs(BASE.__class__(b=3, d=70, length=50))
    with mamba_ssm.backend("native"):
        whole = _fn(**inputs)
        names = ("u", "delta", "B", "C", "z")
        one = _fn(**{k: v[1:2] if k in names else v for k, v in inputs.items()})
    for a, b in zip(whole, one, strict=True):
        assert torch.equal(a[1:2], b)


def test_wide_code_stays_in_its_namespace():
    """Nothing but the functions of namespace avx2 / avx512* may hold AVX instructions.

    An inline function of a common header that the linker took from a file compiled for AVX-512
    would end a process on a CPU without it.
    """
    objdump, filt = shutil.which("objdump"), shutil.which("c++filt")
    if not (objdump and filt):
        pytest.skip("objdump and c++filt (binutils) are not installed")
    library = native.library_path("cpu")
    code = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if re.search(r"file format elf64-x86-64", code) is None:
        pytest.skip("the library is not for x86-64")
    wide, name = set(), ""
    for line in code.splitlines():
        if line.endswith(">:"):
            name = line.split("<", 1)[1][:-2]
        elif "%ymm" in line or "%zmm" in line:
            wide.add(name)
    spaces = re.compile("4avx2|6avx512|11avx512_bf16|10avx512_amx")
    outside = sorted(name for name in wide if not spaces.search(name))
    assert wide, "no wide code at all: the library was built for one instruction set only"
    assert not outside, f"AVX code outside its namespace: {outside}"


def test_an_unknown_instruction_set_is_named():
    with pytest.raises(
        ValueError, match="'sse9' is not to be had; this machine has: auto, baseline"
    ):
        native.force_cpu_isa("sse9")


def test_the_environment_forces_one_from_the_start():
    code = "from mamba_ssm.ops import native; print(native.cpu_isa())"
    env = {**os.environ, "MAMBA_SSM_CPU_ISA": "baseline"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "baseline"


def test_an_unknown_environment_value_says_so():
    code = (
        "import mamba_ssm; from mamba_ssm.ops import native; "
        "print(native.status()['cpu']); print(native.has_kernel('_state_update', 'cpu'))"
    )
    env = {**os.environ, "MAMBA_SSM_CPU_ISA": "sse9"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert "MAMBA_SSM_CPU_ISA is 'sse9'" in done.stdout and "False" in done.stdout.splitlines()[-1]
