"""The synthetic tasks of examples/: their data, their models, resuming, and learning on a CPU."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import induction_heads
import selective_copying
import training_files as files
from synthetic_models import LAYERS, build_model
from synthetic_tasks import NOISE, RECALL, SPECIAL, VOCAB_SIZE, InductionHeads, SelectiveCopying
from synthetic_training import NEVER, Recipe, Stage, Trainer, accuracy

CPU = torch.device("cpu")


def model_of(kind: str, seed: int = 0, device: str = "cpu"):
    return build_model(kind, VOCAB_SIZE, 16, 2, seed, torch.device(device))


class TestData:
    def test_selective_copying_asks_for_the_data_in_order(self):
        ids, targets = SelectiveCopying(50, memorize=7).batch(100, CPU)
        assert ids.shape == (100, 57) and targets.shape == (100, 7)
        assert (ids[:, 50:] == RECALL).all()
        for row, want in zip(ids[:, :50].tolist(), targets.tolist(), strict=True):
            assert [token for token in row if token != NOISE] == want
        places = (ids[:, :50] != NOISE).nonzero()[:, 1]
        assert places.unique().numel() == 50  # anywhere
        assert targets.unique().tolist() == list(range(1, RECALL))

    def test_induction_heads_asks_for_the_successor(self):
        ids, targets = InductionHeads(12).batch(400, CPU)
        for row, want in zip(ids.tolist(), targets[:, 0].tolist(), strict=True):
            first = row.index(SPECIAL)
            assert row.count(SPECIAL) == 2 and row[-1] == SPECIAL and row[first + 1] == want
        assert (ids[:, :-1] == SPECIAL).nonzero()[:, 1].unique().tolist() == list(range(10))

    @pytest.mark.parametrize("chunk", [1, 5, 12, 100])
    def test_a_stream_is_the_task_in_pieces(self, chunk):
        pieces = list(InductionHeads(12).stream(300, chunk, CPU))
        assert all(piece.shape[1] <= chunk for piece, _ in pieces)
        ids, targets = torch.cat([piece for piece, _ in pieces], 1), pieces[0][1]
        assert ids.shape == (300, 12)
        for row, want in zip(ids.tolist(), targets[:, 0].tolist(), strict=True):
            first = row.index(SPECIAL)
            assert row.count(SPECIAL) == 2 and row[-1] == SPECIAL and row[first + 1] == want
        assert (ids[:, :-1] == SPECIAL).nonzero()[:, 1].unique().tolist() == list(range(10))


class TestModels:
    def test_the_time_invariant_layer_is_a_convolution(self):
        """Its response to an input depends on the time since then alone: K_k = C exp(k ΔA) ΔB."""
        layer, x = model_of("time_invariant").backbone.layers[0].mixer, torch.randn(2, 20, 16)
        with torch.no_grad():
            u, z = layer.in_proj(x).transpose(1, 2).chunk(2, dim=1)
            u = F.silu(layer.conv1d(u)[..., :20])
            delta = F.softplus(layer.delta_bias)[:, None]
            decay = torch.exp(-torch.exp(layer.A_log) * delta)
            powers = decay[..., None] ** torch.arange(20)
            kernel = ((layer.C * layer.B * delta)[..., None] * powers).sum(1)  # (d, 20)
            y = F.conv1d(F.pad(u, (19, 0)), kernel.flip(1)[:, None], groups=32)
            want = layer.out_proj(((y + layer.D[:, None] * u) * F.silu(z)).transpose(1, 2))
            torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", LAYERS)
    def test_every_parameter_learns_and_layers_are_causal(self, kind):
        model = model_of(kind)
        ids = torch.randint(VOCAB_SIZE, (2, 30))
        logits = model(ids).logits
        logits.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        changed = ids.clone()
        changed[:, 20] = (changed[:, 20] + 1) % VOCAB_SIZE
        again = model(changed).logits
        torch.testing.assert_close(again[:, :20], logits[:, :20])
        assert not torch.allclose(again[:, 20], logits[:, 20])

    def test_the_ungated_layer_is_mamba_without_z(self):
        """With an open gate (silu(z) = 1) Mamba computes what the layer without a gate does."""
        gated, plain = (model_of(kind).backbone.layers[0].mixer for kind in ("mamba", "no_gate"))
        x = torch.randn(2, 20, 16)
        with torch.no_grad():
            bias = torch.cat([torch.zeros(32), torch.full((32,), 1.2784645)])  # silu of it is 1
            gated.in_proj = torch.nn.Linear(16, 64)
            gated.in_proj.weight.copy_(torch.cat([plain.in_proj.weight, torch.zeros(32, 16)]))
            gated.in_proj.bias.copy_(bias)
            for name in ("conv1d", "x_proj", "dt_proj", "out_proj"):
                getattr(gated, name).load_state_dict(getattr(plain, name).state_dict())
            torch.testing.assert_close(gated(x), plain(x), rtol=1e-4, atol=1e-5)


def tiny_recipe() -> Recipe:
    stages = (
        Stage(SelectiveCopying(12, 2), 4, 15, 2.0),
        Stage(SelectiveCopying(20, 2), 4, 25, NEVER),
    )
    return Recipe(stages, lr=1e-3, warmup=5, check_every=10)


class TestTraining:
    def test_resumed_run_equals_the_uninterrupted_one(self, tmp_path, device):
        class Interrupted(Exception):
            pass

        whole = Trainer(model_of("mamba", device=device), tiny_recipe(), seed=3)
        whole.run(lambda: None)
        assert whole.step == 40 and [h["step"] for h in whole.history] == [10, 15, 25, 35, 40]

        def save():
            files.save_checkpoint(tmp_path / "c.pt", trainer.state())
            if trainer.step in (10, 15, 35):
                raise Interrupted

        for _ in range(4):
            trainer = Trainer(model_of("mamba", device=device), tiny_recipe(), seed=3)
            if (tmp_path / "c.pt").exists():
                trainer.load_state(files.load_checkpoint(tmp_path / "c.pt"))
            try:
                trainer.run(save, save_seconds=0.0)
            except Interrupted:
                continue
        assert trainer.step == 40
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, trainer.model.state_dict()[name]), name
        assert [h["loss"] for h in whole.history] == [h["loss"] for h in trainer.history]

    def test_the_biases_of_delta_sink(self, device):
        """By `sink` learning rates a step, after what Adam does."""
        moved = []
        for sink in (0.0, 3.0):
            recipe = Recipe((Stage(InductionHeads(9), 4, 2, NEVER),), lr=1e-3, sink=sink, warmup=1)
            model = model_of("mamba", device=device)
            Trainer(model, recipe, seed=0).train_step()
            moved.append({name: p.detach().clone() for name, p in model.named_parameters()})
        for name, value in moved[0].items():
            expected = value - 3e-3 if name.endswith("dt_proj.bias") else value
            torch.testing.assert_close(moved[1][name], expected, rtol=1e-6, atol=1e-7)

    def test_a_checkpoint_of_another_recipe_is_refused(self):
        trainer = Trainer(model_of("mamba"), tiny_recipe(), seed=3)
        other = Trainer(model_of("mamba"), dataclasses.replace(tiny_recipe(), lr=1.0), seed=3)
        with pytest.raises(ValueError, match="resume with the options"):
            other.load_state(trainer.state())

    def test_a_stage_ends_when_its_accuracy_is_reached(self):
        first = Stage(SelectiveCopying(12, 2), 4, 1000, 0.0)  # at once
        recipe = Recipe((first, dataclasses.replace(first, steps=30)), lr=1e-3, check_every=10)
        answers = iter([False, True])
        trainer = Trainer(model_of("mamba"), recipe, seed=0)
        trainer.run(lambda: None, reached=lambda: next(answers))
        assert trainer.step == 30  # 10, then 20 until `reached` said yes

    def test_evaluation_does_not_change_what_training_draws(self, device):
        trainer = Trainer(model_of("mamba", device=device), tiny_recipe(), seed=3)
        task, where = tiny_recipe().stages[0].task, torch.device(device)
        with trainer.own_randomness():
            first = task.batch(4, where)[0]
        assert torch.equal(task.batch(4, where)[0], first)

    def test_divergence_is_an_error(self):
        recipe = dataclasses.replace(tiny_recipe(), lr=1e30, warmup=1, grad_clip=1e30)
        with pytest.raises(FloatingPointError, match="lower --lr"):
            Trainer(model_of("mamba"), recipe, seed=3).run(lambda: None)


class TestAccuracy:
    def test_streaming_equals_one_pass(self):
        model = model_of("mamba")
        with torch.no_grad():
            model.lm_head.weight.normal_()
            state, pieces = None, []
            for ids, _ in InductionHeads(40).stream(3, 7, CPU):
                out = model(ids, initial_state=state, return_final_state=True)
                state = out.final_state
                pieces.append((ids, out.logits))
            ids, logits = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
            torch.testing.assert_close(logits, model(ids).logits)

    def test_a_model_that_guesses_is_right_by_chance(self):
        torch.manual_seed(0)
        found = accuracy(model_of("mamba"), SelectiveCopying(20, 4), 256, 2, CPU)
        assert found["accuracy"] < 0.15 and found["examples_right"] < 0.01
        assert induction_heads.streamed_accuracy(model_of("mamba"), 64, 512, 16, CPU) < 0.15


class TestScripts:
    @pytest.mark.parametrize("script", [selective_copying, induction_heads])
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--resume", "start the run without --resume"),
            ("--device tpu9", "torch knows no device 'tpu9'"),
            ("--preset huge", "invalid choice: 'huge'"),
        ],
    )
    def test_bad_options_write_nothing(self, script, options, message, tmp_path, capsys):
        out = tmp_path / "o"
        with pytest.raises(SystemExit) as stop:
            script.main(["--out", str(out), *options.split()])
        assert stop.value.code == 2 and not out.exists()
        assert message in capsys.readouterr().err


@pytest.mark.slow
class TestLearning:
    """The ci presets, half a minute each: learning itself, to the accuracy that they state."""

    def test_selection_learns_to_copy_and_time_invariance_does_not(self, tmp_path):
        metrics = selective_copying.main(ci_options(tmp_path))
        right = {kind: m["test"]["accuracy"] for kind, m in metrics["models"].items()}
        assert right["mamba"] >= 0.90 and right["time_invariant"] < 0.75
        assert json.loads((tmp_path / "o" / "metrics.json").read_text()) == metrics
        # A finished run is not trained again.
        again = selective_copying.main([*ci_options(tmp_path), "--resume", "--models", "mamba"])
        assert again["models"]["mamba"] == metrics["models"]["mamba"]

    def test_induction_heads_reach_beyond_the_length_of_training(self, tmp_path):
        metrics = induction_heads.main(ci_options(tmp_path))
        assert metrics["trained_at"] == 64
        assert {row["length"]: row["accuracy"] >= 0.98 for row in metrics["test"]} == {
            2**power: True for power in range(6, 11)
        }


def ci_options(tmp_path: Path) -> list[str]:
    return ["--preset", "ci", "--device", "cpu", "--require", "--out", str(tmp_path / "o")]
