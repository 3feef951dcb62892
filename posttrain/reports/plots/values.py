"""Values as text for people: digits chosen by the error, a true minus sign, a dash for a missing value. Pure."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

from gemma2.core.json_files import JsonMapping

from .point_kinds import is_merge, word_of

__all__ = [
    "as_yaml",
    "clipped",
    "column",
    "column_decimals",
    "columns_of",
    "duration",
    "end_of",
    "fixed",
    "label_of",
    "number",
    "rounded",
    "short_hash",
    "spreads",
    "start_of",
    "title_of",
    "with_error",
]


RUN = re.compile(r"(?:^|/)policy-(\d+)$")  # the directory of an RL run of WARP


def number(value: object, digits: int = 3) -> str:
    """A value with three significant digits and a true minus sign; a dash if it is missing or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "–"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"
    if "e" in text and abs(value) >= 1:
        text = f"{value:,.0f}"
    return text.replace("-", "−") if "e" not in text else text


def decimals_of(error: float) -> int:
    """Decimals by which to write a value with this error: two digits of the error if these are at most 29, else one.

    This follows the Particle Data Group.
    """
    if error <= 0:
        return 2
    exponent = math.floor(math.log10(error))
    return min(4, max(0, (1 if error / 10.0**exponent < 2.95 else 0) - exponent))


def rounded(value: float, error: float, sign: str = "") -> str:
    """A value with decimals chosen by its error; with `sign` "+", positive values have a plus sign."""
    return f"{value:{sign}.{decimals_of(error)}f}".replace("-", "−")


def with_error(point: JsonMapping, key: str, scale: float = 1.0) -> dict[str, str]:
    """`{"value", "error"}` of one column of a point; the error is "" if unknown."""
    return column([point], key, scale)[0]


def column(points: Sequence[JsonMapping], key: str, scale: float = 1.0) -> list[dict[str, str]]:
    """`{"value", "error"}` of every point, all with the same decimals; the error is "" if unknown."""
    decimals = column_decimals(points, key, scale)
    cells = []
    for point in points:
        value, error = point.get(key), (point.get(f"{key}_se") or 0.0) * scale
        if not isinstance(value, int | float):
            cells.append({"value": "–", "error": ""})
        else:
            cells.append({"value": fixed(value * scale, decimals), "error": fixed(error, decimals) if error else ""})
    return cells


def column_decimals(points: Sequence[JsonMapping], key: str, scale: float = 1.0) -> int:
    """Decimals for a column of values: those that the median of their errors asks for."""
    errors = sorted(error * scale for point in points if (error := point.get(f"{key}_se") or 0.0) > 0)
    return decimals_of(errors[len(errors) // 2] if errors else 0.0)


def spreads(points: Sequence[JsonMapping], key: str) -> list[str]:
    """Every value of a column with its interval, else its standard error, else alone, in the same decimals."""
    decimals = column_decimals(points, key)
    found = []
    for point in points:
        value, low, high, error = (point.get(f"{key}{part}") for part in ("", "_low", "_high", "_se"))
        text = "–" if value is None else fixed(value, decimals)
        if value is not None and low is not None and high is not None:
            text += f" ({fixed(low, decimals)} to {fixed(high, decimals)})"
        elif value is not None and error:
            text += f" ± {fixed(error, decimals)}"
        found.append(text)
    return found


def fixed(value: float, decimals: int) -> str:
    """A value with this many decimals and a true minus sign; never a negative zero."""
    text = f"{value:.{decimals}f}"
    return (text.removeprefix("-") if float(text) == 0 else text).replace("-", "−")


def duration(seconds: float | None) -> str:
    """A time such as `12 s`, `3 min 05 s` or `2 h 10 min`."""
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


def title_of(point: JsonMapping) -> str:
    """Name of a policy before RL: the title in its point, else base or SFT."""
    return str(point.get("title") or {"base": "base", "sft": "SFT"}[point["kind"]])


def label_of(point: JsonMapping) -> str:
    """The one name of a point, in tables, pictures, CSV and sentences: `distilled`, `RL 1.2` (run 2 of iteration 1),
    `SLERP 2`, `SLERP 2, η 0.3`, `RL 1.2, step 30`. Another merge in an iteration has the name of its folder, and
    a point outside the iterations of WARP its own name."""
    kind, name, iteration = point["kind"], str(point.get("name", "")), point.get("iteration")
    if kind in ("base", "sft"):
        return title_of(point)
    if kind == "trajectory":
        run = {**point, "kind": "policy", "name": str(point.get("run", name))}
        return f"{label_of(run)}, step {point.get('step', '?')}"
    if kind == "line":
        eta = point["eta"]
        if not iteration:
            return re.sub(r"\beta (?=[\d.]+$)", "η ", name) or f"η {eta:g}"
        merged = str(point.get("merged") or "slerp")
        end = label_of({"kind": end_of(point), "name": merged, "iteration": iteration})
        return end if eta == 1 else f"{end}, η {eta:g}"
    if not iteration:
        return name
    if is_merge(kind):
        folder = name.rpartition("/")[2]
        named = folder == kind or (kind, folder) == ("liti", "init")  # as WARP names them; else there may be several
        return f"{word_of(kind)} {iteration}" if named else f"iteration-{iteration}/{folder}"
    run_number = RUN.search(name)
    return f"RL {iteration}.{run_number[1]}" if run_number else name


def end_of(point: JsonMapping) -> str:
    """The kind of the merged end of a line; of a front that does not record it, by the name of its directory."""
    return str(point.get("end") or ("policy" if RUN.search(str(point.get("merged") or "")) else "slerp"))


def start_of(points: Iterable[JsonMapping]) -> str:
    """Name of the policy from which RL started and to which KL is measured: SFT, or distilled."""
    return next((title_of(point) for point in points if point["kind"] == "sft"), "SFT")


def as_yaml(config: JsonMapping) -> str:
    """A configuration as the YAML of a recipe."""
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def clipped(text: str, size: int) -> str:
    """The text in at most `size` columns; the middle is cut, because names differ at both ends."""
    if columns_of(text) <= size:
        return text
    tail = fitting(reversed(text), size // 2)[::-1]
    return f"{fitting(text, size - 1 - columns_of(tail))}…{tail}"


def fitting(text: Iterable[str], size: int) -> str:
    """The longest start of a text that fits into `size` columns."""
    kept, used = [], 0
    for char in text:
        used += columns_of(char)
        if used > size:
            break
        kept.append(char)
    return "".join(kept)


def columns_of(text: str) -> int:
    """Columns of a text in a terminal: two for a wide character, none for a combining one."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
