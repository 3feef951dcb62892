"""`gemma2 verify`"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, DryRun, Quiet
from gemma2.core.sizes import size, sizes_apart

from .pipeline import Announcer, open_pipeline
from .pipeline_options import jobs_option

if TYPE_CHECKING:
    from gemma2.posttrain.audit.remake import Remade
    from gemma2.posttrain.audit.verification import Fault, Remark, Verification
    from gemma2.posttrain.pipelines.compile import Pipeline

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Jobs = jobs_option(help="Stages of a pipeline that --fix runs at once [default 1].")
MOST_NAMED = 3  # places in a note


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def verify(
    paths: list[Path] = typer.Argument(
        metavar="PATH",
        help="Outputs of gemma2 commands, or folders that hold some, such as that of a pipeline.",
        show_default=False,
        rich_help_panel="Inputs",
    ),
    fix: bool = typer.Option(
        False, "--fix", help="Make again what is damaged, then verify that.", rich_help_panel="Settings"
    ),
    threads: int | None = typer.Option(
        None,
        "--threads",
        metavar="INT",
        min=1,
        help="Files that are read at once [default 4, with more cores up to 8; >=1].",
        show_default=False,
        rich_help_panel="Settings",
    ),
    jobs: int | None = Jobs,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Read every file of outputs, and of all that they were made from, and compare it with its recorded digest.

    The files are read from the disk, whatever earlier commands remember of them. Named are files that are damaged or
    gone, and inputs that are not those that were used. Exits with 1 if there is any.

    \b
      gemma2 verify runs/align
      gemma2 verify merged --fix
    """  # fmt: skip
    from gemma2.posttrain.audit.disk_reading import DEFAULT_THREADS
    from gemma2.posttrain.audit.verification import plan_verify
    from gemma2.posttrain.audit.verification import verify as verify_outputs

    threads = threads or DEFAULT_THREADS
    console = Console(as_json=as_json, quiet=quiet)
    if dry_run:
        console.result({"plan": f"verify {' '.join(map(str, paths))}, no file was read", **plan_verify(paths)})
        return
    found = verify_outputs(paths, threads=threads, progress=console)
    before = found
    remade: Sequence[Remade] = ()
    if fix and found.broken:
        remade = _made_again(found, console, jobs or 1)
        again = verify_outputs(paths, within=_inside(found, remade), threads=threads, progress=console)
        found = _after(found, again)
    if as_json:
        document = found.document()
        console.json(document | ({"before": before.document()["faults"], "remade": [*map(_of, remade)]} if fix else {}))
    else:
        _show(found, before, remade, console)
    if found.faults:
        raise typer.Exit(1)


# --- --fix ------------------------------------------------------------------------------------------------------------


def _made_again(found: Verification, console: Console, jobs: int) -> Sequence[Remade]:
    from gemma2.posttrain.audit.remake import Tools, remake
    from gemma2.posttrain.pipelines.run import executor_of

    def announcer(pipeline: Pipeline) -> Announcer:
        return Announcer(console, len(pipeline.stages))

    def opened(folder: Path) -> Pipeline:
        return open_pipeline(str(folder), None, None)

    return remake(found, Tools(opened, lambda: executor_of("local", jobs), announcer, console))


def _inside(found: Verification, remade: Sequence[Remade]) -> list[Path]:
    """The outputs to verify again: what was damaged, and all in what was made."""
    made = [one.output for one in remade]
    return [path for path in found.gathered.outputs if any(path.is_relative_to(place) for place in made)]


def _after(before: Verification, again: Verification) -> Verification:
    """What holds after making again: of the outputs that were made the second look, of the others the first."""
    seen = again.gathered.outputs

    def touched(fault: Fault) -> bool:
        return fault.used_by in seen or any(fault.output.is_relative_to(path) for path in seen)

    kept = tuple(fault for fault in before.faults if not touched(fault))
    remarks = tuple(one for one in before.remarks if not any(one.output.is_relative_to(path) for path in seen))
    return replace(before, faults=(*kept, *again.faults), remarks=(*remarks, *again.remarks))


def _of(one: Remade) -> dict[str, object]:
    same = one.same if one.compared and not one.problem else None
    return {"output": str(one.output), "same": same, "other": list(one.other), "problem": one.problem or None}


