"""Everything that decides a result, as a record, and the differences between a record and what would be made now.

    settings   by value, without paths and without the schema's incidental fields
    parents    models, by the option that names them: tensors and all files that decide (core/outputs/model_identity)
    data       files, by the option that names them: their bytes
    code       of the user's functions: source of their module and of what it imports (code.py)

A path is not a setting: the content of an input counts, not its location. Option by option the record and the present
must have the same contents in the same order. Both come from one function of the configuration, `origin_of`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject, parse_json
from gemma2.core.outputs.digests import digest_input
from gemma2.core.outputs.hashing import digest_name, hasher
from gemma2.core.outputs.manifest import SCHEMA_VERSION, DataRecord
from gemma2.core.outputs.model_identity import identity_of, parent_record
from gemma2.posttrain.schemas import MergeConfig
from gemma2.posttrain.schemas.config import Config

from .change import Change
from .code import code_of
from .named_inputs import Named, named_inputs, names_a_path, paths_of

__all__ = [
    "changes",
    "code_changes",
    "data_records",
    "derived_changes",
    "hash_of",
    "is_setting",
    "origin_of",
    "record_changes",
    "settings_of",
]

# Name of a part -> its digest, or the settings in it as JSON; of a data file one part without a name.
Content = Mapping[str, str]
GONE = object()


def origin_of(command: str, config: Config, out: Path, threads: int = 1) -> JsonObject:
    """Return the record of what `config` makes in `out`: it goes into the manifest. Raises InputError."""
    models = [named for named in named_inputs(config) if named.is_model]
    parents = [parent_record(named.role, named.path, identity_of(named.path, threads), out) for named in models]
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "config": config.recorded(),
        "parents": parents,
        "data": data_records(config, out, threads),
        **({"code": code} if (code := code_of(config)) else {}),
        "seed": getattr(config, "seed", None),
    }


def data_records(config: Config, out: Path, threads: int = 1) -> list[DataRecord]:
    """Return the records of the files that a configuration names, for the manifest of `out`."""
    return [_data_record(named, out, threads) for named in named_inputs(config) if not named.is_model]


def _data_record(named: Named, out: Path, threads: int) -> DataRecord:
    path = os.path.relpath(named.path.resolve(), out.resolve())
    return {"role": named.role, "path": path, "digest": digest_input(named.path, threads)}


# --- settings ---------------------------------------------------------------------------------------------------------


def is_setting(schema: type[Config], name: str) -> bool:
    """Whether the value of a field decides the result.

    False for paths (their content is compared by digest) and for the schema's incidental fields, which a resume may
    change. Unknown names count as settings.
    """
    if any(name in vars(kind).get("INCIDENTAL", ()) for kind in schema.__mro__):
        return False
    field = schema.model_fields.get(name)
    return field is None or not names_a_path(field.annotation)


def settings_of(config: Config) -> JsonObject:
    """Return the settings that decide the result, as a manifest records them.

    A path that leads to no input (a teacher on a server) counts by its text; a text that is the path of an input (a
    judge) does not.
    """
    schema = type(config)
    named = {option for option in schema.model_fields if paths_of(config, option)}
    return _settings_in(config.recorded(), schema, named)


def _settings_in(recorded: JsonMapping, schema: type[Config], named: Collection[str]) -> JsonObject:
    """Return the values that decide, by themselves, the result. named: the options that lead to inputs."""

    def decides(key: str, value: object) -> bool:
        return key not in named and (is_setting(schema, key) or (_holds_paths(schema, key) and _is_given(value)))

    return {key: value for key, value in recorded.items() if decides(key, value)}


def _holds_paths(schema: type[Config], key: str) -> bool:
    return key in schema.model_fields and names_a_path(schema.model_fields[key].annotation)


def _is_given(value: object) -> bool:
    return value not in (None, [], {})


def _default_of(schema: type[Config], key: str) -> object:
    """The default of a setting as JSON has it."""
    field = schema.model_fields.get(key)
    default = None if field is None or field.is_required() else field.get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


# --- comparison -------------------------------------------------------------------------------------------------------


def changes(recorded: JsonMapping, command: str, config: Config, unknown: Collection[str] = ()) -> list[Change]:
    """Return what differs between the record of an output and what `config` makes now.

    unknown  options that are not known yet, since another stage makes what they name: they are not compared

    A setting that the record lacks counts as the schema's default.
    Raises InputError for an input that is not there.
    """
    if recorded.get("command") != command:
        return [Change("command", recorded.get("command"), command, by_value=True)]
    if recorded.get("schema_version") != SCHEMA_VERSION:
        what = "schema of its record, which lacks configurations and templates of its inputs"
        return [Change(what, recorded.get("schema_version"), SCHEMA_VERSION, by_value=True)]
    if isinstance(config, MergeConfig) and {"models", "base"} & {*unknown}:
        unknown = {*unknown, "models", "base"}  # the base of a merge may follow from its models
    return [
        *_changed_settings(recorded, config, unknown),
        *_changed_inputs(recorded, config, unknown),
        *code_changes(recorded, config),
    ]


def code_changes(recorded: JsonMapping, config: Config) -> list[Change]:
    """Return the modules of the user's functions that are not those of a record."""
    return _changed_code(recorded.get("code") or {}, code_of(config))


