"""The header of one safetensors file, read and checked before a byte of its data is touched.

Layout: 8 bytes little-endian length N, N bytes of JSON, then the data, which the JSON's offsets cover exactly.
The safetensors library checks the same, but its messages do not name the file; ours name file, key and cause.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject
from gemma2.core.limits import DIMENSIONS, JSON_ITEMS, TENSORS

__all__ = ["ITEM_BYTES", "Tensor", "encode_header", "parameter_count", "printable", "read_header", "weight_files"]

# Every dtype of the format: here only the layout is checked, the plan of a merge checks whether it can compute with it.
ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4},
    **{"U64": 8, "I64": 8, "F64": 8, "C64": 8},
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file. `offset` counts bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def count(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of the data in bytes."""
        return self.count * ITEM_BYTES[self.dtype]


def printable(text: str, longest: int = 120) -> str:
    """Return text of others, safe to show: control characters escaped, at most `longest` characters."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[: longest + 1])
    return shown if len(shown) <= longest else shown[: longest - 3] + "..."


def read_header(path: Path, stored: Path | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file in the order of their data. Raises InputError if it is malformed.

    `stored` is the file that holds its header as long as the rest still arrives.
    """
    stored = stored or path
    try:
        status = stored.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", "check the path and its permissions") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is not a regular file", "give a safetensors file")
    entries, data_start = _read_entries(path, stored, status.st_size)
    tensors = [_tensor(path, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_tiling(path, tensors, data_start, status.st_size)
    return {tensor.name: tensor for tensor in tensors}


def _broken(path: Path, cause: str) -> InputError:
    return InputError(f"{path}: {cause}", "the file is damaged or not safetensors; fetch or write it again")


def _read_entries(path: Path, stored: Path, size: int) -> tuple[JsonObject, int]:
    """Return the JSON of the header without `__metadata__`, and the offset of the data."""
    try:
        with stored.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise _broken(path, f"header length {length} does not fit a file of {size} bytes")
            text = file.read(length)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", "check its permissions") from error
    if length > JSON_ITEMS and text.count(b",") + text.count(b"[") + text.count(b"{") > JSON_ITEMS:
        raise _broken(path, f"the header holds more than {JSON_ITEMS:,} values")
    if not text.startswith(b"{"):  # the format's own rule; other readers take blanks, or another encoding of JSON
        raise _broken(path, "the header does not begin with {")
    try:
        entries: JsonObject = json.loads(text.decode(), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except InputError:  # a duplicate key
        raise
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise _broken(path, f"the header is not JSON ({type(error).__name__})") from error
    if len(entries) > TENSORS:
        raise _broken(path, f"the header names more than {TENSORS:,} tensors")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its __metadata__ does not map texts to texts")
    return entries, 8 + length


def _unique(path: Path, pairs: Sequence[tuple[str, object]]) -> JsonObject:
    """Return an object of the header. Raises InputError for a duplicate key."""
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise _broken(path, f"the header names {printable(twice)} twice")
    return result


def _naturals(value: object) -> bool:
    """Whether a value is a list of integers >= 0."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _tensor(path: Path, name: str, entry: object, data_start: int) -> Tensor:
    """Return one checked entry: known dtype, natural shape, offsets that span exactly shape x dtype bytes."""
    shown = printable(name)
    if any("\ud800" <= char <= "\udfff" for char in name):
        raise _broken(path, f"the name {shown} is not Unicode text")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"the entry of {shown} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _broken(path, f"{shown} has the unknown dtype {printable(str(dtype))}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _broken(path, f"{shown} has a malformed shape or data_offsets")
    if len(shape) > DIMENSIONS:  # a product of millions of factors takes for ever
        raise _broken(path, f"{shown} has {len(shape):,} dimensions, more than {DIMENSIONS}")
    begin, end = offsets
    tensor = Tensor(name, dtype, tuple(shape), path, data_start + begin)
    if end - begin != tensor.nbytes:
        raise _broken(path, f"{shown} is {dtype} {shape}, {tensor.nbytes} bytes, but its offsets span {end - begin}")
    return tensor


def _check_tiling(path: Path, tensors: Sequence[Tensor], data_start: int, size: int) -> None:
    """Check that the tensors cover the data without overlap or hole, and that the file ends with the last of them."""
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            kind = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise _broken(path, f"{printable(tensor.name)} {kind}")
        position += tensor.nbytes
    if position != size:
        kind = "is truncated" if position > size else "has extra bytes at its end"
        raise _broken(path, f"the file {kind}: the header describes {position} bytes, the file has {size}")


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], room: int = 0) -> tuple[bytes, dict[str, int]]:
    """Return the header bytes for `{name: (dtype, shape)}` in that order, and the file offset of each tensor.

    The header is padded with spaces to whole pages, so that the data is page-aligned on disk; to `room` bytes, whole
    pages too, where the data was written before its layout was known.
    """
    entries: JsonObject = {"__metadata__": {"format": "pt"}}
    position = 0
    starts = {}
    for name, (dtype, shape) in tensors.items():
        starts[name] = position
        end = position + prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    length = max(-(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES, room) - 8
    header = length.to_bytes(8, "little") + text.ljust(length)
    return header, {name: len(header) + start for name, start in starts.items()}


def parameter_count(directory: Path) -> int:
    """Return the number of parameters of a model directory, from its safetensors headers alone.

    Raises InputError if a header is not readable or does not fit its file.
    """
    return sum(tensor.count for path in weight_files(directory) for tensor in read_header(path).values())


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model directory, by name."""
    return sorted(path for path in directory.glob("*.safetensors") if path.is_file())
