"""A difference between the record of an output and what would be made now: named in short, shown in full on request."""

from __future__ import annotations

import json
from dataclasses import dataclass

__all__ = ["Change", "shown"]

LONGEST = 60  # characters of a value in a line


@dataclass(frozen=True)
class Change:
    """what: the setting, the file or the module. was, now: values, digests or versions; None for nothing."""

    what: str
    was: object = None
    now: object = None
    by_value: bool = False  # whether the line says the values: of a setting; a digest says nothing

    def __str__(self) -> str:
        return f"{self.what} ({shown(self.was)} -> {shown(self.now)})" if self.by_value else self.what


def shown(value: object, longest: int = LONGEST) -> str:
    """Return a value as it is written in a pipeline file, cut where it is long; `nothing` for None."""
    if value is None or value == [] or value == {}:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
