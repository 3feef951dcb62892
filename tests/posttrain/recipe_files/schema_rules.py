"""What a JSON Schema says about a value: the keywords that our schemas use, read by the standard (2020-12)."""

import re
from collections.abc import Iterator
from typing import Any

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}
MEANING = {"$schema", "$defs", "title", "description", "default", "format"}
READ = {
    *("type", "enum", "const", "anyOf", "allOf", "if", "then", "$ref", "properties", "additionalProperties"),
    *("required", "items", "minItems", "minProperties", "minLength", "pattern", "minimum", "maximum"),
    *("exclusiveMinimum", "exclusiveMaximum", "maxLength", "prefixItems", "maxItems", "repeated"),
}
BOUNDS = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
}


def wrongs(schema: Any, value: Any, whole: Any = None, place: str = "") -> Iterator[str]:
    """The places of a value that do not fit a schema; `whole`: the document that references point into."""
    whole = schema if whole is None else whole
    if isinstance(schema, bool):
        yield from [] if schema else [f"{place}: not allowed"]
        return
    assert schema.keys() <= MEANING | READ, f"unread keywords {schema.keys() - MEANING - READ}"
    if "$ref" in schema:
        target = whole
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        yield from wrongs(target, value, whole, place)
    if "type" in schema and not of_type(value, schema["type"]):
        yield f"{place}: {value!r} is not {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place}: {value!r} is not in the list"
    if "const" in schema and value != schema["const"]:
        yield f"{place}: {value!r} is not {schema['const']!r}"
    if "anyOf" in schema and all(any(wrongs(one, value, whole)) for one in schema["anyOf"]):
        yield f"{place}: {value!r} fits no form"
    for one in schema.get("allOf", ()):
        yield from wrongs(one, value, whole, place)
    if "if" in schema and not any(wrongs(schema["if"], value, whole)):
        yield from wrongs(schema.get("then", True), value, whole, place)
    yield from within(schema, value, whole, place)


def within(schema: Any, value: Any, whole: Any, place: str) -> Iterator[str]:
    """The wrongs of the inside of a value, and of its bounds."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for key in [*(key for key in schema.get("required", ()) if key not in value)]:
            yield f"{place}.{key}: missing"
        if len(value) < schema.get("minProperties", 0):
            yield f"{place}: too few"
        for key, item in value.items():
            inner = properties.get(key, schema.get("additionalProperties", True))
            yield from wrongs(inner, item, whole, f"{place}.{key}")
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{place}: {len(value)} items"
        for number, item in enumerate(value):
            yield from wrongs(schema.get("items", True), item, whole, f"{place}[{number}]")
    elif isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield f"{place}: {value!r} does not match"
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            yield f"{place}: {value!r} has {len(value)} characters"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from (
            f"{place}: {value} {word}"
            for word, holds in BOUNDS.items()
            if word in schema and not holds(value, schema[word])
        )


def of_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, TYPES[kind]) or (kind == "integer" and isinstance(value, float) and value.is_integer())
