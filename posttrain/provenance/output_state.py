"""The state of one output: is it there, whole, and made from what a configuration names now. Torch-free.

An output is complete when its manifest is, when every file that the manifest lists has the recorded bytes, and when
nothing that decides the result differs (origin.py). Files are read again only if they were touched
(core/outputs/digest_cache.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.digests import digest_input
from gemma2.core.outputs.manifest import Manifest, read_manifest, read_state
from gemma2.core.outputs.staging import partial_path
from gemma2.core.permissions import versions_allowed
from gemma2.posttrain.schemas.config import Config

from .change import Change
from .named_inputs import EVALUATIONS
from .origin import changes, derived_changes
from .version_rule import kept_apart, noted_changes, other_versions

__all__ = ["OutputState", "broken_files", "can_go_on", "is_complete", "is_for_people", "output_state"]

# No stage reads these: without them, or with others, an output is whole. Fronts read two of them after all: the samples
# of another front, and the metrics of a policy that was evaluated on the way.
FOR_PEOPLE = ("README.md", "metrics.jsonl", "samples.jsonl", "dropped.jsonl", "skipped.jsonl")
READ_BY_FRONTS = {"samples.jsonl": "front.json", "metrics.jsonl": EVALUATIONS}  # name -> where this is as well
PICTURES = (".png", ".svg", ".csv", ".html")


@dataclass(frozen=True)
class OutputState:
    """state     complete: there is nothing to do
              interrupted: a run of it can be continued; an output of something else may still be in its place
              changed: the output was made from something else, or is damaged
              missing: there is nothing
    why       the differences
    notes     what is worth knowing and changes nothing: other versions, a lost picture
    versions  what had another version when a complete output was made; of an interrupted run, what the user may allow
    """

    state: Literal["complete", "interrupted", "changed", "missing"]
    why: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    versions: tuple[Change, ...] = ()


def output_state(command: str, config: Config, out: Path, unknown: Collection[str] = ()) -> OutputState:
    """Return the state of one output and the reasons for it.

    unknown  options whose inputs another stage has yet to make: what is complete by all others is complete here

    Raises InputError for a foreign directory in its place, or for an input that cannot be read.
    """
    try:
        manifest = read_manifest(out)
    except InputError as error:  # cut or overwritten: nothing says what the output is, so it is made again
        return _not_complete(command, config, out, unknown, [Change(error.what)])
    if manifest is None:
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"{out} holds something else than an output of gemma2", "move it, or choose another --out")
        return _not_complete(command, config, out, unknown, [])
    if manifest.get("status") != "complete":
        return _not_complete(command, config, out, unknown, [Change("unfinished", manifest.get("status"), "complete")])
    recorded: JsonMapping = {**manifest}
    why = [*changes(recorded, command, config, unknown), *broken_files(manifest, out)]
    if not why and not unknown:
        why = derived_changes(recorded, config, out)
    if why:
        return _not_complete(command, config, out, unknown, why)
    others = tuple(other_versions(command, recorded))
    notes = [f"made with other versions: {', '.join(map(str, others))}"] if others else []
    return OutputState("complete", (), (*notes, *_lost_for_people(manifest, out)), others)


def _not_complete(command: str, config: Config, out: Path, unknown: Collection[str], why: list[Change]) -> OutputState:
    """The state of an output that has to be made: continued, again, or for the first time."""
    before = _interrupted(partial_path(out))
    if before is None:
        return OutputState("changed" if out.exists() and why else "missing", (*why,))
    against, allowed = kept_apart(command, config, before, unknown)
    if not against:
        if is_complete(partial_path(out)):  # only its move is missing
            return OutputState("interrupted", (*why,))
        others = [*allowed, *noted_changes(command, before)]
        named = f"begun with other versions: {', '.join(map(str, others))}"
        return OutputState("interrupted", (*why,), (named,) if others else (), (*allowed,))
    notes = (f"an interrupted run is started again: {', '.join(map(str, against))}",)
    return OutputState("changed" if out.exists() and why else "missing", (*why,), notes)


def can_go_on(command: str, config: Config, out: Path) -> bool:
    """Whether an interrupted run of this configuration is there and can be continued."""
    before = _interrupted(partial_path(out))
    if before is None:
        return False
    against, allowed = kept_apart(command, config, before)
    return not against and (versions_allowed() or not allowed or is_complete(partial_path(out)))


def _interrupted(partial: Path) -> JsonObject | None:
    """Return the record of an interrupted run; None without one that a resume can use."""
    try:
        return read_state(partial)
    except InputError:
        return None


def is_complete(out: Path) -> bool:
    """Whether an output exists, whatever it was made from."""
    try:
        return (read_manifest(out) or {}).get("status") == "complete"
    except InputError:
        return False


# --- files ------------------------------------------------------------------------------------------------------------


def broken_files(manifest: Manifest, out: Path) -> Iterator[Change]:
    """Yield the files of a finished output that are gone or do not have the bytes that were written."""
    for name, entry in manifest.get("files", {}).items():
        if is_for_people(name, manifest):
            continue
        path, recorded = out / name, {"size": entry.get("size"), "digest": entry.get("digest")}
        try:
            size = path.stat().st_size
            if size == entry.get("size") and "digest" not in entry:  # a merge without --verify: nothing has read it
                continue
            found = {"size": size, "digest": digest_input(path)}
        except OSError:
            yield Change(f"its {name} is gone", recorded)
            continue
        if found != recorded:
            yield Change(f"its {name} is not what was written", recorded, found)


def is_for_people(name: str, manifest: Manifest) -> bool:
    """Whether a file of an output is read by people only."""
    if READ_BY_FRONTS.get(name) in manifest.get("files", {}):
        return False
    return name in FOR_PEOPLE or name.endswith(PICTURES)


def _lost_for_people(manifest: Manifest, out: Path) -> Iterator[str]:
    lost = [name for name in manifest.get("files", {}) if is_for_people(name, manifest) and not (out / name).is_file()]
    if lost:
        yield f"without its {', '.join(lost)}, which no stage reads"
