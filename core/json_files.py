"""JSON files: objects read with errors that name the file, and written in one rename."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemma2.core.errors import InputError
from gemma2.core.limits import JSON_BYTES, JSON_ITEMS, read_text

__all__ = ["JsonMapping", "JsonObject", "finite", "load_json", "parse_json", "read_json", "write_json"]

# An object of a JSON or YAML file. Its values may have any type, so the reader of a key checks it.
JsonObject = dict[str, Any]
JsonMapping = Mapping[str, Any]


Pairs = list[tuple[str, object]]


def parse_json(text: str | bytes, of_pairs: Callable[[Pairs], object] | None = None) -> Any:  # noqa: ANN401
    """Return the value of a JSON text of others. Raises JSONDecodeError, a ValueError, also for one out of bounds.

    of_pairs  makes the value of each object, from its keys and values
    """
    if len(text) > JSON_ITEMS and _items(text) > JSON_ITEMS:
        raise json.JSONDecodeError(f"more than {JSON_ITEMS:,} items", "", 0)
    try:
        return json.loads(text, object_pairs_hook=of_pairs)
    except (json.JSONDecodeError, InputError):
        raise
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", "", 0) from error
    except ValueError as error:  # not UTF-8, a number of thousands of digits
        raise json.JSONDecodeError(" ".join(str(error).split()), "", 0) from error


def _items(text: str | bytes) -> int:
    """At least the number of values in a JSON text, without reading it."""
    if isinstance(text, bytes):
        return text.count(b",") + text.count(b"[") + text.count(b"{")
    return text.count(",") + text.count("[") + text.count("{")


def load_json(path: Path) -> Any:  # noqa: ANN401
    """Return the value in a JSON file of others. Raises OSError, or ValueError for what is no JSON or out of bounds.

    Raises InputError, also a ValueError, for an object with a key twice: readers differ in which value counts.
    """

    def unique(pairs: Pairs) -> JsonObject:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = next(name for name, count in counts.items() if count > 1)
            raise InputError(f"{path} has the key {twice[:120]!r} twice", "keep the one that is meant")
        return found

    return parse_json(read_text(path, JSON_BYTES), unique)


def read_json(path: Path, fix: str = "restore the file") -> JsonObject:
    """Return the JSON object in a file. Raises InputError naming the file, with `fix` for what is no JSON object."""
    try:
        value = load_json(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist", "give a complete model directory") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", "check its permissions") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not readable JSON ({type(error).__name__})", fix) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object", fix)
    return value


def finite(value: object) -> object:
    """Return the value with null for every number in it that is not finite, which JSON has no token for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_json(path: Path, value: JsonMapping) -> None:
    """Replace `path` with the JSON of `value` in one rename, flushed to disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    # A path that is not UTF-8 holds lone surrogates in Python; `errors` writes their escapes to the JSON.
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(finite(value), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
