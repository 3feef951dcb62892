"""JSON files: objects read with errors that name the file, and written in one rename."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma2.core.errors import InputError

__all__ = ["JsonMapping", "JsonObject", "finite", "read_json", "write_json"]

# An object of a JSON or YAML file. Its values may have any type, so the reader of a key checks it.
JsonObject = dict[str, Any]
JsonMapping = Mapping[str, Any]


def read_json(path: Path) -> JsonObject:
    """Return the JSON object in a file. Raises InputError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist", "give a complete model directory") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", "check its permissions") from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise InputError(f"{path} is not readable JSON ({type(error).__name__})", "restore the file") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object", "restore the file")
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
