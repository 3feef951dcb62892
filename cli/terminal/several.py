"""`--gpus` and `--nodes` of a command: started as several processes, whose exit code is the command's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import typer

from gemma2.core.ranks import announced
from gemma2.posttrain.schemas.config import Config

from .console import Console

C = TypeVar("C", bound=Config)

__all__ = ["check_machines", "one_error", "several"]


def several(config: C, words: Sequence[str] | None, console: Console) -> C:
    """Run a command in several processes, and end this one with their exit code; return the configuration if alone.

    words  the command line after `gemma2`; None where the command is called by a program, which has to start it
    """
    from gemma2.posttrain.schemas import LaunchFields

    if words is None or not isinstance(config, LaunchFields):
        return config
    from gemma2.posttrain.launch.starting import started

    if (config.gpus or 1) * config.nodes > 1 and announced() == 1:  # once, and at once, before there are several
        from gemma2.posttrain.checks.of_command import CommandChecks

        CommandChecks().inputs(config)
    code = started(config, words, console)
    if code is not None:
        raise typer.Exit(code)
    return config


def check_machines(config: Config, out: Path) -> None:
    """Raise UsageError if the machines of a job do not share the disk of an output; before anything is loaded."""
    if announced() > 1:
        from gemma2.posttrain.launch.shared_disk import check_shared_disk

        check_shared_disk(type(config).__name__.removesuffix("Config").lower(), out)


def one_error(config: Config) -> AbstractContextManager[object]:
    """A block in which a failure of one process of the job ends all, in one line, where they share a command's rows."""
    if announced() == 1:
        return nullcontext()
    from gemma2.posttrain.runs.together import as_one

    return as_one(config)
