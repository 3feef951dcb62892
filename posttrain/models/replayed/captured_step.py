"""A step without arguments or results, recorded once and replayed: on CUDA a graph, elsewhere the step itself.

A step of decoding is some 800 kernels of two microseconds; Python takes five to ten times as long to launch them. A
CUDA graph launches them together. It repeats the same kernels at the same addresses with the same numbers, so the step
must keep everything that changes in tensors, write results in place, and never wait for the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import torch

__all__ = ["CapturedStep", "capture_on", "cuda_graph"]

SWITCH = "GEMMA2_CUDA_GRAPHS"
Work = Callable[[], None]
Capture = Callable[[Work], Work]  # records a step without running it; the result replays it


class CapturedStep:
    """Runs a step: the first call plainly, which also warms up; the second captures it, and the others replay that."""

    def __init__(self, work: Work, capture: Capture | None) -> None:
        self.work, self.capture = work, capture
        self.warm = False
        self.replay: Work | None = None

    def __call__(self) -> None:
        """Run the step once."""
        if self.capture is None:
            self.work()
        elif not self.warm:
            self.work()
            self.warm = True
        else:
            if self.replay is None:
                self.replay = self.capture(self.work)
            self.replay()


def capture_on(device: torch.device) -> Capture | None:
    """Return what captures a step on a device; None where steps run plainly. ROCm counts as CUDA, as in torch.

    GEMMA2_CUDA_GRAPHS=0 in the environment turns graphs off: the same steps, launched singly.
    """
    return cuda_graph if device.type == "cuda" and os.environ.get(SWITCH) != "0" else None


def cuda_graph(work: Work) -> Work:
    """Record a step as a CUDA graph.

    Not `torch.cuda.graph`, which empties the allocator's cache first: the training step that follows a rollout would
    have to ask the driver for all of it again. "thread_local": other threads may use the device meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()
        except BaseException as error:
            error.add_note(f"while a step of decoding was captured; {SWITCH}=0 decodes without CUDA graphs")
            with suppress(RuntimeError):  # that the capture is void; what made it so is raised
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay
