"""Waiting in tests. No test asserts how long something takes: other work may run on the same machine.

Every bound here ends a test that hangs. None is a measure of speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from gemma2.core.outputs.digest_cache import TICK

PATIENCE = 600.0  # seconds; on a machine with a load of 20 an import of torch and transformers alone takes a minute
T = TypeVar("T")


def wait_for(condition: Callable[[], T], seconds: float = PATIENCE) -> T:
    """The first true value of a condition that something else brings about."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > until:
            raise TimeoutError(f"nothing happened in {seconds:.0f} s")
        time.sleep(0.002)
    return value


def pause(seconds: float) -> None:
    """Let a random time pass before a kill. The test must hold for every moment."""
    time.sleep(seconds)


def lasting(seconds: float) -> Callable[[], bool]:
    """True until so many seconds have passed: how long disturbances or a planted delay go on, never a result."""
    until = time.monotonic() + seconds
    return lambda: time.monotonic() < until


def seconds_of(work: Callable[[], object]) -> float:
    """How long some work takes: the range for random moments, never a result."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def until_kept(path: Path) -> None:
    """Wait until the clock of the file system is so far past a file's ctime that the file's digest is kept."""
    probe = path.with_name("probe")
    late = path.stat().st_ctime_ns + TICK
    wait_for(lambda: probe.write_text("") == 0 and probe.stat().st_ctime_ns > late)
    probe.unlink()