def _changed_settings(recorded: JsonMapping, config: Config, unknown: Collection[str]) -> list[Change]:
    schema, now, was = type(config), settings_of(config), recorded.get("config") or {}
    found = [
        Change(key, was.get(key, _default_of(schema, key)), value, by_value=True)
        for key, value in now.items()
        if key not in unknown and was.get(key, _default_of(schema, key)) != value
    ]
    gone = sorted(was.keys() - config.recorded().keys())
    return found + [Change(key, was[key], None, by_value=True) for key in gone if _is_given(was[key])]


def _changed_inputs(recorded: JsonMapping, config: Config, unknown: Collection[str]) -> list[Change]:
    # In the order of a record: of an option with models and files first the models.
    known = sorted(named_inputs(config, unknown), key=lambda named: not named.is_model)
    was = {key: held for key, held in _recorded_inputs(recorded).items() if key in type(config).model_fields}
    found: list[Change] = []
    for option in dict.fromkeys([*was, *(named.option for named in known)]):
        if option not in unknown:
            now = [(named.role, named.path, _content_of(named)) for named in known if named.option == option]
            found += _compared(option, was.get(option, []), now)
    return found


def derived_changes(recorded: JsonMapping, config: Config, out: Path) -> list[Change]:
    """Return what differs in the inputs that no option names: a front names the models that `pick` reads.

    They are compared where they were; one that is not there any more is not needed any more.
    """
    found: list[Change] = []
    for option, held in _recorded_inputs(recorded).items():
        if option in type(config).model_fields:
            continue
        for role, recorded_path, content in held:
            path = Path(os.path.normpath(out.resolve() / recorded_path))
            if path.exists():
                named = Named(option, role, path, path.is_dir())
                found += _compared(option, [(role, recorded_path, content)], [(role, path, _content_of(named))])
    return found


def record_changes(was: JsonMapping, now: JsonMapping, schema: type[Config] | None) -> list[Change]:
    """Return what differs between the records of two outputs: command, settings, inputs and code."""
    for key in ("command", "schema_version"):
        if was.get(key) != now.get(key):
            return [Change(key.replace("_", " "), was.get(key), now.get(key), by_value=True)]
    inputs = _recorded_inputs(was), _recorded_inputs(now)
    configs = [record.get("config") or {} for record in (was, now)]
    if schema is not None:
        configs = [_settings_in(config, schema, held) for config, held in zip(configs, inputs, strict=True)]
    default = {key: None if schema is None else _default_of(schema, key) for config in configs for key in config}
    before, after = ({**default, **config} for config in configs)
    found = [Change(key, before[key], after[key], by_value=True) for key in default if before[key] != after[key]]
    for option in dict.fromkeys([*inputs[0], *inputs[1]]):
        found += _compared(option, inputs[0].get(option, []), inputs[1].get(option, []))
    return found + _changed_code(was.get("code") or {}, now.get("code") or {})


def _content_of(named: Named) -> Content:
    try:
        if not named.is_model:
            return {"": digest_input(named.path)}
        found = identity_of(named.path)
    except OSError as error:
        raise InputError(
            f"{named.role} {named.path} cannot be read ({error.strerror})", "restore it, or name another"
        ) from error
    return {"weights": found.weights, **found.files}


