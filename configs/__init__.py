"""Recipes: YAML files that `--config` takes by path or by name. Those in `recipes` are for one machine each."""

from __future__ import annotations

from pathlib import Path

__all__ = ["machine_recipes", "recipe", "recipes"]


def recipes() -> dict[str, Path]:
    """Name -> path of every recipe that comes with the package."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))} | machine_recipes()


def machine_recipes() -> dict[str, Path]:
    """Name -> path of the recipes that are for one command, one size of model and one kind of machine."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("recipes/*.yaml"))}


def recipe(name: str) -> Path | None:
    """The path of a recipe by name, or None for an unknown name."""
    return recipes().get(name)
