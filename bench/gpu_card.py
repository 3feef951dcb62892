"""The device of the GPU bench: its name, its nominal and its measured rates, and figures that are written at once."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from stopwatch import peak_mib
from transformers import TrainerCallback

__all__ = ["Figures", "StepWatch", "card", "device", "failure", "peak_gb", "settle", "start_peak", "timed"]

NOMINAL_BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12}  # bytes/s, the SXM cards' data sheets
ROUNDS = 3
WALK = "CPU, a walk: no figure of it counts"


def device() -> torch.device:
    """The GPU, or the CPU on which the bench is only walked."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settle() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def start_peak() -> None:
    """Begin a new measurement of the peak, with what is cached given back; trainers are circles of references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> dict[str, float]:
    """Most memory since `start_peak`, 10^9 bytes: of tensors, and of the allocator with what it keeps.

    On a CPU: of the process since its start.
    """
    if not torch.cuda.is_available():
        return {"allocated": peak_mib() * 2**20 / 1e9}
    return {
        "allocated": torch.cuda.max_memory_allocated() / 1e9,
        "reserved": torch.cuda.max_memory_reserved() / 1e9,
    }


def timed(work: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """Seconds on the wall of each call, the device waited for."""
    found = []
    for _ in range(rounds):
        settle()
        begin = time.perf_counter()
        work()
        settle()
        found.append(time.perf_counter() - begin)
    return found


def _rate_of_products(size: int) -> float:
    """FLOP/s of a square product in bf16."""
    left, right = (torch.randn(size, size, device=device()).bfloat16() for _ in range(2))
    timed(lambda: left @ right, 2)
    calls = 20
    return 2 * size**3 * calls / statistics.median(timed(lambda: [left @ right for _ in range(calls)]))


def _rate_of_memory(numbers: int) -> float:
    """Bytes/s of a copy, read and written ones together."""
    source = torch.zeros(numbers, device=device())
    target = torch.empty_like(source)
    timed(lambda: target.copy_(source), 2)
    calls = 20
    return 8 * numbers * calls / statistics.median(timed(lambda: [target.copy_(source) for _ in range(calls)]))


def card(tiny: bool) -> dict[str, Any]:
    """Name, memory and rates of the device; nominal ones are None where they are not known."""
    if not torch.cuda.is_available():
        found: dict[str, Any] = {
            "name": "CPU, a walk: no figure of it counts",
            "memory_gb": None,
            "nominal_flops": None,
        }
        name = ""
    else:
        from trl.trainer.utils import get_peak_flops

        name = torch.cuda.get_device_name()
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        found = {"name": name, "memory_gb": memory, "nominal_flops": get_peak_flops(name, "bfloat16")}
    return found | {
        "nominal_bandwidth": next((rate for key, rate in NOMINAL_BANDWIDTH.items() if key in name), None),
        "measured_flops": _rate_of_products(256 if tiny else 8192),
        "measured_bandwidth": _rate_of_memory(2**16 if tiny else 2**30),
        "torch": torch.__version__,
    }


class StepWatch(TrainerCallback):
    """Wall seconds of every step of a trainer but the first `skipped`, the device waited for."""

    def __init__(self, skipped: int) -> None:
        self.skipped, self.ends = skipped, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        settle()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of each step after the skipped ones."""
        kept = self.ends[self.skipped - 1 :]
        return [after - before for before, after in pairwise(kept)]


class Figures:
    """The figures of one part, in a JSON file that is complete after every line."""

    def __init__(self, path: Path, part: str, of: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[str, Any] = {"part": part, "card": of, "rows": []}
        self._write()

    def add(self, what: str, **values: Any) -> None:
        """One line: what was measured, its values, the load of the machine."""
        row = {"what": what, "card": self.found["card"]["name"], "load": os.getloadavg()[0], **values}
        self.found["rows"].append(row)
        shown = ", ".join(f"{name} {_short(value)}" for name, value in values.items())
        print(f"{self.found['part']}  {what} [{row['card']}]: {shown}", flush=True)
        self._write()

    def done(self) -> None:
        """Say that nothing is missing."""
        self.found["complete"] = True
        self._write()

    def _write(self) -> None:
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.found, indent=2) + "\n")
        aside.replace(self.path)


def failure(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_short(one)}" for key, one in value.items()) + "}"
    return "[" + ", ".join(map(_short, value)) + "]" if isinstance(value, list) else str(value)
