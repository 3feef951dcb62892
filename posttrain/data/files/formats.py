"""How each format of file becomes rows: JSON lines, JSON arrays, CSV, parquet, arrow, plain text; compressed or not.

A reader yields rows as they stand in the file and hands a row that cannot be read to `on_bad`, where one is given.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import IO, Any

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject

from .column_files import batches_of, parquet_rows
from .folders import SUFFIXES, format_of
from .rewriting import iconv, line_feeds
from .row import OF_A_ROW, OnBad, Row, kind

__all__ = ["Line", "count_in", "line_reader", "lines_of", "rows_in"]

Line = tuple[str, bytes]  # its place, and what stands there
LONGEST_NAME = 60  # characters of the name of a column


def rows_in(path: Path, on_bad: OnBad | None = None) -> Iterator[Row]:
    """The rows of one file, streamed. Raises InputError with file and line for what cannot be read."""
    return _READERS.get(format_of(path), _json_rows)(path, on_bad)


def count_in(path: Path) -> int:
    """Rows of one file, parsed only where there is no other way to count them."""
    name = format_of(path)
    if name == ".parquet":
        return parquet_rows(path)
    if name in (".csv", ".tsv", ".arrow", ".json") or (name != ".txt" and _begins_a_list(path)):
        return sum(1 for _ in rows_in(path, lambda error, row: None))
    with _opened(path) as lines:
        return sum(1 for line in lines if line.strip())


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked. Raises InputError for a damaged archive."""
    opener = _UNPACKERS.get(path.suffix.lower())
    if opener is None:
        with path.open("rb") as file:
            yield file
        return
    try:
        with opener(path) as file:
            yield file
    except (EOFError, OSError, zlib.error) as error:
        detail = " ".join(str(error).split())[:120]
        raise InputError(f"{path} cannot be unpacked ({detail})", "copy it again, or unpack it yourself") from error


def _zstandard(path: Path) -> IO[bytes]:
    import pyarrow

    return BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_UNPACKERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".zst": _zstandard}


def _begins_a_list(path: Path) -> bool:
    """Whether a file of JSON holds one array instead of a row per line."""
    with _opened(path) as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    return head.startswith(b"[") and not head[1:].lstrip().startswith(b"[")


# --- JSON ---------------------------------------------------------------------------------------------------------


def _json_rows(path: Path, on_bad: OnBad | None) -> Iterator[Row]:
    if format_of(path) == ".json" or _begins_a_list(path):
        yield from _document_rows(path, on_bad)
        return
    yield from _line_rows(path, on_bad)


def _line_rows(path: Path, on_bad: OnBad | None) -> Iterator[Row]:
    """Rows of a file with a row per line."""
    read = line_reader(path)
    assert read is not None
    for line in lines_of(path):
        yield from read(line, on_bad)


