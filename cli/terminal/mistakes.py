"""Command lines that cannot be parsed, explained in our words: what is wrong and what to write instead."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from typer.core import TyperArgument, TyperOption

from gemma2.core.errors import UsageError
from gemma2.core.yaml_files import closest, parse_value
from gemma2.posttrain.foreign.counterparts import command_here, hint_for, plain_name

if TYPE_CHECKING:
    from typer._click import Command, Context
    from typer.exceptions import TyperException

__all__ = ["UsageProblem", "check_words", "explain"]

ITEMS = "A,B,..."  # metavar of a flag that takes several values, separated by commas
# Sub-commands that have another place by now.
MOVED = {("config", "list"): "recipes list", ("config", "show"): "recipes show"}
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?,?")


class UsageProblem(UsageError):
    """A command line that cannot be parsed."""

    def __init__(self, what: str, hint: str = "", page: str = "") -> None:
        super().__init__(what, hint or (f"see {page}" if page else ""), page.removesuffix(" --help"))
        self.text = f"{what} (see {page})" if page and not hint else f"{what}; {hint}" if hint else what

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Given:
    """An option of a command line with its value, and the words after it that belong to nothing."""

    option: TyperOption
    value: str
    loose: tuple[str, ...]

    @property
    def flag(self) -> str:
        return str(max(self.option.opts, key=len))


def explain(error: TyperException, words: Sequence[str]) -> UsageProblem:
    """The problem of a command line that the parser refused."""
    context: Context | None = getattr(error, "ctx", None)
    page = f"{getattr(context, 'command_path', 'gemma2')} --help"
    value = _of_value(error) or _of_another_tool(error, context, words)
    if value is not None:
        return UsageProblem(*value, page)
    text = error.format_message()
    option = getattr(error, "option_name", None)
    if option and "requires an argument" in text:  # the parser says neither which command's nor how
        page = f"gemma2 {words[0]} --help" if words and not words[0].startswith("-") else page
        return UsageProblem(f"{option} needs a value", f"write {option} VALUE; {page} describes it", page)
    if context is not None and "unexpected extra argument" in text:
        switch = _switch_with_value(context.command, words)
        if switch is not None:
            return UsageProblem(*switch, page)
    if context is not None and ("unexpected extra argument" in text or "No such command" in text):
        found = next((given for given in _given(context.command, words) if given.loose), None)
        if found is not None and ("extra" in text or f"'{found.loose[0]}'" in text):
            return UsageProblem(*_several(found), page)
    if context is not None and "unexpected extra argument" in text:
        second = re.search(r"unexpected extra argument\S* \((.+)\)", text)
        if second and context.command_path == "gemma2 chat":
            word = shlex.quote(second[1].split()[0])
            return UsageProblem(
                f"{word} is a second model, and one is taken", f"compare with it: --against {word}", page
            )
    if context is not None and "No such option" in text:
        names = {name for part in context.command.params for name in part.opts if name.startswith("-")}
        short = next(
            (word for word in words if not word.startswith("--") and f"-{word.partition('=')[0]}" in names), None
        )
        if short is not None and len(short) > 2:
            return UsageProblem(f"No such option: {short}", f"write it with two dashes: -{short}", page)
        typed = str(getattr(error, "option_name", ""))
        if typed.startswith("--"):
            # Without the dashes, which all flags share: with them any two short flags are near.
            near = closest(typed[2:], [name[2:] for name in names if name.startswith("--")])
            meant = re.fullmatch("did you mean '(.*)'\\?", near)
            return UsageProblem(f"no such option: {typed}", f"did you mean '--{meant[1]}'?" if meant else "", page)
    return UsageProblem(text, "", page)


def _switch_with_value(command: Command, words: Sequence[str]) -> tuple[str, str] | None:
    """(what, fix) of a switch with `true` or `false` after it, as other tools want it; None without one."""
    for part in command.params:
        for word, after in pairwise(words):
            if (
                isinstance(part, TyperOption)
                and part.is_flag
                and word in part.opts
                and after.lower() in ("true", "false")
            ):
                off = max(part.secondary_opts, key=len, default="")
                fix = f"write {word}" if after.lower() == "true" else f"write {off}" if off else f"leave out {word}"
                return f"{word} is a switch and takes no value", fix
    return None


def _of_value(error: TyperException) -> tuple[str, str] | None:
    """(what, fix) of a value that is not of its flag's type; None for another problem."""
    parameter = getattr(error, "param", None)
    report = getattr(error.__cause__, "errors", None)
    if parameter is None or report is None:
        return None
    from gemma2.posttrain.schemas.messages import reworded

    problem = report()[0]
    name = max(parameter.opts, key=len) if isinstance(parameter, TyperOption) else parameter.metavar or parameter.name
    given = f" {shlex.quote(problem['input'])}" if isinstance(problem["input"], str) else ""
    if problem["type"] == "value_error":  # a choice; the text is typer's: `'x' is not one of 'a', 'b'.`
        listed = str(problem["msg"]).partition(" is not one of ")[2].rstrip(".")
        choices = re.findall(r"'([^']*)'", listed)
        problem = {**problem, "type": "literal_error", "ctx": {"expected": listed}} if choices else problem
    what, hint = reworded(problem)
    return f"{name}{given} {what}", hint


