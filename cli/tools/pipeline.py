"""`gemma2 pipeline run | status | diff | graph`: a DAG of commands from one file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.difference_view import show_explanations, show_run_differences
from gemma2.cli.terminal.help import HelpCommand, HelpGroup
from gemma2.cli.terminal.options import (
    HELP_NAMES,
    AllowHost,
    AllowKey,
    AllowVersions,
    AsJson,
    DryRun,
    Force,
    Form,
    Out,
    Quiet,
    Set,
    file_option,
    required_out,
)
from gemma2.cli.terminal.plan_view import end_plan
from gemma2.configs import recipe, recipes
from gemma2.core.errors import InputError, OutputError, UsageError
from gemma2.core.home import text_at_home
from gemma2.core.outputs.manifest import MANIFEST
from gemma2.core.outputs.promised import promise
from gemma2.core.outputs.staging import partial_path
from gemma2.core.permissions import allow
from gemma2.core.yaml_files import closest

from .pipeline_options import Again, File, From, Jobs, KeepGoing, Only, Place, RayAddress, Reuse, Slurm, Why

if TYPE_CHECKING:
    from gemma2.core.json_files import JsonMapping
    from gemma2.posttrain.pipelines.check import PipelinePlan
    from gemma2.posttrain.pipelines.compile import Pipeline, Stage
    from gemma2.posttrain.pipelines.decision import Choice
    from gemma2.posttrain.pipelines.shelf import Shelf

__all__ = ["Announcer", "app", "kept_for_later"]

SHOWN = 4  # figures in the line about a finished stage

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, cls=HelpGroup)

Write = file_option(None, "--write", help="Write the drawing to this file instead of stdout.")


class Announcer:
    """Prints a line when a stage starts and one when it ends.

    out: final name of the output, if it is built under another name (`.OUT.partial`).
    """

    def __init__(self, console: Console, total: int, out: Path | None = None) -> None:
        self.console, self.total = console, total
        self.numbers: dict[str, int] = {}
        self.names = (str(partial_path(out)), str(out)) if out else ("", "")

    def started(self, stage: Stage, command: str, why: str) -> None:
        number = self.numbers.setdefault(stage.name, len(self.numbers) + 1)  # a retry keeps the number of its stage
        because = f" ({why})" if why else ""
        self.console.heading(f"{number}/{self.total}  {stage.name}: {stage.kind.why}{because}")
        self.console.note(f"     $ {command.replace(*self.names) if self.names[0] else command}")

    def finished(self, stage: Stage, status: str, seconds: float, summary: JsonMapping) -> None:
        figures = [
            f"{key.replace('_', ' ')} {value:.4g}"
            for key, value in summary.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and not key.endswith("_se")
        ]
        shown = "  ".join(figures[:SHOWN])
        self.console.note(f"     {stage.name}: {status} in {seconds:.1f} s{'   ' if shown else ''}{shown}")


@contextmanager
def kept_for_later(console: Console, root: Path) -> Iterator[None]:
    """Note that finished stages are kept when a run ends early."""
    from gemma2.posttrain.pipelines.state import STATE_FILE

    try:
        yield
    except UsageError:  # the same command would only meet it again
        raise
    except BaseException:
        if (root / STATE_FILE).is_file():
            console.note("work done so far is kept: the same command continues from there")
        raise


def open_pipeline(name: str, out: Path | None, sets: list[str] | None) -> Pipeline:
    """Compile the pipeline of a file, a recipe, or the folder of an earlier run."""
    from gemma2.posttrain.pipelines.compile import compile_pipeline, read_pipeline
    from gemma2.posttrain.pipelines.run import FILE

    folder = Path(name)
    if folder.is_dir():
        file = folder / FILE
        if not file.is_file():
            hint = "give a YAML file"
            if (folder / MANIFEST).is_file():  # a warp has stages too, but no file of them
                hint = f"it is one output: gemma2 lineage {folder} shows it, gemma2 pipeline diff compares two"
            raise InputError(f"{folder} is not the folder of a pipeline", hint)
        root, described = out or folder, read_pipeline(file, sets or ())
        return compile_pipeline(described, enter_folder_of(folder, root))
    path = folder if folder.is_file() else recipe(name)
    if path is None:
        known = closest(name, recipes())
        raise InputError(f"{name} does not exist", f"give a YAML file, the folder of a run, or a recipe ({known})")
    out = required_out(out)
    return compile_pipeline(read_pipeline(path, sets or ()), out)


def enter_folder_of(recorded: Path, root: Path) -> Path:
    """Make the folder in which a pipeline was run the working directory: relative paths in its file begin there.

    Returns `root` as it is found from there. Nothing happens where that folder is not recorded, or is gone (the
    pipeline was copied from another machine).
    """
    from gemma2.posttrain.pipelines.state import folder_of

    place = folder_of(recorded)
    if place is None or place.resolve() == Path.cwd():
        return root
    absolute = Path(os.path.abspath(root))
    os.chdir(place)
    return absolute


def choice_of(
    compiled: Pipeline, start: Sequence[str], only: Sequence[str], force: Sequence[str], keep_going: bool
) -> Choice:
    """The stages that --from, --only and --force choose. Raises UsageError if one is unknown or forced but left out."""
    from gemma2.posttrain.pipelines.decision import Choice

    within = compiled.after(compiled.chosen(start)) if start else set(compiled.stages)
    within &= compiled.chosen(only) if only else within
    again = compiled.chosen(force)
    if again - within:
        raise UsageError(f"--force {min(again - within)} is not among the chosen stages", "choose it too, or drop it")
    return Choice(frozenset(within) if start or only else None, frozenset(again), keep_going)


def shelf_of(folders: Sequence[str]) -> Shelf:
    """The outputs below the folders of --reuse. Raises InputError for one that is not a directory."""
    from gemma2.posttrain.pipelines.shelf import Shelf

    for folder in folders:
        if not Path(text_at_home(folder)).is_dir():
            raise InputError(
                f"--reuse {folder} is not a directory", "give the folder of a pipeline, or one with several"
            )
    return Shelf([Path(text_at_home(folder)) for folder in folders])


@app.callback(context_settings=HELP_NAMES)
def pipeline() -> None:
    """Run a pipeline: stages that each name a command, its options, and outputs of other stages."""


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def run(
    file: str = File,
    out: Path | None = Out,
    set_: list[str] | None = Set,
    jobs: int | None = Jobs,
    executor: Literal["local", "ray", "slurm"] = Place,
    ray_address: str | None = RayAddress,
    slurm: list[str] | None = Slurm,
    from_: list[str] | None = From,
    only: list[str] | None = Only,
    force: list[str] | None = Again,
    reuse: list[str] | None = Reuse,
    allow_host: list[str] | None = AllowHost,
    allow_key: list[str] | None = AllowKey,
    allow_versions: bool = AllowVersions,
    keep_going: bool = KeepGoing,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Run the stages that are missing or changed, each after those it needs; started again, continue where it stopped.

    \b
      gemma2 pipeline run align.yaml --out runs/align --jobs 2
      gemma2 pipeline run align.yaml --out runs/align --from reward --set sft.learning_rate=2e-5
      gemma2 pipeline run quickstart --out quickstart --dry-run
    """  # fmt: skip
    from gemma2.posttrain.pipelines.check import check_pipeline
    from gemma2.posttrain.pipelines.run import check_executor, check_place, executor_of, run_pipeline, scripts_of
    from gemma2.posttrain.planning.named_models import NamedModels

    if ray_address is not None and executor != "ray":
        raise UsageError("--ray-address is for --executor ray", "give that too, or drop it")
    if slurm and executor != "slurm":
        raise UsageError("--slurm is for --executor slurm", "give that too, or drop it")
    console = Console(as_json=as_json, quiet=quiet)
    allow(allow_host or (), allow_key or (), allow_versions)
    compiled = open_pipeline(file, out, set_)
    choice = replace(choice_of(compiled, from_ or (), only or (), force or (), keep_going), shelf=shelf_of(reuse or ()))
    place = executor_of(executor, jobs or 1, ray_address, slurm or ())
    if dry_run:
        check_place(compiled.root)
        check_executor(compiled, place)
        plan = check_pipeline(compiled, choice, named=NamedModels())
        show_plan(console, compiled, plan, scripts_of(place, [one.stage for one in plan.to_run], compiled))
        return
    if choice.within is None:
        promise(compiled.root)
    started = time.monotonic()
    announcer = Announcer(console, len(compiled.stages))
    with kept_for_later(console, compiled.root):
        result = run_pipeline(compiled, place, choice=choice, observer=announcer, progress=console)
    for name in result.ran:
        promise(compiled.stages[name].out)
    counts = {status: list(result.status.values()).count(status) for status in ("complete", "not needed")}
    console.result(
        {"stages": len(compiled.stages), "ran": len(result.ran), **{k: v for k, v in counts.items() if v},
         "seconds": time.monotonic() - started},
        compiled.root,
    )  # fmt: skip


