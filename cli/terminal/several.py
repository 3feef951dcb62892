"""`--gpus` and `--nodes` of a command: started as several processes, whose exit code is the command's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from gemma2.core.ranks import announced
from gemma2.posttrain.schemas.config import Config

from .console import Console

__all__ = ["check_machines", "start_others"]


def start_others(config: Config, words: Sequence[str] | None, console: Console) -> None:
    """Run a command in several processes if it is to be several, and end this one with their exit code.

    words  the command line after `gemma2`; None where the command is called by a program, which has to start it
    """
    from gemma2.posttrain.schemas import LaunchFields

    if words is None or not isinstance(config, LaunchFields):
        return
    from gemma2.posttrain.launch.starting import started

    code = started(config, words, console)
    if code is not None:
        raise typer.Exit(code)


def check_machines(config: Config, out: Path | None) -> None:
    """Raise UsageError if the machines of a job do not share the disk of an output; before anything is loaded."""
    if announced() > 1 and out is not None:
        from gemma2.posttrain.launch.shared_disk import check_shared_disk

        check_shared_disk(type(config).__name__.removesuffix("Config").lower(), out)
