"""YAML files that users write: the safe loader, for which a key given twice is an error and `1e-6` is a number.

Deviation from YAML 1.1, which requires a dot in the mantissa and reads `1e-6` as text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .errors import InputError, UsageError
from .json_files import JsonMapping, JsonObject
from .limits import YAML_BYTES, YAML_DEPTH, YAML_NODES, read_text

if TYPE_CHECKING:
    import yaml
    from yaml.resolver import BaseResolver

__all__ = ["apply_sets", "closest", "given_by", "parse_value", "place_of", "read_documents", "text_at", "to_yaml"]

Resolver = TypeVar("Resolver", bound="type[BaseResolver]")

LISTED = 40  # names that still fit on one line
# A part of PyYAML's message -> the fix of what most often causes it.
SYNTAX_FIXES = {
    "mapping values are not allowed": "put a value with ': ' in it in quotes; begin keys of one level in one column",
    "'\\t' that cannot start": "indent with spaces, not with tabs",
    "is given twice": "keep one of the two",
    "the value is too large": f"write at most {YAML_NODES:,} keys and values, each alias counted with its value",
    "could not determine a constructor": "leave out the tag that begins with '!'",
    "undefined alias": "define it with & before it is used with *, or put the text in quotes",
    "'%' that cannot start": "put the text in quotes",
    "'@' that cannot start": "put the text in quotes",
    "'`' that cannot start": "put the text in quotes",
    "expected alphabetic or numeric character": "put a text that begins with * or & in quotes",
    "expected ',' or ']'": "close the list with ]",
    "expected ',' or '}'": "close the mapping with }",
    "unexpected end of stream": "close the quotes",
    "could not find expected ':'": "write KEY: VALUE, with a blank after the colon",
    "expected <block end>": "begin keys of one level in one column",
    "expected '<document start>'": "begin keys of one level in one column",
    "must be in": "put the text in quotes",
}
NUMBER = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


def closest(name: str, valid: Iterable[str]) -> str:
    """Return `"did you mean 'x'?"`; without a close match the valid names, or the nearest five of a long list."""
    names = sorted(valid)
    slips = [(slip, other) for other in names if (slip := slip_between(name, other)) is not None]
    likely = [other for slip, other in slips if slip == min(slips)[0]]
    near = difflib.get_close_matches(name, likely or names, n=1, cutoff=0.0 if likely else 0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    if len(names) > LISTED:
        return f"the nearest of {len(names)}: {', '.join(difflib.get_close_matches(name, names, n=5, cutoff=0.0))}"
    return f"valid: {', '.join(names)}"


def slip_between(typed: str, meant: str) -> int | None:
    """Return which single slip makes `typed` of `meant`, the likelier the lower; None if it takes more than one.

    0 two neighbours swapped, 1 a letter left out, 2 a letter too many, 3 another letter. Of names of two letters or
    fewer only the first counts: the others would make one of any such name.
    """
    shorter, longer = sorted((typed, meant), key=len)
    start = next((at for at, (a, b) in enumerate(zip(typed, meant, strict=False)) if a != b), len(shorter))
    if len(typed) == len(meant):
        if typed[start:] == meant[start + 1 : start + 2] + meant[start : start + 1] + meant[start + 2 :]:
            return 0 if typed != meant else None
        return 3 if len(meant) > 2 and typed[start + 1 :] == meant[start + 1 :] and typed != meant else None
    if len(meant) < 3 or len(longer) - len(shorter) != 1 or shorter[start:] != longer[start + 1 :]:
        return None
    return 1 if len(typed) < len(meant) else 2


def _with_numbers(resolver: Resolver) -> Resolver:
    """Teach a YAML loader or dumper that `1e-6` is a number: the loader reads a float, the dumper quotes such text."""
    resolver.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))
    return resolver


@cache
def _loader() -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, except that a key given twice is an error."""

        def compose_document(self) -> yaml.Node:
            """The nodes of a document; aliases and `<<` are objects that occur again, so this is still small."""
            node = super().compose_document()
            assert node is not None
            _check_size(node)
            return node

        def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
            try:
                return super().construct_object(node, deep)
            except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
                # A date that no calendar has, a number of thousands of digits, `!!int "x"`, `!!timestamp x`.
                what = " ".join(str(error).split()) or "the value does not fit its tag"
                raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from error

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
            first: dict[str, int] = {}
            for key, _ in node.value:
                name = str(key.value)
                if name in first:
                    what = f"key '{name}' is given twice, first in line {first[name]}"
                    raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
                first[name] = key.start_mark.line + 1
            return super().construct_mapping(node, deep)

    return _with_numbers(Loader)


