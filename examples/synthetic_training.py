"""Train a small model on a synthetic task; on a GPU a whole training step is one CUDA graph.

A step draws its batch on the device, so the host does nothing but start the next step. The run is
reproducible from its seed, and a resumed run continues the interrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from synthetic_tasks import InductionHeads, SelectiveCopying
from torch import Tensor, nn
from tqdm import tqdm

from mamba_ssm.utils.graphed_step import GraphedStep

Task = SelectiveCopying | InductionHeads
NEVER = 2.0  # an accuracy that ends no stage early


@dataclass(frozen=True)
class Stage:
    """A part of a run: so many steps at most; over earlier once `accuracy` is reached."""

    task: Task
    batch_size: int
    steps: int
    accuracy: float


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: Adam, linear warm-up, clipped gradients.

    In the last stage the learning rate falls linearly to `last_lr_ratio` of itself. `head_decay` is
    a decoupled weight decay of the output projection alone: it keeps the logits from growing, so
    that the loss goes on asking for cleaner states when every answer is right. `sink` takes that
    many learning rates a step off the biases of delta: by default a token then changes the states
    ever less, and is taken up only where the loss asks for it. (Both are decoupled from Adam.)
    """

    stages: tuple[Stage, ...]
    lr: float
    head_decay: float = 0.0
    sink: float = 0.0
    last_lr_ratio: float = 1.0
    warmup: int = 100
    grad_clip: float = 1.0
    check_every: int = 100  # steps between looks at the accuracy, which is a mean over them


