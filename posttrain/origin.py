"""What an output is made from: recorded in its manifest, compared with what it would be made from. Torch-free.

    settings   by value, without paths and without what the schema calls incidental
    parents    models, by role and the digest of their weights
    data       files, by their digest
    code       of Python functions that a configuration names, by the digest of their module's source

A path is no setting: where an input lies makes no difference, what it holds does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from gemma2.merging.outputs import digest_input, digest_weights

from .config import Config

__all__ = ["HUB_SNAPSHOT", "Parent", "changes", "code_of", "describe_origin", "is_setting"]

# Fields that name Python functions, as module:function.
FUNCTIONS = ("reward_fn", "judge_fn", "judge")
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


def describe_origin(
    command: str, config: Config, out: Path, parents: Sequence[Parent], data: Sequence[Path]
) -> dict[str, Any]:
    """Everything that decides the result: what a resume and a pipeline compare."""
    return {
        "command": command,
        "config": config.recorded(),
        "parents": [describe_parent(parent, out) for parent in parents],
        "data": [
            {"path": os.path.relpath(path.resolve(), out.resolve()), "digest": digest_input(path)} for path in data
        ],
        **({"code": code} if (code := code_of(config)) else {}),
        "seed": getattr(config, "seed", None),
    }


def is_setting(schema: type[Config], name: str) -> bool:
    """Whether a field decides the result by its value: it is no path (what that leads to is compared by digest), nor
    what the schema says is incidental, so that a resume may change it. A name that is no field is one."""
    if any(name in vars(kind).get("INCIDENTAL", ()) for kind in schema.__mro__):
        return False
    field = schema.model_fields.get(name)
    return field is None or not _holds_paths(field.annotation)


def _holds_paths(annotation: Any) -> bool:
    return annotation is Path or any(_holds_paths(part) for part in get_args(annotation))


def settings_of(config: Config) -> dict[str, Any]:
    """What decides the result, as a manifest records it."""
    return {key: value for key, value in config.recorded().items() if is_setting(type(config), key)}


def changes(before: Mapping[str, Any], config: Config, directory: Path) -> list[str]:
    """What differs between the record of a run in `directory` and what it would start from: names, or nothing.

    A path that is not the recorded one is no difference when it leads to the content of a recorded input. A setting
    that the record does not have yet counts as the default that the schema gives it.
    """
    recorded = before["config"]
    found = [
        f"{key} ({was!r} -> {value!r})"
        for key, value in settings_of(config).items()
        if (was := recorded.get(key, _default_of(config, key))) != value
    ]
    dropped = sorted(recorded.keys() - config.recorded().keys())
    found += [f"{key} ({recorded[key]!r} -> nothing)" for key in dropped if recorded[key] not in (None, [], {})]
    for parent in before["parents"]:
        if digest_weights(directory / parent["path"]) != parent["weights"]:
            found.append(f"the weights of {parent['role']} {parent['path']}")
    for source in before["data"]:
        path = directory / source["path"]
        if not path.is_file() or digest_input(path) != source["digest"]:
            found.append(f"the content of {source['path']}")
    for name, digest in code_of(config).items():
        if before.get("code", {}).get(name, digest) != digest:
            found.append(f"the code of {name}")
    known = [parent["weights"] for parent in before["parents"]] + [source["digest"] for source in before["data"]]
    for key, value in config.model_dump(mode="json").items():
        was = recorded.get(key)
        if not _holds_paths(type(config).model_fields[key].annotation) or value == was or not (value or was):
            continue
        paths = [Path(item) for item in (value if isinstance(value, list) else [value] if value else [])]
        if not paths or not _in_order(paths, known):
            found.append(f"{key} ({was!r} -> {value!r})")
    return found


def _default_of(config: Config, key: str) -> Any:
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


def _in_order(paths: Sequence[Path], known: Sequence[str]) -> bool:
    """Whether every path leads to a recorded content, and several to theirs in the recorded order."""
    places = [min((known.index(c) for c in _contents(path) if c in known), default=-1) for path in paths]
    return -1 not in places and places == sorted(places)


def _contents(path: Path) -> Iterator[str]:
    """Digests that may stand for an input: of a file, of a directory's weights, of the rows in it."""
    if path.is_dir():
        yield digest_weights(path)
    yield from (digest_input(file) for file in ([path] if path.is_file() else sorted(path.glob("*.json*"))))
