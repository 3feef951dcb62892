"""`gemma2 doctor`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, DryRun, Force, Quiet

if TYPE_CHECKING:
    from gemma2.posttrain.doctor.checks.finding import Finding

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _settings(name: str, text: str) -> bool:
    option: bool = typer.Option(False, name, help=text, rich_help_panel="Settings")
    return option


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def doctor(
    paths: list[Path] | None = typer.Argument(
        None,
        metavar="PATH",
        help="Models, adapters, reward models, outputs, or hub ids; none: this machine.",
        show_default=False,
        rich_help_panel="Inputs",
    ),
    quick: bool = _settings("--quick", "Read headers and JSON files only; under a second for a 27B."),
    deep: bool = _settings("--deep", "Run the model too: loss on plain sentences, ends of answers, scores."),
    only: str = typer.Option(
        "", "--only", metavar="A,B,...", help="These checks alone.", show_default=False, rich_help_panel="Settings"
    ),
    skip: str = typer.Option(
        "", "--skip", metavar="A,B,...", help="All but these checks.", show_default=False, rich_help_panel="Settings"
    ),
    strict: bool = _settings("--strict", "Exit with 1 for warnings too."),
    listed: bool = _settings("--list", "Name every check, with what it looks at."),
    fix: Path | None = typer.Option(
        None,
        "--fix",
        metavar="DIR",
        help="Write a copy here in which is right what needs no judgement; the weights are linked.",
        show_default=False,
        rich_help_panel="Settings",
    ),
    force: bool = Force,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Check this machine, or whether a model is what it should be: configuration, weights, tokenizer, template, stops.

    Of two or more models also whether they can be merged, and whether the first can teach the second. Exits with 1 if
    there is a problem.

    \b
      gemma2 doctor
      gemma2 doctor google/gemma-2-2b-it
      gemma2 doctor merged rl-1 --deep
      gemma2 doctor broken --fix repaired
    """  # fmt: skip
    from gemma2.core.errors import UsageError
    from gemma2.core.outputs.staging import check_output, out_is
    from gemma2.posttrain.doctor.checks.finding import Depth
    from gemma2.posttrain.doctor.examination import check_names, examine, plan_examination

    console = Console(as_json=as_json, quiet=quiet)
    given = paths or []
    if listed:
        rows = [{"check": name, "looks at": line} for name, line in check_names().items()]
        console.json({"checks": rows}) if as_json else console.table(rows)
        return
    if quick and deep:
        raise UsageError("--quick and --deep contradict each other", "give one of them")
    if fix is not None and len(given) != 1:
        raise UsageError(f"--fix takes one model, but {len(given)} were given", "name one PATH")
    if fix is not None:
        with out_is("--fix"):
            check_output(fix, force)  # now, not when the examination is over
    depth = Depth.QUICK if quick else Depth.DEEP if deep else Depth.FULL
    if dry_run:
        checks = plan_examination(given, depth, _names(only), _names(skip))
        _show_plan(checks, fix, console)
        return
    found = []
    for finding in examine(given, depth, _names(only), _names(skip)):
        found.append(finding)
        if not as_json:
            _show(finding, console, found[-2] if len(found) > 1 else None)
    changed = _repaired(given[0], fix, force) if fix is not None else None
    _end(found, changed, fix, console, as_json)
    counted = [one.status for one in found]
    if "problem" in counted or (strict and "warning" in counted):
        raise typer.Exit(1)


def _show_plan(checks: list[dict[str, str]], fix: Path | None, console: Console) -> None:
    """The checks that would run, a line each."""
    plan = f"doctor, {len(checks)} checks, none was made" + (f"; a copy would be written to {fix}" if fix else "")
    if console.as_json:
        console.json({"plan": plan, "checks": checks})
        return
    console.result({"plan": plan})
    if checks:
        console.table(checks)


def _repaired(path: Path, out: Path, force: bool) -> list[str]:
    from gemma2.core.outputs.hub import locate_model
    from gemma2.core.outputs.staging import out_is
    from gemma2.posttrain.doctor.repair import repair

    with out_is("--fix"):
        return repair(locate_model(path, "model"), out, force).changed


MARKS = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}


def _show(finding: Finding, console: Console, before: Finding | None) -> None:
    """One line for a finding, under a heading for each subject."""
    if before is None or before.subject != finding.subject:
        console.text(finding.subject if before is None else f"\n{finding.subject}")
    fix = f"; {finding.fix}" if finding.fix else ""
    console.text(f"  {MARKS[finding.status]:8} {finding.name:13} {finding.message}{fix}")


def _end(found: list[Finding], changed: list[str] | None, fix: Path | None, console: Console, as_json: bool) -> None:
    counts = {status: sum(one.status == status for one in found) for status in ("problem", "warning", "ok")}
    counts["finding"] = len(found)
    if as_json:
        document: dict[str, object] = {"ok": not counts["problem"], "checks": [vars(one) for one in found]}
        console.json(document | ({} if changed is None else {"fixed": str(fix), "changed": changed}))
        return
    console.text("")
    kinds = ("finding", "problem", "warning")
    findings, problems, warnings = (f"{counts[kind]} {kind}{'' if counts[kind] == 1 else 's'}" for kind in kinds)
    console.text(f"{findings}: {problems}, {warnings}")
    if changed is not None:
        console.text(f"{fix}: {'; '.join(changed) or 'nothing to change'}")
