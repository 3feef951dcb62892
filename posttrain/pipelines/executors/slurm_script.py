"""The batch script of a stage on a SLURM cluster, and the settings of `--slurm`. Pure text.

srun starts one program on each machine; posttrain/launch reads SLURM's variables there and joins them.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import UsageError

__all__ = ["Allocation", "batch_script", "slurm_settings"]

PROGRAM = "gemma2.posttrain.pipelines.executors.job_process"
KEY = re.compile(r"[a-z][a-z0-9-]*")
VALUE = re.compile(r"[^\s'\"\\#]+")
# What the pipeline decides: where a job runs and writes, and how many machines and GPUs it has.
OURS = {
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node"), "give the stage resources: {nodes: N}"),
    **dict.fromkeys(("job-name", "output", "error", "open-mode", "chdir", "array", "wrap", "parsable"), "drop it"),
    **dict.fromkeys(("requeue", "no-requeue"), "give the stage retries: N"),
    **dict.fromkeys(("dependency", "wait", "test-only", "kill-on-invalid-dep"), "drop it"),
}
OF_GPUS = ("gres", "gpus", "gpus-per-node", "gpus-per-task", "tres-per-node")  # one of these replaces our request


@dataclass(frozen=True)
class Allocation:
    """What a stage asks SLURM for. gpus: of each machine."""

    name: str
    nodes: int
    cpus: int
    gpus: int
    log: Path
    folder: Path
    mailbox: Path


def slurm_settings(given: Iterable[str]) -> dict[str, str]:
    """Return option -> value of `--slurm KEY=VALUE`; "" for one without a value, such as exclusive.

    Raises UsageError for what is not an option of sbatch, and for one that the pipeline sets.
    """
    found: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not KEY.fullmatch(key) or (equals and not VALUE.fullmatch(value)):
            raise UsageError(
                f"--slurm {text!r} is not an option of sbatch",
                "give KEY=VALUE with its long name and without blanks or quotes, such as partition=gpu",
                "--slurm",
            )
        if key in OURS:
            raise UsageError(f"--slurm {key} is set by the pipeline", OURS[key], "--slurm")
        found[key] = value
    return found


def batch_script(asked: Allocation, settings: Mapping[str, str]) -> str:
    """Return the script that sbatch gets."""
    options = {
        "job-name": asked.name,
        "output": f'"{str(asked.log).replace("%", "%%")}"',
        "open-mode": "append",
        "nodes": str(asked.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(asked.cpus),
        **({"gres": f"gpu:{asked.gpus}"} if asked.gpus and not settings.keys() & {*OF_GPUS} else {}),
        "no-requeue": "",
        **settings,
    }
    lines = [f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}" for key, value in options.items()]
    program = shlex.join([sys.executable, "-m", PROGRAM, str(asked.mailbox)])
    step = f"srun --kill-on-bad-exit=1 --cpus-per-task={options['cpus-per-task']} " if asked.nodes > 1 else ""
    # exec: SLURM's signals reach the program itself, and not a shell that waits for it.
    body = [f"cd -- {shlex.quote(str(asked.folder))}", f"exec {step}{program}"]
    return "\n".join(["#!/bin/bash", *lines, "set -eu", *body, ""])
