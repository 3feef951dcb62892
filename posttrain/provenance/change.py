"""A difference between the record of an output and what would be made now: named in short, shown in full on request."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def shown(value: object, longest: int | None = LONGEST) -> str:
    """Return a value as it is written in a pipeline file, cut where it is long; `nothing` for what is empty."""
    text = _text(value)
    return text if longest is None or len(text) <= longest else f"{text[: longest - 3]}..."


def _text(value: object) -> str:
    if value is None or value in ("", [], {}, ()):
        return "nothing"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
