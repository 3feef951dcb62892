"""`gemma2 config import`: a file of TRL, axolotl or LLaMA-Factory as a recipe, and the account of its keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args, get_origin

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonObject, load_json
from gemma2.core.yaml_files import place_of, read_documents, to_yaml
from gemma2.posttrain.foreign.counterparts import RUN_FLAGS, converted, is_off
from gemma2.posttrain.foreign.names import NAMES
from gemma2.posttrain.schemas import RewardConfig, RlhfConfig, SftConfig
from gemma2.posttrain.schemas.config import Config, validated

from .account import KeyAccount, KeyRow
from .dialects import DIALECTS, FORMATS, Dialect, Format, Kind
from .foreign_data import read_data
from .training_settings import name_in, read_training

__all__ = ["Imported", "import_file"]

SCHEMAS: dict[Kind, type[Config]] = {"sft": SftConfig, "reward": RewardConfig, "dpo": RewardConfig, "rlhf": RlhfConfig}
COMMAND = {"sft": "sft", "reward": "reward", "dpo": "reward", "rlhf": "rlhf"}
KINDS_OF = {
    "sft": "sft",
    "rm": "reward",
    "dpo": "dpo",
    "ipo": "dpo",
    "orpo": "dpo",
    "simpo": "dpo",
    "ppo": "rlhf",
}
# What is not read: its name in the file -> where to go instead.
REFUSED = {
    "pt": "texts without turns are for pre-training, which is not among the commands; write prompt and completion",
    "kto": "rows without a pair have no counterpart; gemma2 reward needs chosen and rejected answers",
    "grpo": "write a recipe for gemma2 rlhf (gemma2 rlhf --help); rewards are functions or models there",
}
SAME_NAMES = ("max_grad_norm", "temperature", "max_new_tokens")  # as here, in commands that have them
# Beginnings of keys on which no result depends, and parts of the names of axolotl's plugins for speed.
INDIFFERENT = (
    *("wandb_", "hub_", "swanlab_", "mlflow_", "comet_", "logging_", "profiler", "loss_watchdog_"),
    *("ddp_", "dp_", "ray_", "fsdp", "dataloader_", "liger_", "flash_attn_", "use_kernels", "torch_compile"),
    *("activation_offloading", "experimental_skip_move", "skip_prepare_dataset", "deepcompile", "tokenizer_use_fast"),
)
SPEED = ("liger", "cut_cross_entropy", "Liger", "CutCrossEntropy")
TRACKERS = ("tensorboard", "wandb", "trackio")
PAIR_KEYS = ("beta", "pref_beta", "rl_beta", "dpo_beta", "pref_loss", "loss_type", "pref_ftx")
NO_DPO = "there is no DPO here: gemma2 reward learns the pairs, gemma2 rlhf --beta weighs the KL"


@dataclass(frozen=True)
class Imported:
    """A recipe and how it came about.

    settings  of the command, as the recipe has them
    """

    path: Path
    form: Format
    kind: Kind
    settings: JsonObject
    rows: list[KeyRow]

    @property
    def command(self) -> str:
        """The command that the recipe is for."""
        return COMMAND[self.kind]

    @property
    def lacking(self) -> list[KeyRow]:
        """The keys without a counterpart."""
        return [row for row in self.rows if row.verdict == "missing"]

    @property
    def deciding(self) -> list[KeyRow]:
        """Those of them on which results depend."""
        return [row for row in self.lacking if row.decides]

    def recipe(self) -> str:
        """The recipe as text; its first line says what it is."""
        lines = [f"# For gemma2 {self.command}: from {self.path.name} of {DIALECTS[self.form].title}"]
        lines += [f"# no counterpart: {row.key}" for row in self.deciding]
        return "\n".join([*lines, to_yaml(self.settings)])

    def following(self, recipe: str) -> list[str]:
        """The commands to go on with."""
        out = {"sft": "sft", "reward": "reward", "rlhf": "policy"}[self.command]
        commands = [f"gemma2 {self.command} --config {recipe} --out {out} --dry-run"]
        if self.kind == "dpo":
            model = self.settings.get("model", "MODEL")
            commands += [
                f"gemma2 reward --config {recipe} --out reward",
                f"gemma2 rlhf --policy {model} --reward reward --prompts {self.settings.get('data', 'PROMPTS')} "
                "--out policy",
            ]
        return commands

    def document(self) -> JsonObject:
        """Everything as one JSON document."""
        return {
            "format": self.form,
            "command": self.command,
            "settings": self.settings,
            "keys": [{item.name: getattr(row, item.name) for item in fields(row)} for row in self.rows],
            "without_counterpart": len(self.lacking),
            "without_counterpart_deciding_results": len(self.deciding),
        }


def import_file(path: Path, form: Format | None = None, kind: Kind | None = None) -> Imported:
    """Read a file of another tool. Raises InputError or UsageError, with its place, for one that cannot be read."""
    given = _read(path)
    form = form or _format_of(path, given)
    dialect = DIALECTS[form]
    kind = kind or _kind_of(path, given, form)
    schema = SCHEMAS[kind]
    defaults = {name: field.get_default(call_default_factory=True) for name, field in schema.model_fields.items()}
    lists = {name for name, field in schema.model_fields.items() if get_origin(field.annotation) is tuple}
    account = KeyAccount(path, given, defaults, frozenset(lists))
    if kind == "dpo":
        for key in PAIR_KEYS:
            if account.has(key):
                account.lack(key, NO_DPO)
    _model(account, dialect, kind)
    read_data(account, dialect.title, kind)
    read_training(account, dialect, kind)
    _trackers(account)
    for key in list(account.left):
        _remaining(account, key)
    settings = account.ordered(list(schema.model_fields))
    _check(schema, account, settings)
    return Imported(path, form, kind, settings, account.rows)


def _read(path: Path) -> JsonObject:
    if path.suffix == ".json":
        try:
            document = load_json(path)
        except OSError as error:
            raise InputError(f"cannot read {path} ({error.strerror})", "give a file that you may read") from error
        except ValueError as error:
            raise UsageError(f"{path} is not valid JSON: {error}", "correct the file") from error
        if not isinstance(document, dict):
            raise UsageError(f"{path} holds no JSON object", "give the file with the arguments of the training")
        return document
    documents = read_documents(path)
    if len(documents) != 1:
        raise UsageError(f"{path} holds {len(documents)} YAML documents", "give a file with one")
    return documents[0]


def _format_of(path: Path, given: Mapping[str, object]) -> Format:
    """The tool that a file is for: the one with the most keys that the others do not have."""
    found = {form: len(DIALECTS[form].own & given.keys()) for form in FORMATS}
    best = max(FORMATS, key=lambda form: found[form])
    if any("_component_" in value for value in given.values() if isinstance(value, dict)):
        raise InputError(f"{path} is a file of torchtune, which is not read", "see gemma2 sft --help for the options")
    if sum(number == found[best] for number in found.values()) > 1:
        ours = set(SftConfig.model_fields) | set(RewardConfig.model_fields)
        if given.keys() <= ours:
            raise UsageError(f"{path} is a recipe of ours already", f"gemma2 sft --config {path}")
        raise UsageError(
            f"{path}: its keys do not tell TRL, axolotl and LLaMA-Factory apart", f"give --format {'|'.join(FORMATS)}"
        )
    return best


def _kind_of(path: Path, given: Mapping[str, object], form: Format) -> Kind:
    """What a file trains. Raises InputError for what has no counterpart."""
    if form == "llamafactory":
        key, named = "stage", str(given.get("stage", "sft"))
    elif form == "axolotl":
        named = "rm" if given.get("reward_model") else str(given.get("rl") or "sft")
        key, named = ("pretraining_dataset", "pt") if given.get("pretraining_dataset") else ("rl", named)
    else:
        of_pairs = {"beta", "precompute_ref_log_probs", "label_smoothing", "sync_ref_model"} & given.keys()
        key, named = "beta", "dpo" if of_pairs else "rm" if "center_rewards_coefficient" in given else "sft"
    if named not in KINDS_OF:
        where = place_of(path, (key,))
        raise InputError(f"'{named}' in {where} is not read", REFUSED.get(named, "give --as sft, reward or dpo"), where)
    kind: Kind = KINDS_OF[named]  # type: ignore[assignment]
    assert kind in get_args(Kind)
    return kind


def _model(account: KeyAccount, dialect: Dialect, kind: Kind) -> None:
    ours = "policy" if kind == "rlhf" else "model"
    key = name_in(account, dialect, "model")
    if key is None:
        raise UsageError(f"{account.path} names no model", f"write {dialect.names['model'][0]}: MODEL into it")
    account.take(key, {ours: str(account.given[key])})
    if kind == "rlhf" and account.has("reward_model"):
        account.take("reward_model", {"reward": [str(account.given["reward_model"])]})
    else:
        account.drop("reward_model", "the command trains a reward model")
    for key in ("stage", "rl"):
        why = NO_DPO if kind == "dpo" else f"the command is gemma2 {COMMAND[kind]}"
        if kind == "dpo" and account.has(key):
            account.lack(key, why)
        else:
            account.drop(key, why)


def _trackers(account: KeyAccount) -> None:
    value = account.given.get("report_to")
    if not is_off(value) and value != "all":
        listed = [str(item) for item in (value if isinstance(value, list) else [value])]
        known = [item for item in listed if item in TRACKERS]
        if known:
            account.take("report_to", {"report_to": known})
        elif listed != ["none"]:
            account.lack("report_to", f"trackers are {', '.join(TRACKERS)}", decides=False)
    account.drop("report_to", "no tracker is the default")
    for key, tracker in (("wandb_project", "wandb"), ("use_wandb", "wandb"), ("use_tensorboard", "tensorboard")):
        if not is_off(account.given.get(key)):
            account.take(key, {"report_to": [*account.ours.get("report_to", ()), tracker]}, NAMES[key].how)


def _remaining(account: KeyAccount, key: str) -> None:
    """A key that no reader took: by its name in the table, or unknown."""
    value, row = account.given[key], NAMES.get(key)
    if is_off(value) and not isinstance(value, int | float):
        account.drop(key, "it is empty")
        return
    if key in SAME_NAMES and key in account.fields:
        account.take(key, {key: value})
        return
    if row is None:
        if value is False or value == 0:
            account.drop(key, "it is off")
        elif key.startswith(INDIFFERENT) or key.endswith(("_kernel", "_parallel_size")):
            account.drop(key, "it changes speed, memory or what is shown, and no result")
        elif key == "plugins" and all(any(name in str(item) for name in SPEED) for item in value):
            account.drop(key, "they change speed and memory only")
        else:
            account.lack(key, "it is not in the table of names")
        return
    if key == "special_tokens" and isinstance(value, dict) and value.keys() <= {"pad_token"}:
        account.drop(key, "padding is not learned")
        return
    if row.ours and row.ours[0] in RUN_FLAGS:
        account.drop(key, f"give it on the command line: --{row.ours[0]}")
        return
    known = () if row.without in account.fields else row.ours
    target = next((ours for ours in known if ours.partition(".")[0] in account.fields), None)
    settings = converted(key, target, value, account.ours) if target else None
    if settings is not None:
        account.take(key, settings, row.how)
    elif target is not None:
        account.lack(key, row.how or "its value has no counterpart", decides=not key.endswith("_steps"))
    elif value is False or value == 0:
        account.drop(key, "it is off")
    elif row.decides:
        account.lack(key, row.instead)
    else:
        account.drop(key, row.instead.removeprefix("leave it out: "))


def _check(schema: type[Config], account: KeyAccount, settings: JsonObject) -> None:
    """Refuse what the command would refuse, at the place of the foreign key that it came from."""
    wanted = {"model", "data", "policy", "prompts"} & schema.model_fields.keys() - settings.keys()
    for name in sorted(wanted):
        raise UsageError(f"{account.path} names no data set", f"write one into it; here it is {name}")
    if "reward" in schema.model_fields and not settings.get("reward"):
        raise UsageError(f"{account.path} names no reward model", "write reward_model: DIR into it")
    try:
        validated(schema, settings)
    except UsageError as error:
        named = [row for row in account.rows if row.here and f"'{row.here.partition(':')[0]}" in error.what]
        where = place_of(account.path, (named[0].key,)) if named else str(account.path)
        raise UsageError(f"{where}: {error.what}", error.hint, where) from error
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{account.path}: {name} is {value}", "write a finite number")
