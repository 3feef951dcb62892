"""One row of a file, with its place, and the renaming of its columns (`--columns`)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.yaml_files import closest

__all__ = ["OF_A_ROW", "ColumnNames", "OnBad", "Row", "kind"]


# Columns that the shapes of rows read; other names are for the columns of reward functions.
OURS = ("prompt", "completion", "messages", "chosen", "rejected")
# Columns by which one object is a row, not a wrapping of rows.
OF_A_ROW = frozenset({*OURS, "conversations", "conversation", "text"}) | {"question", "query", "problem", "instruction"}
UNUSED = "unused"  # what a column is called that should not be read
KNOWN = (
    *OURS,
    *("conversations", "text", "system"),
    *("question", "answer", "instruction", "input", "output", "response", "margin"),
)


@dataclass(frozen=True)
class Row:
    """One row of a data set. `where` is `"file:line"`; `aside`: what the file holds next to its rows, on the first."""

    where: str
    columns: JsonObject
    aside: tuple[str, ...] = ()

    def extra(self, *read: str) -> JsonObject:
        """The columns that are not among `read`."""
        return {name: value for name, value in self.columns.items() if name not in read}


OnBad = Callable[[InputError, Row], None]


def kind(value: object) -> str:
    """The JSON type of a value, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), f"the number {value}")


class ColumnNames:
    """The renames of `--columns OURS=THEIRS,...`: a column that the data set calls THEIRS is read as OURS.

    A column of the name OURS that a row has besides becomes `OURS_of_row`, so that nothing of the row is lost.
    Raises UsageError for an item without both names.
    """

    def __init__(self, items: Sequence[str] = ()) -> None:
        self.theirs: dict[str, str] = {}
        for item in items:
            ours, equals, theirs = (part.strip() for part in item.partition("="))
            if not (ours and equals and theirs):
                raise UsageError(
                    f"--columns {item!r} does not say both names", "write OURS=THEIRS, as in prompt=question"
                )
            if theirs in OURS and ours not in (*KNOWN, UNUSED):
                raise UsageError(f"--columns {item!r} is the wrong way round", f"write {theirs}={ours}")
            meant = difflib.get_close_matches(ours, KNOWN, n=1, cutoff=0.75)
            if ours not in KNOWN and meant:
                raise UsageError(f"--columns {item!r}: nothing reads {ours!r}", f"write {meant[0]}={theirs}")
            self.theirs[ours] = theirs
        self._unseen = set(self.theirs.values())
        self._present: set[str] = set()

    def apply(self, columns: JsonObject) -> JsonObject:
        """The columns of a row under the names that the suite reads."""
        if not self.theirs:
            return columns
        self._unseen -= columns.keys()
        self._present |= columns.keys()
        found = {ours: theirs for ours, theirs in self.theirs.items() if theirs in columns}
        rest = {name: value for name, value in columns.items() if name not in found.values()}
        kept = {f"{name}_of_row" if name in found else name: value for name, value in rest.items()}
        return {ours: columns[theirs] for ours, theirs in found.items()} | kept

    def check(self, where: str) -> None:
        """Raise InputError for a column that no row had."""
        if self._unseen and self._present:
            name = min(self._unseen)
            raise InputError(f"--columns: no row of {where} has a column {name!r}", closest(name, self._present))
