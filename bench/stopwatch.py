"""Times the steps of a trainer, ours or TRL's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

__all__ = ["Stopwatch", "peak_mib"]


class Stopwatch(TrainerCallback):
    """CPU seconds of every step but the first, which pays for set-up, and the seconds on the wall."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.wall: list[float] = []
        self.last: tuple[float, float] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.process_time(), time.perf_counter()
        if self.last is not None:
            self.seconds.append(now[0] - self.last[0])
            self.wall.append(now[1] - self.last[1])
        self.last = now


def peak_mib() -> float:
    """Most resident memory that this process has had, MiB. `getrusage` would count its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM")
