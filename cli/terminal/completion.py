"""What the shell offers after TAB: recipes, merge methods, stages of a pipeline, choices inside a list.

Called by typer's completion. A mistake in the line that is being written is not an error here: nothing is offered, and
the shell falls back to files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import typer

from gemma2.configs import recipe, recipes
from gemma2.core.errors import Gemma2Error
from gemma2.core.home import text_at_home

__all__ = [
    "begun",
    "every_recipe",
    "items_of",
    "merge_methods",
    "pipelines",
    "recipes_of_command",
    "stages",
]


def _recipes_for(command: str) -> list[str]:
    """Recipes whose first line says that they are for a command."""
    found = []
    for name, path in recipes().items():
        with path.open(encoding="utf-8") as file:
            if file.readline().startswith(f"# gemma2 {command}:"):
                found.append(name)
    return found


def recipes_of_command(ctx: typer.Context, incomplete: str) -> list[str]:
    """The recipes for the command of this line; `quickstart` takes those of pipelines."""
    command = ctx.command_path.partition(" ")[2]
    return begun(_recipes_for("pipeline" if command == "quickstart" else command), incomplete)


def pipelines(incomplete: str) -> list[str]:
    """The recipes of pipelines."""
    return begun(_recipes_for("pipeline"), incomplete)


def every_recipe(incomplete: str) -> list[str]:
    """All recipes."""
    return begun(recipes(), incomplete)


def stages(ctx: typer.Context, incomplete: str) -> list[str]:
    """The stages of the pipeline that this line names, and their groups."""
    from gemma2.posttrain.pipelines.compile import compile_pipeline, read_pipeline
    from gemma2.posttrain.pipelines.run import FILE

    # The parser stops at the flag that has no value yet, and leaves FILE among the words.
    given = ctx.params.get("file") or next((word for word in ctx.args if not word.startswith("-")), "")
    name = text_at_home(str(given))
    place = Path(name, FILE) if Path(name).is_dir() else Path(name)
    path = place if place.is_file() else recipe(name)
    if path is None:
        return []
    try:
        compiled = compile_pipeline(read_pipeline(path), Path("out"))
    except Gemma2Error:
        return []
    return begun([*compiled.groups, *compiled.stages], incomplete)


def merge_methods(ctx: typer.Context, incomplete: str) -> list[str]:
    """The methods, for the first word after `merge plan`."""
    from gemma2.merging.methods.table import METHODS

    return [] if ctx.params.get("words") else begun(METHODS, incomplete)


def items_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """The completion of a list with commas: the choices that are not in it yet."""

    def offered(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        taken = before.split(",")
        return [f"{before}{comma}{item}" for item in begun(choices, last) if item not in taken]

    return offered


def begun(names: Iterable[str], incomplete: str) -> list[str]:
    """The names that begin with what is written so far."""
    return [name for name in names if name.startswith(incomplete)]