def lines_of(path: Path) -> Iterator[Line]:
    """(file:line, bytes) of every line that is not blank."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", line


def line_reader(path: Path) -> Callable[[Line, OnBad | None], Iterator[Row]] | None:
    """What makes a row of a line, or none of a bad line; None for a format whose rows are not lines.

    Raises InputError for a file whose format cannot be known.
    """
    name = format_of(path)
    if name == ".txt":
        return _text_row
    if name == ".json" or name in _READERS or _begins_a_list(path):
        return None
    if name not in SUFFIXES:
        _require_json(path)
    return _json_row


def _json_row(line: Line, on_bad: OnBad | None) -> Iterator[Row]:
    where, content = line
    raw = {"line": content.decode("utf-8", "replace").rstrip()}
    return _checked(where, partial(_parse, where, content), on_bad, raw)


def _require_json(path: Path) -> None:
    """Refuse a file whose name does not say its format and that does not look like JSON lines."""
    with _opened(path) as file:
        head = file.read(4096)
    if head.strip() and b"\x00" not in head and not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        what = f"{path} holds no JSON, and its name does not say what it is"
        raise InputError(what, f"end its name with one of {', '.join(SUFFIXES)}")


def _checked(
    where: str, read: Callable[[], JsonObject], on_bad: OnBad | None, raw: JsonObject | None = None
) -> Iterator[Row]:
    try:
        yield Row(where, read())
    except InputError as error:
        if on_bad is None:
            raise
        on_bad(error, Row(where, raw or {}))


def _parse(where: str, line: bytes) -> JsonObject:
    return _parse_text(where, _decoded(where, line))


def _parse_text(where: str, text: str) -> JsonObject:
    return _object(where, _value(where, text))


def _decoded(where: str, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        path = where.rpartition(":")[0]
        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise InputError(f"{path} is in UTF-16", iconv(path, "UTF-16")) from error
        if b"\x00" in line[:4096]:
            what = f"{path} is not a text file"
            raise InputError(what, f"save the rows as one of {', '.join(SUFFIXES)}") from error
        what = f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1})"
        raise InputError(what, iconv(path, "WINDOWS-1252")) from error


def _value(where: str, text: str) -> object:
    try:
        return _DECODER.decode(text)
    except _Twice as error:
        raise InputError(f"{where}: the key {str(error)!r} stands twice", "remove one of them") from error
    except ValueError as error:
        hint = line_feeds(where) if "\r" in text.strip() else "write one JSON object per line"
        raise InputError(f"{where}: not JSON ({_fault(error)})", hint) from error
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply", "write one flat JSON object per line") from error


def _fault(error: ValueError) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _object(where: str, value: object) -> JsonObject:
    if not isinstance(value, dict):
        raise InputError(f"{where}: {kind(value)}, not a JSON object", 'write {"column": value, ...}')
    return value


class _Twice(Exception):
    """A key that an object has twice, of which JSON parsers keep the last in silence."""


def _once(pairs: list[tuple[str, object]]) -> JsonObject:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)
_DECLARED = re.compile(r"sep=(.)\s*", re.IGNORECASE)
_SPACE = re.compile(r"[ \t\r\n]*")


def _document_rows(path: Path, on_bad: OnBad | None) -> Iterator[Row]:
    """Rows of one JSON document: an array, an object that holds one array, one row, or a row per line after all."""
    with _opened(path) as file:
        text = _decoded(f"{path}:1", file.read())
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        yield from _array_rows(path, text, start, on_bad)
        return
    try:
        whole = _DECODER.decode(text) if text.strip() else {}
    except (ValueError, RecursionError, _Twice):
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield from _checked(where, partial(_parse_text, where, line), on_bad)
        return
    named = _key_of_rows(path, whole)
    if named is not None:
        aside = tuple(key for key in whole if key != named)
        for number, item in enumerate(whole[named], start=1):
            yield Row(f"{path}:{number}", item, aside if number == 1 else ())
    elif whole:
        yield from _checked(f"{path}:1", partial(_object, f"{path}:1", whole), on_bad)


def _key_of_rows(path: Path, whole: object) -> str | None:
    """The key of an object under which its rows are; None where the object is one row.

    Raises InputError where several keys hold rows, as those of splits do.
    """
    if not isinstance(whole, dict) or OF_A_ROW & whole.keys():
        return None
    found = [key for key, value in whole.items() if _is_list_of_rows(value)]
    if len(found) > 1:
        names = ", ".join(f"{key}.json" for key in found)
        raise InputError(
            f"{path} holds rows under {' and '.join(map(repr, found))}",
            f"write each array to a file ({names}), and give the file to be read",
        )
    return found[0] if found else None


def _is_list_of_rows(value: object) -> bool:
    """Whether a value is a list of objects that are not messages: those make a row of the object around them."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, dict) and not {"role", "from"} & item.keys() for item in value)


def _array_rows(path: Path, text: str, start: int, on_bad: OnBad | None) -> Iterator[Row]:
    """The items of an array one by one, each with the line on which it begins."""
    line, counted = 1, 0
    number, last = 0, 0  # objects that begin on this line so far
    place = _after_space(text, start + 1)
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        number, last = (number + 1 if line == last else 1), line
        where = f"{path}:{line}" if number == 1 else f"{path}:{line} (object {number})"
        try:
            value, place = _DECODER.raw_decode(text, place)
        except _Twice as error:
            raise InputError(f"{where}: the key {str(error)!r} stands twice", "remove one of them") from error
        except json.JSONDecodeError as error:
            where = f"{path}:{error.lineno}"
            raise InputError(f"{where}: not JSON ({_fault(error)})", "write an array of objects") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error})", "write an array of objects") from error
        yield from _checked(where, partial(_object, where, value), on_bad)
        place = _after_space(text, place)
        if text[place : place + 1] == ",":
            place = _after_space(text, place + 1)
        elif text[place : place + 1] != "]":
            raise InputError(f"{where}: not JSON (no comma behind the object)", "write an array of objects")
    if text[place + 1 :].strip():
        raise InputError(f"{path}: text follows the array of rows", "write one array, or one object per line")


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


