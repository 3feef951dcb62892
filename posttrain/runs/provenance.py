"""What an output is made from: recorded in its manifest, and compared before a resume or a skip. Torch-free.

    settings   by value, without paths and without the schema's incidental fields
    parents    models, by role and the digest of their weights
    data       files, by role (the option that names them) and their digest
    code       of Python functions that a configuration names, by the digest of their module's source

A path is not a setting: the content of an input counts, not its location.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.digests import digest_input, digest_weights
from gemma2.posttrain.data.sources import data_files
from gemma2.posttrain.schemas.config import Config

__all__ = ["DATA", "HUB_SNAPSHOT", "Parent", "changes", "code_of", "describe_origin", "is_setting"]

# Fields that name Python functions, as module:function.
FUNCTIONS = ("reward_fn", "judge_fn", "judge")
# Options that name rows: a file, or a directory of them.
DATA = ("data", "prompts", "heldout", "eval_data", "decontaminate")
# Path of a model in the hub's cache: the folder of one revision.
HUB_SNAPSHOT = re.compile(r"/models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]+)$")

# One input in a manifest: path, `weights` (a model) or `digest` (a file), most often role, sometimes hub.
InputRecord = Mapping[str, str]


@dataclass(frozen=True)
class Parent:
    """A model directory that a result is made from. `role` is the name of the flag: model, policy, reward, ..."""

    role: str
    path: Path


def describe_parent(parent: Parent, out: Path) -> dict[str, str]:
    """Role, path relative to the output, digest of the weights; for a model in the hub's cache also id and revision."""
    path = parent.path.resolve()
    relative = os.path.relpath(path, out.resolve())
    found = HUB_SNAPSHOT.search(path.as_posix())
    hub = {"hub": f"{found['owner']}/{found['name']}@{found['revision']}"} if found else {}
    return {"role": parent.role, "path": relative, **hub, "weights": digest_weights(path)}


def describe_data(path: Path, config: Config, out: Path) -> dict[str, str]:
    """Role, path relative to the output, digest. No role if several options lead to the file, or none."""
    place = path.resolve()
    roles = [
        name for name in type(config).model_fields if any(_leads_to(given, place) for given in _paths(config, name))
    ]
    role = {"role": roles[0]} if len(roles) == 1 else {}
    return {**role, "path": os.path.relpath(place, out.resolve()), "digest": digest_input(path)}


def _paths(config: Config, name: str) -> tuple[Path, ...]:
    """The paths in the value of an option."""
    value = getattr(config, name)
    return tuple(item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, Path))


def _leads_to(given: Path, place: Path) -> bool:
    return place.is_relative_to(given.resolve())


def describe_origin(
    command: str, config: Config, out: Path, parents: Sequence[Parent], data: Sequence[Path]
) -> JsonObject:
    """Everything that decides the result; a resume and a pipeline compare it."""
    return {
        "command": command,
        "config": config.recorded(),
        "parents": [describe_parent(parent, out) for parent in parents],
        "data": [describe_data(path, config, out) for path in data],
        **({"code": code} if (code := code_of(config)) else {}),
        "seed": getattr(config, "seed", None),
    }


def is_setting(schema: type[Config], name: str) -> bool:
    """Whether the value of a field decides the result.

    False for paths (their content is compared by digest) and for the schema's incidental fields, which a resume may
    change. Unknown names count as settings.
    """
    if any(name in vars(kind).get("INCIDENTAL", ()) for kind in schema.__mro__):
        return False
    field = schema.model_fields.get(name)
    return field is None or not _holds_paths(field.annotation)


def _holds_paths(annotation: object) -> bool:
    return annotation is Path or any(_holds_paths(part) for part in get_args(annotation))


def settings_of(config: Config) -> JsonObject:
    """The settings that decide the result, as a manifest records them."""
    return {key: value for key, value in config.recorded().items() if is_setting(type(config), key)}


