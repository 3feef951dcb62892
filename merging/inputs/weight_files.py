"""The files of a model directory that hold its weights. Without numpy: a wrong directory is refused at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import read_json
from gemma2.core.outputs.hub import is_hub_id
from gemma2.core.outputs.manifest import require_complete
from gemma2.core.outputs.safetensors_header import Tensor, printable, read_header
from gemma2.merging.remote.arrivals import ON_DISK, Arrivals

__all__ = [
    "COMPANIONS",
    "INDEX",
    "WEIGHTS",
    "check_folders",
    "companions",
    "find_weights",
    "indexed_tensors",
    "natural_order",
    "stored_tensors",
    "wrong_size",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# The files that make a model directory loadable besides the weights. No other files are copied to the output.
COMPANIONS = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)


def find_weights(path: Path, role: str, arrivals: Arrivals = ON_DISK) -> dict[str, list[str]] | None:
    """Return the names in each shard of a model directory by the index; None for a single file.

    Raises InputError if it is not a model directory, is unfinished, or stores weights in another format.
    """
    if not path.is_dir():
        raise InputError(f"{role} {path} is not a directory", "give the path of a model directory")
    require_complete(path, role)
    shards = _shards(path, role, arrivals)
    if not (path / "config.json").is_file():
        raise InputError(f"{role} {path} holds no config.json", "give a directory with config.json and *.safetensors")
    return shards


def check_folders(named: Mapping[str, Path]) -> None:
    """Raise the errors of `find_weights` for inputs (role -> path) that can be nothing but model directories.

    A merge and its relatives call this before they import numpy and numba, so that a wrong path is reported at once.
    """
    for role, path in named.items():
        adapted = "+" in str(path) and not path.exists()
        if not adapted and not is_hub_id(path) and not (path / ADAPTER).exists():
            find_weights(path, role)


def _shards(path: Path, role: str, arrivals: Arrivals) -> dict[str, list[str]] | None:
    single, index = path / WEIGHTS, path / INDEX
    alone = arrivals.stored(single).exists()
    if alone and index.exists():
        raise InputError(f"{role} {path} holds both {WEIGHTS} and {INDEX}", "remove the one that is not meant")
    if alone:
        return None
    if index.exists():
        return _read_index(index)
    if (path / ADAPTER).exists():
        raise InputError(f"{role} {path} is an adapter without its base model", "merge the adapter into its base first")
    others = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if others:
        raise InputError(
            f"{role} {path} holds pickled weights only ({others[0]})", "convert them to safetensors; pickles are unsafe"
        )
    if (path / ADAPTER_WEIGHTS).exists():
        raise InputError(
            f"{role} {path} holds the weights of an adapter ({ADAPTER_WEIGHTS}) without its {ADAPTER}",
            "give a complete adapter directory",
        )
    if any(path.glob("*.gguf")):
        raise InputError(f"{role} {path} holds GGUF weights only", "import them with gemma2 convert")
    raise InputError(f"{role} {path} holds neither {WEIGHTS} nor {INDEX}", "give a directory with safetensors weights")


def _read_index(index: Path) -> dict[str, list[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map", "restore the file")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_file_name(file):
            raise InputError(
                f"{index} places {printable(name)} in {printable(str(file))}, not a file name", "restore the index"
            )
        shards.setdefault(file, []).append(name)
    return shards


def _is_file_name(text: str) -> bool:
    """Whether a text is a bare file name that can be printed."""
    bare = text not in ("", ".", "..") and Path(text).name == text and "\\" not in text
    return bare and text.isprintable() and len(text.encode()) <= 255


def companions(directory: Path) -> list[Path]:
    """Return the files of a directory that make a model loadable besides its weights."""
    return [directory / name for name in COMPANIONS if (directory / name).is_file()]


def natural_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a sort key that puts layer 2 before layer 10."""
    return tuple((0, int(part)) if part.isdecimal() and len(part) < 20 else (1, part) for part in name.split("."))


def indexed_tensors(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a directory by its index; None where its weights are one file, or have other names.

    Raises InputError for an index that its shards do not agree with.
    """
    if (path / WEIGHTS).exists() or not (path / INDEX).exists():
        return None
    return stored_tensors(path, _read_index(path / INDEX), ON_DISK)


def wrong_size(index: Path, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """A warning where an index states another size than its shards have; published ones are wrong now and then."""
    metadata = read_json(index).get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    held = sum(tensor.nbytes for tensor in tensors.values())
    if stated is None or stated == held:
        return ()
    return (
        f"{index} states a total_size of {printable(str(stated))}, the tensors have {held} bytes: "
        "is it the index of other shards?",
    )


def stored_tensors(path: Path, shards: Mapping[str, list[str]] | None, arrivals: Arrivals) -> dict[str, Tensor]:
    """Return all tensors in natural order; index and shards must agree exactly."""
    if shards is None:
        found = read_header(path / WEIGHTS, arrivals.stored(path / WEIGHTS))
    else:
        found = {}
        for file, names in sorted(shards.items()):
            held = read_header(path / file, arrivals.stored(path / file))
            for name in sorted(set(names) ^ set(held)):
                where = f"in the index but not in {file}" if name in names else f"in {file} but not in the index"
                raise InputError(f"{path}: {printable(name)} is {where}", "restore both: they do not belong together")
            found |= held
    return {name: found[name] for name in sorted(found, key=natural_order)}
