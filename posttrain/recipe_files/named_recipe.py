"""The file that `--config` means: a path, an output, or the name of a recipe. Imported by every command: light."""

from __future__ import annotations

from pathlib import Path

from gemma2.configs import recipe, recipes
from gemma2.core.errors import InputError, UsageError
from gemma2.core.outputs.manifest import MANIFEST
from gemma2.core.yaml_files import closest

__all__ = ["recipe_path"]


def recipe_path(name: str | None, command: str = "", flag: str = "--config ") -> Path | None:
    """The file that `--config` means: a path, the configuration that an output records, or a recipe by name.

    flag  how messages begin; "" where the name is an argument

    Raises UsageError for a recipe of ours that is for another command than `command`.
    """
    if name is None:
        return None
    path = Path(name, MANIFEST) if Path(name).is_dir() else Path(name)
    found = path if path.is_file() else recipe(name)
    if found is None and path.exists():
        raise InputError(f"{flag}{name} is not a regular file", "give a YAML file")
    if found is None:
        from .machines import cell_named, no_recipe

        cell = cell_named(name)
        if cell is not None:
            raise no_recipe(cell)
        raise InputError(f"{flag}{name} does not exist", f"give a YAML file, or a recipe ({closest(name, recipes())})")
    if command and not path.is_file():
        with found.open(encoding="utf-8") as lines:
            begins, _, rest = lines.readline().partition("# gemma2 ")
        purpose = rest.partition(":")[0]
        if not begins and purpose not in ("", command):
            how = "pipeline run " + name if purpose == "pipeline" else f"{purpose} --config {name}"
            raise UsageError(f"--config {name} is a recipe for gemma2 {purpose}", f"use it with gemma2 {how}")
    return found