def _of_another_tool(error: TyperException, context: Context | None, words: Sequence[str]) -> tuple[str, str] | None:
    """(what, fix) of a flag or sub-command that another tool has; None for another problem."""
    name = getattr(error, "option_name", None)
    if context is None:
        return None
    if name is None:
        unknown = re.search(r"No such command '([^']*)'", error.format_message())
        new = MOVED.get((context.command_path.rpartition(" ")[2], unknown[1])) if unknown else None
        if unknown and new:
            rest = words[[*words].index(unknown[1]) + 1 :]
            return (
                f"gemma2 {' '.join(words[: -len(rest) or None])} has moved",
                f"write {shlex.join(['gemma2', *new.split(), *rest])}",
            )
        fix = command_here(unknown[1]) if unknown and context.command_path == "gemma2" else None
        return (f"there is no command '{unknown[1]}'", fix) if unknown and fix else None
    options = {flag for part in context.command.params for flag in part.opts if flag.startswith("--")}
    texts = dict(_foreign(words))
    given = {key: parse_value(text) for key, text in texts.items() if text is not None}
    key, text = plain_name(name), texts.get(plain_name(name))
    dashed = f"--{key.replace('_', '-')}"
    if dashed in options:  # ours, with underscores
        if key == "report_to" and text == "none":
            return f"no such option: {name}", "leave it out: no tracker is the default"
        shown = "" if text is None else f" {shlex.quote(text)}"
        return f"no such option: {name}", f"flags have dashes here: write {dashed}{shown}"
    known = {plain_name(flag) for flag in options}
    known |= {"trainer"} if "--report-to" in options else set()  # the flags of TrainingFields
    hint = hint_for(name, known, given.get(key), given)
    return None if hint is None else (f"no such option: {name}", hint)


def _foreign(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(key, value) of every word that looks like a long flag; None where no value follows."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name == "--":
            continue
        follows = words[place + 1 :][:1]
        if not equals and follows and (not follows[0].startswith("-") or NUMBER.fullmatch(follows[0])):
            value = follows[0]
        yield plain_name(name), value or None


def check_words(command: Command, words: Sequence[str]) -> None:
    """Refuse a list whose items are separate words or repeated flags, where the parser would lose or misplace some.

    A command that takes any number of models would read `--weights 0.4 0.6` as a model called 0.6.
    """
    several = any(isinstance(part, TyperArgument) and part.nargs == -1 for part in command.params)
    seen: dict[str, Given] = {}
    for given in _given(command, words):
        loose = tuple(word for word in given.loose if NUMBER.fullmatch(word) and not Path(word).exists())
        numeric = all(NUMBER.fullmatch(part) for part in given.value.split(",") if part)
        if several and loose and loose == given.loose[: len(loose)] and numeric and _takes_items(given):
            raise UsageProblem(*_several(Given(given.option, given.value, loose)))
        before = seen.setdefault(given.flag, given)
        if before is not given and _takes_items(given):
            raise UsageProblem(
                *_several(Given(given.option, before.value, (given.value,)), f"{given.flag} is given twice")
            )


def _takes_items(given: Given) -> bool:
    return given.option.metavar == ITEMS and not given.option.multiple


def _several(given: Given, what: str = "") -> tuple[str, str]:
    """(what, fix) of an option that is followed by more words than it takes."""
    items = [part for word in (given.value, *given.loose) for part in word.split(",") if part]
    if _takes_items(given):
        return (
            what or f"{given.flag} takes one word, and '{given.loose[0]}' follows it",
            f"separate the items by commas: {given.flag} {shlex.quote(','.join(items))}",
        )
    if given.option.multiple:
        return (
            f"{given.flag} takes one value, and '{given.loose[0]}' follows it",
            f"repeat the flag: {' '.join(f'{given.flag} {shlex.quote(word)}' for word in (given.value, *given.loose))}",
        )
    return (
        f"{given.flag} takes one value, and '{given.loose[0]}' follows it",
        f"leave it out, or put a value with blanks in quotes: {given.flag} "
        f"{shlex.quote(' '.join((given.value, *given.loose)))}",
    )


def _given(command: Command, words: Sequence[str]) -> Iterator[Given]:
    """The options with a value in a command line, in their order."""
    options = {name: part for part in command.params if isinstance(part, TyperOption) for name in part.opts}
    place = 0
    while place < len(words) and words[place] != "--":
        name, equals, value = words[place].partition("=")
        place += 1
        option = options.get(name)
        if option is None or option.is_flag:
            continue
        if not equals:
            value = words[place] if place < len(words) else ""
            place += 1
        end = place
        while end < len(words) and not words[end].startswith("-"):
            end += 1
        yield Given(option, value, tuple(words[place:end]))
