"""What a stage may reserve: GPUs on each of its machines, for one process on each. Torch-free.

A stage with several GPUs or machines is a gang: its command is started with `--gpus` and `--nodes`. So only commands
with these flags can be one; the others run in one process, on one GPU at most.
"""

from __future__ import annotations

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonMapping
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.schemas import Resources
from gemma2.posttrain.schemas.pipeline import LAUNCHED

__all__ = ["check_reserved", "fitting", "over", "runs_as_gang"]


def runs_as_gang(command: str) -> bool:
    """Whether a command can run in several processes."""
    return command != "warp" and "gpus" in COMMANDS[command].schema.model_fields


def over(shared: Resources, own: Resources) -> Resources:
    """The shared resources, except where a stage has its own."""
    return Resources(**{**shared.model_dump(exclude_none=True), **own.model_dump(exclude_none=True)})


def fitting(command: str, shared: Resources) -> Resources:
    """Resources that several stages share, without what a command in one process cannot use."""
    if runs_as_gang(command) or not shared.is_gang:
        return shared
    return shared.model_copy(update={"gpus": None, "nodes": None})


def check_reserved(stage: str, command: str, options: JsonMapping, resources: Resources) -> None:
    """Raise UsageError for a gang of a command in one process, and for --gpus or --nodes among the options."""
    for name in LAUNCHED:
        if name in options:
            raise UsageError(
                f"stages.{stage}.options.{name} is what the stage reserves",
                f"write resources: {{{name}: {options[name]}}} in its place",
            )
    if resources.is_gang and not runs_as_gang(command):
        many = "gpus" if (resources.gpus or 1) > 1 else "nodes"
        raise UsageError(
            f"stages.{stage}.resources.{many} = {getattr(resources, many)}: {command} runs in one process",
            f"give {many}: 1, or leave it out",
        )