class Trainer:
    """One model on its way through the stages of a recipe."""

    def __init__(self, model: nn.Module, recipe: Recipe, seed: int) -> None:
        self.model, self.recipe = model, recipe
        self.device = next(model.parameters()).device
        on_gpu = self.device.type == "cuda"
        # A tensor: a captured graph reads the learning rate from it.
        self.lr = torch.tensor(0.0, device=self.device) if on_gpu else 0.0
        head = list(model.lm_head.parameters())
        others = [p for p in model.parameters() if all(p is not h for h in head)]
        groups = [
            {"params": others, "weight_decay": 0.0},
            {"params": head, "weight_decay": recipe.head_decay},
        ]
        named = self.model.named_parameters() if recipe.sink else ()
        self.sinking = [p for name, p in named if name.endswith("dt_proj.bias")]
        # A small eps: gradients become tiny once every answer is right.
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.lr, eps=1e-12, fused=on_gpu, capturable=on_gpu
        )
        self.stage = self.stage_step = self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.watched: list[dict[str, Any]] = []  # what `reached` of `run` measured
        self.graphed = GraphedStep(self._work, self.device)
        self.loss_sum = torch.zeros((), device=self.device)
        self.correct_sum = torch.zeros((), device=self.device)
        torch.manual_seed(seed)

    def state(self) -> dict[str, Any]:
        """What is needed to continue."""
        return {
            "recipe": repr(self.recipe),
            "position": [self.stage, self.stage_step, self.step],
            "seconds": self.seconds,
            "history": self.history,
            "watched": self.watched,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self._generator_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up `state`; ValueError if it belongs to another recipe."""
        if state["recipe"] != repr(self.recipe):
            raise ValueError(
                f"the run was started as {state['recipe']}, and is now {self.recipe}; resume with "
                "the options that it was started with, or choose another --out"
            )
        self.stage, self.stage_step, self.step = state["position"]
        self.seconds, self.history = state["seconds"], state["history"]
        self.watched = state["watched"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._set_generator_state(state["generator"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr  # load_state_dict has put a copy there, which no graph would read

    def _generator_state(self) -> Tensor:
        return torch.cuda.get_rng_state() if self.device.type == "cuda" else torch.get_rng_state()

    def _set_generator_state(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state)
        else:
            torch.set_rng_state(state)

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """What is drawn inside does not change what the training will draw."""
        state = self._generator_state()
        yield
        self._set_generator_state(state)

    def speeds(self) -> dict[str, float]:
        """Steps per second at each length, without the pieces in which a graph was captured."""
        found: dict[int, list[dict[str, Any]]] = {}
        for row in self.history:
            found.setdefault(row["length"], []).append(row)
        return {
            str(length): round(
                (rows[-1]["step"] - rows[0]["step"]) / (rows[-1]["seconds"] - rows[0]["seconds"]), 1
            )
            for length, rows in found.items()
            if len(rows) > 1
        }

    def _set_learning_rate(self) -> None:
        lr = self.recipe.lr * min(1.0, (self.step + 1) / self.recipe.warmup)
        if self.stage == len(self.recipe.stages) - 1:
            done = self.stage_step / self.recipe.stages[-1].steps
            lr *= 1 - (1 - self.recipe.last_lr_ratio) * done
        if isinstance(self.lr, Tensor):
            self.lr.fill_(lr)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr

    def _work(self) -> None:
        """One step, without anything that waits for the device."""
        stage = self.recipe.stages[self.stage]
        ids, targets = stage.task.batch(stage.batch_size, self.device)
        logits = self.model(ids, num_last_tokens=targets.shape[1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        self.optimizer.step()
        with torch.no_grad():
            for bias in self.sinking:
                bias.sub_(self.recipe.sink * self.optimizer.param_groups[0]["lr"])
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += loss.detach()
        self.correct_sum += (logits.detach().argmax(-1) == targets).float().mean()

    def train_step(self) -> None:
        """One optimizer step on a fresh batch."""
        self._set_learning_rate()
        self.graphed()
        self.step += 1
        self.stage_step += 1

    def _take_means(self, steps: int) -> tuple[float, float]:
        loss, accuracy = (float(x) / steps for x in (self.loss_sum, self.correct_sum))
        self.loss_sum.zero_()
        self.correct_sum.zero_()
        if not loss == loss:
            raise FloatingPointError(f"the loss is {loss} at step {self.step}; lower --lr")
        return loss, accuracy

    def run(
        self,
        save: Callable[[], None],
        reached: Callable[[], bool] | None = None,
        save_seconds: float = 30.0,
        label: str = "",
    ) -> None:
        """Train to the end of the last stage.

        `save` is called every `save_seconds` and at the end. `reached`, where given, has the last
        word when the last stage reaches its accuracy.
        """
        total = sum(stage.steps for stage in self.recipe.stages)
        last_save = time.monotonic()
        with tqdm(total=total, initial=self.step, unit="step", desc=label, disable=None) as bar:
            while self.stage < len(self.recipe.stages):
                accuracy = self._run_piece(bar)
                stage = self.recipe.stages[self.stage]
                last = self.stage == len(self.recipe.stages) - 1
                done = accuracy >= stage.accuracy and (not last or reached is None or reached())
                if done or self.stage_step >= stage.steps:
                    self.stage, self.stage_step = self.stage + 1, 0
                    bar.write(
                        f"{label}: {stage.task} {'reached' if done else 'ended at'} accuracy "
                        f"{accuracy:.4f}; step {self.step}, {self.seconds:.1f} s"
                    )
                if time.monotonic() - last_save > save_seconds:
                    save()
                    last_save = time.monotonic()
        save()

    def _run_piece(self, bar: tqdm) -> float:
        """`check_every` steps of the present stage, or what is left of it; the mean accuracy."""
        stage, before, start = self.recipe.stages[self.stage], self.seconds, time.monotonic()
        steps = min(self.recipe.check_every, stage.steps - self.stage_step)
        if self.stage_step == 0:  # other shapes, another graph
            self.graphed = GraphedStep(self._work, self.device)
        for _ in range(steps):
            self.train_step()
        loss, accuracy = self._take_means(steps)
        self.seconds = before + time.monotonic() - start
        self.history.append(
            {"step": self.step, "length": stage.task.length, "loss": loss, "accuracy": accuracy}
            | {"seconds": round(self.seconds, 3)}
        )
        bar.update(steps)
        bar.set_postfix(length=stage.task.length, accuracy=f"{accuracy:.4f}")
        return accuracy


@torch.inference_mode()
def accuracy(
    model: nn.Module, task: Task, batch_size: int, batches: int, device: torch.device
) -> dict[str, float]:
    """Share of right tokens, and of examples with every token right, on fresh examples."""
    tokens = examples = 0.0
    for _ in range(batches):
        ids, targets = task.batch(batch_size, device)
        right = model(ids, num_last_tokens=targets.shape[1]).logits.argmax(-1) == targets
        tokens += float(right.float().mean())
        examples += float(right.all(1).float().mean())
    return {
        "accuracy": tokens / batches,
        "examples_right": examples / batches,
        "examples": batches * batch_size,
    }
