"""This machine: GPU, memory, disk, versions, extras, the hub's cache and token. Torch-free."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from gemma2.core.outputs.manifest import RECORDED_PACKAGES
from gemma2.posttrain.runs.machine import free_disk, free_memory

from .checks.finding import Depth, Diagnosis, fine, problem, warning

__all__ = ["MACHINE_CHECKS"]

# What the tests ran with, as constraints.txt has it (tests/posttrain/doctor compares both).
TESTED = {"torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0", "peft": "0.21.2"}
EXTRAS = {"vllm": "vllm", "ray": "ray", "eval": "lm_eval", "quant": "bitsandbytes"}
PROBE_BYTES = 64 << 20
LITTLE_DISK, LITTLE_MEMORY = 20e9, 4e9  # a 9B in bf16; the embedded models with their libraries


def _python(_: Path) -> Iterator[Diagnosis]:
    yield fine(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {_cores()} cores")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu(_: Path) -> Iterator[Diagnosis]:
    place = free_memory()
    if place.where == "main memory":
        yield fine("no GPU: the embedded models and merges run here, a 2B trains slowly")
    else:
        yield fine(f"{place.where}: {place.free / 1e9:.3g} GB free")


def _memory(_: Path) -> Iterator[Diagnosis]:
    import psutil  # type: ignore[import-untyped]

    free = float(psutil.virtual_memory().available)
    if free < LITTLE_MEMORY:
        yield warning(f"{free / 1e9:.1f} GB of memory free", "end other programs, or merge with fewer --threads")
    else:
        yield fine(f"{free / 1e9:.1f} GB free")


def _disk(here: Path) -> Iterator[Diagnosis]:
    """Free room and the speed of one write and one read of 64 MiB, past the page cache where the system allows."""
    free = free_disk(here)
    try:
        write, read = _speeds(here)
    except OSError as error:
        yield problem(f"{here} cannot be written ({error.strerror})", "choose an --out on another disk")
        return
    figures = f"{free / 1e9:.0f} GB free, writes {write:.0f} MB/s, reads {read:.0f} MB/s in {here}"
    if free < LITTLE_DISK:
        yield warning(figures, "free some room: a 9B in bf16 takes 18.5 GB, a checkpoint of full training 147 GB")
    else:
        yield fine(figures)


def _speeds(here: Path) -> tuple[float, float]:
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=here) as file:
        begin = time.perf_counter()
        for _ in range(PROBE_BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        while file.read(1 << 20):
            pass
        done = time.perf_counter()
    return PROBE_BYTES / 1e6 / (written - begin), PROBE_BYTES / 1e6 / (done - written)


def _versions(_: Path) -> Iterator[Diagnosis]:
    found = {name: version for name in RECORDED_PACKAGES if (version := _version(name))}
    other = [
        f"{name} {found[name]} (tested: {wanted})"
        for name, wanted in TESTED.items()
        if name in found and found[name].partition("+")[0] != wanted
    ]
    if other:
        yield warning(f"not tested with {', '.join(other)}", "install what constraints.txt names: make setup")
    else:
        yield fine(", ".join(f"{name} {found[name]}" for name in ("gemma2", *TESTED) if name in found))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _extras(_: Path) -> Iterator[Diagnosis]:
    has = {extra: importlib.util.find_spec(module) is not None for extra, module in EXTRAS.items()}
    missing = [extra for extra, there in has.items() if not there]
    lines = [f"{extra} {'yes' if there else 'no'}" for extra, there in has.items()]
    how = f"; pip install 'gemma2[{','.join(missing)}]' adds the rest" if missing else ""
    yield fine(f"{', '.join(lines)}{how}")


def _hub(_: Path) -> Iterator[Diagnosis]:
    """The hub's cache can be written; whether there is a token, which is never shown."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    place = next(path for path in (home, *home.parents) if path.exists())
    token = bool(os.environ.get("HF_TOKEN")) or (home / "token").is_file()
    offline = os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True", "ON", "YES")
    if not os.access(place, os.W_OK):
        yield warning(f"{home} cannot be written: models cannot be fetched", "set HF_HOME to a folder of yours")
    else:
        words = [f"cache {home}", "token found" if token else "no token (Gemma needs one: hf auth login)"]
        yield fine(", ".join([*words, "offline"] if offline else words))


def _terminal(_: Path) -> Iterator[Diagnosis]:
    width = shutil.get_terminal_size().columns
    encoding = (sys.stdout.encoding or "ascii").lower()
    if encoding.replace("-", "") != "utf8":
        yield warning(f"the terminal's encoding is {encoding}", "set LANG=C.UTF-8 to see every character")
    else:
        yield fine(f"{width} columns, {encoding}")


# name -> (what it looks at, how far it reads, the check)
MACHINE_CHECKS: dict[str, tuple[str, Depth, Callable[[Path], Iterator[Diagnosis]]]] = {
    "python": ("Python, system, cores", Depth.QUICK, _python),
    "gpu": ("GPU and its free memory", Depth.QUICK, _gpu),
    "memory": ("free main memory", Depth.QUICK, _memory),
    "disk": ("free disk and its measured speed", Depth.FULL, _disk),
    "versions": ("libraries against those that this release was tested with", Depth.QUICK, _versions),
    "extras": ("which extras can be imported", Depth.QUICK, _extras),
    "hub": ("the hub's cache and token", Depth.QUICK, _hub),
    "terminal": ("width and encoding of the terminal", Depth.QUICK, _terminal),
}
