"""The commands of `gemma2` as a tree, and command lines parsed by them without being run."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from typer.core import TyperGroup

from gemma2.cli.app import COMMANDS, load
from gemma2.cli.evaluation.eval_group import EvalGroup


@cache
def all_commands() -> tuple[tuple[str, Any], ...]:
    """("merge slerp", its command), ... for every command and sub-command; made once, which takes 0.2 s."""
    return tuple(_commands())


def _commands() -> Iterator[tuple[str, Any]]:
    for name in COMMANDS:
        command = load(name)
        yield name, command
        if isinstance(command, TyperGroup):
            yield from ((f"{name} {sub}", child) for sub, child in command.commands.items())


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and the parameters that its function would get. Raises what an unknown flag raises."""
    name, *rest = words
    assert name in COMMANDS, f"no command {name}"
    command = load(name)
    if isinstance(command, EvalGroup):
        rest = command.routed(rest)
    if isinstance(command, TyperGroup) and rest and rest[0] in command.commands:
        name, command, rest = f"{name} {rest[0]}", command.commands[rest[0]], rest[1:]
    context = command.make_context(name, list(rest))
    assert not isinstance(command, TyperGroup) or not context.args, f"{name} has no sub-command {context.args}"
    return name, context.params
