"""The plan of `--dry-run` on a terminal: facts, data sets, the first row as a model reads it, what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import typer

from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.posttrain.schemas.config import Config

from .console import Console

if TYPE_CHECKING:
    from gemma2.posttrain.checks.plan import Planned
    from gemma2.posttrain.runs.run_directory import RunOptions

__all__ = ["PlanAsked", "end_plan", "plan_only", "show_plan"]

APART = ("data", "first_row", "stages", "problems", "warnings", "config", "batch")


class PlanAsked(Protocol):
    """What `gemma2 plan` puts in place of the plan of a dry run."""

    def complete(self, schema: type[Config], flags: JsonMapping, file: Path | None, sets: Sequence[str]) -> JsonObject:
        """Return the flags of a command, with stand-ins for data that is not given."""
        ...

    def show(self, config: Config, planned: Planned, console: Console) -> None:
        """Print the plan."""
        ...


def plan_only(config: Config, options: RunOptions | None, console: Console, asked: PlanAsked | None) -> None:
    """Print the plan of a command, which `gemma2 plan` shows in its own way. options: where it writes, if it does."""
    from gemma2.posttrain.checks.kinds import wanted_kind
    from gemma2.posttrain.pipelines.check import plan_step
    from gemma2.posttrain.planning.named_models import name_models

    config, named = name_models(config, wanted_kind(config), sizes=asked is not None)
    planned = plan_step(config, options, named)
    if asked is not None:
        asked.show(config, planned, console)
    else:
        show_plan(planned.document, console)


def show_plan(document: JsonMapping, console: Console) -> None:
    """Print the plan of one command; with --json the whole document. Exits with 1 if something does not fit."""
    if console.as_json:
        console.json(document)
    else:
        _for_people(document, console)
    for line in document.get("warnings", ()):
        console.warn(line)
    end_plan(document.get("problems", ()), console)


def end_plan(problems: Sequence[str], console: Console) -> None:
    """Name what does not fit, behind the plan, and exit with 1 if there is anything."""
    for problem in problems:
        console.warn(problem)
    if problems:
        raise typer.Exit(1)


def _for_people(document: JsonMapping, console: Console) -> None:
    facts = {key: value for key, value in document.items() if key not in APART}
    console.result({**facts, **document.get("batch", {})})
    if document.get("data"):
        console.text("")
        console.table([_line(row) for row in document["data"]], "data")
    if "first_row" in document:
        console.text(f"\nthe first row of {document['first_row']['data']} as the model reads it\n")
        console.text(document["first_row"]["text"])
    if document.get("stages"):
        console.text("")
        console.table(document["stages"], "stages")


def _line(row: JsonMapping) -> dict[str, object]:
    """One data set: only columns with a value, lengths as one cell."""
    lengths = [row.get(f"tokens_{name}") for name in ("median", "95", "max")]
    found: dict[str, object] = {key: value for key, value in row.items() if not key.startswith("tokens_")}
    if None not in lengths:
        found["tokens: median, 95 %, most"] = ", ".join(f"{length:,}" for length in lengths)
    return found
