"""Which files a data path names, and which files of a folder are left aside.

    an output of this suite        its shards
    a folder of `save_to_disk`     its arrow files; of several splits the training split
    any other folder               the data files in it, or else those in its sub-folder `data/`; where their names tell
                                   splits apart (train.jsonl, test.csv, train-00000-of-00002.parquet), the training ones

The caller gets the names of what is left aside; a set of shards with a gap, and one set in two formats, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import load_json
from gemma2.core.outputs.manifest import MANIFEST, read_manifest, require_complete

__all__ = ["COMPRESSED", "SUFFIXES", "FolderFiles", "all_files_inside", "files_inside", "format_of"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSED = (".gz", ".zst")
OUTPUTS = ("data-*.jsonl", "data.jsonl", "pairs.jsonl")
TASKS_WRITER = "eval data"  # the command whose output has a file for each task
SHARD = re.compile(r"(?P<set>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?:-[0-9a-f]+)?")
SPLIT = re.compile(r"train(?:ing)?(?:[-_.\d].*)?", re.IGNORECASE)  # names of training splits, as train_sft
# Descriptions of a data set, which hold no rows.
DESCRIPTIONS = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "metadata.json",
    "croissant.json",
)
DOCUMENTS = (".md", ".rst", ".cff", ".bib", ".lock")  # for people; never data


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder that are read, in their order, and the names of those that are left aside."""

    read: list[Path]
    aside: list[str]


