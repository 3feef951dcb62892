"""Times the steps of a trainer, ours or TRL's."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

__all__ = ["Stopwatch"]


class Stopwatch(TrainerCallback):
    """CPU seconds of every step but the first, which pays for set-up."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.process_time()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now
