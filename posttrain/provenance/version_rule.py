"""Which versions decide a result, and what follows from another one: one rule for plan, status, run and resume.

    decide     the packages that compute (torch, transformers, numpy ...), and the number of gemma2's own arithmetic
    are noted  gemma2 itself, and the packages that only read, write or render (`NOTED`)

A finished output is kept. Plan, status and run name what it was made with.
An interrupted run goes on where only noted versions differ, and says so. Where one differs that decides, or the code of
a function that the user has changed, it would not end with the same bytes: it is kept, and refused by name, until the
user says `--allow-versions` or starts over. Either way its record says with what its parts were made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.manifest import now, versions
from gemma2.core.permissions import versions_allowed
from gemma2.posttrain.schemas.config import Config

from .change import Change
from .origin import changes, code_changes

__all__ = [
    "arithmetic_of",
    "continued",
    "deciding_changes",
    "goes_on_with",
    "kept_apart",
    "made_with",
    "noted_changes",
    "other_versions",
    "way_on",
]

# Command -> the number of its arithmetic, 1 where none is named. It is raised by whoever changes this package so that
# the command's result has other bytes; the version of the package itself decides nothing.
ARITHMETIC: Mapping[str, int] = {}
NOTED = ("gemma2", "safetensors", "jinja2", "datasets")
# Commands that load no network are decided by these alone; the others by every package that a manifest records.
WITHOUT_NETWORK = ("gemma2", "safetensors", "tokenizers", "jinja2", "numpy", "numba", "datasets")
LIGHT = ("filter", "merge", "pick")


def arithmetic_of(command: str) -> int:
    """Return the number of this package's arithmetic in a command: with another one its result has other bytes."""
    return ARITHMETIC.get(command, 1)


def made_with(command: str) -> JsonObject:
    """Return what a record says about versions: those of now."""
    return {"versions": versions(), "arithmetic": arithmetic_of(command)}


def deciding_changes(command: str, record: JsonMapping) -> list[Change]:
    """Return what decides the bytes of a result and was another one when an output or an interrupted run was made."""
    was, here = record.get("arithmetic", 1), arithmetic_of(command)
    own = [Change("the arithmetic of gemma2", was, here, by_value=True)] if was != here else []
    return own + [change for change in _package_changes(command, record) if change.what not in NOTED]


def noted_changes(command: str, record: JsonMapping) -> list[Change]:
    """Return the packages that decide nothing and had another version when an output or run was made."""
    return [change for change in _package_changes(command, record) if change.what in NOTED]


def other_versions(command: str, record: JsonMapping) -> Sequence[Change]:
    """Return everything that had another version, what decides first."""
    return [*deciding_changes(command, record), *noted_changes(command, record)]


def way_on(start_over: str) -> str:
    """Return what to do about an interrupted run that other versions began. start_over: the flag that begins again."""
    return f"restore those, continue all the same with --allow-versions, or start over with {start_over}"


def kept_apart(
    command: str, config: Config, record: JsonMapping, unknown: Collection[str] = ()
) -> tuple[list[Change], list[Change]]:
    """Return what stands against going on with a run: what is another run, and what the user may allow."""
    code = code_changes(record, config)
    others = [change for change in changes(record, command, config, unknown) if change not in code]
    return others, [*code, *deciding_changes(command, record)]


def goes_on_with(command: str, config: Config, record: JsonMapping) -> str:
    """Return a line about the other versions with which a run goes on; empty if nothing changed, or it may not."""
    others, allowed = kept_apart(command, config, record)
    if others or (allowed and not versions_allowed()):
        return ""
    found = [*allowed, *noted_changes(command, record)]
    return f"the run goes on with other versions: {', '.join(map(str, found))}" if found else ""


def continued(command: str, config: Config, record: JsonMapping) -> JsonObject:
    """Return what the record of a run says about versions once it goes on: those of now, and of its parts before."""
    before: list[JsonObject] = list(record.get("continued") or [])
    changed = [*code_changes(record, config), *other_versions(command, record)]
    if changed:
        before.append({"at": now(), "changed": {change.what: [change.was, change.now] for change in changed}})
    return {**made_with(command), **({"continued": before} if before else {})}


def _package_changes(command: str, record: JsonMapping) -> list[Change]:
    """A package that the record does not name was not installed then: it decided nothing."""
    light, here = command.partition(" ")[0] in LIGHT, versions()
    return [
        Change(name, version, here.get(name, "not installed"), by_value=True)
        for name, version in (record.get("versions") or {}).items()
        if (not light or name in WITHOUT_NETWORK) and here.get(name) != version
    ]