# --- for people -------------------------------------------------------------------------------------------------------


def _show(found: Verification, before: Verification, remade: Sequence[Remade], console: Console) -> None:
    if before.faults:
        console.table([*_rows(before.faults)])
        console.text("")
    for one in remade:
        console.text(f"{_shown(one.output)}: {_outcome(one)}")
    for line in _notes(found.remarks):
        console.note(line)
    rate = f", {size(found.bytes / found.seconds)}/s" if found.seconds else ""
    counts = ", ".join(f"{count} {kind}" for kind, count in found.counts().items())
    after = f" after --fix: {counts or 'all right'}" if remade else f" {counts or 'all right'}"
    outputs = f"{_count(len(found.gathered.outputs), 'output')}, {_count(found.files, 'file')}, {size(found.bytes)}"
    console.text(f"{outputs} in {found.seconds:.1f} s{rate}:{after}")
    for line in _hints(found, bool(remade)):
        console.warn(line)


def _rows(faults: Sequence[Fault]) -> Iterator[dict[str, str]]:
    """A row for every file; those who used an input that changed share one."""
    users: dict[tuple[str, Path, str], list[Fault]] = {}
    for fault in faults:
        users.setdefault((fault.kind, fault.output, fault.file), []).append(fault)
    for (kind, output, file), alike in users.items():
        yield {"output": _shown(output), "file": file or "-", "state": kind, "detail": _detail(alike)}


def _detail(alike: Sequence[Fault]) -> str:
    first = alike[0]
    if first.kind == "input changed":
        names = _some([_shown(fault.used_by) for fault in alike if fault.used_by])
        return f"{_digest(first.recorded)} when {names} used it, now {_digest(first.found)}"
    if first.kind == "manifest unreadable":
        return first.found
    if first.kind == "gone":
        return f"{_digest(first.recorded)}" if first.recorded_bytes is None else size(first.recorded_bytes)
    if first.recorded_bytes != first.found_bytes and None not in (first.recorded_bytes, first.found_bytes):
        was, now = sizes_apart(first.recorded_bytes or 0, first.found_bytes or 0)
        return f"{was} recorded, now {now}"
    return f"{_digest(first.recorded)} recorded, now {_digest(first.found)}"


def _digest(text: str) -> str:
    """A digest in short; another text as it is."""
    name, colon, digits = text.partition(":")
    return f"{digits[:10]}" if colon and name == "blake3" else text or "gone"


def _outcome(one: Remade) -> str:
    if one.problem:
        return f"not made again: {one.problem}"
    if not one.compared:
        return "made again; its record could not be read, so nothing says what it was"
    return "made again, with the recorded bytes" if one.same else f"made again, with other bytes in {_some(one.other)}"


# Kind of a remark -> what is counted, and what is worth knowing of it.
NOTES: Mapping[str, tuple[str, str]] = {
    "not recorded": ("file", "that no manifest records"),
    "without a digest": ("file", "without a digest, not compared (a merge with --no-verify)"),
    "input not on disk": ("input", "not on the disk"),
    "unfinished": ("output", "not finished"),
    "other record": ("output", "of a version that records inputs in another way: only files were compared"),
}


def _notes(remarks: Sequence[Remark]) -> Iterator[str]:
    for kind, (noun, text) in NOTES.items():
        found = (one.output / one.file if one.file else one.output for one in remarks if one.kind == kind)
        places = list(dict.fromkeys(found))
        if places:
            yield f"{_count(len(places), noun)} {text}: {_some([_shown(place) for place in places])}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _hints(found: Verification, fixed: bool) -> Iterator[str]:
    """What helps against what was found."""
    if found.broken and not fixed:
        yield "gemma2 verify --fix makes damaged outputs again"
    changed = {fault.output for fault in found.faults if fault.kind == "input changed"}
    made = {path for path in changed if any(path.is_relative_to(one) for one in found.gathered.outputs)}
    if changed - made:
        names = _some([_shown(path) for path in sorted(changed - made)])
        yield f"no gemma2 command made {names}, so it cannot be made again: restore it, or run again what used it"
    if made:
        names = _some([_shown(path) for path in sorted(made)])
        yield f"{names} was made again since it was used: run again what used it (gemma2 pipeline run does)"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _shown(path: Path) -> str:
    """A path relative to the present directory where it is inside."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
