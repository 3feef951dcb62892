"""`gemma2 plan COMMAND ...`: the command's own command line, parsed by its own parser, planned and not run."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING

import typer
from typer.core import TyperGroup
from typer.main import get_command

from gemma2.cli.terminal.completion import begun
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES, QUESTION, AsJson, Quiet
from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonMapping
from gemma2.core.yaml_files import closest
from gemma2.posttrain.schemas.config import is_given

if TYPE_CHECKING:
    from typer._click import Command

    from gemma2.posttrain.planning.plan_answers import PlanQuestion

PANEL = "Plan"


def plannable(ctx: typer.Context, incomplete: str) -> list[str]:
    """The commands, for the first word after `plan`."""
    from gemma2.cli.app import COMMANDS

    return [] if ctx.params.get("words") else begun((name for name in COMMANDS if name != "plan"), incomplete)


Words = typer.Argument(
    None,
    metavar="COMMAND",
    help="The command as it would be run; --out may be left out, and a model may be a size: 2b, 9b, 27b.",
    show_default=False,
    autocompletion=plannable,
    rich_help_panel="Inputs",
)
Gpu = typer.Option(
    None,
    "--gpu",
    metavar="SIZE",
    help="Memory of the GPU to plan for, such as 24GB; default: 24, 48, 80 and 141 GB.",
    rich_help_panel=PANEL,
)
Gpus = typer.Option(
    None,
    "--gpus",
    metavar="INT",
    min=1,
    help="GPUs of each machine: the flag of the command, which may stand here too.",
    rich_help_panel=PANEL,
)
Throughput = typer.Option(
    None,
    "--throughput",
    metavar="TOKENS/S",
    min=1e-9,
    help="Tokens per second of all GPUs together, for the time.",
    rich_help_panel=PANEL,
)
Measure = typer.Option(
    False, "--measure", help="Try three steps of the training here, for the time.", rich_help_panel=PANEL
)
OURS = ("gpu", "throughput", "measure")


def _flags(
    gpu: str | None = Gpu,
    throughput: float | None = Throughput,
    measure: bool = Measure,
) -> None:
    """The flags of plan, as typer makes them of a function."""


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(
    cls=HelpCommand,
    context_settings={**HELP_NAMES, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def plan(
    ctx: typer.Context,
    words: list[str] | None = Words,
    gpu: str | None = Gpu,
    gpus: int | None = Gpus,
    throughput: float | None = Throughput,
    measure: bool = Measure,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Show what a command needs before it runs: memory by part and phase, which GPUs are large enough, disk, time.

    Takes the flags of the command, and its own in front of or behind them. Where a command does not fit, the flags with
    which it does are shown. Nothing is loaded; of a model on the hub only the headers are read.

    \b
      gemma2 plan sft --model 9b --gpu 24GB
      gemma2 plan rlhf --policy 2b --reward 9b --gpus 8 --strategy fsdp --throughput 20000
      gemma2 plan sft --model sft --data data --measure
    """  # fmt: skip
    given = {"gpu": gpu, "throughput": throughput, "measure": measure}
    if not words:
        if as_json or gpus is not None or any(map(is_given, given.values())):
            raise UsageError("plan names no command", "give the command line behind it: gemma2 plan sft --model 9b")
        typer.echo(ctx.get_help())
        return
    from .answer_view import AskedPlan

    name, command, rest = _command(words)
    asked = _asking(name, command)
    assert ctx.parent is not None
    with asked.make_context(name, rest, parent=ctx.parent) as inner:
        theirs = {part.name for part in command.params}
        own = {key: None if key in theirs else inner.params.pop(key) for key in OURS}
        question = _question({key: own[key] if is_given(own[key]) else given[key] for key in OURS})
        if (flag := _given(question)) and not _has_answers(name):
            raise UsageError(*_no_answer(name, flag))
        if gpus is not None:
            _give_gpus(name, gpus, inner.params)
        inner.meta[QUESTION] = AskedPlan(question)
        dry = next(str(part.name) for part in command.params if "--dry-run" in part.opts)
        inner.params[dry] = True
        inner.params |= {key: True for key, on in (("as_json", as_json), ("quiet", quiet)) if on and key in theirs}
        command.invoke(inner)


def _give_gpus(name: str, gpus: int, params: dict[str, object]) -> None:
    """Give a command the flag that stood in front of it. Raises UsageError for one that has no such flag."""
    if "gpus" not in params:
        raise UsageError(f"gemma2 {name} runs in one process", "leave out --gpus")
    if params["gpus"] is None:
        params["gpus"] = gpus


def _command(words: list[str]) -> tuple[str, Command, list[str]]:
    """The command that the words name, and the words behind it. Raises UsageError for one without a plan."""
    from gemma2.cli.app import COMMANDS, load

    name, *rest = words
    if name not in COMMANDS:
        raise UsageError(f"there is no command '{name}' to plan", closest(name, COMMANDS))
    command = load(name)
    rest = getattr(command, "routed", list)(rest)  # the forms of eval
    if isinstance(command, TyperGroup) and rest and rest[0] in command.commands:
        name, command, rest = f"{name} {rest[0]}", command.commands[rest[0]], rest[1:]
    if not any("--dry-run" in part.opts for part in command.params):
        raise UsageError(f"gemma2 {name} has nothing to plan", "it runs no model and writes nothing")
    return name, command, rest


def _has_answers(name: str) -> bool:
    """Whether a command is one of a schema that runs a model: others show what --dry-run shows."""
    from gemma2.posttrain.runs.commands import COMMANDS

    return name.split()[0] in ("eval", "reward") or (name in COMMANDS and COMMANDS[name].accelerated and name != "tiny")


def _no_answer(name: str, flag: str) -> tuple[str, str]:
    """What is wrong with a flag of plan for a command, and what to do."""
    if name.split()[0] in ("pipeline", "quickstart"):
        return f"the stages of gemma2 {name} are planned for this machine", f"leave out --{flag}, or plan one stage"
    return f"gemma2 {name} runs no model of yours", f"leave out --{flag}"


def _given(question: PlanQuestion) -> str:
    """The first flag of plan that was given, or nothing."""
    values = {name: getattr(question, name) for name in OURS}
    return next((name for name, value in values.items() if value != getattr(type(question)(), name)), "")


def _asking(name: str, command: Command) -> Command:
    """A command that takes the flags of plan too."""
    asked = copy(command)
    asked.name = name
    ours = get_command(_only(_flags)).params
    theirs = {part.name for part in command.params}
    asked.params = [*command.params, *(part for part in ours if part.name in OURS and part.name not in theirs)]
    return asked


def _only(function: Callable[..., None]) -> typer.Typer:
    one = typer.Typer(add_completion=False)
    one.command()(function)
    return one


def _question(given: JsonMapping) -> PlanQuestion:
    from gemma2.posttrain.planning.plan_answers import PlanQuestion, gpu_bytes

    gpu = None if given["gpu"] is None else gpu_bytes(given["gpu"])
    return PlanQuestion(gpu, given["throughput"], bool(given["measure"]))
