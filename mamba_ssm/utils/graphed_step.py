"""A training step that costs the host next to nothing: on a GPU it becomes a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

EAGER_STEPS = 3  # before a graph is captured: they initialise libraries and the optimizer


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None) -> torch.cuda.graph:
    """`torch.cuda.graph` on a stream of the current device.

    Left to itself torch captures on one stream for the whole process, of the device that was
    current at the first capture: work of another device would run at once and not be recorded.
    """
    return torch.cuda.graph(graph, pool=pool, stream=_capture_stream(torch.cuda.current_device()))


class GraphedStep:
    """Call ``work`` again and again; on a GPU its kernels are captured once, then replayed.

    ``work`` (it takes and returns nothing) is the whole step: forward, backward, optimizer, and
    setting the gradients to None. The first three calls run it as it is, the fourth captures it,
    and all later ones replay the same kernels on the same memory. So what changes from step to
    step must lie in tensors that ``work`` reads, which the caller overwrites in place (``copy_``):
    the batch, and a learning rate given to the optimizer as a tensor with ``capturable=True``.
    What comes out lies in tensors that ``work`` writes in place. It must not wait for the device
    (no ``.item()``, no printing of a tensor) and its shapes are fixed. Random numbers of the
    device's generator go on from step to step.

    Args:
        work: the step.
        device: where it runs; on anything but a GPU every call runs ``work`` as it is.
        enabled: False runs ``work`` as it is everywhere.

    Whatever ``work`` raises in the first calls or during the capture is raised.
    """

    def __init__(
        self, work: Callable[[], None], device: torch.device | str, enabled: bool = True
    ) -> None:
        self.work = work
        self.device = torch.device(device)
        self.enabled = enabled and self.device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_steps = 0

    def __call__(self) -> None:
        """One step."""
        if not self.enabled:
            self.work()
            return
        # Streams, captures and replays are the current device's, which need not be the step's.
        with torch.cuda.device(self.device):
            self._on_its_device()

    def _on_its_device(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif self.eager_steps < EAGER_STEPS:
            # Beside the main stream, as torch.cuda.graphs wants the steps before a capture.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.work()
            torch.cuda.current_stream().wait_stream(side)
            self.eager_steps += 1
        else:
            graph = torch.cuda.CUDAGraph()
            with capturing(graph):  # records the kernels without running them
                self.work()
            graph.replay()
            self.graph = graph
