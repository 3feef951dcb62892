"""Reads the data sets of a command, and keeps tally: what a row says is read, refused, left out or named.

    --columns OURS=THEIRS      names that a data set gives to its columns
    --ignore-keys KEY          keys of messages that are left out knowingly
    --on-bad-row skip          rows that cannot be learned are left out, counted, and written to skipped.jsonl

`report` tells the rest once for each data set: files of a folder and columns of rows that are not read, and what was
read in another way than it stands in the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.manifest import MANIFEST
from gemma2.core.progress import Progress

from .rows import Conversation, Pair, Prompt, conversation_of, pair_of, prompt_of
from .shapes.turns import SKIP_HINT, IgnoredKeys, UnknownKeys, unknown_hint
from .sources import ColumnNames, Row, RowSample, find_files, iter_rows, no_rows, to_line

if TYPE_CHECKING:
    from .chat import ChatFormat  # imports transformers

__all__ = ["SKIPPED", "Reading", "RowOptions", "Tally"]

SKIPPED = "skipped.jsonl"
SHOWN = 4  # names in one warning
LATER_KEYS = 100_000  # rows that are searched for further keys before the first is refused
# Columns that change what a conversation means; a prompt with one of them is another prompt.
OF_THE_CONVERSATION = ("tools", "functions", "images", "image", "videos", "audio", "audios")


class RowOptions(Protocol):
    """The fields of a configuration that concern the reading of rows."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def ignore_keys(self) -> tuple[str, ...]: ...

    @property
    def on_bad_row(self) -> Literal["error", "skip"]: ...


@dataclass
class Tally:
    """What was found in one data set."""

    shapes: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)  # columns that nothing reads, and in how many rows
    notes: Counter[str] = field(default_factory=Counter)
    aside: list[str] = field(default_factory=list)  # files of a folder that are not read
    keys: Counter[str] = field(
        default_factory=Counter
    )  # keys next to the rows of a JSON document, and in how many files


@dataclass(frozen=True)
class Skipped:
    """A row that was left out."""

    error: str
    hint: str
    columns: JsonObject


Read = TypeVar("Read", Prompt, Conversation, Pair)


