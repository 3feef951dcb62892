"""Errors about values that do not fit a schema, in our words: what, where, fix. No text of pydantic reaches a user.

A place is a flag, a `--set`, or `FILE:LINE:COLUMN`: whichever of them gave the value that counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gemma2.core.errors import InputError, UsageError
from gemma2.core.outputs.manifest import MANIFEST
from gemma2.core.yaml_files import closest, given_by, place_of, text_at
from gemma2.posttrain.foreign.counterparts import Spelling, hint_for, is_foreign

__all__ = ["ValueSource", "explained", "explained_each", "limits_of", "reworded"]

Key: TypeAlias = str | int
# One entry of `ValidationError.errors()`: type, loc, input, ctx, msg.
Problem: TypeAlias = Mapping[str, Any]

NUMBER = ("is not a number", "give a number{limits}")
WHOLE = ("is not a whole number", "give a whole number{limits}")
SWITCH = ("is not true or false", "give true or false")
LIST = ("is not a list", "write {example}")
SECTION = ("is not a mapping", "write KEY: VALUE lines below it")
PATH = ("is not a path", "give a path; put one that looks like a number in quotes")
CHOICE = ("is not one of {choices}", "{closest}")
# Type of a problem -> (what is wrong with the value, fix).
WORDS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("float_type", "float_parsing"), NUMBER),
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), WHOLE),
    **dict.fromkeys(("bool_type", "bool_parsing"), SWITCH),
    **dict.fromkeys(("tuple_type", "list_type"), LIST),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type"), SECTION),
    **dict.fromkeys(("path_type", "is_instance_of"), PATH),
    **dict.fromkeys(("literal_error", "enum"), CHOICE),
    "finite_number": ("is not a finite number", "give a number{limits}"),
    "string_type": ("is not text", "put it in quotes"),
    "string_unicode": ("is not text", "save the file as UTF-8"),
    "string_too_short": ("is too short", "give {min_length} characters or more"),
    "string_too_long": ("is too long", "give {max_length} characters or fewer"),
    "string_pattern_mismatch": ("does not fit", "{description}"),
    "too_short": ("holds too few items", "give {min_length} or more"),
    "too_long": ("holds too many items", "give {max_length} or fewer"),
    "greater_than": ("is not above {gt}", "give a number{limits}"),
    "greater_than_equal": ("is below {ge}", "give a number{limits}"),
    "less_than": ("is not below {lt}", "give a number{limits}"),
    "less_than_equal": ("is above {le}", "give a number{limits}"),
    "multiple_of": ("is not a multiple of {multiple_of}", "give a number{limits}"),
}
OTHER = ("does not fit", "{description}")
VARIABLE = re.compile(r"\$\{(vars\.[\w.]+)\}")  # of a pipeline file
# Keys that files of other commands begin with.
OTHER_FILES = {"stages": "pipeline run FILE", "method": "merge --config FILE", "merge_method": "merge --config FILE"}
WHOLE_FILE = 4  # keys of other tools from which on a file is one of theirs
LONGEST = 60  # characters of a value that a message shows


@dataclass(frozen=True)
class ValueSource:
    """What gave the values of a configuration. The last of these counts: file, --set, flags.

    flags  keys that flags gave
    above  keys above the values in the file
    """

    file: Path | None = None
    sets: tuple[str, ...] = ()
    flags: frozenset[str] = frozenset()
    above: tuple[str, ...] = ()

    def below(self, *keys: str) -> ValueSource:
        """The source of the values below these keys."""
        return replace(self, above=(*self.above, *keys))

    def place(self, keys: Sequence[Key], *, of_key: bool = False) -> str:
        """The flag, the --set, or `FILE:LINE:COLUMN` of the value of a key, or with `of_key` of the key itself."""
        full = (*self.above, *keys)
        if full and full[0] in self.flags:
            return flag_of(str(full[0]))
        given = given_by(self.sets, full)
        if given is not None:
            return f"--set {given}"
        if self.file is None:
            return ""
        inside = ("config",) if self.file.name == MANIFEST else ()
        variable = VARIABLE.search(text_at(self.file, full)) if self.sets else None
        given = given_by(self.sets, variable[1].split(".")) if variable else None
        return f"--set {given}" if given else place_of(self.file, (*inside, *full), of_key=of_key)

    def wrong(self, what: str, hint: str, *keys: Key, of_key: bool = False) -> UsageError:
        """The error of a value, or with `of_key` of a key; its place follows `what`."""
        where = self.place(keys, of_key=of_key)
        named = where.startswith("--") and not where.startswith("--set ")  # a flag that `what` names
        return UsageError(f"{what} in {where}" if where and not named else what, hint, where)

    @contextmanager
    def located(self, *keys: Key, prefix: str = "") -> Iterator[None]:
        """Add `prefix` and the place of these keys to an error that names no place yet."""
        try:
            yield
        except (UsageError, InputError) as error:
            if error.where:
                raise
            where = self.place(keys)
            what = f"{prefix}{error.what}{f' in {where}' if where else ''}"
            raise type(error)(what, error.hint, where) from error


def flag_of(key: str) -> str:
    """The flag of a field."""
    return f"--{key.replace('_', '-')}"


def limits_of(field: FieldInfo) -> Iterator[str]:
    """The bounds of a number as text: `>0`, `<=1`."""
    for item in field.metadata:
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if hasattr(item, name):
                yield f"{sign}{getattr(item, name):g}"


def reworded(problem: Problem, field: FieldInfo | None = None) -> tuple[str, str]:
    """What is wrong with the value of a problem, as a predicate, and the fix."""
    what, hint = WORDS.get(problem["type"], OTHER)
    limits = ", ".join(limits_of(field)) if field else _bound(problem)
    choices = _choices(problem)
    described = (field.description if field else None) or "see --help for what is allowed"
    facts = {
        **{key: f"{value:g}" if isinstance(value, float) else value for key, value in problem.get("ctx", {}).items()},
        "limits": f" {limits}" if limits else "",
        "choices": ", ".join(choices),
        "closest": _nearest(str(problem.get("input")), choices),
        "description": described,
        "example": _example(problem.get("input"), field),
    }
    return what.format_map(facts), hint.format_map(facts)


def _example(value: object, field: FieldInfo | None) -> str:
    """A value as the list that was meant; of a list of choices, the choice that is meant."""
    kinds = get_args(field.annotation) if field else ()
    choices = [str(item) for kind in kinds if get_origin(kind) is Literal for item in get_args(kind)]
    near = re.search("'(.*)'", _nearest(str(value), choices)) if choices else None
    if near is not None or choices:
        return f"[{near[1] if near else choices[0]}]"
    if {int, float} & {*kinds}:
        return f"[{value}]" if isinstance(value, int | float) and not isinstance(value, bool) else "[1, 2]"
    return f"[{value}]" if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) else "[a, b]"


def _bound(problem: Problem) -> str:
    """The bound that a value is outside of, as `limits_of` has it."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return "".join(f"{sign}{problem['ctx'][key]:g}" for key, sign in signs.items() if key in problem.get("ctx", {}))


