"""Values as people read them: digits that the error deserves, a true minus sign, a dash for nothing. Pure."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "as_yaml",
    "clipped",
    "columns_of",
    "duration",
    "number",
    "rounded",
    "short_hash",
    "start_of",
    "title_of",
    "with_error",
]


def number(value: object, digits: int = 3) -> str:
    """Three significant digits, a true minus sign, a dash for nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "–"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"
    if "e" in text and abs(value) >= 1:
        text = f"{value:,.0f}"
    return text.replace("-", "−") if "e" not in text else text


def decimals_of(error: float) -> int:
    """Decimals that an error deserves: two digits of it up to 29, else one (the Particle Data Group's habit)."""
    if error <= 0:
        return 2
    exponent = math.floor(math.log10(error))
    return min(4, max(0, (1 if error / 10.0**exponent < 2.95 else 0) - exponent))


def rounded(value: float, error: float, sign: str = "") -> str:
    """A value with the decimals that its error deserves; `sign` is "+" to always show one."""
    return f"{value:{sign}.{decimals_of(error)}f}".replace("-", "−")


def with_error(point: Mapping[str, Any], key: str, scale: float = 1.0) -> dict[str, str]:
    """`{"value", "error"}` of one column of a point; the error is "" where there is none."""
    value, error = point.get(key), (point.get(f"{key}_se") or 0.0) * scale
    if not isinstance(value, int | float):
        return {"value": "–", "error": ""}
    return {"value": rounded(value * scale, error), "error": rounded(error, error) if error else ""}


def duration(seconds: float | None) -> str:
    """`12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def short_hash(digest: str | None) -> str:
    """The first ten digits of a digest."""
    return (digest or "").rpartition(":")[2][:10]


def title_of(point: Mapping[str, Any]) -> str:
    """What a policy before RL is called: the title that it was measured under, else base or SFT."""
    return str(point.get("title") or {"base": "base", "sft": "SFT"}[point["kind"]])


def start_of(points: Iterable[Mapping[str, Any]]) -> str:
    """What the policy is called that RL started from and KL is measured to: SFT, or distilled."""
    return next((title_of(point) for point in points if point["kind"] == "sft"), "SFT")


def as_yaml(config: Mapping[str, Any]) -> str:
    """A configuration as a recipe."""
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def clipped(text: str, size: int) -> str:
    """At most `size` columns: the middle goes, since names differ at both ends."""
    if columns_of(text) <= size:
        return text
    tail = fitting(reversed(text), size // 2)[::-1]
    return f"{fitting(text, size - 1 - columns_of(tail))}…{tail}"


def fitting(text: Iterable[str], size: int) -> str:
    """The first characters, as far as they fit into `size` columns."""
    kept, used = [], 0
    for char in text:
        used += columns_of(char)
        if used > size:
            break
        kept.append(char)
    return "".join(kept)


def columns_of(text: str) -> int:
    """Columns that a text takes in a terminal: two for a wide character, none for a combining one."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
