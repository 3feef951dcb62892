"""The user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from .home import text_at_home

__all__ = ["cache_folder"]


def cache_folder(name: str) -> Path:
    """Return a folder in the user's cache by the XDG base directory specification; it need not exist."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(text_at_home(given)) if given else Path.home() / ".cache") / "gemma2" / name