def format_of(path: Path) -> str:
    """The suffix that says how a file is read, without the suffix of a compression."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def files_inside(folder: Path, split: str | None = None) -> FolderFiles:
    """The data files of a folder, of one `split` if it is named.

    Raises InputError where no file is found, where an output is unfinished, or where a shard is missing.
    """
    if (folder / MANIFEST).exists():
        require_complete(folder, "data set")
        found = FolderFiles(_of_an_output(folder, split), [])
    elif (folder / "dataset_dict.json").exists():
        found = _saved_splits(folder, split)
    elif (folder / "state.json").exists():
        found = FolderFiles(_saved(folder), [])
    else:
        found = _plain(folder, split)
    _check_shards(folder, found.read)
    return found


def all_files_inside(folder: Path) -> list[Path]:
    """The data files of a folder and of the folders in it, of every split. Raises InputError for one without any."""
    if (folder / MANIFEST).exists() or (folder / "state.json").exists():
        return files_inside(folder).read
    inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    found = [path for path in inside if _holds_rows(path)]
    for path in inside:
        if path.is_dir():
            with suppress(InputError):
                found += all_files_inside(path)
    if not found:
        raise InputError(f"{folder} is a directory without data", f"put {', '.join(SUFFIXES)} files there")
    return found


def _of_an_output(folder: Path, split: str | None) -> list[Path]:
    if split is not None:
        raise InputError(f"{folder} is an output, which has no splits", f"leave out @{split}")
    names = ("*.jsonl",) if (read_manifest(folder) or {}).get("command") == TASKS_WRITER else OUTPUTS
    found = next((sorted(folder.glob(name)) for name in names if any(folder.glob(name))), [])
    if not found:
        hint = "give the output of generate, filter or reward pairs, or name the file"
        raise InputError(f"{folder} is a directory without data", hint)
    return found


def _saved_splits(folder: Path, split: str | None) -> FolderFiles:
    """One split of a `DatasetDict` that was saved to disk: the one that is named, or that of training."""
    names = [str(name) for name in _state(folder / "dataset_dict.json", "splits")]
    chosen = _split_of(folder, names, split)
    return FolderFiles(_saved(folder / chosen), [f"{name}/" for name in names if name != chosen])


def _split_of(folder: Path, names: Sequence[str], split: str | None) -> str:
    training = sorted({name for name in names if name == split or (split is None and _is_training(name))})
    if len(training) != 1 and (split is not None or len(names) != 1):
        named = ", ".join(sorted(names)) or "no splits"
        raise InputError(f"{folder} holds {named}", f"name one: {folder}@{(training or sorted(names) or ['train'])[0]}")
    return (training or list(names))[0]


def _saved(folder: Path) -> list[Path]:
    """The arrow files of a `Dataset` that was saved to disk, in the order that its state gives."""
    listed = _state(folder / "state.json", "_data_files")
    names = [str(item["filename"]) for item in listed if isinstance(item, dict) and "filename" in item]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise InputError(
            f"{folder} lacks {missing[0] if missing else 'its arrow files'}", "save the data set again, or copy it all"
        )
    return [folder / name for name in names]


def _state(path: Path, key: str) -> Sequence[object]:
    try:
        found = load_json(path)[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the state of a saved data set", "save the data set again") from error
    return list(found) if isinstance(found, list) else []


def _plain(folder: Path, split: str | None) -> FolderFiles:
    inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    files = [path for path in inside if path.is_file()]
    folders = {path.name: path for path in inside if path.is_dir()}
    data = [path for path in files if _holds_rows(path)]
    aside = [path.name for path in files if path not in data and not _is_description(path)]
    if data:
        chosen = _of_split(folder, data, split)
        aside += [path.name for path in data if path not in chosen] + [f"{name}/" for name in folders]
        _check_formats(folder, chosen)
        return FolderFiles(chosen, sorted(aside))
    if "data" in folders:
        place, below = "data", files_inside(folders["data"], split)
    else:
        place = _folder_with_rows(folder, folders, split)
        below = files_inside(folders[place])
    aside += [f"{name}/" for name in folders if name != place] + [f"{place}/{name}" for name in below.aside]
    return FolderFiles(below.read, sorted(aside))


def _holds_rows(path: Path) -> bool:
    return path.is_file() and format_of(path) in SUFFIXES and path.name not in DESCRIPTIONS


def _is_description(path: Path) -> bool:
    """Whether a file is about the data set, for people or for programs."""
    name = path.name.upper()
    return path.suffix.lower() in DOCUMENTS or path.name in DESCRIPTIONS or name.startswith(("LICENSE", "README"))


def _folder_with_rows(folder: Path, folders: Mapping[str, Path], split: str | None) -> str:
    """The sub-folder that holds the wanted split. Raises InputError where none does."""
    with_rows = [name for name, path in folders.items() if any(_holds_rows(file) for file in path.iterdir())]
    if not with_rows:
        raise InputError(f"{folder} is a directory without data", f"put {', '.join(SUFFIXES)} files there")
    wanted = [name for name in with_rows if name == split or (split is None and _is_training(name))]
    if len(wanted) != 1:
        named = ", ".join(f"{name}/" for name in with_rows)
        raise InputError(f"{folder} holds data in {named}", f"give one of them: {folder / with_rows[0]}")
    return wanted[0]


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """The files of a split; without a name those of training, and all files where none is of training.

    Raises InputError where the split is missing, or where several sets are for training (train_sft, train_gen).
    """
    sets = {path: _set_of(path) for path in files}
    if split is not None:
        found = [path for path, name in sets.items() if name == split or name.rstrip("-_.0123456789") == split]
        if not found:
            have = ", ".join(sorted(set(sets.values())))
            raise InputError(
                f"{folder} has no files of {split!r}, but of {have}", f"give {folder}, or one of its files"
            )
        return found
    training = [path for path, name in sets.items() if _is_training(name)]
    kinds = sorted({sets[path].rstrip("-_.0123456789") for path in training})
    if len(kinds) > 1:
        raise InputError(
            f"{folder} holds several sets for training: {', '.join(kinds)}", f"name one: {folder}@{kinds[0]}"
        )
    return training or files


def _is_training(name: str) -> bool:
    """Whether a file or folder of that name is of a training split."""
    return SPLIT.fullmatch(name) is not None


def _set_of(path: Path) -> str:
    """The name of the set that a file belongs to: without its number among the shards."""
    name = _name(path)
    shard = SHARD.fullmatch(name)
    return shard["set"] if shard else name


def _name(path: Path) -> str:
    """The name of a file without the suffixes of its format and compression."""
    return path.name[: -len(format_of(path) + (path.suffix if path.suffix.lower() in COMPRESSED else ""))] or path.name


def _check_formats(folder: Path, files: list[Path]) -> None:
    """Refuse one set in several formats: each row would be learned twice."""
    names: dict[str, Path] = {}
    for path in files:
        twin = names.setdefault(_name(path), path)
        if twin != path:
            what = f"{folder} holds {twin.name} and {path.name}, most likely the same rows"
            raise InputError(what, f"give one of them: {twin}")


def _check_shards(folder: Path, files: list[Path]) -> None:
    """Refuse a set of shards of which one is missing: less data would be learned without a word."""
    shards: dict[tuple[str, str], list[str]] = {}
    for path in files:
        if found := SHARD.fullmatch(_name(path)):
            shards.setdefault((found["set"], found["total"]), []).append(found["number"])
    for (name, total), numbers in shards.items():
        if len(numbers) != int(total):
            what = f"{folder} holds {len(numbers)} of {int(total)} shards"
            raise InputError(what, f"copy all {name}-*{format_of(files[0])} files")
