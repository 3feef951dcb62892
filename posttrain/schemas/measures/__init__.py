"""Schemas of the forms of `gemma2 eval`, one file each. Torch-free."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .suite import SuiteConfig

# Resolved on first use: a form pays for its own schema, not for all.
_HOMES = {
    "SuiteConfig": "suite",
}

__all__ = ["SuiteConfig"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
