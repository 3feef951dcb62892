"""How two runs of a pipeline, or two outputs, differ: `gemma2 pipeline diff A B`. Reads manifests only. Torch-free.

same                     made from the same, with the same bytes
made from something else the settings, inputs, code or versions that differ
other bytes              made from the same; the files that differ, and what is recorded of the machine
only in A, only in B     no output of this name, and none with the same hash under another one
not comparable           a manifest that cannot be read, or records of different versions
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.manifest import MANIFEST, Manifest
from gemma2.posttrain.pipelines.run import FILE
from gemma2.posttrain.pipelines.state import read_state
from gemma2.posttrain.provenance.change import Change
from gemma2.posttrain.provenance.origin import record_changes
from gemma2.posttrain.provenance.output_state import is_for_people
from gemma2.posttrain.runs.commands import COMMANDS, output_hash
from gemma2.posttrain.schemas.config import load_yaml

from .recorded import FOLDERS, GIVE, RecordedOutput, outputs_in, recorded_output

__all__ = ["compare_runs"]

SAME, ELSE, OTHER_BYTES, NOT_COMPARABLE = "same", "made from something else", "other bytes", "not comparable"


@dataclass(frozen=True)
class Member:
    """One output of a run. name: of its stage. cpus: that the pipeline gives it; None for its default."""

    name: str
    output: RecordedOutput
    cpus: object = None

    @property
    def hash(self) -> str:
        """Of what it was made from; equal ones mean equal work, for records of one version."""
        version = self.output.manifest.get("schema_version")
        return "" if self.output.problem else f"{version} {output_hash(self.output.manifest)}"


def compare_runs(a: Path, b: Path) -> JsonObject:
    """Return how two folders of pipelines, or two outputs, differ, stage by stage, as a JSON document.

    Raises InputError for a folder without an output.
    """
    first, second = _members(a), _members(b)
    pairs: list[tuple[Member | None, Member | None]]
    if first.keys() == second.keys() == {"."}:  # two outputs, whatever they are called
        pairs = [(first["."], second["."])]
    else:
        pairs = [(one, second.get(name)) for name, one in first.items()]
        left = {name: one for name, one in second.items() if name not in first}
        for i, (one, other) in enumerate(pairs):
            wanted = one.hash if one is not None and other is None else ""
            found = next((name for name, two in left.items() if wanted and two.hash == wanted), None)
            if found is not None:
                pairs[i] = one, left.pop(found)
        pairs += [(None, other) for other in left.values()]
    return {"runs": [str(a), str(b)], "stages": [_compared(one, other, (str(a), str(b))) for one, other in pairs]}


def _members(folder: Path) -> dict[str, Member]:
    """Return the outputs of a run by name: its stages in their order, without outputs inside others."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a directory", GIVE)
    found: dict[str, Member] = {}
    kept: list[Path] = []
    for place in outputs_in(folder):
        output = recorded_output(place)
        if output.command not in FOLDERS and not any(place.is_relative_to(one) for one in kept):
            kept.append(place)
            name = place.relative_to(folder).as_posix()
            found[name] = Member(name, output, _cpus(folder, name))
    if not found:
        raise InputError(f"{folder} holds no output with a {MANIFEST}", GIVE)
    try:
        order = [*(read_state(folder) or {}).get("stages", {})]
    except InputError:
        order = []
    names = [*(name for name in order if name in found), *(name for name in found if name not in order)]
    return {name: found[name] for name in names}


def _cpus(folder: Path, name: str) -> object:
    """The threads that the file of a pipeline gives a stage: on a CPU the last bits depend on them."""
    if not (folder / FILE).is_file():
        return None
    document = load_yaml(folder / FILE)
    stages = document.get("stages")
    parts = name.split("/")
    names = ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]  # a copy of a matrix, a stage of WARP
    described = [stages.get(one) for one in names] if isinstance(stages, Mapping) else []
    for place in (*described, document):
        resources = place.get("resources") if isinstance(place, Mapping) else None
        if isinstance(resources, Mapping) and resources.get("cpus") is not None:
            return resources["cpus"]
    return None


