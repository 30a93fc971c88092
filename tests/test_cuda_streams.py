"""CUDA ops run on the current stream and on their tensors' device, whichever is current."""

from __future__ import annotations

import pytest
import torch
from module_helpers import assert_all_same, assert_same, run_with_grads, scrambled

from mamba_ssm import Mamba, MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
two_devices = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="two CUDA devices are needed"
)


def layer_and_input(device: str) -> tuple[Mamba, torch.Tensor]:
    torch.manual_seed(0)
    layer = scrambled(Mamba(16, layer_idx=0)).to(device)
    return layer, torch.randn(2, 100, 16).to(device)


def decoded(layer: Mamba, x: torch.Tensor) -> torch.Tensor:
    cache = layer.allocate_inference_cache(2, 4)
    with torch.no_grad():
        return torch.cat([layer.step(x[:, t : t + 1], *cache)[0] for t in range(4)], 1)


def test_work_waits_for_its_own_stream():
    layer, x = layer_and_input("cuda")
    expected, steps = run_with_grads(layer, layer, x), decoded(layer, x)
    side, late = torch.cuda.Stream(), torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        # The input is there only after this wait: an op on another stream would read NaN.
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        actual, late_steps = run_with_grads(layer, layer, late), decoded(layer, late)
    torch.cuda.synchronize()
    assert_all_same(actual, expected)
    assert_same(late_steps, steps)


@two_devices
def test_a_device_that_is_not_current():
    layer, x = layer_and_input("cuda:0")
    expected, steps = run_with_grads(layer, layer, x), decoded(layer, x)
    layer, x = layer_and_input("cuda:1")
    assert torch.cuda.current_device() == 0
    actual = {name: value.to("cuda:0") for name, value in run_with_grads(layer, layer, x).items()}
    assert_all_same(actual, expected)
    assert_same(decoded(layer, x).to("cuda:0"), steps)
    assert torch.cuda.current_device() == 0


@two_devices
def test_generation_on_a_device_that_is_not_current():
    torch.manual_seed(0)
    config = MambaConfig(d_model=16, n_layer=2, vocab_size=24)
    model = scrambled(MambaLMHeadModel(config)).eval()
    ids = torch.randint(0, 24, (2, 5))
    results = [
        model.to(device).generate(ids.to(device), max_length=16, cg=cg).cpu()
        for device in ("cuda:0", "cuda:1")
        for cg in (False, True)
    ]
    assert all(torch.equal(result, results[0]) for result in results)
