"""The user's folders: the cache, and `~` in paths, also where no shell replaces it (`--out=~/x`, `a,~/b`, YAML)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeVar

__all__ = ["at_home", "cache_folder", "text_at_home"]

T = TypeVar("T")
START = re.compile(r"(?:^|(?<=\+))~(?=/|$)|^~[^/+]+")  # `~`, `~name`, and both parts of MODEL+ADAPTER


def text_at_home(text: str) -> str:
    """The text of a path with `~` replaced by the user's home; unchanged if it does not begin with one."""
    return START.sub(lambda found: os.path.expanduser(found[0]), text) if "~" in text else text


def at_home(value: T) -> T:
    """A path, or a list of paths, with `~` replaced; other values unchanged."""
    if isinstance(value, Path):
        return type(value)(text_at_home(str(value)))
    if isinstance(value, list | tuple):
        return type(value)(at_home(item) for item in value)
    return value


def cache_folder(name: str) -> Path:
    """Return a folder in the user's cache by the XDG base directory specification; it need not exist."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(text_at_home(given)) if given else Path.home() / ".cache") / "gemma2" / name
