"""Text of others as it may be shown: names of files and columns, manifests, errors of servers and libraries.

A control character can move the cursor, retitle the terminal or hide a line; a direction mark can reverse one.
"""

from __future__ import annotations

import re

__all__ = ["visible", "visible_json"]

KEPT = "\n\t"
# DEL, C1 controls, directions of writing, and halves of characters that no terminal can encode.
STEERING = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return text with secrets masked and every character escaped that steers a terminal; line ends and tabs stay.

    It is applied once, where text leaves for the terminal (`cli/terminal/console.py`, `cli/main.py`).
    """
    text = _masked(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in KEPT or _is_blank(char) else _escaped(char) for char in text)


def visible_json(text: str) -> str:
    """Return a JSON text with secrets masked and the characters escaped, as JSON does, that steer a terminal."""
    return STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", _masked(text))


def _masked(text: str) -> str:
    from gemma2.core.secret_text import masked  # takes 5 ms, which --help must not pay

    return masked(text)


def _is_blank(char: str) -> bool:
    """Whether it is a blank of some width; `isprintable` knows only the common one."""
    return char.isspace() and char >= "\xa0" and char not in "\u2028\u2029"


def _escaped(char: str) -> str:
    return ascii(char)[1:-1]
