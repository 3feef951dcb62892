"""JSON Schemas of settings files, for editors: keys with their meaning, unit, bounds and default. Torch-free.

    command   the recipe of one command: no key is required, since flags may give any
    pipeline  stages with the options of their command; a reference `${...}` may stand for any value
    merge     a file of merges in our keys (mergekit's are read too, and are not described here)

Deviation from what the commands accept: what keys say together is not described; `gemma2 config check` knows it.
"""

from __future__ import annotations

from copy import deepcopy

from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.merging.methods.option import OPTIONS, Option
from gemma2.merging.methods.request import DTYPES, FILES
from gemma2.merging.methods.table import METHODS
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.schemas import MergeConfig, PipelineFile
from gemma2.posttrain.schemas.config import Config

from .schema_index import schema_for

__all__ = ["json_schema"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE = {"type": "string", "pattern": r"\$\{"}


def json_schema(name: str) -> JsonObject:
    """The schema of the recipe of a command, of `pipeline` or of `merge`. Raises UsageError for another name."""
    if name == "pipeline":
        found = _pipeline()
    elif name == "merge":
        found = _merge_file()
    else:
        found = _settings(schema_for(name))
        found.pop("required", None)
    title = f"gemma2 {name}" if name not in ("pipeline", "merge") else f"gemma2 {name} file"
    return {"$schema": DIALECT, **found, "title": title}


def _settings(schema: type[Config]) -> JsonObject:
    """The keys of one schema, with what its validators turn into lists."""
    found: JsonObject = deepcopy(schema.model_json_schema())
    properties: dict[str, JsonObject] = found["properties"]
    for key in _of_one_item(schema):
        properties[key] = _widened(properties[key])
    if "columns" in properties:  # a mapping is a list of renames
        named = {"type": "object", "additionalProperties": {"type": "string"}}
        properties["columns"] = _either(properties["columns"], named)
    if "on_policy_fraction" in properties:
        properties["lambda"] = properties["on_policy_fraction"]
    for key, one in properties.items():
        one.pop("title", None)
        if key in schema.model_fields and schema.model_fields[key].default_factory is dict:
            one["default"] = {}
    return found


def _of_one_item(schema: type[Config]) -> set[str]:
    """The keys of lists that take one item as it is: those with a validator before the type is looked at."""
    validators = schema.__pydantic_decorators__.field_validators.values()
    before = {name for one in validators if one.info.mode == "before" for name in one.info.fields}
    return {name for name in before & schema.model_fields.keys() if _is_list(schema, name)}


def _is_list(schema: type[Config], name: str) -> bool:
    return str(schema.model_fields[name].annotation).startswith("tuple")


def _widened(described: JsonObject) -> JsonObject:
    return _either(described, described.get("items", {}))


def _either(described: JsonObject, other: JsonMapping) -> JsonObject:
    """A description that another form fits as well; meaning and default stay on the outside, where editors look."""
    outside: JsonObject = {key: described[key] for key in ("description", "default") if key in described}
    inside: JsonObject = {key: value for key, value in described.items() if key not in (*outside, "title")}
    forms = inside["anyOf"] if inside.keys() == {"anyOf"} else [inside]
    return {**outside, "anyOf": [*forms, dict(other)]}


# --- pipelines --------------------------------------------------------------------------------------------------------


def _pipeline() -> JsonObject:
    """Stages, each with the options of its command."""
    found: JsonObject = deepcopy(PipelineFile.model_json_schema())
    shared: dict[str, JsonObject] = found["$defs"]
    stage = shared["StageFile"]
    stage["properties"]["command"]["enum"] = list(COMMANDS)
    stage["properties"]["after"] = _widened(stage["properties"]["after"])
    cases = []
    for schema in dict.fromkeys(command.schema for command in COMMANDS.values()):
        names = [name for name, command in COMMANDS.items() if command.schema is schema]
        options = _settings(schema)
        shared |= options.pop("$defs", {})
        options["properties"] = {key: _either(one, REFERENCE) for key, one in options["properties"].items()}
        options.pop("required", None)  # a key of the matrix may give it
        if schema is MergeConfig:
            options["properties"].pop("method")
        shared[f"{schema.__name__}Options"] = options
        cases.append(
            {
                "if": {"properties": {"command": {"enum": names}}, "required": ["command"]},
                "then": {"properties": {"options": {"$ref": f"#/$defs/{schema.__name__}Options"}}},
            }
        )
    stage["allOf"] = cases
    return found


# --- files of merges --------------------------------------------------------------------------------------------------

NUMBER = {"$ref": "#/$defs/number"}
VARIED: JsonObject = {
    "description": "a number, a gradient over the layers, or rules by the names of tensors",
    "anyOf": [
        {"type": "number"},
        {"$ref": "#/$defs/gradient"},
        {"type": "array", "items": {"type": "number"}, "minItems": 1},
        {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/rule"}, {"type": "number"}]}, "minItems": 1},
    ],
}
GRADIENT: JsonObject = {
    "type": "object",
    "properties": {"layers": {"type": "array", "items": {"type": "number"}, "minItems": 1}},
    "required": ["layers"],
    "additionalProperties": False,
}
RULE: JsonObject = {
    "type": "object",
    "properties": {
        "match": {"type": "string", "description": "regular expression that the name of a tensor contains"},
        "value": {"type": "number"},
        "layers": {"type": "array", "items": {"type": "number"}, "minItems": 1},
    },
    "additionalProperties": False,
}


def _option(option: Option) -> JsonObject:
    """One option of merge methods."""
    if option.kind != "number":
        kind: JsonObject = {"type": "boolean" if option.kind == "switch" else "integer"}
    elif option.varies:
        kind = dict(NUMBER)
    else:
        kind = {"type": "number"}
    if kind.get("type") != "boolean" and not option.varies:
        kind |= {"minimum": option.low} if option.low is not None and not option.open_low else {}
        kind |= {"exclusiveMinimum": option.low} if option.open_low else {}
        kind |= {"maximum": option.high} if option.high is not None else {}
    if option.per:
        kind = {"anyOf": [kind, {"type": "array", "items": kind, "minItems": 1}]}
    limits = f"; {option.range}" if option.range else ""
    default = f"; default {option.shown}" if option.shown else ""
    return {"description": f"{option.help}{limits}{default}", **kind}


def _merge_file() -> JsonObject:
    """One merge, or several below `steps`."""
    fields = MergeConfig.model_json_schema()["properties"]
    single = {
        option.name.removesuffix("s"): {"description": option.help, **NUMBER}
        for option in OPTIONS.values()
        if option.per == "model"
    }
    text: JsonObject = {"type": "string", "minLength": 1}
    model = {
        "type": "object",
        "properties": {"model": {"description": "directory, hub id or step", **text}, **single},
        "required": ["model"],
        "additionalProperties": False,
    }
    described: dict[str, JsonObject] = {
        key: {"description": fields[key].get("description", "")} for key in ("base", "tokenizer", *FILES)
    }
    own: JsonObject = {
        "method": {"description": "merge method", "enum": list(METHODS)},
        "models": {
            "description": "models in order, each with its own numbers if it has any",
            "type": "array",
            "items": {"anyOf": [text, model]},
            "minItems": 1,
        },
        "base": {**described["base"], **text},
        "granularity": {key: value for key, value in fields["granularity"].items() if key != "title"},
        "tokenizer": {**described["tokenizer"], **text},
        "allow_config": {
            "description": fields["allow_config"]["description"],
            "anyOf": [text, {"type": "array", "items": text}],
        },
        **{key: {**described[key], "anyOf": [text, {"type": "integer"}]} for key in FILES},
        "vocabulary": {"description": "rows of single tokens, and a multiple for their number", "type": "object"},
        "inputs": {"description": "role and identity of each input, as an output records them", "type": "array"},
        "dtype": {"description": "dtype of the output", "enum": list(DTYPES)},
        "stream": {"description": "read the models from the hub while they are merged", "type": "boolean"},
        "slices": {"description": fields["slices"]["description"], "type": "array", "items": {"type": "object"}},
        **{option.name: _option(option) for option in OPTIONS.values()},
    }
    merge = {"type": "object", "properties": own, "required": ["method", "models"], "additionalProperties": False}
    steps: JsonObject = {
        "type": "object",
        "properties": {
            "steps": {
                "description": "name -> merge; a model may be the name of another step",
                "type": "object",
                "additionalProperties": {"$ref": "#/$defs/merge"},
                "minProperties": 1,
            }
        },
        "required": ["steps"],
        "additionalProperties": False,
    }
    defs: JsonObject = {"merge": merge, "number": VARIED, "gradient": GRADIENT, "rule": RULE}
    return {"anyOf": [{"$ref": "#/$defs/merge"}, steps], "$defs": defs}
