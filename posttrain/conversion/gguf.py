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
from gemma2.core.limits import DIMENSIONS, GGUF_DEPTH, GGUF_ENTRIES, GGUF_ITEMS, TENSORS
from gemma2.core.outputs.safetensors_header import printable

__all__ = ["GgufHeader", "find_gguf", "read_header"]

# Type number of a value -> struct format; 8 is a text, 9 an array.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
# Settings of a gemma2 file that must be natural numbers, and those that must be numbers.
POSITIVE = {"block_count", "embedding_length", "feed_forward_length", "context_length"}
POSITIVE |= {"attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"}
SOFT_CAPS = {"attn_logit_softcapping", "final_logit_softcapping"}


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
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a regular file", "give a GGUF file")
    try:
        with path.open("rb") as file:
            return _checked(_Header(file).read())
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable GGUF file ({error})", "copy it again") from error
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})", "check the path and its permissions") from error


def _checked(header: GgufHeader) -> GgufHeader:
    """The header, if the settings that a Gemma 2 is built from are of their types. Raises ValueError with the key."""
    for key, value in header.metadata.items():
        architecture, _, name = key.partition(".")
        natural = isinstance(value, int) and not isinstance(value, bool) and value > 0
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if architecture == "gemma2" and ((name in POSITIVE and not natural) or (name in SOFT_CAPS and not number)):
            raise ValueError(f"{key} is {printable(str(value))}, not a number above 0")
    if header.metadata.get("general.architecture") == "gemma2":
        for name in ("embedding_length", "attention.head_count"):
            if f"gemma2.{name}" not in header.metadata:
                raise ValueError(f"gemma2.{name} is missing")
    return header


class _Header:
    """A cursor over the header. Lengths are checked against the file, so that a torn file cannot exhaust memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.items = 0  # of arrays that are read one by one

    def read(self) -> GgufHeader:
        if self._bytes(4) != b"GGUF":
            raise ValueError("no GGUF magic")
        version = self._integer("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        tensors, entries = self._integer("Q"), self._integer("Q")
        if tensors > TENSORS or entries > GGUF_ENTRIES:
            raise ValueError(f"{tensors:,} tensors and {entries:,} entries, which no model has")
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

    def _value(self, kind: int, depth: int = 1) -> int | float | bool | str | None:
        """Return the next value; arrays are skipped and give None."""
        if kind == TEXT:
            return self._text()
        if kind == ARRAY:
            self._skip_array(depth)
            return None
        if kind not in NUMBERS:
            raise ValueError(f"value type {kind}")
        return self._number(NUMBERS[kind])

    def _skip_array(self, depth: int) -> None:
        if depth > GGUF_DEPTH:
            raise ValueError(f"arrays nested more than {GGUF_DEPTH} deep")
        kind, length = self._integer("I"), self._integer("Q")
        if kind in NUMBERS:
            self._bytes(length * struct.calcsize(f"<{NUMBERS[kind]}"))
        else:
            self.items += length
            if self.items > GGUF_ITEMS:
                raise ValueError(f"arrays of more than {GGUF_ITEMS:,} texts")
            for _ in range(length):
                self._bytes(self._integer("Q")) if kind == TEXT else self._value(kind, depth + 1)

    def _tensor(self) -> int:
        """Return the number of elements of the next tensor."""
        self._text()
        dimensions = self._integer("I")
        if dimensions > DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions:,} dimensions, more than {DIMENSIONS}")
        shape = [self._integer("Q") for _ in range(dimensions)]
        self._bytes(4 + 8)  # type and offset
        return math.prod(shape)
