"""Which versions decide a result, and what follows from another one: one rule for plan, status, run and resume.

A finished output is kept. Plan, status and run name what it was made with.
An interrupted run is not continued: with another version it would not end with the same bytes. `--resume` refuses
it by name; a pipeline starts it again, and says so beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gemma2.core.outputs.manifest import versions

from .change import Change

__all__ = ["deciding_versions", "other_versions"]

# Commands that load no network decide by these alone; the others by every package that a manifest records.
WITHOUT_NETWORK = ("gemma2", "safetensors", "tokenizers", "jinja2", "numpy", "numba", "datasets")
LIGHT = ("filter", "merge", "pick")


def deciding_versions(command: str, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return package -> version, of those that decide the bytes of a command's result; by default as installed."""
    found = versions() if recorded is None else recorded
    light = command.partition(" ")[0] in LIGHT
    return {name: version for name, version in found.items() if not light or name in WITHOUT_NETWORK}


def other_versions(command: str, recorded: Mapping[str, str]) -> Sequence[Change]:
    """Return the packages that had another version when an output or an interrupted run was made.

    A package that the record does not name was not installed then: it decided nothing.
    """
    here = deciding_versions(command)
    return [
        Change(name, version, here.get(name, "not installed"), by_value=True)
        for name, version in deciding_versions(command, recorded).items()
        if here.get(name) != version
    ]
