"""The answer of `gemma2 plan` on a terminal: memory by part, verdicts with flags to paste, disk, time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.plan_view import show_plan
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.posttrain.planning.named_models import with_stand_ins
from gemma2.posttrain.planning.plan_answers import PlanQuestion
from gemma2.posttrain.planning.verdicts import gpus_flags
from gemma2.posttrain.schemas.config import Config

if TYPE_CHECKING:
    from gemma2.posttrain.checks.plan import Planned

# What a dry run says of this machine alone; the answers say it of every place.
INSIDE = re.compile(r"memory_\w+|disk_gib|problems|time|tokens_(trained|read|drawn)_\w+")

__all__ = ["AskedPlan"]


@dataclass(frozen=True)
class AskedPlan:
    """A question about a command, which its own command line is parsed for (`cli/terminal/options.py`)."""

    question: PlanQuestion

    def complete(self, schema: type[Config], flags: JsonMapping, file: Path | None, sets: Sequence[str]) -> JsonObject:
        """Return the flags of a command, with stand-ins for data that is not given."""
        return with_stand_ins(schema, flags, file, sets)

    def show(self, config: Config, planned: Planned, console: Console) -> None:
        """Print the plan of a command with the answers; with --json as one document."""
        show_planned(self.question, config, planned, console)


def show_planned(question: PlanQuestion, config: Config, planned: Planned, console: Console) -> None:
    """Print the plan of a command with the answers to what was asked; with --json one document."""
    from gemma2.posttrain.checks.plan import place_of
    from gemma2.posttrain.planning.plan_answers import PlanFacts, answer
    from gemma2.posttrain.runs.machine import free_memory

    trial = None
    if question.measure:
        from gemma2.posttrain.planning.trial import try_steps

        console.note("trying three steps")
        trial = try_steps(config)
    tokens = planned.work.tokens if planned.work is not None else 0.0
    facts = PlanFacts(config, planned.sizes, planned.lengths, tokens, planned.steps, place_of(free_memory()))
    found = answer(facts, question, trial)
    document = {key: value for key, value in planned.document.items() if not INSIDE.fullmatch(key)} | found
    if console.as_json:
        console.json(document)
        return
    show_plan({key: value for key, value in document.items() if key not in found}, console)
    show_answer(found, console)


def show_answer(found: JsonMapping, console: Console) -> None:
    """Print the answer, without the plan of the command around it."""
    if "memory" in found:
        _show_memory(found["memory"], console)
        _show_verdicts(found["verdicts"], console)
    if "memory_note" in found:
        console.text(f"\nmemory: {found['memory_note']}")
    if "disk" in found:
        console.text("")
        rows = [{"disk": name, "GiB": _gib(value)} for name, value in found["disk"].items()]
        console.table([*rows, {"disk": "at one time, at most", "GiB": _gib(sum(found["disk"].values()))}])
    if found["time"]:
        console.text("")
        console.result(found["time"])


def _show_memory(memory: JsonMapping, console: Console) -> None:
    phases = memory["phases"]
    names = list(dict.fromkeys(name for one in phases for name in one["parts"]))
    rows: list[JsonObject] = [
        {"part": name} | {_title(one, memory): _gib(one["parts"].get(name)) for one in phases} for name in names
    ]
    rows.append({"part": "all"} | {_title(one, memory): _gib(one["gib"]) for one in phases})
    console.text("")
    console.table(rows, f"memory in GiB, {memory['place']}; the peak is {memory['peak']}")


def _title(phase: JsonMapping, memory: JsonMapping) -> str:
    peak = phase["phase"] == memory["peak"] and len(memory["phases"]) > 1
    return f"{phase['phase']} (peak)" if peak else str(phase["phase"])


def _show_verdicts(verdicts: list[JsonObject], console: Console) -> None:
    rows = [
        {
            "place": one["place"],
            "has GiB": _gib(one["has_gib"]),
            "needs": _gib(one["needs_gib"]),
            "verdict": "fits" if one["fits"] else "does not fit",
            "micro-batch up to": one["largest_micro_batch"],
        }
        for one in verdicts
    ]
    console.text("")
    console.table(rows, "verdicts")
    small = [one for one in verdicts if not one["fits"]]
    if small:
        console.text("\nwhat makes it fit")
    for one in small:
        console.text(f"  {one['place']}: {_way(one)}")


def _gib(value: float | None) -> str | None:
    """A figure of a table: two decimals, and never in powers of ten."""
    if value is None:
        return None
    return f"{value:.2f}" if value >= 0.01 else "<0.01"


def _way(one: JsonMapping) -> str:
    """What makes a command fit: flags of its settings, or more GPUs of this size."""
    several = f"{gpus_flags(one['fewest_gpus'])}, of such GPUs" if one["fewest_gpus"] else ""
    if one["flags"]:
        return f"add {one['flags']}  ({_gib(one['then_gib'])} GiB)" + (f", or {several}" if several else "")
    if several:
        return f"add {several}"
    return f"no flags help, the least is {_gib(one['then_gib'])} GiB; a smaller model, or a larger device"
