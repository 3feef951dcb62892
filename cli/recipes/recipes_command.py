"""`gemma2 recipes`: the recipes that come with the package, by command, size of the model and machine."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Literal

import typer

from gemma2.cli.terminal.completion import begun, every_recipe
from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand, HelpGroup
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, DryRun, Force, Quiet, file_option
from gemma2.configs import machine_recipes, recipes
from gemma2.core.errors import InputError, OutputError, UsageError
from gemma2.core.outputs.manifest import MANIFEST
from gemma2.core.outputs.promised import promise
from gemma2.core.yaml_files import closest
from gemma2.posttrain.recipe_files.named_recipe import recipe_path
from gemma2.posttrain.schemas.config import load_yaml, to_yaml

setting = partial(typer.Option, show_default=False, rich_help_panel="Settings")
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, cls=HelpGroup)


def planned(incomplete: str) -> list[str]:
    """The recipes that are for one machine."""
    return begun(machine_recipes(), incomplete)


Name = typer.Argument(
    metavar="NAME",
    help="Name of a recipe, a YAML file, or an output.",
    show_default=False,
    rich_help_panel="Inputs",
    autocompletion=every_recipe,
)

CopyFile = file_option(None, "--out", "-o", help="File to write; default: NAME.yaml.")


@app.callback(context_settings=HELP_NAMES)
def recipes_group() -> None:
    """List, show, copy and plan recipes: YAML files with the settings of a command, for --config.

    NAME is COMMAND-SIZE-MACHINE: sft, distill, reward, rlhf or warp; 2b, 9b or 27b; 24gb, 80gb, 8x80gb or multi-node.
    """


@app.command(name="list", cls=HelpCommand, context_settings=HELP_NAMES)
def list_recipes(
    command: str = setting("", "--command", metavar="COMMAND", help="Only those for this command."),
    size: Literal["2b", "9b", "27b"] | None = setting(
        None, "--size", metavar="2b|9b|27b", help="Only those for this size of model."
    ),
    machine: Literal["24gb", "80gb", "8x80gb", "multi-node"] | None = setting(
        None, "--machine", metavar="24gb|80gb|8x80gb|multi-node", help="Only those for this machine."
    ),
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """List the recipes by name, with what each is for and the memory that it needs of one GPU.

    \b
      gemma2 recipes list --size 2b --machine 24gb
    """  # fmt: skip
    console = Console(as_json=as_json, quiet=quiet)
    rows = [_row(name, path) for name, path in recipes().items()]
    wanted = {"command": command, "size": size, "machine": machine}
    rows = [row for row in rows if all(not value or row[key] == value for key, value in wanted.items())]
    if as_json:
        console.json({"recipes": rows})
        return
    if not rows:
        asked = " ".join(str(value) for value in wanted.values() if value)
        known = "" if not command or command in _commands() else f"; {closest(command, _commands())}"
        console.text(f"no recipe for {asked}{known}; gemma2 recipes show COMMAND-SIZE-MACHINE says why")
        return
    console.table([{"recipe": row["name"], "for": row["purpose"], "memory": row["memory"]} for row in rows])


def _row(name: str, path: Path) -> dict[str, str | None]:
    """What the head of a recipe says."""
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    command, _, purpose = first.removeprefix("# gemma2 ").partition(": ")
    plan = next((line.removeprefix("# Plan: ") for line in rest if line.startswith("# Plan: ")), "")
    own, _, place = name.partition("-") if name in machine_recipes() else (command, "", "")
    size, _, machine = place.partition("-")
    found = {"name": name, "command": own, "purpose": purpose, "size": size, "machine": machine}
    return {key: value or None for key, value in (found | {"memory": plan.partition(" at the peak")[0]}).items()}


def _commands() -> list[str]:
    return sorted({str(_row(name, path)["command"]) for name, path in recipes().items()})


def _named(name: str) -> Path:
    """The file of a recipe. Raises InputError for a name without a recipe: why, and the next that exists."""
    from gemma2.posttrain.recipe_files.machines import cell_named, cells, no_recipe

    known = recipes()
    if name in known or Path(name).exists():
        path = recipe_path(name, flag="")
        assert path is not None  # a name was given
        return path
    cell = cell_named(name.lower())
    if cell is not None:
        raise no_recipe(cell)
    names = [*known, *(one.name for one in cells())]
    raise InputError(f"there is no recipe {name}", _hint(name, names), name)


def _hint(name: str, names: Iterable[str]) -> str:
    near = closest(name, names)
    return near if near.startswith("did you mean") else "see gemma2 recipes list"


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def show(name: str = Name, as_json: bool = AsJson, quiet: bool = Quiet) -> None:
    """Print a recipe, or the settings of an output, as a start for your own recipe.

    Of a combination that has no recipe: why it cannot be done, and the next that can.

    \b
      gemma2 recipes show sft-2b-24gb
      gemma2 recipes show rlhf-27b-24gb
    """  # fmt: skip
    path = _named(name)
    if path.name == MANIFEST and path.with_name("merge.yaml").is_file():
        path = path.with_name("merge.yaml")
    values = load_yaml(path)
    console = Console(as_json=as_json, quiet=quiet)
    if as_json:
        console.json(values)
        return
    console.text(to_yaml(values) if path.name == MANIFEST else path.read_text(encoding="utf-8"))


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def copy(
    name: str = Name,
    out: Path | None = CopyFile,
    force: bool = Force,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Copy a recipe into a file of yours, to change it.

    \b
      gemma2 recipes copy sft-9b-80gb --out mine.yaml
    """  # fmt: skip
    from gemma2.core.outputs.text_file import write_text

    path = _named(name)
    target = out or Path(f"{path.stem}.yaml")
    if target.exists() and not force:
        raise OutputError(f"--out {target} exists", "choose another --out, or replace it with --force")
    console = Console(as_json=as_json, quiet=quiet)
    if dry_run:
        console.result({"would write": str(target)})
        return
    text = to_yaml(load_yaml(path)) if path.name == MANIFEST else path.read_text(encoding="utf-8")
    own = f"--config {path.stem} "
    write_text(promise(target, file=True), text.replace(own, f"--config {target} "))
    console.result({}, target)
    console.note(f"check it after a change: gemma2 config check {target}")


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def plan(
    name: str = typer.Argument(
        metavar="NAME",
        help="Recipe of a machine.",
        show_default=False,
        rich_help_panel="Inputs",
        autocompletion=planned,
    ),
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Print the memory that a recipe needs of each GPU, by part and by phase. Nothing is loaded.

    The same sums as in the head of the recipe, for the command line that stands there.

    \b
      gemma2 recipes plan rlhf-2b-80gb
    """  # fmt: skip
    path = _named(name)
    from gemma2.posttrain.recipe_files.machines import MACHINES, cell_named, plan_of, run_line

    cell = cell_named(path.stem)
    if cell is None or cell.path != path:
        raise UsageError(f"{name} is for no certain machine", "give its command to gemma2 plan, or add --dry-run to it")
    found = plan_of(cell)
    console = Console(as_json=as_json, quiet=quiet)
    if as_json:
        console.json(found.as_json() | {"run": run_line(path)})
        return
    peak = found.memory.peak
    console.text(f"{cell.name}: {MACHINES[cell.machine].words}; largest in the phase {peak.name}")
    rows = [{"part": part.name, "GB": f"{part.bytes / 1e9:.2f}"} for part in peak.parts]
    console.table([*rows, {"part": "sum", "GB": f"{found.needed / 1e9:.2f}"}])
    console.table([{"phase": one.name, "GB": f"{one.bytes / 1e9:.2f}"} for one in found.memory.phases])
    console.text(f"fits: {found.sum}" if found.fits else f"does not fit: {found.sum}")
    console.text(run_line(path))
