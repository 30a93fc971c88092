"""A training step on a GPU under autocast: compiled as one graph, and captured as a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.graphed_step import EAGER_STEPS, GraphedStep
from mamba_ssm.utils.optim import param_groups

STEPS = 8


@pytest.fixture(autouse=True)
def cuda_only():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is available to torch")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Training:
    """A small language model, its optimizer and one batch; ``step`` trains once."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        torch.manual_seed(0)
        config = MambaConfig(d_model=64, n_layer=2, vocab_size=96)
        self.model = MambaLMHeadModel(config, device="cuda")
        self.optimizer = torch.optim.AdamW(
            param_groups(self.model, weight_decay=0.1), lr=1e-3, capturable=True
        )
        self.ids = torch.randint(96, (3, 70), device="cuda")
        self.dtype = dtype

    def loss(self) -> torch.Tensor:
        with torch.autocast("cuda", self.dtype, enabled=self.dtype is not None):
            return self.model(self.ids, labels=self.ids).loss

    def step(self, loss=None) -> torch.Tensor:
        value = (loss or self.loss)()
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value.detach()


@pytest.fixture(params=[None, torch.bfloat16], ids=["fp32", "autocast"])
def dtype(request):
    return request.param


def _losses(dtype) -> torch.Tensor:
    training = Training(dtype)
    return torch.stack([training.step() for _ in range(STEPS)])


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_a_compiled_training_step(dtype, compiler, backend):
    expected = _losses(dtype)
    training = Training(dtype)
    loss = torch.compile(training.loss, backend=compiler, fullgraph=True)
    actual = torch.stack([training.step(loss) for _ in range(STEPS)])
    # Casts may be fused away, so bf16 runs drift apart by roundings of bf16.
    torch.testing.assert_close(actual, expected, rtol=1e-5 if dtype is None else 2e-3, atol=0)
    assert actual[-1] < 0.9 * actual[0]


def test_a_captured_training_step(dtype, backend):
    expected = _losses(dtype)
    training, last = Training(dtype), torch.zeros((), device="cuda")
    step = GraphedStep(lambda: last.copy_(training.step()), "cuda")
    actual = []
    for i in range(STEPS):
        step()
        actual.append(last.clone())
        assert (step.graph is not None) == (i >= EAGER_STEPS)
    torch.testing.assert_close(
        torch.stack(actual), expected, rtol=1e-5 if dtype is None else 1e-4, atol=0
    )
