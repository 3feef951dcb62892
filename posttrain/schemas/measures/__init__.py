"""Schemas of the forms of `gemma2 eval`, one file each. Torch-free."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .built_in import ChoicesConfig, PerplexityConfig, QaConfig, WinRateConfig
    from .suite import SuiteConfig

# Resolved on first use: a form pays for its own schema, not for all.
_HOMES = {
    "ChoicesConfig": "built_in",
    "PerplexityConfig": "built_in",
    "QaConfig": "built_in",
    "SuiteConfig": "suite",
    "WinRateConfig": "built_in",
}

__all__ = ["ChoicesConfig", "PerplexityConfig", "QaConfig", "SuiteConfig", "WinRateConfig"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
