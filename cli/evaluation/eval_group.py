"""`gemma2 eval`: one command whose forms measure different things; a form's module is imported when it is called.

A form is a sub-command, and the flag of the same name selects it: `gemma2 eval MODEL --suite gemma2` is
`gemma2 eval suite MODEL --suite gemma2`. Without such a flag the form is `policy`.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from gemma2.cli.terminal.help import HelpGroup
from gemma2.cli.terminal.mistakes import UsageProblem

if TYPE_CHECKING:
    from typer._click import Command, Context

__all__ = ["FORMS", "EvalGroup", "app"]

PLAIN = "policy"  # the form of a command line without a flag that selects one
HELP = ("-h", "--help")


@dataclass(frozen=True)
class Form:
    """One form: its module in this package, what it measures, and whether a flag of its name selects it."""

    module: str
    summary: str
    has_flag: bool = True


FORMS: dict[str, Form] = {
    PLAIN: Form(
        "policy_form",
        "Reward, KL to the SFT policy and length: the form without a flag.",
        has_flag=False,
    ),
    "suite": Form("suite_form", "Few-shot benchmarks: MMLU, ARC-c, GSM8K, Winogrande, HellaSwag as Gemma 2 reports."),
    "perplexity": Form("perplexity_form", "Perplexity of texts: per token, per word, and as bits per byte."),
    "qa": Form("qa_form", "Questions with known answers: exact match, and match of the last number."),
    "choices": Form("choices_form", "Multiple choice: accuracy by log-probability, and by that per byte."),
    "win-rate": Form("win_rate_form", "Answers of two models side by side, by a reward or by a judge."),
    "data": Form(
        "data_command", "The data sets of --suite as JSON lines, from the hub or the package index.", has_flag=False
    ),
    "show": Form(
        "show_command", "A finished result next to published rows, or two results row by row.", has_flag=False
    ),
}


class _LazyForms(MutableMapping[str, "Command"]):
    """The sub-commands by name; reading one imports its module."""

    def __getitem__(self, name: str) -> Command:
        return _load(name)

    def __setitem__(self, name: str, command: Command) -> None:
        raise TypeError("a form is added to FORMS")

    def __delitem__(self, name: str) -> None:
        raise TypeError("a form is removed from FORMS")

    def __iter__(self) -> Iterator[str]:
        return iter(FORMS)

    def __len__(self) -> int:
        return len(FORMS)


@cache
def _load(name: str) -> Command:
    command = get_command(import_module(f".{FORMS[name].module}", __package__).app)
    command.name = name
    return command


class EvalGroup(HelpGroup):
    """Turns a flag that selects a form into the form's sub-command."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401  # those of typer's groups
        super().__init__(**settings)
        self.commands = _LazyForms()

    @staticmethod
    def routed(words: Sequence[str]) -> list[str]:
        """The command line with its form in front. Raises UsageProblem for flags of two forms."""
        if not words or words[0] in (*FORMS, *HELP):
            return list(words)
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        chosen = [name for name, form in FORMS.items() if form.has_flag and f"--{name}" in flags]
        if len(chosen) > 1:
            first, second, *_ = chosen
            raise UsageProblem(f"--{first} and --{second} are two measurements", "give one of them, then the other")
        return [*(chosen or [PLAIN]), *words]

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self.routed(args))

    def list_commands(self, ctx: Context) -> list[str]:
        return list(FORMS)

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        """A form without its parameters, for the list; `resolve_command` imports the one that is called."""
        return TyperCommand(name=cmd_name, help=FORMS[cmd_name].summary) if cmd_name in FORMS else None

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, _load(name) if command is not None and name is not None else command, rest


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, cls=EvalGroup)


@app.callback(context_settings={"help_option_names": list(HELP)})
def evaluate() -> None:
    """Measure a model. Each form measures something else; the flag with a form's name selects it.

    \b
      gemma2 eval --model policy --sft sft --reward reward --prompts heldout.jsonl
      gemma2 eval MODEL --suite gemma2 --data tasks --out results
      gemma2 eval suite --help
    """
