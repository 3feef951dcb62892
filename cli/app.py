"""The table of commands. A command's module is imported only when that command is called: `--help` stays quick."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException
from typer.main import get_command

from gemma2.core.outputs.manifest import metadata_version

from .terminal.help import HelpGroup
from .terminal.mistakes import explain

if TYPE_CHECKING:
    from typer._click import Command, Context

__all__ = ["COMMANDS", "invoke"]


@dataclass(frozen=True)
class CommandEntry:
    """One command: its module in this package, its line in `gemma2 --help`, and the panel that lists it."""

    module: str
    summary: str
    panel: str


COMMANDS = {
    "doctor": CommandEntry("tools.doctor", "Check this machine or a model, and name what is wrong.", "Start here"),
    "quickstart": CommandEntry(
        "tools.quickstart",
        "Run every stage on the embedded models, from data to an aligned, merged model.",
        "Start here",
    ),
    "tiny": CommandEntry(
        "stages.tiny", "Make the embedded models: a small real Gemma 2 student and its teacher.", "Start here"
    ),
    "recipes": CommandEntry(
        "recipes.recipes_command", "List, show, copy and plan recipes for your model and machine.", "Start here"
    ),
    "data": CommandEntry("tools.data", "Inspect data files before training on them, convert them.", "Post-training"),
    "generate": CommandEntry("stages.generate", "Write teacher completions for a file of prompts.", "Post-training"),
    "filter": CommandEntry("stages.filter", "Drop rows unfit for training, each with its reason.", "Post-training"),
    "sft": CommandEntry("stages.sft", "Fine-tune a model on prompts and completions (SFT).", "Post-training"),
    "distill": CommandEntry(
        "stages.distill", "Distil a teacher into a student on completions that the student samples.", "Post-training"
    ),
    "reward": CommandEntry(
        "stages.reward", "Train a reward model; `reward pairs` makes its preference data.", "Post-training"
    ),
    "rlhf": CommandEntry(
        "stages.rlhf",
        "Train a policy by RL, with the KL anchored to an EMA of the policy.",
        "Post-training",
    ),
    "warp": CommandEntry(
        "stages.warp",
        "Run WARP: M policies, SLERP, interpolation to the init, I times; then the front.",
        "Post-training",
    ),
    "pipeline": CommandEntry(
        "tools.pipeline",
        "Run the stages of a file, show their status and graph, compare two runs.",
        "Post-training",
    ),
    "plan": CommandEntry(
        "planning.plan_command",
        "Show what a command needs before it runs: memory by part, GPUs, disk, time.",
        "Start here",
    ),
    "watch": CommandEntry(
        "tools.watch",
        "Follow a running pipeline or run, in the terminal or as a page; end it on alerts.",
        "Post-training",
    ),
    "merge": CommandEntry("stages.merge", "Merge models by one of 18 methods, or by a file.", "Merging"),
    "diff": CommandEntry("tools.diff", "Show norms, distances and angles of two models, with a heat map.", "Merging"),
    "inspect": CommandEntry(
        "tools.inspect", "Show tensors, parameters, tied weights and lineage of a model directory.", "Merging"
    ),
    "eval": CommandEntry(
        "evaluation.eval_group", "Measure a model: reward and KL of a policy, few-shot benchmarks.", "Evaluation"
    ),
    "pareto": CommandEntry(
        "stages.pareto", "Measure the KL-reward front of policies and of the line between init and merge.", "Evaluation"
    ),
    "pick": CommandEntry(
        "stages.pick", "Write a point of a finished front as a model directory, with its card.", "Evaluation"
    ),
    "chat": CommandEntry("chat.chat_command", "Talk to a model, or to two side by side; vote for pairs.", "Evaluation"),
    "lineage": CommandEntry(
        "tools.lineage", "Show what an output was made from: a tree from base to result, with hashes.", "Evaluation"
    ),
    "verify": CommandEntry(
        "tools.verify", "Read every file of a lineage and compare it with its recorded digest; --fix.", "Evaluation"
    ),
    "report": CommandEntry("tools.report", "Write one self-contained HTML page about a run.", "Evaluation"),
    "convert": CommandEntry(
        "stages.convert", "Import a model from a GGUF file or another directory as plain safetensors.", "Tools"
    ),
    "export": CommandEntry(
        "export.export_command", "Write a model for others: dtype, shards, GGUF, the hub, endpoints.", "Tools"
    ),
    "push": CommandEntry(
        "export.push", "Copy outputs to another disk or an object store, verified there by their digests.", "Tools"
    ),
    "pull": CommandEntry(
        "export.pull", "Fetch an output from another disk or an object store, verified by its digests.", "Tools"
    ),
    "serve": CommandEntry("export.serve_command", "Serve a model with vLLM, checked first.", "Tools"),
    "config": CommandEntry(
        "recipes.config",
        "Check settings files, print their JSON Schema, import those of TRL, axolotl or LLaMA-Factory.",
        "Tools",
    ),
    "help": CommandEntry("tools.help_page", "Show the page of a command, as its --help does.", "Tools"),
}


class LazyGroup(HelpGroup):
    """Lists all commands from the table and loads the module only of the one that is called."""

    def list_commands(self, ctx: Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        return placeholder(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, Command | None, list[str]]:
        self.commands = {name: placeholder(name) for name in COMMANDS}  # the names that a suggestion can offer
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if command is not None and name is not None else command, rest


def placeholder(name: str) -> TyperCommand:
    """A command with the name, summary and panel of a table entry; nothing is imported for it."""
    return TyperCommand(name=name, help=COMMANDS[name].summary, rich_help_panel=COMMANDS[name].panel)


@cache
def load(name: str) -> Command:
    """Import a command's module and return its parser, which typer takes up to 40 ms to build: once for a process."""
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

    `gemma2 quickstart --out DIR` runs every stage on this machine in minutes. Every command takes `--help`.
    """


def invoke(arguments: list[str]) -> int:
    """Parse and run one command line; returns the exit code. Raises UsageProblem if it cannot be parsed."""
    command = get_command(app)
    try:
        code = command.main(arguments, prog_name="gemma2", standalone_mode=False, obj=arguments)
    except TyperException as error:
        raise explain(error, arguments) from error
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer turns it into exit code 1
            raise error.__context__ from None
        raise
    return code if isinstance(code, int) else 0
