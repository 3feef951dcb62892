"""Recipes: YAML files that `--config` takes by path or by name."""

from __future__ import annotations

from pathlib import Path

__all__ = ["recipe", "recipes"]


def recipes() -> dict[str, Path]:
    """Name -> path of every recipe that comes with the package."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def recipe(name: str) -> Path | None:
    """The path of a recipe by name, or None for an unknown name."""
    return recipes().get(name)
