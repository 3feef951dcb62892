"""Writes an adapter directory in peft's layout: factors one module at a time, the configuration at the end.

The ranks are known only when all factors are computed. So the header gets the room of the largest possible one, the
data follows it in order, and the header is filled in last; memory holds the factors of one module.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gemma2.core.errors import OutputError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.hashing import digest_file, digest_name, hasher
from gemma2.core.outputs.safetensors_header import encode_header, printable, read_header
from gemma2.merging.inputs.adapter import CONFIG, PREFIX, WEIGHTS
from gemma2.merging.kernels.number_formats import Bytes
from gemma2.merging.streaming.writer import Layout

__all__ = ["AdapterWriter", "adapter_config", "factor_names", "short_names", "whole_name", "write_config"]


PIECE = 4 << 20  # bytes read back at a time
AGAIN = "check the disk and the memory, and extract again"


def factor_names(module: str) -> tuple[str, str]:
    """Return the names of A and B of a module in the file."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def whole_name(tensor: str, adapted: bool) -> str:
    """Return the name in the file of a tensor that is stored whole.

    adapted  the bias of a module that has factors: peft moves it, with the weight, into a layer inside the module
    """
    module, _, leaf = tensor.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{leaf}" if adapted else f"{PREFIX}{tensor}"


class AdapterWriter:
    """Writes the weights of an adapter, tensor after tensor. `most`: a layout that needs at least as long a header."""

    def __init__(self, directory: Path, most: Layout) -> None:
        self._path = directory / WEIGHTS
        self._room = len(encode_header(most)[0])
        self._layout: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._digests = {"": hasher()}  # of what is given to be written, by tensor
        self._last = ""
        self._file: BinaryIO = self._path.open("xb")
        self._file.write(bytes(self._room))

    def add(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Begin the next tensor."""
        self._layout[name] = dtype, shape
        self._digests[name], self._last = hasher(), name

    def write(self, data: Bytes) -> None:
        """Append bytes to the tensor that was begun last."""
        whole = np.ascontiguousarray(data).data
        self._digests[self._last].update(whole)
        self._file.write(whole)

    def finish(self) -> None:
        """Write the header, now that the layout is known."""
        self._file.seek(0)
        self._file.write(encode_header(self._layout, self._room)[0])
        self._file.flush()
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that it is read back from the disk
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.close()

    def read_back(self) -> str:
        """Compare the finished file with what was written; return its digest.

        Raises OutputError naming the difference.
        """
        tensors = read_header(self._path)
        if {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} != self._layout:
            raise OutputError(f"{self._path} reads back with other tensors than were written", AGAIN)
        with self._path.open("rb") as file:
            for name, tensor in tensors.items():
                file.seek(tensor.offset)
                found, left = hasher(), tensor.nbytes
                while left and (piece := file.read(min(left, PIECE))):
                    found.update(piece)
                    left -= len(piece)
                if left or digest_name(found) != digest_name(self._digests[name]):
                    raise OutputError(f"{self._path}: {printable(name)} reads back with other bytes", AGAIN)
        return digest_file(self._path)

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()


def short_names(chosen: Sequence[str], every: Sequence[str], dotted: bool) -> list[str]:
    """Return names that mean exactly the chosen modules: their last parts, or in full where these mean others too.

    dotted  peft compares the end of a module's name behind a dot; for `modules_to_save` the bare end
    """
    last = sorted({module.rpartition(".")[2] for module in chosen})

    def meant(module: str) -> bool:
        return any(module == name or module.endswith(f".{name}" if dotted else name) for name in last)

    return last if {module for module in every if meant(module)} == set(chosen) else sorted(chosen)


def adapter_config(
    base: str, task: str, ranks: Mapping[str, int], names: tuple[Sequence[str], Sequence[str]], flags: JsonObject
) -> JsonObject:
    """Return adapter_config.json. The scale is 1 for every rank.

    ranks  of each module
    names  target_modules and modules_to_save
    """
    common = max(ranks.values(), key=list(ranks.values()).count) if ranks else 1
    others = {module: rank for module, rank in ranks.items() if rank != common}
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "modules_to_save": list(names[1]) or None,
        "peft_type": "LORA",
        "r": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(names[0]),
        "task_type": task,
        "use_dora": False,
        "use_rslora": False,
    } | flags


def write_config(directory: Path, config: JsonObject) -> None:
    """Write adapter_config.json."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
