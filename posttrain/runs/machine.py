"""What this machine has free: memory of its GPUs or its own, and disk. Torch-free."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CHOICE", "MAIN", "Gpu", "Memory", "chosen_keys", "free_disk", "free_memory", "visible_devices"]

MAIN = "main memory"
CGROUP = Path("/sys/fs/cgroup")
QUERY = ("--query-gpu=name,memory.free", "--format=csv,noheader,nounits")
CHOICE = "CUDA_VISIBLE_DEVICES"  # what a process sees of the GPUs, by their numbers or names
PATIENCE = 5.0  # seconds that the driver may take


@dataclass(frozen=True)
class Memory:
    """Free memory of the place where a model would be: bytes, and the name of the place."""

    free: float
    where: str


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use.

    key     what CUDA_VISIBLE_DEVICES calls it
    memory  what is free of it, NaN where the driver does not say
    """

    key: str
    memory: Memory


def visible_devices() -> tuple[Gpu, ...]:
    """Return the GPUs that this process may use, in the order in which torch would number them; without torch.

    Where the driver's tool lists no GPU, numbers in CUDA_VISIBLE_DEVICES say nothing: none is returned, and only torch
    (`launch/starting.py`) knows how many of them exist.
    """
    present = _gpus()
    keys = chosen_keys()
    if keys is None:
        return tuple(Gpu(str(number), memory) for number, memory in enumerate(present))
    if not present and any(key.isdigit() for key in keys):
        return ()
    found: list[Gpu] = []
    for key in keys:
        if not key or (key.isdigit() and int(key) >= len(present)) or key.startswith("-"):
            break  # CUDA sees those in front of one that does not exist
        found.append(Gpu(key, present[int(key)] if key.isdigit() else Memory(math.nan, "GPU")))
    return tuple(found)


def chosen_keys() -> list[str] | None:
    """Return what CUDA_VISIBLE_DEVICES lists; None where it is not set."""
    given = os.environ.get(CHOICE)
    return None if given is None else [word.strip() for word in given.split(",")]


def free_memory() -> Memory:
    """Free memory of the visible GPU that has most; without a GPU, main memory that programs can still have."""
    gpus = [gpu.memory for gpu in visible_devices() if not math.isnan(gpu.memory.free)]
    if gpus:
        return max(gpus, key=lambda gpu: gpu.free)
    import psutil  # type: ignore[import-untyped]

    return Memory(min(float(psutil.virtual_memory().available), _container_limit()), MAIN)


def free_disk(place: Path) -> float:
    """Free bytes of the disk on which a path is, or will be."""
    parent = next(path for path in [place, *place.absolute().parents] if path.exists())
    return float(shutil.disk_usage(parent).free)


def _gpus() -> list[Memory]:
    """The GPUs that the driver's tool lists; [] where it is missing, fails, or says what cannot be read."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    with suppress(subprocess.SubprocessError, OSError, ValueError):
        done = subprocess.run([command, *QUERY], capture_output=True, text=True, timeout=PATIENCE, check=True)
        rows = [line.rpartition(",") for line in done.stdout.splitlines()]
        return [Memory(_bytes(free.strip()), name.strip()) for name, _, free in rows]
    return []


def _bytes(text: str) -> float:
    """Bytes of a number of MiB; NaN for [N/A], which the tool says of a GPU that shares the machine's memory."""
    return math.nan if text.startswith("[") else float(text) * 2**20


def _container_limit() -> float:
    """Bytes that a container may still take, infinite without a limit (control groups, version 2)."""
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        return float(limit) - float((CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return float("inf")