def parse_value(text: str) -> object:
    """Return the YAML value of the right-hand side of a `--set`: `3`, `1e-6`, `true`, `[1, 2]`, `null`, else text."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, RecursionError):
        return text


def read_documents(path: Path) -> list[JsonObject]:
    """Return the mappings of a YAML file, one for each document that is not empty.

    Raises InputError if the file cannot be read, UsageError with file and line if it does not hold YAML mappings.
    """
    import yaml

    try:
        text = read_text(path, YAML_BYTES)
        documents = list(yaml.load_all(text, Loader=_loader()))
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})", "give a YAML file that you may read") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        what = f"cannot read {path}:{line}: it is not UTF-8 text"
        raise InputError(what, "save the file as UTF-8", f"{path}:{line}") from error
    except yaml.YAMLError as error:
        raise _not_yaml(path, text, error) from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply", "correct the file") from error
    found = [document for document in documents if document is not None]
    for number, document in enumerate(found):
        if not isinstance(document, dict):
            kind = "a list" if isinstance(document, list) else "text" if isinstance(document, str) else "a single value"
            where = place_of(path, (), number)
            raise UsageError(
                f"{where} holds {kind}, not KEY: VALUE lines", "write a blank after each colon, as in steps: 100", where
            )
    return found


def _not_yaml(path: Path, text: str, error: yaml.YAMLError) -> UsageError:
    """The error of a file that is not YAML, with the line and column of the problem."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:  # a character that no YAML file may hold
        before = text[: getattr(error, "position", 0)]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        what, hint = "a control character", "remove it, or write it as \\xNN between double quotes"
    else:
        line, column = mark.line + 1, mark.column + 1
        context, start = getattr(error, "context", None), getattr(error, "context_mark", None)
        what = str(getattr(error, "problem", error))
        if context and start is not None and start.line != mark.line:
            what += f" ({context}, begun in line {start.line + 1})"
        hint = next((fix for part, fix in SYNTAX_FIXES.items() if part in what), f"correct line {line}")
    where = f"{path}:{line}:{column}"
    return UsageError(f"{where} is not valid YAML: {' '.join(what.split())}", hint, where)


def place_of(path: Path, keys: Sequence[str | int], document: int = 0, *, of_key: bool = False) -> str:
    """Return `FILE:LINE:COLUMN` of the value of a key, or with `of_key` of the key itself; `FILE` if it is not found.

    keys      from the top of the document; of a key that the file does not have, the place of the key above it
    document  number among those that are not empty, as `read_documents` returns them

    A stage `sft/seed-1` that follows from `sft` in the file is found there.
    """
    found = _nodes_at(path, keys, document)
    if found is None:
        return str(path)
    mark = found[0 if of_key else 1].start_mark
    return f"{path}:{mark.line + 1}:{mark.column + 1}"


def text_at(path: Path, keys: Sequence[str | int]) -> str:
    """Return the text of the value of a key as the file has it; "" of a value that is not a single one."""
    found = _nodes_at(path, keys, 0)
    return found[1].value if found is not None and isinstance(found[1].value, str) else ""


def _nodes_at(path: Path, keys: Sequence[str | int], document: int) -> tuple[yaml.Node, yaml.Node] | None:
    """The nodes of a key and of its value, or of the deepest key above it; None for a file that cannot be read."""
    import yaml

    try:
        nodes = list(yaml.compose_all(read_text(path, YAML_BYTES), Loader=_loader()))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    filled = [node for node in nodes if node is not None and node.tag != "tag:yaml.org,2002:null"]
    if document >= len(filled):
        return None
    found = (filled[document], filled[document])
    for key in keys:
        entry = _entry(found[1], key)
        if entry is None:
            break
        found = entry
    return found


