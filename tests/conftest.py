"""Fixtures of the whole suite: devices, backends, and fresh memory that is never zero by luck."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)
settings.register_profile(
    "suite",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("suite")


def _poisoned(make):
    """``make`` (torch.empty and its kin), filled with values that show up in any result."""

    def wrapper(*args, **kwargs):
        fresh = make(*args, **kwargs)
        if type(fresh) is not torch.Tensor or torch.compiler.is_compiling():
            return fresh
        with torch.no_grad():
            if fresh.is_floating_point() or fresh.is_complex():
                fresh.fill_(float("nan"))
            elif fresh.dtype != torch.bool:
                fresh.fill_(torch.iinfo(fresh.dtype).max)
        return fresh

    return wrapper


@pytest.fixture(autouse=True)
def poison_fresh_memory(monkeypatch):
    """Whatever is allocated without a value holds NaN, so that nothing can be left unwritten."""
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    """Each device type in turn."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is available to torch")
    return request.param


@pytest.fixture(params=["reference", "native"])
def backend(request):
    """Each explicit backend in turn, chosen for the whole test."""
    import mamba_ssm

    with mamba_ssm.backend(request.param):
        yield request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A backend that says it does not serve the call skips the test, with its own words."""
    try:
        return (yield)
    except Exception as error:
        if "backend" in item.fixturenames and type(error).__name__ == "BackendError":
            pytest.skip(str(error))
        raise


def pytest_configure(config):
    """Print the reason of every skip."""
    if "s" not in (config.option.reportchars or ""):
        config.option.reportchars = (config.option.reportchars or "") + "s"