def show_plan(console: Console, compiled: Pipeline, plan: PipelinePlan, scripts: Mapping[str, str]) -> None:
    """Print what a run would do. scripts: of batch jobs, by stage."""
    from gemma2.posttrain.runs.machine import free_memory

    rows, memory = plan.rows(), free_memory()
    problems = [*plan.problems, *plan.without_memory(memory)]
    facts = {
        "to_run": len(plan.to_run), "stages": len(rows),
        "memory_free_gib": memory.free / 2**30, "memory_of": memory.where,
        "disk_gib": plan.disk / 2**30, "disk_free_gib": plan.disk_free / 2**30,
    }  # fmt: skip
    if console.as_json:
        more = {"scripts": dict(scripts)} if scripts else {}
        console.json({"plan": rows, **facts, **more, "problems": problems, "warnings": list(plan.warnings),
                      "out": str(compiled.root)})  # fmt: skip
    else:
        console.table([{key.replace("_", " "): value for key, value in row.items()} for row in rows])
        console.text("")
        console.result(facts, compiled.root)
        for name, text in scripts.items():
            console.text(f"\n# stage {name}\n{text}")
    for line in plan.warnings:
        console.warn(line)
    end_plan(problems, console)


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def status(
    file: str = File,
    out: Path | None = Out,
    set_: list[str] | None = Set,
    why: list[str] | None = Why,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Show the status of every stage: complete, changed and by what, interrupted, failed and why, to run.

    \b
      gemma2 pipeline status runs/align
      gemma2 pipeline status runs/align --why sft
      gemma2 pipeline status align.yaml --out runs/align
    """
    from gemma2.posttrain.pipelines.run import status_rows

    console = Console(as_json=as_json, quiet=quiet)
    compiled = open_pipeline(file, out, set_)
    if why:
        from gemma2.posttrain.audit.explanation import explain

        found = explain(compiled, compiled.chosen(why))
        console.json({"stages": found, "out": str(compiled.root)}) if as_json else show_explanations(found, console)
        return
    rows = status_rows(compiled)
    if as_json:
        console.json({"stages": rows, "out": str(compiled.root)})
    else:
        used = [key for key in rows[0] if any(row[key] is not None for row in rows)]
        console.table([{key: row[key] for key in used} for row in rows])


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def diff(
    run1: Path = typer.Argument(
        metavar="RUN1",
        help="Folder of a pipeline, or one output.",
        show_default=False,
        rich_help_panel="Inputs",
    ),
    run2: Path = typer.Argument(metavar="RUN2", help="The other.", show_default=False, rich_help_panel="Inputs"),
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Show how two runs differ, stage by stage: what each was made from, the bytes that came out, the figures.

    \b
      gemma2 pipeline diff runs/align runs/align-2
      gemma2 pipeline diff runs/align/sft runs/other/sft
    """
    from gemma2.posttrain.audit.run_difference import compare_runs

    console = Console(as_json=as_json, quiet=quiet)
    found = compare_runs(run1, run2)
    console.json(found) if as_json else show_run_differences(found, console)


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def graph(
    file: str = File,
    out: Path | None = Out,
    set_: list[str] | None = Set,
    form: Literal["text", "mermaid", "svg"] = Form,
    write: Path | None = Write,
    force: bool = Force,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Draw the stages and what they need, as text, Mermaid or SVG.

    \b
      gemma2 pipeline graph quickstart --out quickstart
      gemma2 pipeline graph align.yaml --format svg --write align.svg
    """  # fmt: skip
    from gemma2.core.outputs.text_file import write_text
    from gemma2.posttrain.pipelines.state import recorded_stages
    from gemma2.posttrain.reports.graph.render import Edge, Node, dag_mermaid, dag_svg, dag_text

    console = Console(as_json=as_json, quiet=quiet)
    if as_json and (write is not None or form != "text"):
        raise UsageError("--json has its own format and goes to stdout", "drop --format and --write, or drop --json")
    compiled = open_pipeline(file, out or (None if Path(file).is_dir() else Path("out")), set_)
    recorded = recorded_stages(compiled.root)
    if as_json:
        console.json({name: {"command": one.command, "needs": one.needs} for name, one in compiled.stages.items()})
        return
    nodes = [
        Node(name, name, stage.command, str(recorded.get(name, {}).get("status", "")))
        for name, stage in compiled.stages.items()
    ]
    edges = [Edge(need, name) for name, stage in compiled.stages.items() for need in stage.needs]
    draw = {"text": dag_text, "mermaid": dag_mermaid, "svg": dag_svg}[form]
    if write is not None and write.exists() and not force:
        raise OutputError(f"--write {write} exists", "choose another file, or replace it with --force")
    if write is not None and not write.parent.is_dir():
        raise OutputError(f"cannot write --write {write}: {write.parent} is not a directory", "create it first")
    if dry_run:
        plan = f"pipeline graph {file} -> {write or 'stdout'}, nothing was written"
        console.result({"plan": plan, "stages": len(nodes), "arrows": len(edges)})
    elif write is None:
        console.text(draw(nodes, edges))
    else:
        console.result({}, write_text(write, draw(nodes, edges)))
