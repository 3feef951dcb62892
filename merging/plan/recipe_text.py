"""The recipe of an output, merge.yaml: a merge file that repeats it, with the identity of every input.

Paths are relative to the output, models in the hub's cache are `owner/name@revision`. A model whose identity is not the
recorded one any more is refused by name: `gemma2 merge --config OUT/merge.yaml` gives the same bytes or an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.digests import digest_input
from gemma2.core.outputs.hub import SNAPSHOT
from gemma2.core.outputs.manifest import ParentRecord
from gemma2.core.outputs.model_identity import as_digests
from gemma2.core.outputs.safetensors_header import printable
from gemma2.core.yaml_files import to_yaml
from gemma2.merging.inputs.checkpoint import Checkpoint
from gemma2.merging.methods.option import OPTIONS
from gemma2.merging.methods.parameters import Rule, Schedule
from gemma2.merging.methods.request import FILES, MergeRequest, Slice, file_named

from .merge_plan import MergePlan

__all__ = ["RECIPE", "check_files", "check_inputs", "recipe_text"]

RECIPE = "merge.yaml"
HEAD = "# gemma2 merge: repeats the merge that made this model: gemma2 merge --config {name} --out OUT\n"
# What an option that names a file, or gives a text, made of it in the output.
COPIES = {
    "chat_template": "chat_template.jinja",
    "generation_config": "generation_config.json",
    "special_tokens": "tokenizer_config.json",
}


def recipe_text(plan: MergePlan, number: int, parents: Sequence[ParentRecord], directory: Path) -> str:
    """Return the recipe of one output, whose files are in `directory`. `parents` are the records of its manifest."""
    request, out = plan.request, plan.outputs[number]
    models = [_named(name, model, out) for name, model in zip(request.models, plan.models, strict=True)]
    base = _named(request.base, plan.base, out) if request.base and plan.base else None
    values: JsonObject = {"method": request.method, "models": models}
    values |= {"base": base} if base else {}
    values |= {option.name: _option(plan, option.attribute, number) for option in OPTIONS.values()
               if option.attribute in request.values}  # fmt: skip
    values |= {"granularity": request.granularity, "dtype": request.dtype, "allow_config": list(request.allow_config)}
    if request.slices:
        values["slices"] = [_slice(part, base) for part in request.slices]
    if plan.vocabulary:
        owner = plan.vocabulary.owner.role
        union = request.tokenizer == "union"
        values["tokenizer"] = "union" if union else "base" if owner == "base" else models[int(owner.split()[1]) - 1]
    if request.vocabulary is not None:
        values["vocabulary"] = _vocabulary(plan, out)
    copies = _copies(request)
    values |= {option: copies.get(option, getattr(request, option)) for option in FILES}
    given = {key: value for key, value in values.items() if value not in (None, [])}
    inputs: list[JsonObject] = [{**parent, "files": as_digests(parent.get("files", {}))} for parent in parents]
    for option, name in copies.items():
        inputs.append({"role": option, "path": name, "digest": digest_input(directory / name)})
    return HEAD.format(name=RECIPE) + to_yaml({**given, "inputs": inputs})


def _copies(request: MergeRequest) -> dict[str, str]:
    """Return the file of the output that the recipe names in place of a file or text of the request."""
    given = {option: choice for option in FILES if (choice := getattr(request, option)) is not None}
    return {option: COPIES[option] for option, choice in given.items() if "{" in choice or file_named(choice)}


def check_files(recorded: Sequence[JsonMapping], files: Sequence[tuple[str, Path]]) -> None:
    """Require that the files of a merge, by option, are those that its recipe records. Raises InputError."""
    known = {record.get("role"): record["digest"] for record in recorded if "digest" in record}
    for option, path in files:
        if known.get(option, digest := digest_input(path)) != digest:
            raise InputError(
                f"{option} {path} is not the file that the recipe records: its digest is {digest}, not {known[option]}",
                "restore it, or take 'inputs' out of the recipe to merge with what is there now",
            )


def check_inputs(recorded: Sequence[JsonMapping], found: Sequence[tuple[str, Path, str, Mapping[str, str]]]) -> None:
    """Require that the inputs of a merge are those that its recipe records.

    found  role, directory, digest of the weights, and digests of the files of each input
    Raises InputError naming the first one that is not.
    """
    recorded = [record for record in recorded if "digest" not in record]
    fix = "restore it, or take 'inputs' out of the recipe to merge what is there now"
    if [record.get("role") for record in recorded] != [role for role, *_ in found]:
        raise InputError(f"the recipe records {len(recorded)} inputs, this merge has {len(found)} in other roles", fix)
    for record, (role, path, weights, files) in zip(recorded, found, strict=True):
        named = f"{role} {path} is not the model that the recipe records"
        if record.get("weights") != weights:
            raise InputError(f"{named}: its weights have the digest {weights}, not {record.get('weights')}", fix)
        known = record.get("files")
        before, now = known if isinstance(known, Mapping) else {}, as_digests(files)
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if changed:
            raise InputError(f"{named}: its {printable(changed[0])} differs", fix)


def _named(name: Path, model: Checkpoint, out: Path) -> str:
    """Return an input as a merge file in `out` names it."""
    whole, plus, adapter = str(name).rpartition("+")
    if plus and whole and adapter and not name.exists():
        return f"{_place(whole, model.origin, out)}+{_place(adapter, model.path, out)}"
    return _place(str(name), model.path, out)


def _place(name: str, path: Path, out: Path) -> str:
    hub = SNAPSHOT.search(path.resolve().as_posix())
    if hub and not Path(name).is_dir():
        return f"{hub['owner']}/{hub['name']}@{hub['revision']}"
    return os.path.relpath(path.resolve(), out.resolve())


def _option(plan: MergePlan, attribute: str, number: int) -> object:
    value = plan.request.values[attribute]
    if attribute == "etas" and isinstance(value, tuple):
        value = value[number : number + 1]
    return _plain(value)


def _plain(value: object) -> Any:  # noqa: ANN401
    """Return a value in the form of a merge file."""
    if isinstance(value, Schedule):
        rules: list[Any] = [_rule(rule) for rule in value.rules]
        if value.default is not None:
            rules.append(value.default)
        alone = rules[0] if len(rules) == 1 else None
        return alone if isinstance(alone, dict) and alone.keys() == {"layers"} else rules
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _rule(rule: Rule) -> JsonObject:
    points = {"value": rule.points[0]} if len(rule.points) == 1 else {"layers": list(rule.points)}
    return ({"match": rule.pattern} if rule.pattern is not None else {}) | points


def _slice(part: Slice, base: str | None) -> JsonObject:
    sources: list[JsonObject] = [{"model": model, "layers": [first, end]} for model, first, end in part.layers]
    if base and part.base:
        sources.insert(0, {"model": base, "layers": list(part.base)})
    names = {option.attribute: option.name for option in OPTIONS.values()}
    return {"sources": sources} | {names[key]: _plain(value) for key, value in part.changes.items()}


def _vocabulary(plan: MergePlan, out: Path) -> JsonObject:
    choice = plan.request.vocabulary
    if choice is None:
        return {}
    tokens = [
        {
            **{"token": one.token, "model": one.model and _place(one.model, Path(one.model), out)},
            **{"force": one.force, "other": one.other, "index": one.index},
        }
        for one in choice.tokens
    ]
    return {"tokens": tokens, "multiple": choice.multiple}