def _nearest(value: str, choices: Sequence[str]) -> str:
    hint = closest(value, choices)
    return hint if hint.startswith("did you mean") else "choose one of them"


def _choices(problem: Problem) -> list[str]:
    """The values that a problem says were expected."""
    expected = str(problem.get("ctx", {}).get("expected", ""))
    return re.findall(r"'([^']*)'", expected) or re.findall(r"\d+", expected)


def explained(schema: type[BaseModel], problems: Sequence[Problem], source: ValueSource) -> UsageError:
    """The error of the first problem of a pydantic report, with the number of the others."""
    # A mistyped key also causes a "missing" error: the typo is the cause, so it is named first.
    ordered = sorted(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    others = len(ordered) - 1
    return _explained_one(schema, ordered, source, f" ({others} more)" if others else "")


def explained_each(schema: type[BaseModel], problems: Sequence[Problem], source: ValueSource) -> list[UsageError]:
    """The errors of all problems of a pydantic report, each without a count of the others.

    That a key is missing is not said next to a typo of it.
    """
    typos = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    meant = {
        (*problem["loc"][:-1], name)
        for problem in typos
        for name in re.findall("'(.*)'", closest(str(problem["loc"][-1]), _fields_at(schema, problem["loc"][:-1])))
    }
    rest = [
        problem
        for problem in problems
        if problem["type"] != "extra_forbidden" and not (problem["type"] == "missing" and problem["loc"] in meant)
    ]
    found = [_explained_one(schema, [problem, *typos, *rest], source, "") for problem in (*typos, *rest)]
    # Each part of a union reports the same value.
    return list({str(error): error for error in found}.values())


def _explained_one(schema: type[BaseModel], ordered: Sequence[Problem], source: ValueSource, more: str) -> UsageError:
    """The error of the first of these problems."""
    first = ordered[0]
    keys: tuple[Key, ...] = tuple(first["loc"])
    name = _spelt((*source.above, *keys))
    if first["type"] == "extra_forbidden":
        unknown = {
            problem["loc"][0]
            for problem in ordered
            if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1
        }
        other = None if source.above else next((how for key, how in OTHER_FILES.items() if key in unknown), None)
        if other:
            hint = f"use the file with gemma2 {other}"
        else:
            hint = _of_another_tool(schema, ordered, source) or closest(str(keys[-1]), _fields_at(schema, keys[:-1]))
        return source.wrong(f"unknown key '{name}'{more}", hint, *keys, of_key=True)
    if first["type"] == "missing":
        option = "" if source.above or len(keys) > 1 else f"give {flag_of(str(keys[0]))} or "  # a section has no flags
        return source.wrong(f"'{name}' is missing{more}", f"{option}set it in the recipe", *keys[:-1])
    if keys and keys[-1] == "[key]":  # YAML reads 1, on and no as a number and booleans
        what = f"the name '{_spelt((*source.above, *keys[:-1]))}' is read as {_shown(first['input'])}{more}"
        return source.wrong(what, "put it in quotes", *keys[:-1], of_key=True)
    if first["type"] in ("value_error", "assertion_error"):
        return _of_our_own(schema, first, source, more)
    what, hint = reworded(first, _field_at(schema, keys))
    return _of_value(first["input"], f" {what}", hint, source, keys, more)


def _of_another_tool(schema: type[BaseModel], ordered: Sequence[Problem], source: ValueSource) -> str | None:
    """The fix for an unknown key that another tool has; None for any other."""
    *above, key = ordered[0]["loc"]
    level = [problem for problem in ordered if problem["loc"][:-1] == tuple(above)]
    given = {str(p["loc"][-1]): p["input"] for p in level if p["type"] == "extra_forbidden"}
    by_set = source.place((*above, key), of_key=True).startswith("--set")
    spelling: Spelling = "keys" if source.file is not None and not by_set else "sets"
    if spelling == "keys" and not above and not source.above and sum(map(is_foreign, given)) >= WHOLE_FILE:
        return f"gemma2 config import {source.file} --out recipe.yaml makes a recipe of a file of another tool"
    return hint_for(str(key), _fields_at(schema, above), ordered[0]["input"], given, spelling)


def _of_value(value: object, what: str, hint: str, source: ValueSource, keys: tuple[Key, ...], more: str) -> UsageError:
    """The error of one value: its name, the value and its place, then what is wrong."""
    where = source.place(keys)
    given = "" if isinstance(value, dict) else _shown(value)
    if where.startswith("--") and not where.startswith("--set"):
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else given
        return UsageError(f"{where}{f' {text}' if text else ''}{what}{more}", hint, where)
    subject = f"'{_spelt((*source.above, *keys))}'{f' = {given}' if given else ''}{f' in {where}' if where else ''}"
    return UsageError(f"{subject}{what}{more}", hint, where)


def _of_our_own(schema: type[BaseModel], problem: Problem, source: ValueSource, more: str) -> UsageError:
    """The error that a validator of ours raised: its message is `what; hint`."""
    keys: tuple[Key, ...] = tuple(problem["loc"])
    what, _, hint = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ").partition("; ")
    hint = hint or "see --help for the allowed values"
    if keys:
        begun = " " if what.startswith("is ") else ": "
        return _of_value(problem["input"], begun + what, hint, source, keys, more)
    # Options that contradict each other: the place is that of the first one in the message which was given.
    given = problem["input"] if isinstance(problem["input"], dict) else {}
    named = [word.replace("-", "_") for word in re.findall(r"[a-z][\w-]*[a-z]", what)]
    key = next((word for word in named if word in schema.model_fields and given.get(word) is not None), None)
    where = source.place((key,) if key else ())
    at = f" in {where}" if where and (where.startswith("--set") or not where.startswith("--")) else ""
    prefix = f"{_spelt(source.above)}: " if source.above else ""
    return UsageError(f"{prefix}{what}{at}{more}", hint, where)


def _spelt(keys: Sequence[Key]) -> str:
    """Keys as they are named in messages: `stages.sft.options.weights[1]`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return text.removeprefix(".") or "configuration"


def _shown(value: object) -> str:
    """A value as YAML has it, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = " ".join(repr(str(value) if isinstance(value, Path) else value).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _field_at(schema: type[BaseModel], keys: Sequence[Key]) -> FieldInfo | None:
    """The field that holds the value at a place inside a schema."""
    *parents, last = [key for key in keys if isinstance(key, str)] or [""]
    return _inside(schema, parents).model_fields.get(last)


def _fields_at(schema: type[BaseModel], keys: Sequence[Key]) -> list[str]:
    """The valid keys at a place inside a schema."""
    return list(_inside(schema, keys).model_fields)


def _inside(schema: type[BaseModel], keys: Sequence[Key]) -> type[BaseModel]:
    """The schema of a section; a key of a mapping of sections (`stages.NAME`) is passed over."""
    current, waiting = schema, False
    for key in keys:
        if waiting:
            waiting = False
            continue
        field = current.model_fields.get(str(key))
        inner = _section_of(field.annotation) if field else None
        if inner is None:
            break
        current, waiting = inner
    return current


def _section_of(annotation: object) -> tuple[type[BaseModel], bool] | None:
    """The schema below an annotation, and whether a mapping of names is between."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    if get_origin(annotation) is dict:
        inner = get_args(annotation)[1]
        return (inner, True) if isinstance(inner, type) and issubclass(inner, BaseModel) else None
    return None
