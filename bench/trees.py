"""Compares two folders of outputs bit for bit. Reads files and runs nothing.

    *.safetensors      tensor by tensor: name, dtype, shape, bytes; then metadata and the order in the file
    *.json, *.jsonl    key by key, the order of keys included; numbers are equal when they are written alike
    README.md, *.html  as text, but reported apart from the rest, as prose: model cards and report pages; so are the
                       sentences in notes and warnings of a JSON file. Dates and durations of a page read <time>
    every other file   as bytes

The name of the folder itself is replaced by <root> first, since absolute paths may be recorded. A file or a key that
only one folder has is a difference. The value of a field in IGNORED may differ, but the field has to be in both.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

import numpy as np

__all__ = ["IGNORED", "PROSE", "SENTENCES", "Comparison", "Difference", "Ignored", "compare_trees"]

ROOT = b"<root>"
SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Ignored:
    """A field whose value may differ. Patterns as in a shell; a star in `key` also matches the slashes."""

    file: str  # its name
    key: str  # path to the field, as files/README.md/size
    reason: str


IGNORED = (
    Ignored("*.json", "started", "time of day"),
    Ignored("*.json", "*/started", "time of day"),
    Ignored("*.json", "ended", "time of day"),
    Ignored("*.json", "*/ended", "time of day"),
    Ignored("stdout-*.json", "seconds", "duration"),
    Ignored("stdout-*.json", "*/seconds", "duration"),
    Ignored("pipeline.json", "stages/*/seconds", "duration"),
    Ignored("stdout-*.json", "bytes_free", "free disk"),
    Ignored("gemma2.json", "gemma2", "version of this package"),
    Ignored("*.json", "versions/gemma2", "version of this package"),
    Ignored("*.json", "*/versions/gemma2", "version of this package"),
    Ignored("gemma2.json", "files/*README.md/*", "size and digest of a model card, which is compared itself"),
    Ignored("gemma2.json", "files/*.html/*", "size and digest of a report page, which is compared itself"),
    Ignored("gemma2.json", "files/*pipeline.json/*", "size and digest of a file with durations, compared itself"),
)
# Sentences inside JSON: reported as prose. How many there are counts.
SENTENCES = tuple(
    Ignored(file, key, "a sentence")
    for file in ("gemma2.json", "stdout-*.json")
    for key in ("notes/*", "*/notes/*", "warnings/*", "*/warnings/*", "*/note")
)
PROSE = ("README.md", "*.html")
# What a report page says of time: "7 s of work", "1 min 5 s", "2026-11-28".
TIMES = re.compile(rb"\b(?:\d[\d.,]* (?:ms|s|min|h)\b ?)+|\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?Z?)?")


@dataclass(frozen=True)
class Difference:
    """The first difference of one file."""

    file: str
    text: str  # where in the file, and both values

    def __str__(self) -> str:
        return f"{self.file}: {self.text}"


@dataclass
class Comparison:
    """What two folders have in common and what not, at most one difference per file."""

    files: int = 0
    differences: list[Difference] = field(default_factory=list)
    prose: list[Difference] = field(default_factory=list)


def compare_trees(a: Path, b: Path, folders: Iterable[str] = (".",)) -> Comparison:
    """Compare what two folders hold; `folders` limits the comparison to these folders inside both."""
    a, b = a.resolve(), b.resolve()
    names = {folder: [_files(root, folder) for root in (a, b)] for folder in folders}
    found = Comparison()
    for name in sorted({name for pair in names.values() for side in pair for name in side}):
        found.files += 1
        prose = any(fnmatchcase(PurePath(name).name, pattern) for pattern in PROSE)
        text = None if prose else _file_difference(a, b, name, IGNORED + SENTENCES)
        if text:
            found.differences.append(Difference(name, text))
        elif text := _file_difference(a, b, name, IGNORED):
            found.prose.append(Difference(name, text))
    return found


def _files(root: Path, folder: str) -> set[str]:
    paths = (root / folder).rglob("*")
    return {path.relative_to(root).as_posix() for path in paths if path.is_file()}


def _file_difference(a: Path, b: Path, name: str, ignored: Sequence[Ignored]) -> str | None:
    """The first difference between two files of one name, in words."""
    for one, side in ((a, "B"), (b, "A")):
        if not (one / name).is_file():
            return f"only in {side}"
    left, right = ((root / name).read_bytes().replace(str(root).encode(), ROOT) for root in (a, b))
    kind = PurePath(name).suffix
    if kind == ".html":
        left, right = (TIMES.sub(b"<time>", text) for text in (left, right))
    if left == right:
        return None
    try:
        if kind == ".safetensors":
            return _tensor_difference(left, right)
        if kind == ".json":
            keys = [entry.key for entry in ignored if fnmatchcase(PurePath(name).name, entry.file)]
            return _document_difference(left, right, keys)
        if kind == ".jsonl":
            return _lines_difference(left, right)
    except (ValueError, KeyError, TypeError) as error:  # one of the files is not what its name says
        return f"bytes differ, and cannot be read ({error})"
    return _byte_difference(left, right)


# --- JSON -----------------------------------------------------------------------------------------------------------


def _document_difference(left: bytes, right: bytes, ignored: Sequence[str]) -> str | None:
    values = json.loads(left), json.loads(right)
    text = _value_difference(*values, "", ignored)
    # With equal values something else differs: indentation, say. Where a field was ignored that cannot be told.
    return text or (None if values[0] != values[1] else _byte_difference(left, right))


def _lines_difference(left: bytes, right: bytes) -> str | None:
    lines = left.splitlines(), right.splitlines()
    for number, pair in enumerate(zip(*lines, strict=False), start=1):
        if pair[0] != pair[1]:
            text = _value_difference(*map(json.loads, pair), "", ()) or _byte_difference(*pair)
            return f"line {number}: {text}"
    if len(lines[0]) != len(lines[1]):
        return f"{len(lines[0])} and {len(lines[1])} lines"
    return _byte_difference(left, right)


def _value_difference(a: Any, b: Any, path: str, ignored: Sequence[str]) -> str | None:
    """The path and both values of the first difference, or None."""
    if any(fnmatchcase(path, pattern) for pattern in ignored):
        return None
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            inner = f"{path}/{key}".lstrip("/")
            if key not in a or key not in b:
                return f"{inner}: only in {'A' if key in a else 'B'}"
            text = _value_difference(a[key], b[key], inner, ignored)
            if text:
                return text
        return None if list(a) == list(b) else f"{path or 'the document'}: keys in another order"
    if isinstance(a, list) and isinstance(b, list):
        for index, pair in enumerate(zip(a, b, strict=False)):
            text = _value_difference(*pair, f"{path}/{index}".lstrip("/"), ignored)
            if text:
                return text
        return None if len(a) == len(b) else f"{path or 'the document'}: {len(a)} and {len(b)} entries"
    written = json.dumps(a), json.dumps(b)  # NaN is equal to NaN, and 1 is not 1.0
    return None if written[0] == written[1] else f"{path or 'the document'}: {_both(*written)}"


def _both(a: str, b: str) -> str:
    """Two values, from shortly before the place where they part."""
    at = _parting(a, b)
    if max(len(a), len(b)) <= SHOWN:
        return f"{a} and {b}"
    start = max(0, at - SHOWN // 3)
    cut = ["…" * (start > 0) + text[start : start + SHOWN] for text in (a, b)]
    return f"{cut[0]} and {cut[1]}"


def _parting(a: str | bytes, b: str | bytes) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _byte_difference(left: bytes, right: bytes) -> str:
    at = _parting(left, right)
    line = left[:at].count(b"\n") + 1
    start = left.rfind(b"\n", 0, at) + 1
    texts = [data[start:].split(b"\n", 1)[0] for data in (left, right)]
    try:
        shown = [text.decode() for text in texts]
    except UnicodeDecodeError:
        return f"byte {at:,} differs; {len(left):,} and {len(right):,} bytes"
    return f"line {line}: {_both(*(repr(text) for text in shown))}"


# --- tensors --------------------------------------------------------------------------------------------------------


def _read(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Header and bytes of every tensor. The format: 8 bytes length of the header, the JSON header, the tensors."""
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            tensors[name] = data[8 + length + start : 8 + length + end]
    return header, tensors