def _entry(node: yaml.Node, key: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """The nodes of a key and of its value, also of one that `<<` brings; of a list, the item twice."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        inside = isinstance(key, int) and 0 <= key < len(node.value)
        return (node.value[key], node.value[key]) if inside else None
    if not isinstance(node, yaml.MappingNode):
        return None
    found = {str(k.value): (k, v) for k, v in node.value}
    merged = found.pop("<<", None)
    for name in (str(key), str(key).replace("_", "-"), str(key).rpartition("/")[0], str(key).partition("/")[0]):
        if name in found:
            return found[name]
    if merged is None:
        return None
    above = merged[1].value if isinstance(merged[1], yaml.SequenceNode) else [merged[1]]
    return next((entry for each in above if (entry := _entry(each, key)) is not None), None)


def _check_size(root: yaml.Node) -> None:
    """Raise ComposerError for a document that contains itself, is too deep, or too large with its aliases spelt out.

    Every node is visited once. What walks through the values later visits an alias as often as it occurs.
    """
    import yaml

    sizes: dict[int, int] = {}  # by node; 0 while the node is open
    depths: dict[int, int] = {}
    waiting = [(root, False)]
    while waiting:
        node, inside_is_known = waiting.pop()
        inner = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        if inside_is_known:
            sizes[id(node)] = 1 + sum(sizes[id(part)] for part in inner)
            depths[id(node)] = 1 + max((depths[id(part)] for part in inner), default=0)
            if sizes[id(node)] > YAML_NODES or depths[id(node)] > YAML_DEPTH:
                what = f"nested more than {YAML_DEPTH} deep" if depths[id(node)] > YAML_DEPTH else "too large"
                raise yaml.composer.ComposerError(None, None, f"the value is {what}", node.start_mark)
        elif id(node) not in sizes:
            sizes[id(node)] = 0
            waiting.append((node, True))
            if any(sizes.get(id(part)) == 0 for part in inner):
                raise yaml.composer.ComposerError(None, None, "the value contains itself", node.start_mark)
            waiting += [(part, False) for part in inner if id(part) not in sizes]


@cache
def _dumper() -> type[yaml.SafeDumper]:
    import yaml

    class Dumper(yaml.SafeDumper):
        """The safe dumper, the counterpart of our loader."""

    return _with_numbers(Dumper)


def to_yaml(values: JsonMapping) -> str:
    """Return a dumped or recorded configuration as a recipe that reruns the same job."""
    import yaml

    return yaml.dump(dict(values), Dumper=_dumper(), sort_keys=False, allow_unicode=True)


def apply_sets(values: JsonObject, sets: Iterable[str]) -> JsonObject:
    """Apply `a.b=c` assignments to a nested mapping; return a new one."""
    result = _copied(values)
    for item in sets:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise UsageError(f"--set {item!r} is not KEY=VALUE", "write for instance --set learning_rate=1e-6")
        *parents, last = path.split(".")
        node = result
        for key in parents:
            node = node.setdefault(_spelt(key, node), {})
            if not isinstance(node, dict):
                raise UsageError(f"--set {item!r}: '{key}' is a single value", "set it as a whole")
        node[_spelt(last, node)] = parse_value(text)
    return result


def given_by(sets: Iterable[str], keys: Sequence[str | int]) -> str | None:
    """Return the last `a.b=c` that gave the value of these keys, or of one above or below them; None without any.

    The key of a stage `sft` counts for its copies `sft/seed-1`.
    """
    found = None
    for item in sets:
        path = item.partition("=")[0].replace("-", "_").split(".")
        pairs = [(a, str(b).replace("-", "_")) for a, b in zip(path, keys, strict=False)]
        if pairs and all(a == b or b.startswith(f"{a}/") for a, b in pairs):
            found = item
    return found


def _copied(value: JsonObject) -> JsonObject:
    return {key: _copied(item) if isinstance(item, dict) else item for key, item in value.items()}


def _spelt(key: str, node: Mapping[str, object]) -> str:
    """Return a key in the spelling of the file, or with underscores as in all our keys."""
    return key if key in node else key.replace("-", "_")
