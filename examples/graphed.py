"""A training step that costs the host next to nothing: on a GPU it becomes a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

EAGER_STEPS = 3  # before a graph is captured: they initialise libraries and the optimizer


class GraphedStep:
    """Call `work` again and again; on a GPU its kernels are captured once, then replayed.

    `work` must do the same kernels on the same tensors each time, and wait for nothing: what
    changes from step to step lies in tensors that it reads (learning rate, data), or comes from
    the device's random generator. It takes and returns nothing.
    """

    def __init__(self, work: Callable[[], None], device: torch.device, enabled: bool = True):
        self.work = work
        self.enabled = enabled and device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_steps = 0

    def __call__(self) -> None:
        if not self.enabled:
            self.work()
        elif self.graph is not None:
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
            with torch.cuda.graph(graph):  # records the kernels without running them
                self.work()
            graph.replay()
            self.graph = graph