def _compared(one: Member | None, other: Member | None, runs: tuple[str, str]) -> JsonObject:
    """Return the comparison of two outputs, of which one may be missing."""
    known = one or other
    assert known is not None
    row: JsonObject = {"stage": known.name, "command": known.output.command, "note": None}
    if one is None or other is None:
        return {**row, "state": f"only in {runs[0] if one else runs[1]}", "differences": [], "summary": []}
    records = {member.output.manifest.get("schema_version") for member in (one, other)}
    problem = one.output.problem or other.output.problem
    if not problem and len(records) > 1:
        problem = "made by versions of gemma2 that record different things"
    if problem:
        return {**row, "state": NOT_COMPARABLE, "note": problem, "differences": [], "summary": []}
    a, b = one.output.manifest, other.output.manifest
    if one.name != other.name:
        row["note"] = f"called {other.name} in {runs[1]}"
    schema = COMMANDS[one.output.command].schema if one.output.command in COMMANDS else None
    changed = record_changes(a, b, schema)
    files = [*_files(a, b)]
    machine = [*_versions(a, b), *_machine(one, other)]
    if changed or one.hash != other.hash:
        state, shown = ELSE, [*changed, *_versions(a, b)]
    elif files:
        state, shown = OTHER_BYTES, [*files, *machine]
        row["note"] = row["note"] or (None if machine else "nothing that is recorded explains it")
    else:
        state, shown = SAME, []
    figures = [] if state == SAME else [*_figures(a, b)]
    differences = [{"what": change.what, "a": change.was, "b": change.now} for change in shown]
    return {**row, "state": state, "differences": differences, "summary": figures}


def _files(a: JsonMapping, b: JsonMapping) -> Iterator[Change]:
    """Yield the files with other bytes, without those that only people read."""
    first, second = _read_by_stages(a), _read_by_stages(b)
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) != second.get(name):
            yield Change(name, first.get(name), second.get(name))


def _read_by_stages(manifest: JsonMapping) -> dict[str, JsonObject]:
    files = manifest.get("files") or {}
    return {
        name: {"size": entry.get("size"), "digest": entry.get("digest")}
        for name, entry in files.items()
        if not is_for_people(name, cast("Manifest", manifest))
    }


def _versions(a: JsonMapping, b: JsonMapping) -> Iterator[Change]:
    yield from _entries("", a.get("versions"), b.get("versions"))


def _machine(one: Member, other: Member) -> Iterator[Change]:
    """Yield what differs between the machines, as far as it is recorded."""
    a, b = one.output.manifest, other.output.manifest
    yield from _entries("hardware: ", a.get("hardware"), b.get("hardware"))
    yield from _entries("precision: ", a.get("precision"), b.get("precision"))
    if a.get("processes", 1) != b.get("processes", 1):
        yield Change("processes", a.get("processes", 1), b.get("processes", 1))
    if one.cpus != other.cpus:
        yield Change("threads (cpus of the pipeline)", one.cpus, other.cpus)


def _entries(prefix: str, a: object, b: object) -> Iterator[Change]:
    was, now = (value if isinstance(value, Mapping) else {} for value in (a, b))
    for key in dict.fromkeys([*was, *now]):
        if was.get(key) != now.get(key):
            yield Change(f"{prefix}{key}", was.get(key), now.get(key))


def _figures(a: JsonMapping, b: JsonMapping) -> Iterator[JsonObject]:
    """Yield the figures of the summaries that differ."""
    was, now = dict(_numbers("", a.get("summary"))), dict(_numbers("", b.get("summary")))
    for name in dict.fromkeys([*was, *now]):
        if was.get(name) != now.get(name):
            yield {"figure": name, "a": was.get(name), "b": now.get(name)}


def _numbers(prefix: str, value: object) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{prefix}.{key}" if prefix else str(key), item)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield prefix, value
