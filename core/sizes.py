"""Numbers in sentences: sizes with a unit that fits, and pairs of numbers with enough digits to show that they differ.

Pure.
"""

from __future__ import annotations

__all__ = ["apart", "size", "sizes_apart"]

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
MOST = 17  # significant digits that tell any two floats apart


def size(count: float, digits: int = 3) -> str:
    """Return bytes for people: `digits` significant digits and a unit in which they are 1 or more, such as 5.23 GB."""
    power = 0
    while power < len(UNITS) - 1 and float(f"{count / 1000**power:.{digits}g}") >= 1000:
        power += 1
    amount = count / 1000**power
    return f"{amount:.0f} B" if power == 0 else f"{_plain(amount, digits)} {UNITS[power]}"


def apart(a: float, b: float, digits: int = 4) -> tuple[str, str]:
    """Return two numbers with `digits` significant digits, or as many more as show that they differ."""
    a, b = a or 0, b or 0  # 0 and -0 are one number
    for count in range(digits, MOST + 1):
        texts = f"{a:.{count}g}", f"{b:.{count}g}"
        if texts[0] != texts[1] or a == b:
            return texts
    return texts


def sizes_apart(a: float, b: float, digits: int = 3) -> tuple[str, str]:
    """Return two sizes as `size` does, with more digits where they would read the same."""
    for count in range(digits, MOST + 1):
        texts = size(a, count), size(b, count)
        if texts[0] != texts[1] or a == b:
            return texts
    return f"{a:.0f} B", f"{b:.0f} B"


def _plain(value: float, digits: int) -> str:
    """A number of 1 or more with `digits` significant digits, never in powers of ten."""
    whole = len(str(int(value)))
    return f"{value:.{max(0, digits - whole)}f}"