def changes(before: JsonMapping, config: Config, directory: Path) -> list[str]:
    """Name the differences between the record of a run in `directory` and a start with `config` now.

    A path may differ from the recorded one if it leads to the content that was recorded for its option; several paths,
    if they lead to all of it in the recorded order. A setting that the record lacks counts as the schema's default.
    """
    return [
        *_changed_settings(before["config"], config),
        *_changed_inputs(before, config, directory),
        *_changed_code(before.get("code", {}), config),
    ]


# --- settings ---------------------------------------------------------------------------------------------------------


def _changed_settings(recorded: JsonMapping, config: Config) -> list[str]:
    found = [
        f"{key} ({was!r} -> {value!r})"
        for key, value in settings_of(config).items()
        if (was := recorded.get(key, _default_of(config, key))) != value
    ]
    dropped = sorted(recorded.keys() - config.recorded().keys())
    return found + [f"{key} ({recorded[key]!r} -> nothing)" for key in dropped if recorded[key] not in (None, [], {})]


def _default_of(config: Config, key: str) -> object:
    """The default of a setting as JSON has it."""
    field = type(config).model_fields.get(key)
    default = None if field is None or field.is_required() else field.get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


# --- models and data --------------------------------------------------------------------------------------------------


def _changed_inputs(before: JsonMapping, config: Config, directory: Path) -> list[str]:
    """Name the options whose content differs from the record, and recorded inputs of no option that changed."""
    found: list[str] = []
    unclaimed: list[InputRecord] = [*before["parents"], *before["data"]]
    for option in _options_to_compare(before, config):
        own = _recorded_for(option, before)
        unclaimed = [entry for entry in unclaimed if entry not in own]
        if not _leads_to_the_record(option, before, config):
            found += _describe_change(option, before, config, directory)
    return found + [f"the {_called(entry)}" for entry in unclaimed if not _is_unchanged(entry, directory)]


def _options_to_compare(before: JsonMapping, config: Config) -> Iterator[str]:
    """Yield the path options whose value differs from the recorded one, or whose content is recorded."""
    for option, field in type(config).model_fields.items():
        if not _holds_paths(field.annotation):
            continue
        same_value = (_as_json(config, option) or []) == (before["config"].get(option) or [])
        if not same_value or _content_is_recorded(option, before, config):
            yield option


def _content_is_recorded(option: str, before: JsonMapping, config: Config) -> bool:
    """Whether the record has digests to compare the paths of an option with."""
    paths = _paths(config, option)
    if not paths:
        return False
    if _recorded_for(option, before):
        return True
    # Files that were recorded without a role may belong to any data option; a hub data set is not a path on disk.
    return option in DATA and bool(_digests_without_role(before)) and all(path.exists() for path in paths)


def _leads_to_the_record(option: str, before: JsonMapping, config: Config) -> bool:
    """Whether the paths of an option lead to the content that was recorded for it."""
    paths, entries = _paths(config, option), _recorded_for(option, before)
    if not paths:
        return False
    recorded, without_role = [_digest_of(entry) for entry in entries], _digests_without_role(before)
    if option in DATA:
        return _same_rows(paths, recorded, without_role)
    contents = (_contents(path, weights=any("weights" in entry for entry in entries)) for path in paths)
    return _same_contents(contents, recorded, without_role)


def _same_rows(paths: Sequence[Path], recorded: list[str], without_role: Sequence[str]) -> bool:
    """Whether data paths lead to exactly the recorded files, in their order; an added file counts as a change.

    Files among `without_role` may belong to any option and are not compared.
    """
    found: list[str] = []
    for path in paths:
        digests = _row_digests(path)
        if digests is None:
            return False
        found += [digest for digest in digests if digest not in without_role]
        if found != recorded[: len(found)]:  # the files of the next paths need not be read
            return False
    return len(found) == len(recorded)


def _same_contents(contents: Iterable[Sequence[str]], recorded: Sequence[str], without_role: Sequence[str]) -> bool:
    """Whether every path has the next recorded contents, or one that was recorded without a role, and none is left.

    contents  per path, the digests that may stand for it
    """
    rest = list(recorded)
    for digests in contents:
        matched = _length_of_match(rest, digests)
        if matched == 0 and not any(digest in without_role for digest in digests):
            return False
        rest = rest[matched:]
    return not rest


