"""The command table. A command's module is imported when that command is called, so that `--help` stays quick."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException
from typer.main import get_command

from gemma2.core.outputs.manifest import metadata_version

from .terminal.console import UsageProblem
from .terminal.help import HelpGroup

__all__ = ["COMMANDS", "invoke"]


@dataclass(frozen=True)
class CommandEntry:
    """One command: its module in this package, its line in `gemma2 --help`, and the panel it stands in."""

    module: str
    summary: str
    panel: str


COMMANDS = {
    "quickstart": CommandEntry(
        "tools.quickstart", "The whole path on the embedded models: data to aligned, merged model.", "Start here"
    ),
    "tiny": CommandEntry(
        "stages.tiny", "Make the embedded models: a small real Gemma 2 student and its teacher.", "Start here"
    ),
    "generate": CommandEntry("stages.generate", "Teacher completions for a file of prompts.", "Post-training"),
    "filter": CommandEntry("stages.filter", "Drop rows not to learn from, each with its reason.", "Post-training"),
    "sft": CommandEntry("stages.sft", "Supervised fine-tuning on prompts and completions.", "Post-training"),
    "distill": CommandEntry(
        "stages.distill", "Distil a teacher into a student on the student's own completions.", "Post-training"
    ),
    "reward": CommandEntry(
        "stages.reward", "Train a reward model; `reward pairs` makes its preference data.", "Post-training"
    ),
    "rlhf": CommandEntry(
        "stages.rlhf", "RL from a reward model, the KL anchored to an EMA of the policy.", "Post-training"
    ),
    "warp": CommandEntry(
        "stages.warp", "WARP: M policies, SLERP, interpolation to the init, I times, and the front.", "Post-training"
    ),
    "pipeline": CommandEntry(
        "tools.pipeline", "Stages from one file: run, skip, continue; status and graph.", "Post-training"
    ),
    "merge": CommandEntry("stages.merge", "Merge models by one of 18 methods, or by a file.", "Merging"),
    "diff": CommandEntry("tools.diff", "Norms, distances and angles between two models, with a heat map.", "Merging"),
    "inspect": CommandEntry(
        "tools.inspect", "Tensors, parameters, tied weights and lineage of a model directory.", "Merging"
    ),
    "eval": CommandEntry("stages.eval", "Reward, KL to the SFT policy and length of one policy.", "Evaluation"),
    "pareto": CommandEntry(
        "stages.pareto", "The KL-reward front of policies and of the line between init and merge.", "Evaluation"
    ),
    "pick": CommandEntry(
        "stages.pick", "A point of a finished front as a model directory, with its card.", "Evaluation"
    ),
    "lineage": CommandEntry(
        "tools.lineage", "What an output was made from: a tree from base to result, with hashes.", "Evaluation"
    ),
    "report": CommandEntry("tools.report", "One self-contained HTML page about a finished run.", "Evaluation"),
    "convert": CommandEntry(
        "stages.convert", "Import a model from a GGUF file or another directory as plain safetensors.", "Tools"
    ),
    "config": CommandEntry("tools.config", "List and show recipes, or the settings of an output.", "Tools"),
}


class LazyGroup(HelpGroup):
    """Lists every command from the table and loads the module of the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        return TyperCommand(name=cmd_name, help=entry.summary, rich_help_panel=entry.panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        self.commands = {name: self.get_command(ctx, name) for name in COMMANDS}  # what a suggestion can name
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if command is not None and name is not None else command, rest


def load(name: str) -> Any:
    """The real command behind an entry of the table."""
    module = import_module(f".{COMMANDS[name].module}", __package__)
    command = get_command(module.app)
    command.name = name
    return command


def _version(value: bool) -> None:
    if value:
        typer.echo(f"gemma2 {metadata_version()}")
        raise typer.Exit


app = typer.Typer(
    cls=LazyGroup,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


@app.callback()
def gemma2(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Post-training and model merging for Gemma 2: from teacher data to an aligned, merged model.

    `gemma2 quickstart --out DIR` runs every stage in minutes on this machine. Every command takes `--help`.
    """


def invoke(arguments: list[str]) -> int:
    """Parse and run one command line. Raises UsageProblem for one that cannot be parsed; returns the exit code."""
    command = get_command(app)
    try:
        code = command.main(arguments, prog_name="gemma2", standalone_mode=False)
    except TyperException as error:
        path = getattr(getattr(error, "ctx", None), "command_path", "gemma2")
        raise UsageProblem(f"{error.format_message()} (see {path} --help)") from error
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer's answer to one is exit code 1
            raise error.__context__ from None
        raise
    return code if isinstance(code, int) else 0