def _recorded_inputs(recorded: JsonMapping) -> dict[str, list[tuple[str, str, Content]]]:
    """Return option -> (role, path, content) of a record's inputs."""
    found: dict[str, list[tuple[str, str, Content]]] = {}
    for parent in recorded.get("parents") or ():
        content = {"weights": parent.get("weights", ""), **(parent.get("files") or {})}
        option = _option_of(parent["role"], str(recorded.get("command")))
        found.setdefault(option, []).append((parent["role"], parent["path"], content))
    for source in recorded.get("data") or ():
        content = {"": source.get("digest", "")}
        found.setdefault(str(source.get("role")), []).append((str(source.get("role")), source["path"], content))
    return found


def _option_of(role: str, command: str) -> str:
    """The option of a role. The models of a merge have roles that tell them from what a policy was trained from."""
    models = "model" if command == "merge extract-lora" else "models"
    return models if role in ("input", "adapter-base") else role.replace("-", "_")


def _compared(
    option: str, was: Sequence[tuple[str, str, Content]], now: Sequence[tuple[str, Path | str, Content]]
) -> list[Change]:
    """Return the differences of one option: by part where as many inputs are named, else as a whole."""
    if [(role, content) for role, _, content in was] == [(role, content) for role, _, content in now]:
        return []
    before, after = [_text(content) for _, _, content in was], [_text(content) for _, _, content in now]
    paths = [path for _, path, _ in was], [str(path) for _, path, _ in now]
    if sorted(before) == sorted(after):
        return [Change(f"the order of {option}", *paths)]
    if len(was) != len(now):
        gone = [path for path, content in zip(paths[0], before, strict=True) if content not in after]
        added = [path for path, content in zip(paths[1], after, strict=True) if content not in before]
        parts = [*(f"added {path}" for path in added), *(f"without {path}" for path in gone)]
        return [Change(f"{option} ({', '.join(parts) or f'{len(was)} -> {len(now)}'})", *paths)]
    found = []
    for (_, _, then), (role, path, here) in zip(was, now, strict=True):
        for part in sorted(then.keys() | here.keys()):
            if then.get(part) != here.get(part):
                place = f"{role} {path}" if part else f"the content of {path}"
                called = f"the weights of {place}" if part == "weights" else f"{part} of {place}" if part else place
                found += _in_file(called, then.get(part), here.get(part))
    return found


def _in_file(called: str, was: str | None, now: str | None) -> list[Change]:
    """Return the difference of one file: key by key where its settings are recorded by their values."""
    before, after = _values(was), _values(now)
    if before is None or after is None:
        return [Change(called, was, now)]
    keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key, GONE) != after.get(key, GONE)]
    return [Change(f"{key} in {called}", before.get(key), after.get(key), by_value=True) for key in keys]


def _values(recorded: str | None) -> JsonObject | None:
    """The settings that a record holds by their values; None for a digest, or for nothing."""
    try:
        found = parse_json(recorded or "")
    except (ValueError, TypeError):  # also of a record that was edited
        return None
    return found if isinstance(found, dict) else None


def _text(content: Content) -> str:
    return json.dumps(content, sort_keys=True)


def _changed_code(was: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[Change]:
    """Return the modules whose source differs; a function that is no longer named is a changed setting."""
    found: dict[str, Change] = {}
    for name, modules in now.items():
        before = was.get(name)
        if before is None:
            continue
        for module in sorted(before.keys() | modules.keys()):
            if before.get(module) != modules.get(module):
                found[module] = Change(f"the code of {module}", before.get(module), modules.get(module))
    return list(found.values())


# --- hash -------------------------------------------------------------------------------------------------------------


def hash_of(record: JsonMapping, schema: type[Config] | None) -> str:
    """Return `"blake3:<hex>"` of what a record says that decides the result: equal hashes mean equal work.

    BLAKE3 of {command, settings without paths, (role, contents) of every parent, digest of every data file, code}.
    Versions are not part of it (version_rule.py).
    """
    inputs = _recorded_inputs(record)
    settings = record.get("config") or {}
    settings = settings if schema is None else _settings_in(settings, schema, inputs)
    content = {
        "command": record.get("command"),
        # Without empty values: the record of a merge has keys that its options lack.
        "config": {key: value for key, value in settings.items() if _is_given(value)},
        "inputs": {
            option: [[role, content] for role, _, content in entries] for option, entries in sorted(inputs.items())
        },
        "code": record.get("code") or {},
    }
    digest = hasher()
    digest.update(json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode())
    return digest_name(digest)