def _length_of_match(recorded: Sequence[str], digests: Sequence[str]) -> int:
    """How many entries at the beginning of `recorded` are among `digests`, each of which counts once."""
    left = list(digests)
    for length, digest in enumerate(recorded):
        if digest not in left:
            return length
        left.remove(digest)
    return len(recorded)


def _describe_change(option: str, before: JsonMapping, config: Config, directory: Path) -> list[str]:
    """Describe a changed option by its new value; with the same value, by the recorded inputs that changed."""
    was, value = before["config"].get(option), _as_json(config, option)
    if value != was:
        return [f"{option} ({was!r} -> {value!r})"]
    changed = [entry for entry in _recorded_for(option, before) if not _is_unchanged(entry, directory)]
    return [f"the {_called(entry)}" for entry in changed] or [f"the files of {option}"]


def _as_json(config: Config, option: str) -> object:
    """The value of an option as JSON has it."""
    return config.model_dump(mode="json", include={option})[option]


def _recorded_for(option: str, before: JsonMapping) -> list[InputRecord]:
    """The recorded inputs of an option, in their order."""
    # A merge records its models with the role "input", which tells them from the models that a policy was trained from.
    role = "input" if before["command"].startswith("merge ") and option == "models" else option.replace("_", "-")
    parents = [parent for parent in before["parents"] if parent["role"] in (role, option)]
    return parents + [source for source in before["data"] if source.get("role") == option]


def _digests_without_role(before: JsonMapping) -> list[str]:
    """The digests of recorded data files that name no option: they may belong to any."""
    return [source["digest"] for source in before["data"] if "role" not in source]


def _digest_of(entry: InputRecord) -> str:
    return entry.get("weights") or entry["digest"]


def _called(entry: InputRecord) -> str:
    return f"weights of {entry['role']} {entry['path']}" if "weights" in entry else f"content of {entry['path']}"


def _is_unchanged(entry: InputRecord, directory: Path) -> bool:
    """Whether a recorded input is at its recorded path with its recorded content."""
    path = directory / entry["path"]
    if "weights" in entry:
        return digest_weights(path) == entry["weights"]
    return path.is_file() and digest_input(path) == entry["digest"]


def _row_digests(path: Path) -> list[str] | None:
    """The digests of the files behind a data path; None if no file exists, or if the output is unfinished."""
    try:
        return [digest_input(file) for file in data_files(path)] if path.exists() else None
    except InputError:
        return None


def _contents(path: Path, weights: bool) -> list[str]:
    """The digests that may stand for an input: of a model's weights; of a file; of an output's JSON files and tensors.

    The tensors are those of a teacher's cache.
    """
    if weights:
        return [digest_weights(path)]
    files = [path] if path.is_file() else [*sorted(path.glob("*.json*")), *sorted(path.glob("topk-*.safetensors"))]
    return [digest_input(file) for file in files]


# --- code -------------------------------------------------------------------------------------------------------------


def _changed_code(recorded: Mapping[str, str], config: Config) -> list[str]:
    return [f"the code of {name}" for name, digest in code_of(config).items() if recorded.get(name, digest) != digest]


def code_of(config: Config) -> dict[str, str]:
    """`module:function` -> digest of the module's source, for every function that a configuration names.

    A module that cannot be found, or has no source, is left out: the caller of the function reports it.
    """
    found = {}
    for option in FUNCTIONS:
        value = getattr(config, option, None)
        for name in value if isinstance(value, tuple) else (value,):
            module = str(name).partition(":")[0] if name and ":" in str(name) else ""
            source = _source_of(module) if module.replace(".", "").isidentifier() else None
            if source is not None:
                found[str(name)] = digest_input(source)
    return found


def _source_of(module: str) -> Path | None:
    """The file of a module, found without importing it (its packages are imported)."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None
