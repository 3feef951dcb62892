"""SLURM's own programs: sbatch, sacct, squeue, scancel, sinfo. Each call is short; a controller that is busy is not an
error.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from gemma2.core.errors import InputError, UsageError

__all__ = ["GONE", "LIVE", "LOST", "Refused", "cancel", "check_slurm", "has_gpus", "job_called", "states_of", "submit"]

PATIENCE = 60.0  # seconds for one call
GONE = "GONE"  # not listed any more
LIVE = {
    *("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "RESIZING", "REQUEUED", "REQUEUE_HOLD"),
    *("REQUEUE_FED", "RESV_DEL_HOLD", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED"),
}
# States in which a job was taken away from the stage: it may be tried again. What to do about each.
LOST = {
    "NODE_FAIL": "a machine of it failed",
    "BOOT_FAIL": "a machine of it did not start",
    "PREEMPTED": "another job has taken its place",
    "TIMEOUT": "its time limit is over; give more with --slurm time=HH:MM:SS",
    "DEADLINE": "its deadline is over",
    "OUT_OF_MEMORY": "it needed more memory; give more with --slurm mem=SIZE, or a smaller batch",
}
BUSY = re.compile(r"unable to contact|timed out|temporarily (unavailable|unable)|connection (refused|reset)", re.I)


class Refused(Exception):
    """sbatch does not take a job; its words are the message. `busy`: it may later."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.busy = bool(BUSY.search(said))


def check_slurm() -> None:
    """Raise UsageError on a machine that cannot submit jobs."""
    if shutil.which("sbatch") is None:
        raise UsageError("--executor slurm needs sbatch, which is not on PATH", "start gemma2 on a login node")


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 1, "", f"{words[0]} timed out after {PATIENCE:.0f} s")
    except FileNotFoundError:
        return subprocess.CompletedProcess(words, 127, "", f"{words[0]} is not on PATH")


def _said(done: subprocess.CompletedProcess[str]) -> str:
    text = " ".join((done.stderr or done.stdout).split())
    return text.removeprefix(f"{done.args[0]}: error: ")[:300] or f"exit code {done.returncode}"


def submit(script: Path) -> str:
    """Submit a script and return the number of its job. Raises Refused."""
    done = _call("sbatch", "--parsable", str(script))
    number = done.stdout.strip().partition(";")[0]  # `17;cluster` where there are several
    if done.returncode or not number.isdigit():
        raise Refused(_said(done))
    return number


def job_called(name: str) -> str | None:
    """Return the number of the waiting or running job of this name; None without one."""
    done = _call("squeue", "--noheader", f"--name={name}", "--format=%i")
    found = done.stdout.split() if done.returncode == 0 else []
    return found[0] if found else None


def states_of(jobs: Sequence[str]) -> dict[str, str] | None:
    """Return the state of every job, GONE for one that is not listed; None where SLURM does not answer now.

    sacct knows jobs that have ended; a cluster without accounting has squeue alone.
    """
    found: dict[str, str] = {}
    accounted = _call(
        "sacct", "--noheader", "--parsable2", "--allocations", "--format=JobIDRaw,State", f"--jobs={','.join(jobs)}"
    )
    if accounted.returncode == 0:
        rows = (line.split("|") for line in accounted.stdout.splitlines() if "|" in line)
        found = {number: state.split()[0] for number, state, *_ in rows if state.split()}
    for number in jobs:
        if number in found:
            continue
        listed = _call("squeue", "--noheader", f"--jobs={number}", "--format=%i|%T")
        if listed.returncode and "invalid job id" not in listed.stderr.lower():
            return None
        state = listed.stdout.strip().partition("|")[2] if listed.returncode == 0 else ""
        found[number] = state or GONE
    return {number: found[number] for number in jobs}


def cancel(jobs: Sequence[str]) -> None:
    """Ask SLURM to end jobs: SIGTERM, and SIGKILL some seconds later."""
    if jobs:
        _call("scancel", *jobs)


def has_gpus(partition: str | None) -> bool:
    """Whether a partition (without one: the cluster) has GPUs. Raises InputError where it does not exist."""
    done = _call("sinfo", "--noheader", "--format=%G", *([f"--partition={partition}"] if partition else []))
    if done.returncode == 0 and partition and not done.stdout.split():
        raise InputError(f"--slurm partition={partition} does not exist here", "see `sinfo` for those that do")
    return done.returncode == 0 and "gpu" in done.stdout
