"""Steps that depend on each other: run what is missing, skip what is there, continue what was interrupted. Torch-free.

A step is skipped when its output is complete and was made by the same command from the same configuration, parents
and data (compared by content, not by path). An output made from something else is refused, never silently kept.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2.merging.errors import OutputError
from gemma2.merging.outputs import partial_path, read_manifest
from gemma2.merging.progress import Progress

from .config import Config, parse_value
from .rundir import RunOptions, RunResult, changes

__all__ = ["Step", "command_line", "ensure", "spell"]

Runner = Callable[[Any, RunOptions, Progress], RunResult]


@dataclass(frozen=True)
class Step:
    """One command of a pipeline: its name on the command line, its configuration, its output, and what runs it."""

    command: str
    config: Config
    out: Path
    run: Runner


def command_line(step: Step) -> str:
    """The command that does this step by hand."""
    return spell(step.command, step.config, step.out)


def spell(command: str, config: Config, out: Path) -> str:
    """The command line of a configuration: every setting that is not the default."""
    words = ["gemma2", *command.split()]
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if value == field.get_default(call_default_factory=True):
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is None:  # no flag can say it
            words += ["--set", f"{name}=null"]
        elif isinstance(value, dict):
            words += [word for key, item in value.items() for word in ("--set", f"{name}.{key}={_yaml(item)}")]
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            words += [flag, ",".join(str(item) for item in value)]
        else:
            words += [flag, str(value)]
    return shlex.join([*words, "--out", str(out)])


def _yaml(value: Any) -> str:
    """The text after `--set KEY=` that reads as this value."""
    plain = str(value)
    return plain if parse_value(plain) == value else json.dumps(value, ensure_ascii=False)


def is_current(step: Step) -> bool:
    """Whether the output is complete and made from what the step names. Raises OutputError when from something else."""
    manifest = read_manifest(step.out)
    if manifest is None or manifest.get("status") != "complete":
        return False
    differing = changes(manifest, step.config, step.out)
    if manifest.get("command") != step.command:
        differing.insert(0, f"command ({manifest.get('command')} -> {step.command})")
    if differing:
        raise OutputError(
            f"{step.out} was made from something else: {', '.join(differing)}", "remove it, or choose another --out"
        )
    return True


def ensure(step: Step, progress: Progress) -> RunResult:
    """The result of a step: found, continued or made."""
    if is_current(step):
        manifest = read_manifest(step.out) or {}
        return RunResult(step.out, manifest.get("summary", {}))
    interrupted = (partial_path(step.out) / "run.json").is_file()
    return step.run(step.config, RunOptions(step.out, resume=interrupted), progress)
