"""The account of an import: every key of the foreign file, and what became of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gemma2.core.json_files import JsonObject
from gemma2.core.yaml_files import to_yaml

__all__ = ["KeyAccount", "KeyRow", "Verdict", "shown"]

# taken: stands in the recipe; default: what happens here without a setting; unneeded: nothing has to stand for it;
# missing: no counterpart; implied: not in the file, the other tool's default.
Verdict = Literal["taken", "default", "unneeded", "missing", "implied"]
LONGEST = 60  # characters of a value that the account shows


@dataclass(frozen=True)
class KeyRow:
    """One key of the foreign file.

    here     our settings for it, as the recipe has them
    why      the reason, or how the value was converted
    decides  whether results depend on it, for a key without a counterpart
    """

    key: str
    value: object
    verdict: Verdict
    here: str = ""
    why: str = ""
    decides: bool = False


@dataclass
class KeyAccount:
    """A foreign file while it is read: what is left of it, the rows so far, and our settings.

    fields  keys and defaults of the command that the recipe is for
    lists   those of the keys that take several values
    given   the whole file
    """

    path: Path
    given: JsonObject
    fields: Mapping[str, object]
    lists: frozenset[str] = frozenset()
    left: JsonObject = field(init=False)
    rows: list[KeyRow] = field(default_factory=list)
    ours: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.left = dict(self.given)

    def has(self, key: str) -> bool:
        """Whether a key is in the file with a value, and nothing has been said about it."""
        return self.left.get(key) is not None

    def take(self, key: str, settings: Mapping[str, object], why: str = "") -> None:
        """A key of the file becomes these settings; without any, it is what happens here anyway."""
        value = self.left.pop(key, self.given.get(key))
        self._set(settings)
        same = all(self.fields.get(name) == setting for name, setting in settings.items())
        self.rows.append(KeyRow(key, value, "default" if same else "taken", spelt(settings), why))

    def imply(self, key: str, value: object, settings: Mapping[str, object], why: str) -> None:
        """A key that the file does not have, whose default in the other tool decides results."""
        self._set(settings)
        if any(self.fields.get(name) != setting for name, setting in settings.items()):
            self.rows.append(KeyRow(key, value, "implied", spelt(settings), why))

    def drop(self, key: str, why: str) -> None:
        """Nothing has to stand for a key of the file."""
        if key in self.left:
            self.rows.append(KeyRow(key, self.left.pop(key), "unneeded", why=why))

    def lack(self, key: str, why: str, decides: bool = True) -> None:
        """A key of the file has no counterpart."""
        value = self.left.pop(key, self.given.get(key))
        self.rows.append(KeyRow(key, value, "missing", why=why, decides=decides))

    def gap(self, key: str, value: object, why: str, decides: bool = True) -> None:
        """A part of a key's value, or of the other tool's defaults, has no counterpart."""
        self.rows.append(KeyRow(key, value, "missing", why=why, decides=decides))

    def _set(self, settings: Mapping[str, object]) -> None:
        for name, setting in settings.items():
            section, dot, inner = name.partition(".")
            if dot:
                self.ours.setdefault(section, {})[inner] = setting
            else:
                self.ours[name] = setting

    @property
    def undecided(self) -> list[KeyRow]:
        """The rows without a counterpart on which results depend."""
        return [row for row in self.rows if row.verdict == "missing" and row.decides]

    def ordered(self, names: Collection[str]) -> JsonObject:
        """Our settings in the order of the command's fields."""
        return {name: self.ours[name] for name in names if name in self.ours}


def spelt(settings: Mapping[str, object]) -> str:
    """Settings as a recipe has them, on one line."""
    return ", ".join(f"{name}: {shown(value)}" for name, value in settings.items())


def shown(value: object) -> str:
    """A value as YAML has it, on one line, cut if it is long."""
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(shown, value))}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{key}: {shown(item)}' for key, item in value.items())}}}"
    else:
        text = to_yaml({"x": value}).removeprefix("x:").strip()
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
