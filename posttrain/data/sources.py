"""Reading and writing rows: JSONL, parquet and text files, folders of them, outputs, hub data sets.

    PATH                          a JSONL file; *.parquet; *.txt with one prompt a line
    DIR                           an output of generate, filter or reward pairs, or a plain folder of such files
    ORG/NAME[:CONFIG][@SPLIT]     a data set of the hub (split: train), copied into the cache as parquet

Torch-free. Every refusal names file, line (of a text file) or row (of a parquet file), the fault and the fix.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.cache import cache_folder
from gemma2.core.outputs.manifest import MANIFEST, require_complete

__all__ = ["Row", "ShardWriter", "count_rows", "data_files", "iter_rows", "kind", "to_line"]

OnBad = Callable[[InputError], None]

SUFFIXES = (".jsonl", ".parquet", ".txt")
OUTPUTS = ("data-*.jsonl", "data.jsonl", "pairs.jsonl")
SHARD = re.compile(r"data-(\d{5})-of-(\d{5})\.jsonl")
HUB_SET = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?", re.ASCII)


@dataclass(frozen=True)
class Row:
    """One row of a data set. `where` is `"file:line"`."""

    where: str
    columns: JsonObject

    def extra(self, *read: str) -> JsonObject:
        """The columns that are not among `read`."""
        return {name: value for name, value in self.columns.items() if name not in read}


def data_files(path: Path) -> list[Path]:
    """The files that a data path names, in the order in which they are read.

    Raises InputError when the path holds none, when an output is unfinished, or when the hub lacks the set.
    """
    if path.is_dir():
        return _files_inside(path)
    if path.is_file():
        return [path]
    if path.exists():
        raise InputError(f"{path} is not a regular file", "give a data file or a directory")
    if is_hub_set(path):
        return [_from_hub(str(path))]
    raise InputError(f"{path} does not exist", "give a data file, a directory, or a hub data set ORG/NAME")


def iter_rows(path: Path, limit: int | None = None, on_bad: OnBad | None = None) -> Iterator[Row]:
    """The rows behind a data path, at most `limit`, streamed.

    Raises InputError at the first row that cannot be read; with `on_bad` the error goes there and the row is left out.
    """
    count = 0
    for file in data_files(path):
        for row in _READERS.get(file.suffix, _json_rows)(file, on_bad):
            yield row
            count += 1
            if count == limit:
                return


def count_rows(path: Path) -> int:
    """Rows behind a data path, without parsing them. Raises InputError when the path holds none."""
    rows = sum(_count(file) for file in data_files(path))
    if rows == 0:
        raise InputError(f"{path} has no rows", "write one JSON object per line")
    return rows


def to_line(columns: JsonMapping) -> bytes:
    """One row as a line of JSONL, UTF-8."""
    return (json.dumps(columns, ensure_ascii=False) + "\n").encode("utf-8")


class ShardWriter:
    """Writes rows to `data-00000-of-0000N.jsonl`, `shard_rows` to a file, as the hub names them.

    N is known at the end: the files get their names when the block ends without an error. Without a row there is one
    empty file.
    """

    def __init__(self, directory: Path, shard_rows: int) -> None:
        self.directory = directory
        self.shard_rows = shard_rows
        self.rows = 0
        self._file: BinaryIO | None = None
        self._paths: list[Path] = []

    def write(self, row: JsonMapping) -> None:
        """Append one row."""
        if self._file is None or self.rows % self.shard_rows == 0:
            self._next()
        assert self._file is not None
        self._file.write(to_line(row))
        self.rows += 1

    def _next(self) -> None:
        self._close()
        self._paths.append(self.directory / f".data-{len(self._paths):05d}.tmp")
        self._file = self._paths[-1].open("wb")

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._paths and error is None:
            self._next()
        self._close()
        for number, path in enumerate(self._paths):
            if error is None:
                path.replace(self.directory / f"data-{number:05d}-of-{len(self._paths):05d}.jsonl")
            else:
                path.unlink()


def is_hub_set(path: Path) -> bool:
    """Whether a path that is not here can be a hub data set: no data file's suffix, and no folder of that name here."""
    plausible = HUB_SET.fullmatch(str(path)) is not None and path.suffix not in SUFFIXES
    return plausible and not Path(path.parts[0]).exists()


