"""The inputs that an output is made from: recorded in its manifest, compared with the present ones. Torch-free.

    settings   by value, without paths and without what the schema calls incidental
    parents    models, by role and the digest of their weights
    data       files, by role (the option that names them) and their digest
    code       of Python functions that a configuration names, by the digest of their module's source

A path is not a setting: the place of an input makes no difference, its content does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

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
# How the hub's cache lays out a model: the folder of one revision.
HUB_SNAPSHOT = re.compile(r"/models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]+)$")


@dataclass(frozen=True)
class Parent:
    """A model directory that a result is made from. `role` is the name of the flag: model, policy, reward, ..."""

    role: str
    path: Path


def describe_parent(parent: Parent, out: Path) -> dict[str, str]:
    """Role, path relative to the output, digest of the weights; of a model in the hub's cache also id and revision."""
    path = parent.path.resolve()
    relative = os.path.relpath(path, out.resolve())
    found = HUB_SNAPSHOT.search(path.as_posix())
    hub = {"hub": f"{found['owner']}/{found['name']}@{found['revision']}"} if found else {}
    return {"role": parent.role, "path": relative, **hub, "weights": digest_weights(path)}


def describe_data(path: Path, config: Config, out: Path) -> dict[str, str]:
    """Role, path relative to the output, digest. No role where several options lead to it, or none."""
    place = path.resolve()
    roles = [
        name for name in type(config).model_fields if any(_leads_to(given, place) for given in _paths(config, name))
    ]
    role = {"role": roles[0]} if len(roles) == 1 else {}
    return {**role, "path": os.path.relpath(place, out.resolve()), "digest": digest_input(path)}


def _paths(config: Config, name: str) -> tuple[Path, ...]:
    """The paths that an option holds."""
    value = getattr(config, name)
    return tuple(item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, Path))


def _leads_to(given: Path, place: Path) -> bool:
    return place.is_relative_to(given.resolve())


def describe_origin(
    command: str, config: Config, out: Path, parents: Sequence[Parent], data: Sequence[Path]
) -> JsonObject:
    """Everything that decides the result: what a resume and a pipeline compare."""
    return {
        "command": command,
        "config": config.recorded(),
        "parents": [describe_parent(parent, out) for parent in parents],
        "data": [describe_data(path, config, out) for path in data],
        **({"code": code} if (code := code_of(config)) else {}),
        "seed": getattr(config, "seed", None),
    }


def is_setting(schema: type[Config], name: str) -> bool:
    """Whether a field decides the result by its value. A path does not (its content is compared by digest), nor does a
    field that the schema lists as incidental, which a resume may change. Unknown names count as settings."""
    if any(name in vars(kind).get("INCIDENTAL", ()) for kind in schema.__mro__):
        return False
    field = schema.model_fields.get(name)
    return field is None or not _holds_paths(field.annotation)


def _holds_paths(annotation: Any) -> bool:  # noqa: ANN401
    return annotation is Path or any(_holds_paths(part) for part in get_args(annotation))


def settings_of(config: Config) -> JsonObject:
    """The settings that decide the result, as a manifest records them."""
    return {key: value for key, value in config.recorded().items() if is_setting(type(config), key)}


def changes(before: JsonMapping, config: Config, directory: Path) -> list[str]:
    """The names of the inputs that differ between the record of a run in `directory` and its present inputs.

    Another path than the recorded one does not count when it leads to the content that was recorded for its option;
    several, when they lead to all of it in the recorded order. A setting that the record does not have yet counts as
    the default that the schema gives it.
    """
    recorded = before["config"]
    found = [
        f"{key} ({was!r} -> {value!r})"
        for key, value in settings_of(config).items()
        if (was := recorded.get(key, _default_of(config, key))) != value
    ]
    dropped = sorted(recorded.keys() - config.recorded().keys())
    found += [f"{key} ({recorded[key]!r} -> nothing)" for key in dropped if recorded[key] not in (None, [], {})]
    found += _changed_inputs(before, config, directory)
    for name, digest in code_of(config).items():
        if before.get("code", {}).get(name, digest) != digest:
            found.append(f"the code of {name}")
    return found