def _tensor_difference(left: bytes, right: bytes) -> str:
    (head_a, a), (head_b, b) = _read(left), _read(right)
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            return f"{name}: only in {'A' if name in a else 'B'}"
        kinds = [f"{head[name]['dtype']} {head[name]['shape']}" for head in (head_a, head_b)]
        if kinds[0] != kinds[1]:
            return f"{name}: {kinds[0]} and {kinds[1]}"
        if a[name] != b[name]:
            return f"{name}: {_elements(a[name], b[name], head_a[name]['dtype'], head_a[name]['shape'])}"
    text = _value_difference(head_a.get("__metadata__"), head_b.get("__metadata__"), "__metadata__", ())
    return text or "equal tensors in another order or alignment"


def _elements(a: bytes, b: bytes, dtype: str, shape: list[int]) -> str:
    """How many elements differ, and by how much."""
    count = math.prod(shape)
    width = len(a) // count
    words = [np.frombuffer(data, f"<u{width}") for data in (a, b)]
    differing = int((words[0] != words[1]).sum())
    text = f"{differing:,} of {count:,} elements"
    if dtype == "BF16":
        numbers = [(word.astype(np.uint32) << 16).view(np.float32) for word in words]
    elif dtype in ("F16", "F32", "F64"):
        numbers = [word.view(f"<f{width}") for word in words]
    else:
        return text
    with np.errstate(all="ignore"):
        gaps = np.abs(numbers[0].astype(np.float64) - numbers[1].astype(np.float64))
    finite = gaps[np.isfinite(gaps)]
    return f"{text}, largest difference {finite.max():.3g}" if len(finite) else text
