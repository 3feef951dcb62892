"""The header of a GGUF file: plain metadata and the number of parameters. Torch-free, one pass, no tensor is read.

    magic "GGUF", version, tensors, entries, entries x (key, type, value), tensors x (name, shape, type, offset)

Little-endian, versions 2 and 3 (`docs/gguf.md` of ggml). Arrays, such as the vocabulary, are skipped.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject

__all__ = ["GgufHeader", "find_gguf", "read_header"]

# Type number of a value -> struct format; 8 is a text, 9 an array.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufHeader:
    """`metadata`: numbers and texts by key. `parameters`: elements of all tensors."""

    metadata: JsonObject
    parameters: int


def find_gguf(source: Path) -> Path | None:
    """Return the GGUF file that `source` is or contains, None for a model directory. Raises InputError for neither."""
    if source.is_file():
        if source.suffix != ".gguf":
            raise InputError(f"{source} is a file but not a .gguf", "give a GGUF file or a model directory")
        return source
    if not source.is_dir():
        raise InputError(f"{source} does not exist", "give a GGUF file or a model directory")
    found = sorted(source.glob("*.gguf"))
    if (source / "config.json").is_file() and any(source.glob("*.safetensors")):
        return None
    if not found:
        raise InputError(f"{source} holds neither *.gguf nor config.json with *.safetensors", "check the path")
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise InputError(
            f"{source} holds {len(found)} GGUF files ({names})", "name one; join the parts of a split file"
        )
    return found[0]


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file. Raises InputError if it is not one, is cut off or has an unknown version."""
    try:
        with path.open("rb") as file:
            return _Header(file).read()
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable GGUF file ({error})", "copy it again") from error
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})", "check the path and its permissions") from error


class _Header:
    """A cursor over the header. Lengths are checked against the file, so that a torn file cannot exhaust memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def read(self) -> GgufHeader:
        if self._bytes(4) != b"GGUF":
            raise ValueError("no GGUF magic")
        version = self._integer("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        tensors, entries = self._integer("Q"), self._integer("Q")
        metadata: JsonObject = {}
        for _ in range(entries):
            key, kind = self._text(), self._integer("I")
            value = self._value(kind)
            if kind != ARRAY:
                metadata[key] = value
        return GgufHeader(metadata, sum(self._tensor() for _ in range(tensors)))

    def _bytes(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise ValueError(f"ends at byte {self.size}, in the middle of its header")
        return self.file.read(count)

    def _number(self, code: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]
        return value

    def _integer(self, code: Literal["I", "Q"]) -> int:
        return int(self._number(code))

    def _text(self) -> str:
        return self._bytes(self._integer("Q")).decode("utf-8")

    def _value(self, kind: int) -> int | float | bool | str | None:
        """Return the next value; arrays are skipped and give None."""
        if kind == TEXT:
            return self._text()
        if kind == ARRAY:
            self._skip_array()
            return None
        if kind not in NUMBERS:
            raise ValueError(f"value type {kind}")
        return self._number(NUMBERS[kind])

    def _skip_array(self) -> None:
        kind, length = self._integer("I"), self._integer("Q")
        if kind in NUMBERS:
            self._bytes(length * struct.calcsize(f"<{NUMBERS[kind]}"))
        else:
            for _ in range(length):
                self._bytes(self._integer("Q")) if kind == TEXT else self._value(kind)

    def _tensor(self) -> int:
        """Return the number of elements of the next tensor."""
        self._text()
        dimensions = self._integer("I")
        shape = [self._integer("Q") for _ in range(dimensions)]
        self._bytes(4 + 8)  # type and offset
        return math.prod(shape)
