"""Bounds of every parser of foreign input: size, depth, count, time. `tests/core/test_limits.py` has the worst of each.

What is read     bounds
YAML             YAML_BYTES, YAML_NODES (every alias and `<<` counted with all that it stands for), YAML_DEPTH
JSON             JSON_BYTES, JSON_ITEMS, Python's own depth
safetensors      the format's 100 MB, TENSORS, DIMENSIONS; one pass over the names
GGUF             GGUF_ENTRIES, GGUF_ITEMS, GGUF_DEPTH, TENSORS, DIMENSIONS
chat templates   TEMPLATE_BYTES, and for one conversation TEMPLATE_SECONDS of computing, TEMPLATE_MEMORY, TEMPLATE_TEXT
                 that comes out; integers of TEMPLATE_BITS
answers          `generation/engines/reply.py` MOST_BYTES, not compressed; one attempt ends after --timeout
files            regular files only: a pipe or a device would be waited for

The bounds are far above what real files have: Gemma's tokenizer.json, the largest JSON file of a model, has 34 MB and
2.6 million items, the longest published chat templates 30 KB.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from gemma2.core.errors import InputError

__all__ = [
    "DIMENSIONS",
    "GGUF_DEPTH",
    "GGUF_ENTRIES",
    "GGUF_ITEMS",
    "JSON_BYTES",
    "JSON_ITEMS",
    "TEMPLATE_BITS",
    "TEMPLATE_BYTES",
    "TEMPLATE_MEMORY",
    "TEMPLATE_SECONDS",
    "TEMPLATE_TEXT",
    "TENSORS",
    "YAML_BYTES",
    "YAML_DEPTH",
    "YAML_NODES",
    "read_bytes",
    "read_text",
]

YAML_BYTES = 256 * 2**10  # PyYAML reads 130 KB a second
YAML_NODES = 20_000
YAML_DEPTH = 100  # our own files have six
JSON_BYTES = 128 * 2**20
JSON_ITEMS = 8_000_000  # an empty list, the costliest, takes 64 bytes in memory
TENSORS = 1_000_000
DIMENSIONS = 16
GGUF_ENTRIES = 100_000  # of the metadata
GGUF_ITEMS = 8_000_000  # texts of arrays; a vocabulary and its merges have under a million
GGUF_DEPTH = 4  # arrays of arrays
TEMPLATE_BYTES = 2**20
TEMPLATE_SECONDS = 5.0
TEMPLATE_MEMORY = 512 * 2**20  # above what the process has
TEMPLATE_TEXT = 16 * 2**20  # characters, without those of the messages
TEMPLATE_BITS = 4096  # of an integer


def read_bytes(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises OSError if it cannot be opened, InputError for a pipe, a device or a larger file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer opens at once
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(21, os.strerror(21), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is not a regular file", "give a file, not a pipe or a device")
        content = file.read(most + 1)
    if len(content) > most:
        raise InputError(
            f"{path} has more than {most >> 10:,} KiB", "this is not what such a file holds; check the path"
        )
    return content


def read_text(path: Path, most: int) -> str:
    """Return the UTF-8 text of a file, with `\\n` for every line end; bounds and errors as of `read_bytes`."""
    return read_bytes(path, most).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
