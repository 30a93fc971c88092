"""What torch.compile, torch.export, AOTInductor and gradient checkpointing cost or gain on a CPU.

    python benchmarks/torch_features.py --threads 2

A language model of 4 layers, d_model 256, vocabulary 8192, fp32: a training step of 2 × 512 tokens
(forward and backward), and a forward over 512 tokens. Compiling is not timed. Contestants run in
turn, round after round; "ours" is the model as it is, and the other rows say how many times as fast
it is.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measuring import Contest, Contestant, facts, measure, table, write_csv
from torch import Tensor, nn
from torch.export import Dim

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig

RESULTS = Path(__file__).resolve().parent / "results"
VOCABULARY = 8192


class Logits(nn.Module):
    """A model whose result is one tensor."""

    def __init__(self, model: MambaLMHeadModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids).logits


def new_model() -> MambaLMHeadModel:
    """The measured model, with the same random weights each time."""
    torch.manual_seed(0)
    return MambaLMHeadModel(MambaConfig(d_model=256, n_layer=4, vocab_size=VOCABULARY))


def training(length: int) -> Contest:
    """Forward and backward, with memory."""
    ids = torch.randint(0, VOCABULARY, (2, length))

    def step_of(model: MambaLMHeadModel, loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad(set_to_none=True)
            loss(ids).backward()

        return step

    plain, compiled, recomputed = new_model(), new_model(), new_model()
    recomputed.train().gradient_checkpointing_enable()
    losses = {
        "mamba_ssm": (plain, lambda x: plain(x, labels=x).loss),
        "torch.compile": (
            compiled,
            torch.compile(lambda x: compiled(x, labels=x).loss, fullgraph=True),
        ),
        "checkpointing": (recomputed, lambda x: recomputed(x, labels=x).loss),
    }
    contestants = [Contestant(name, step_of(*pair)) for name, pair in losses.items()]
    return Contest(f"training step, 2 x {length}", "ms", 1, contestants, memory=True)


def inference(length: int, folder: str) -> Contest:
    """A forward without gradients; the exported programs take any batch and length."""
    model = new_model().eval()
    ids = torch.randint(0, VOCABULARY, (1, length))
    program = torch.export.export(
        Logits(model), (ids.expand(2, -1).contiguous(),),
        dynamic_shapes=({0: Dim("batch"), 1: Dim("length")},),
    )  # fmt: skip
    path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
    forwards = {
        "mamba_ssm": Logits(model),
        "torch.compile": torch.compile(Logits(model), fullgraph=True),
        "torch.export": program.module(),
        "AOTInductor": torch._inductor.aoti_load_package(path),
    }
    expected = forwards["mamba_ssm"](ids)
    for name, forward in forwards.items():
        torch.testing.assert_close(forward(ids), expected, rtol=1e-3, atol=1e-4, msg=name)

    def run_of(forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            forward(ids)

        return run

    contestants = [Contestant(name, run_of(forward)) for name, forward in forwards.items()]
    return Contest(f"forward, 1 x {length}", "ms", 1, contestants)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, append it to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=40.0, help="seconds for each case")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--csv", default=str(RESULTS / "torch_features_cpu.csv"))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    about = facts()
    rows = measure([training(options.length)], options.rounds, options.budget)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rows += measure([inference(options.length, folder)], options.rounds, options.budget)
    print(table(rows))
    if options.csv != "none":
        write_csv(Path(options.csv), rows, about)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
