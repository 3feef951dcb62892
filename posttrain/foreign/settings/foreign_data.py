"""Data sets of a foreign file as data paths of ours: hub ids and files, splits, columns, weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonObject, load_json
from gemma2.core.yaml_files import closest, place_of
from gemma2.posttrain.foreign.counterparts import is_off

from .account import KeyAccount, shown
from .dialects import Kind

__all__ = ["read_data"]

# Kinds of axolotl's `path` and of TRL's that say how a file is read, and not which.
READERS = ("json", "csv", "parquet", "text", "arrow")
LISTS = ("messages", "conversations", "conversation")
SPLIT = re.compile(r"[\w.-]+", re.ASCII)
# Types of axolotl whose rows are recognised here by their columns, and types whose columns have other names.
RECOGNISED = (
    "alpaca",
    "sharegpt",
    "chat_template",
    "chatml",
    "gemma",
    "llama3",
    "zephyr",
    "bradley_terry",
    "context_qa",
)
COLUMNS_OF_TYPE = {
    "icr": {"prompt": "input"},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "bradley_terry": {"prompt": "input"},
}
TEXTS = ("completion", "pretrain", "pygmalion", "input_output", "stepwise_supervised", "metharme")
FIELDS = {
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field_prompt": "prompt",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
}
LOST = {
    "drop_system_message": "system texts stay in the rows",
    "roles_to_train": "turns of the assistant are learned",
    "shards": "all rows are used: cut the file",
    "field_tools": "tool calls are not learned",
    "tools": "tool calls are not learned",
    "images": "images are not read",
    "videos": "videos are not read",
    "audios": "audio is not read",
    "kto_tag": "rows without a pair are not read",
    "num_samples": "all rows are used: cut the file",
    "revision": "a hub id means its main revision",
}
QUIET = ("path", "name", "split", "type", "ds_type", "data_files", "data_dir", "fraction", "columns", "format")
OWN_TAGS = {"role_tag": ("role", "from"), "content_tag": ("content", "value", "text")}

Record = Mapping[str, Any]


class DataSets:
    """The data sets of one key of a foreign file: paths, renamed columns, weights, and what has no counterpart."""

    def __init__(self, account: KeyAccount, key: str) -> None:
        self.account, self.key = account, key
        self.paths: list[str] = []
        self.columns: dict[str, str] = {}
        self.weights: list[float] = []

    def add(self, path: str, split: object = None, config: object = None) -> None:
        """A hub id or a file, with its configuration and split; the split `train` is what is read anyway."""
        text = f"{path}:{config}" if config else path
        if split not in (None, "train"):
            if SPLIT.fullmatch(str(split)):
                text += f"@{split}"
            else:
                self.lost("split", split, "a part of a split has no counterpart: cut the file")
        if text in self.paths:
            self.lost("path", text, "a data set is read once")
        else:
            self.paths.append(text)

    def rename(self, columns: Mapping[str, str]) -> None:
        """Columns of one data set, ours -> theirs."""
        for ours, theirs in columns.items():
            if self.columns.setdefault(ours, theirs) != theirs:
                self.lost(ours, theirs, "columns hold for all data sets: gemma2 data convert PATH --columns first")

    def lost(self, part: str, value: object, why: str) -> None:
        """A part of a data set has no counterpart."""
        self.account.gap(f"{self.key}.{part}", value, why)


def read_data(account: KeyAccount, title: str, kind: Kind) -> None:
    """Say what becomes of the data sets of a file."""
    target = "prompts" if kind == "rlhf" else "data"
    if title == "LLaMA-Factory":
        _of_llamafactory(account, target)
    elif title == "axolotl":
        _of_axolotl(account, target)
    else:
        _of_trl(account, target)


def _write(account: KeyAccount, found: DataSets, target: str) -> None:
    paths = found.paths
    if "data" in account.ours and target == "eval_data":
        paths = paths[:1]
        for path in found.paths[1:]:
            found.lost("path", path, "eval_data is one data set")
    several = target in account.lists
    if len(paths) > 1 and not several:
        why = "this command takes one data set: join the files first"
        found.lost("path", paths[1:], why)
        paths = paths[:1]
    settings: dict[str, object] = {target: paths if several and len(paths) > 1 else paths[0]}
    if found.weights:
        settings["weights"] = found.weights
    renames = [f"{ours}={theirs}" for ours, theirs in found.columns.items()]
    if renames:
        settings["columns"] = renames
    account.take(found.key, settings, "shapes are recognised: gemma2 data inspect shows them")


# --- TRL --------------------------------------------------------------------------------------------------------------


def _of_trl(account: KeyAccount, target: str) -> None:
    key = "datasets" if account.has("datasets") else "dataset_name"
    found = DataSets(account, key)
    if key == "datasets":
        for record in _records(account, key):
            _one_of_trl(found, record)
    elif account.has(key):
        config, split = account.given.get("dataset_config"), account.given.get("dataset_train_split")
        found.add(str(account.given[key]), split, config)
    if not found.paths:
        return
    _write(account, found, target)
    for part in ("dataset_config", "dataset_train_split"):
        account.drop(part, "it is a part of the path")
    evaluates = not is_off(account.given.get("eval_strategy"))
    if evaluates and not account.has("test_split_size") and "eval_data" in account.fields and key == "dataset_name":
        tested = DataSets(account, "dataset_test_split")
        tested.add(str(account.given[key]), account.given.get("dataset_test_split", "test"), config)
        if account.has("dataset_test_split"):
            _write(account, tested, "eval_data")
        else:
            account.imply("dataset_test_split", "test", {"eval_data": tested.paths[0]}, "the default of TRL")
    account.drop("dataset_test_split", "there is no evaluation (eval_strategy)")


def _one_of_trl(found: DataSets, record: Record) -> None:
    files = record.get("data_files")
    if record.get("path") in READERS and files:
        for file in files if isinstance(files, list) else [files]:
            found.add(str(file))
    else:
        found.add(str(record.get("path")), record.get("split"), record.get("name"))
    if record.get("fraction") is not None:
        found.weights.append(float(record["fraction"]))


# --- axolotl ----------------------------------------------------------------------------------------------------------


def _of_axolotl(account: KeyAccount, target: str) -> None:
    for key, place in (("datasets", target), ("test_datasets", "eval_data")):
        if not account.has(key):
            continue
        if place == "eval_data" and place not in account.fields:
            account.lack(key, "held-out pairs are a share of the data: set eval_fraction", decides=False)
            continue
        found = DataSets(account, key)
        for record in _records(account, key):
            _one_of_axolotl(found, record)
        _write(account, found, place)


def _one_of_axolotl(found: DataSets, record: Record) -> None:
    files = record.get("data_files")
    listed = files if isinstance(files, list) else [files] if files else []
    if listed and (record.get("path") in READERS or record.get("ds_type")):
        folder = record["path"] if record.get("path") not in (*READERS, None) else ""
        for file in listed:
            found.add(str(Path(folder, file)))
    else:
        found.add(str(record.get("path")), record.get("split"), record.get("name"))
    _type_of_axolotl(found, record.get("type"))
    _messages_of_axolotl(found, record)
    found.rename({ours: str(record[name]) for name, ours in FIELDS.items() if record.get(name) not in (None, ours)})
    for name, why in LOST.items():
        usual = name == "roles_to_train" and record.get(name) in (["assistant"], ["gpt"], ["assistant", "gpt"])
        if not is_off(record.get(name)) and not usual:
            found.lost(name, record[name], why)
    if record.get("train_on_eos") not in (None, "turn", "last"):
        found.lost("train_on_eos", record["train_on_eos"], "ends of learned turns are learned (end_of_turn)")


def _type_of_axolotl(found: DataSets, kind: object) -> None:
    if isinstance(kind, dict):
        found.rename({ours: str(kind[name]) for name, ours in FIELDS.items() if kind.get(name) not in (None, ours)})
        for name in [name for name in kind if "format" in name]:
            found.lost(f"type.{name}", kind[name], "turns are rendered by the model's chat template")
        return
    name = str(kind or "")
    head, _, tail = name.partition(".")
    if head in TEXTS:
        found.lost("type", kind, "texts without turns are not learned: write prompt and completion")
    elif head not in RECOGNISED and name:
        found.lost("type", kind, "look with gemma2 data inspect whether the rows are read as you mean them")
    found.rename(COLUMNS_OF_TYPE.get(tail, COLUMNS_OF_TYPE.get(head, {})))


def _messages_of_axolotl(found: DataSets, record: Record) -> None:
    listed = record.get("field_messages")
    if listed and listed not in LISTS:
        found.rename({"messages": str(listed)})
    mapping = record.get("message_property_mappings") or {}
    named = {
        "role_tag": mapping.get("role", record.get("message_field_role")),
        "content_tag": mapping.get("content", record.get("message_field_content")),
    }
    _tags(found, named)


def _tags(found: DataSets, named: Mapping[str, object]) -> None:
    for tag, known in OWN_TAGS.items():
        if named.get(tag) not in (None, *known):
            found.lost(tag, named[tag], f"keys of messages are {' or '.join(known)}: rename them in the file")


# --- LLaMA-Factory ----------------------------------------------------------------------------------------------------


def _of_llamafactory(account: KeyAccount, target: str) -> None:
    for key, place in (("dataset", target), ("eval_dataset", "eval_data")):
        if not account.has(key):
            continue
        if place == "eval_data" and place not in account.fields:
            account.lack(key, "held-out rows are a share of the data, or heldout", decides=False)
            continue
        found = DataSets(account, key)
        value = account.given[key]
        names = value if isinstance(value, list) else str(value).split(",")
        table, folder = _dataset_info(account)
        for name in (str(name).strip() for name in names):
            _one_of_llamafactory(found, name, table, folder)
        if key == "dataset" and account.has("interleave_probs"):
            shares = account.given["interleave_probs"]
            parts = shares if isinstance(shares, list) else str(shares).split(",")
            found.weights = [float(part) for part in parts]
            account.drop("interleave_probs", "it is weights: shares of the rows of an epoch")
        _write(account, found, place)
    account.drop("dataset_dir", "it is a part of the paths")
    if account.has("max_samples"):
        account.lack("max_samples", "all rows are used: cut the files")


def _dataset_info(account: KeyAccount) -> tuple[JsonObject, Path]:
    """dataset_info.json of a file: in its `dataset_dir`, next to it, or in `data` of a folder above."""
    named = account.given.get("dataset_dir", "data")
    folder = account.path.absolute().parent
    if isinstance(named, dict):
        return named, folder
    above = [folder, *folder.parents]
    places = [Path(str(named)), *(place / str(named) for place in above), folder]
    for place in places:
        path = place / "dataset_info.json"
        if path.is_file():
            try:
                return dict(load_json(path)), _short(place)
            except (ValueError, TypeError) as error:
                raise InputError(f"{path} is not a JSON object ({error})", "correct the file") from error
    raise InputError(
        f"{place_of(account.path, ('dataset',))} names data sets of dataset_info.json, which is neither in "
        f"{named} nor next to the file",
        "copy it next to the file, or set dataset_dir",
    )


def _short(folder: Path) -> Path:
    """A folder relative to the working directory, if it is below."""
    found = folder.absolute()
    return found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found


def _one_of_llamafactory(found: DataSets, name: str, table: JsonObject, folder: Path) -> None:
    if name not in table:
        where = place_of(found.account.path, (found.key,))
        raise UsageError(f"'{name}' in {where} is not in dataset_info.json", closest(name, table), where)
    record: Record = table[name]
    if record.get("hf_hub_url"):
        found.add(str(record["hf_hub_url"]), record.get("split"), record.get("subset"))
    elif record.get("file_name"):
        found.add(str(folder / record["file_name"]), record.get("split"))
    else:
        found.lost(name, record, "only files and hub data sets are read")
        found.add(name)
    columns: Record = record.get("columns") or {}
    found.rename(_columns_of_llamafactory(columns))
    tags: Record = record.get("tags") or {}
    _tags(found, tags)
    for part, why in LOST.items():
        if columns.get(part) or record.get(part):
            found.lost(part, columns.get(part) or record.get(part), why)


def _columns_of_llamafactory(columns: Record) -> dict[str, str]:
    """Ours -> theirs, for the columns whose names are not recognised as they are."""
    asked = "instruction" if columns.get("query") else "prompt"
    answered = "output" if columns.get("query") else "completion"
    usual = {"prompt": ("instruction",), "response": ("output",), "messages": LISTS}
    ours = {
        "prompt": asked,
        "query": "input",
        "response": answered,
        "messages": "messages",
        "system": "system",
        "history": "history",
        "chosen": "chosen",
        "rejected": "rejected",
    }
    return {
        ours[name]: str(theirs)
        for name, theirs in columns.items()
        if name in ours and theirs not in (None, "", ours[name], *usual.get(name, ()))
    }


def _records(account: KeyAccount, key: str) -> list[Record]:
    """The data sets of a list. Raises UsageError with the place of one that is not a mapping with a path."""
    value = account.given[key]
    records = value if isinstance(value, list) else [value]
    for number, record in enumerate(records):
        if isinstance(record, str):
            records[number] = {"path": record}
        elif not isinstance(record, dict) or not record.get("path"):
            where = place_of(account.path, (key, number))
            raise UsageError(f"{key}[{number}] = {shown(record)} in {where} has no path", "write path: FILE", where)
    return records