def _changed_inputs(before: JsonMapping, config: Config, directory: Path) -> list[str]:
    """The options that lead to something else than was recorded for them, and other recorded inputs that are gone."""
    inputs = [*before["parents"], *before["data"]]
    others = [source["digest"] for source in before["data"] if "role" not in source]
    found = []
    for option, value in config.model_dump(mode="json").items():
        was, own, paths = before["config"].get(option), _recorded_for(option, before), _paths(config, option)
        shared = option in DATA and others and all(path.exists() for path in paths)  # a set of the hub does not
        known = paths and (own or shared)
        unchanged = (value or []) == (was or []) and not known
        if unchanged or not _holds_paths(type(config).model_fields[option].annotation):
            continue
        inputs = [entry for entry in inputs if entry not in own]
        if paths and _same_contents(option, paths, own, others):
            continue
        gone = [entry for entry in own if value == was and not _is_there(entry, directory)]
        named = f"the files of {option}" if value == was else f"{option} ({was!r} -> {value!r})"
        found += [f"the {_called(entry)}" for entry in gone] or [named]
    return found + [f"the {_called(entry)}" for entry in inputs if not _is_there(entry, directory)]


def _default_of(config: Config, key: str) -> object:
    """The default of a setting as JSON has it."""
    field = type(config).model_fields.get(key)
    default = None if field is None or field.is_required() else field.get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


def code_of(config: Config) -> dict[str, str]:
    """`module:function` -> digest of the module's source, for every function that a configuration names.

    A module that cannot be found, or has no source, is left out: whoever calls the function says what is wrong.
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
    """The file of a module, found without importing it (its packages are)."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def _recorded_for(option: str, before: JsonMapping) -> list[JsonMapping]:
    """The recorded inputs of an option, in their order."""
    # A merge calls its models inputs: the role separates them from the model that a policy was trained from.
    role = "input" if before["command"].startswith("merge ") and option == "models" else option.replace("_", "-")
    parents = [parent for parent in before["parents"] if parent["role"] in (role, option)]
    return parents + [source for source in before["data"] if source.get("role") == option]


def _digest_of(entry: JsonMapping) -> str:
    return str(entry.get("weights") or entry["digest"])


def _called(entry: JsonMapping) -> str:
    return f"weights of {entry['role']} {entry['path']}" if "weights" in entry else f"content of {entry['path']}"


def _is_there(entry: JsonMapping, directory: Path) -> bool:
    """Whether a recorded input is where it was, with the content that it had."""
    path = directory / entry["path"]
    if "weights" in entry:
        result: bool = digest_weights(path) == entry["weights"]
        return result
    found: bool = path.is_file() and digest_input(path) == entry["digest"]
    return found


def _same_contents(option: str, paths: Sequence[Path], recorded: Sequence[JsonMapping], others: Sequence[str]) -> bool:
    """Whether paths lead to all recorded contents in the recorded order, or one by one to others.

    others  digests of recorded files that may belong to any option
    """
    rest = [_digest_of(entry) for entry in recorded]
    models = any("weights" in entry for entry in recorded)
    for path in paths:
        if option in DATA:
            contents = _rows_in(path)  # all of them: a file that was added counts
            if contents is None:
                return False
            own = [content for content in contents if content not in others]
            if rest[: len(own)] != own:
                return False
            del rest[: len(own)]
            continue
        contents = _contents(path, models)
        found = any(content in others for content in contents)
        while rest and rest[0] in contents:
            contents.remove(rest.pop(0))
            found = True
        if not found:
            return False
    return not rest


def _rows_in(path: Path) -> list[str] | None:
    """Digests of the files behind a data path; None if they are missing or unfinished."""
    try:
        return [digest_input(file) for file in data_files(path)] if path.exists() else None
    except InputError:
        return None


def _contents(path: Path, models: bool) -> list[str]:
    """Digests that may stand for an input: of a model's weights; of a file, or of those in an output."""
    if models:
        return [digest_weights(path)]
    return [digest_input(file) for file in ([path] if path.is_file() else sorted(path.glob("*.json*")))]