class Reading:
    """The reading of all data sets of one command.

    Raises UsageError for `--columns` or `--ignore-keys` that cannot be meant.
    """

    def __init__(
        self, options: RowOptions, change: Callable[[Row], Row] | None = None, sample: RowSample | None = None
    ) -> None:
        self._change = change  # applied to each row before it is read
        self._sample = sample  # reads a part of large files, for checks
        self.ignored = IgnoredKeys(options.ignore_keys)
        self.skips = options.on_bad_row == "skip"
        self._columns = options.columns
        self._names = ColumnNames(options.columns)
        self.tallies: dict[Path, Tally] = {}
        self.skipped: dict[str, Skipped] = {}

    def prompts(self, path: Path, limit: int | None = None) -> list[Prompt]:
        """The prompts of a data path, at most `limit`. Raises InputError at the first bad row, and for no row."""
        return self._all(path, self.each_prompt(path, limit))

    def each_prompt(self, path: Path, limit: int | None = None) -> Iterator[Prompt]:
        """The same, streamed."""
        return islice(self.each(path, lambda row: prompt_of(row, self.ignored)), limit)

    def conversations(self, path: Path, limit: int | None = None) -> list[Conversation]:
        """The conversations of a data path, at most `limit`. Raises InputError at the first bad row."""
        return self._all(path, self.each_conversation(path, limit))

    def each_conversation(self, path: Path, limit: int | None = None) -> Iterator[Conversation]:
        """The same, streamed."""
        return islice(self.each(path, lambda row: conversation_of(row, self.ignored)), limit)

    def pairs(self, path: Path, limit: int | None = None) -> list[Pair]:
        """The preference pairs of a data path, at most `limit`. Raises InputError at the first bad row."""
        return self._all(path, self.each_pair(path, limit))

    def each_pair(self, path: Path, limit: int | None = None) -> Iterator[Pair]:
        """The same, streamed."""
        return islice(self.each(path, lambda row: pair_of(row, self.ignored)), limit)

    def first_error(self) -> str | None:
        """The error of the first row that was left out."""
        return next((row.error for row in self.skipped.values()), None)

    def rows(self, path: Path, limit: int | None = None) -> Iterator[Row]:
        """The rows as they stand in the files, under the names of `--columns`."""
        self.tallies[path] = Tally(aside=find_files(path).aside)
        for row in iter_rows(path, limit, self._unreadable if self.skips else None, self._names, self._sample):
            self.tallies[path].keys.update(row.aside)
            yield row if self._change is None else self._change(row)

    def each(self, path: Path, parse: Callable[[Row], Read]) -> Iterator[Read]:
        """The rows of a data path as `parse` reads them, streamed. Raises InputError at a bad row, or skips it."""
        is_output = (path / MANIFEST).exists()
        tally = Tally()
        rows = self.rows(path)
        for row in rows:
            tally = self.tallies[path]
            if row.where in self.skipped:
                continue
            try:
                found = parse(row)
            except UnknownKeys as error:
                self.skip(error if self.skips else _with_later_keys(error, rows, parse), row.where, row.columns)
                continue
            except InputError as error:
                self.skip(self._as_renamed(error), row.where, row.columns)
                continue
            tally.shapes[found.shape] += 1
            tally.notes.update(found.notes)
            foreign = found.extra.keys() if not (is_output or isinstance(found, Prompt)) else OF_THE_CONVERSATION
            tally.unread.update(name for name in foreign if found.extra.get(name) not in (None, "", [], {}))
            yield found

    def skip(self, error: InputError, where: str, columns: JsonObject) -> None:
        """Leave a row out, with `--on-bad-row skip`; else raise the error."""
        if not self.skips:
            raise error
        self.skipped.setdefault(where, Skipped(error.what, error.hint, columns))

    @contextmanager
    def usable(self, row: Prompt | Conversation | Pair) -> Iterator[None]:
        """Take an InputError inside the block for a fault of the row, which is named in front of it."""
        try:
            yield
        except InputError as error:
            hint = error.hint if self.skips or SKIP_HINT in error.hint else f"{error.hint}, or {SKIP_HINT}"
            self.skip(InputError(f"{row.where}: {error.what}", hint), row.where, _columns_of(row))

    def renderable(self, prompts: list[Prompt], chat: ChatFormat) -> list[Prompt]:
        """The prompts that the chat template takes. Raises InputError at the first other one, unless it is skipped."""
        found = []
        for prompt in prompts:
            with self.usable(prompt):
                chat.check_prompt(prompt.messages)
                found.append(prompt)
        if prompts and not found:
            raise InputError(f"the chat template takes none of {len(prompts)} prompts", "see docs/data.md")
        return found

    def check_columns(self) -> None:
        """Raise InputError for a column of `--columns` that no row had. Call it when everything is read."""
        self._names.check(", ".join(map(str, self.tallies)))

    def keys_without_use(self) -> list[str]:
        """The keys of `--ignore-keys` that no message had, once everything is read."""
        is_read = any(tally.shapes for tally in self.tallies.values())  # and not by another process, as in filter
        return sorted(self.ignored - self.ignored.used) if is_read else []

    def report(self, progress: Progress, folder: Path | None = None, carried: bool = False) -> JsonObject:
        """Tell what was not read, write the rows that were left out to `folder`; the counts for the manifest.

        carried  the other columns of the rows go into the output, so that they need no mention
        """
        self.check_columns()
        for key in self.keys_without_use():
            progress.warn(f"--ignore-keys {key}: no message that was read has this key")
        counts: JsonObject = {}
        if carried:
            for tally in self.tallies.values():
                tally.unread.clear()
        for path, tally in self.tallies.items():
            for words, found in self._told(path, tally):
                progress.warn(f"{path}: {words} {_listed(found)}")
        unread = sum((tally.unread for tally in self.tallies.values()), Counter())
        if unread:
            counts["unread_columns"] = dict(unread)
        aside = [f"{path}/{name}" for path, tally in self.tallies.items() for name in tally.aside]
        if aside:
            counts["unread_files"] = aside
        keys = sum((tally.keys for tally in self.tallies.values()), Counter())
        if keys:
            counts["unread_keys"] = dict(keys)
        if self.skipped:
            listed = f" (all in {SKIPPED})" if folder is not None else ""
            files = Counter(where.rpartition(":")[0] for where in self.skipped)
            of = [f"{count} of {file}" for file, count in files.most_common()]
            by_file = f" ({_listed(of)})" if len(files) > 1 else ""
            progress.warn(f"rows left out: {len(self.skipped)}{by_file}{listed}, the first: {self.first_error()}")
            counts["skipped_rows"] = len(self.skipped)
            if folder is not None:
                rows = self.skipped.values()
                lines = [to_line({"error": row.error, "fix": row.hint, "row": row.columns}) for row in rows]
                (folder / SKIPPED).write_bytes(b"".join(lines))
        return counts

    def _told(self, path: Path, tally: Tally) -> Iterator[tuple[str, list[str]]]:
        """What is worth a line: words, and what they are about."""
        if tally.aside:
            yield "not read:", tally.aside
        if tally.keys:
            yield "keys next to the rows that are not read:", list(tally.keys)
        if tally.unread:
            yield "columns that are not read:", [f"{name} ({count} rows)" for name, count in tally.unread.items()]
        for note, count in tally.notes.items():
            yield f"{note}:", [f"{count} rows"]

    def _as_renamed(self, error: InputError) -> InputError:
        """An error of a row under the names of `--columns`: a name that no row has comes first; advice repeats them."""
        if not self.skips:
            self.check_columns()
        renames = ",".join(self._columns)
        hint = error.hint.replace("--parse-json", f"--columns {renames} --parse-json") if renames else error.hint
        return error if hint == error.hint else InputError(error.what, hint)

    def _all(self, path: Path, rows: Iterable[Read]) -> list[Read]:
        found = list(rows)
        if found:
            return found
        if self.skipped:
            what = f"no row of {path} can be used, the first: {self.first_error()}"
            raise InputError(what, "see docs/data.md for what is read")
        raise no_rows(path)

    def _unreadable(self, error: InputError, row: Row) -> None:
        self.skip(error, row.where, row.columns)


def _with_later_keys(error: UnknownKeys, rows: Iterator[Row], parse: Callable[[Row], object]) -> UnknownKeys:
    """The error with the keys of the rows that follow too, so that its advice holds for all of them."""
    keys = set(error.keys)
    for row in islice(rows, LATER_KEYS):
        try:
            parse(row)
        except UnknownKeys as later:
            keys |= later.keys
        except InputError:
            continue
    return UnknownKeys(error.what, unknown_hint(keys), keys)


def _columns_of(row: Prompt | Conversation | Pair) -> JsonObject:
    if isinstance(row, Pair):
        return {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected, **row.extra}
    return {"messages": row.messages, **row.extra}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
