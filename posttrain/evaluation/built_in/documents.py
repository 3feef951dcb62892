"""The documents of a perplexity: a text file is one, a row with `text` is one. Torch-free.

Files of rows are JSONL, JSON, CSV, TSV, parquet and arrow, packed or not, folders and hub data sets; the column may
have another name (`--columns text=content`). Any other file is read as UTF-8 text, line ends and blanks as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.posttrain.data.files.folders import SUFFIXES, format_of
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.data.shapes.recognise import columns_hint, present
from gemma2.posttrain.data.sources import Row, kind

__all__ = ["documents_of", "each_document", "is_one_text"]

ROWS = tuple(suffix for suffix in SUFFIXES if suffix != ".txt")


def is_one_text(path: Path) -> bool:
    """Whether a path is a text file: one document."""
    return path.is_file() and format_of(path) not in ROWS


def each_document(path: Path, reading: Reading, limit: int | None = None) -> Iterator[Prompt]:
    """The documents of a path, streamed, each as one message.

    Raises InputError for a file that is not UTF-8, and for a row without a text.
    """
    if is_one_text(path):
        yield Prompt(str(path), [{"role": "user", "content": _whole_text(path)}], shape="text")
        return
    yield from islice(reading.each(path, _text_row), limit)


def documents_of(path: Path, reading: Reading, limit: int | None = None) -> Iterator[str]:
    """The texts of `each_document`."""
    return (row.messages[0]["content"] for row in each_document(path, reading, limit))


def _whole_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:  # line ends as they are: they are bytes of the text
            text = file.read()
    except UnicodeDecodeError as error:
        what = f"{path} is not UTF-8 text (byte {error.start:,})"
        raise InputError(what, "give text, or rows as JSONL, CSV or parquet") from error
    if not text.strip():
        raise InputError(f"{path} has no text", "give a file with text")
    return text


def _text_row(row: Row) -> Prompt:
    columns = present(row)
    if "text" not in columns:
        raise InputError(f"{row.where}: no 'text'", columns_hint(columns, "text"))
    text = columns["text"]
    if not isinstance(text, str):
        raise InputError(f"{row.where}: 'text' is {kind(text)}", "write a text")
    if not text.strip():
        raise InputError(f"{row.where}: 'text' is empty", "leave the row out (--on-bad-row skip)")
    return Prompt(row.where, [{"role": "user", "content": text}], row.extra("text"), "text")