def kind(value: object) -> str:
    """The JSON type of a value, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), f"the number {value}")


def _files_inside(directory: Path) -> list[Path]:
    if (directory / MANIFEST).exists():
        require_complete(directory, "data set")
        found = next((sorted(directory.glob(name)) for name in OUTPUTS if any(directory.glob(name))), [])
        hint = "give the output of generate, filter or reward pairs, or name the file"
    else:
        found = sorted(path for path in directory.iterdir() if path.suffix in SUFFIXES and path.is_file())
        hint = f"put {', '.join(SUFFIXES)} files there"
    if not found:
        raise InputError(f"{directory} is a directory without data", hint)
    _check_shards(directory, found)
    return found


def _check_shards(directory: Path, files: list[Path]) -> None:
    """Refuse a set of shards of which one is missing: less data would be learned without a word."""
    shards = [found for file in files if (found := SHARD.fullmatch(file.name))]
    if shards and len(shards) != int(shards[0][2]):
        what = f"{directory} holds {len(shards)} of {int(shards[0][2])} shards"
        raise InputError(what, "copy all data-*.jsonl files")


def _json_rows(path: Path, on_bad: OnBad | None) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = Row(where, _parse(where, line))
            except InputError as error:
                if on_bad is None:
                    raise
                on_bad(error)
            else:
                yield row


def _parse(where: str, line: bytes) -> JsonObject:
    try:
        columns = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1})", "convert it") from error
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})", "write one JSON object per line") from error
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply", "write one flat JSON object per line") from error
    if not isinstance(columns, dict):
        raise InputError(f"{where}: {kind(columns)}, not a JSON object", 'write {"column": value, ...}')
    return columns


def _text_rows(path: Path, on_bad: OnBad | None) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                what = f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start + 1})"
                if on_bad is None:
                    raise InputError(what, "convert it") from error
                on_bad(InputError(what, "convert it"))
                continue
            if text:
                yield Row(f"{path}:{number}", {"prompt": text})


def _parquet_rows(path: Path, on_bad: OnBad | None) -> Iterator[Row]:
    """Rows of a parquet file, a batch at a time; a file is whole or broken, so no single row can be left out."""
    number = 0
    with _open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for columns in batch.to_pylist():
                number += 1
                yield Row(f"{path}:{number}", columns)


def _open_parquet(path: Path) -> Any:  # noqa: ANN401
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        detail = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is not a readable parquet file ({detail})", "write it again") from error


_READERS: dict[str, Callable[[Path, OnBad | None], Iterator[Row]]] = {".txt": _text_rows, ".parquet": _parquet_rows}


def _count(path: Path) -> int:
    if path.suffix == ".parquet":
        with _open_parquet(path) as file:
            return int(file.metadata.num_rows)
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _from_hub(name: str) -> Path:
    """A hub data set as one parquet file in the cache; fetched at the first use.

    Its name holds the fingerprint of the content, so that a set that changed on the hub is another file.
    """
    import datasets

    found = HUB_SET.fullmatch(name)
    assert found is not None
    split = found["split"] or "train"
    try:
        loaded = datasets.load_dataset(found["name"], found["config"], split=split)
    except (OSError, ValueError) as error:  # not found, offline, no such config or split
        detail = " ".join(str(error).split())[:160]
        raise InputError(
            f"{name} is not a file here, and cannot be loaded from the hub ({detail})",
            "give a file, or check name, config and split; go online once if HF_HUB_OFFLINE is set",
        ) from error
    folder = cache_folder("data")
    folder.mkdir(parents=True, exist_ok=True)
    plain = re.sub(r"[^\w.-]+", "--", f"{found['name']}-{found['config'] or 'default'}-{split}")
    target = folder / f"{plain}-{loaded._fingerprint}.parquet"
    if not target.exists():
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        loaded.to_parquet(str(aside))
        aside.replace(target)
    return target