# --- tables -----------------------------------------------------------------------------------------------------------


def _table_rows(path: Path, on_bad: OnBad | None) -> Iterator[Row]:
    """Rows of a CSV or TSV file with a header. An empty field is an empty text."""
    csv.field_size_limit(sys.maxsize)
    with _opened(path) as file:
        lines = _lines_of(path, file)
        header = next(lines, None)
        if header is None:
            return
        delimiter = "\t" if format_of(path) == ".tsv" else _delimiter(header)
        above = 0  # lines that the reader does not see
        if declared := _DECLARED.fullmatch(header):  # the first line of spreadsheets: sep=;
            delimiter, header, above = declared[1], next(lines, ""), 1
        reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
        names = _header(path, next(_fields(path, reader)))
        end = reader.line_num + above
        for fields in _fields(path, reader):
            start, end = end + 1, reader.line_num + above
            where = f"{path}:{start}" if start == end else f"{path}:{start}-{end}"  # a field holds line breaks
            if fields:
                yield from _checked(where, partial(_record, where, names, fields), on_bad, {"fields": fields})


def _lines_of(path: Path, file: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        yield _decoded(f"{path}:{number}", line)


def _delimiter(header: str) -> str:
    """The delimiter of a CSV file: spreadsheets of many countries write semicolons."""
    return max((",", ";", "\t", "|"), key=header.count)


def _fields(path: Path, reader: Any) -> Iterator[list[str]]:  # noqa: ANN401  # the type has no public name
    while True:
        start = reader.line_num + 1
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "close the quotation mark that opens there, and double those inside a field"
            if "new-line" in str(error):  # a carriage return: in the header it ends the lines of the whole file
                hint = "put fields with line breaks in double quotes" if start > 1 else line_feeds(f"{path}:1")
            raise InputError(f"{path}:{start}: not CSV ({error})", hint) from error


def _header(path: Path, names: list[str]) -> list[str]:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"{path}:1: the column {twice[0]!r} stands twice", "rename one of them")
    text = next((name for name in names if name.rstrip().endswith((".", "?", "!")) or len(name) > LONGEST_NAME), None)
    if text is not None:
        raise InputError(
            f"{path}:1: the first line holds {text[:LONGEST_NAME]!r} where names of columns belong",
            "begin the file with a line of names, as in prompt,completion",
        )
    return [name.strip() for name in names]


def _record(where: str, names: list[str], fields: list[str]) -> JsonObject:
    if len(fields) != len(names):
        what = f"{where}: {len(fields)} fields, but the header has {len(names)} columns"
        raise InputError(what, "put fields with the separator or line breaks in double quotes")
    return dict(zip(names, fields, strict=True))


def _column_rows(path: Path, on_bad: OnBad | None) -> Iterator[Row]:
    """Rows of a column file, a batch at a time; a file is whole or broken, so no single row can be left out."""
    number = 0
    for batch in batches_of(path):
        for columns in batch.to_pylist():
            number += 1
            yield Row(f"{path}:{number}", columns)


# --- text -------------------------------------------------------------------------------------------------------------


def _text_row(line: Line, on_bad: OnBad | None) -> Iterator[Row]:
    """A prompt a line."""
    return _checked(line[0], partial(_prompt, *line), on_bad)


def _prompt(where: str, line: bytes) -> JsonObject:
    text = _decoded(where, line).strip()
    if "\r" in text:  # else a file of an old Mac would be one long prompt
        raise InputError(f"{where}: a carriage return inside of the line", line_feeds(where))
    return {"prompt": text}


_READERS: dict[str, Callable[[Path, OnBad | None], Iterator[Row]]] = {
    ".txt": _line_rows,
    ".parquet": _column_rows,
    ".arrow": _column_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
}
