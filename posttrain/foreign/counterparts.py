"""What to write for a name of another tool: our option with the value converted, or why nothing stands for it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from .names import BATCH, COMMANDS_ELSEWHERE, NAMES, ForeignName

__all__ = [
    "RUN_FLAGS",
    "Spelling",
    "command_here",
    "converted",
    "counterpart",
    "hint_for",
    "is_foreign",
    "is_off",
    "plain_name",
]

Settings = dict[str, object]
# How a hint spells settings: as flags, as --set, or as keys of a YAML file.
Spelling = Literal["flags", "sets", "keys"]

RUN_FLAGS = ("out", "force", "resume")  # flags of the commands that write an output; not keys of a recipe
NOTHING_LIKE_IT = "this command has nothing like it; leave it out"
EVERY = 100  # steps between held-out losses in a hint for an option that compares them
ALL = ("all", "all-linear", "all_linear")
OFF = ("none", "no", "off", "disabled", "false", "")
ATTENTIONS: dict[object, str] = {
    **dict.fromkeys((True, "fa2", "flash_attention_2", "kernels-community/flash-attn2"), "flash_attention_2"),
    **dict.fromkeys(("fa3", "flash_attention_3", "kernels-community/flash-attn3"), "flash_attention_3"),
    **dict.fromkeys(("disabled", "eager"), "eager"),
    **{name: name for name in ("flex_attention", "sdpa")},
}
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw")


@dataclass(frozen=True)
class Counterpart:
    """What stands for a name here.

    key       our key; empty without a counterpart
    settings  our settings for the value; None if the value is not known or cannot be converted, {} if it is ours anyway
    """

    row: ForeignName
    key: str = ""
    settings: Settings | None = None


def plain_name(name: str) -> str:
    """A flag or key in the spelling of the table: no leading dashes, underscores."""
    return name.lstrip("-").partition("=")[0].replace("-", "_")


def is_foreign(name: str) -> bool:
    """Whether another tool has an option of this name."""
    return plain_name(name) in NAMES


def counterpart(
    name: str, known: Collection[str], value: object = None, given: Mapping[str, object] | None = None
) -> Counterpart | None:
    """What a name of another tool is for a command that has the keys `known`; None for a name of no other tool.

    given  the other settings: some of our values follow from several of theirs
    """
    row = NAMES.get(plain_name(name))
    if row is None:
        return None
    for key in () if row.without in known else row.ours:
        if key in RUN_FLAGS or ("trainer" if key.startswith("trainer.") else key) in known:
            if plain_name(name) in BATCH:
                settings = batch_settings({**(given or {}), plain_name(name): value}, known)
            else:
                settings = None if value is None else converted(plain_name(name), key, value, given or {})
            further = {one for one in settings or () if "." not in one and one not in RUN_FLAGS}
            if further <= set(known):
                return Counterpart(row, key, settings)
    return Counterpart(row)


def hint_for(
    name: str,
    known: Collection[str],
    value: object = None,
    given: Mapping[str, object] | None = None,
    spelling: Spelling = "flags",
) -> str | None:
    """The fix for an unknown option: what to write instead; None for a name of no other tool."""
    found = counterpart(name, known, value, given)
    if found is None:
        return None
    if not found.key:
        return found.row.instead if _fits(found.row.instead, known) else NOTHING_LIKE_IT
    if found.key in RUN_FLAGS and spelling != "flags":
        words = spelt(found.settings, "flags") if found.settings else f"--{found.key}"
        return f"give it on the command line: {words}"
    how = f" ({found.row.how})" if found.row.how and _fits(found.row.how, known) else ""
    here = f"here it is {spelt_key(found.key, spelling)}{how}"
    if found.settings is None:
        return here
    if not found.settings:
        return f"leave it out: it is the default here ({spelt_key(found.key, spelling)})"
    others = [one for one in BATCH if one in (given or {}) and one != plain_name(name) and one not in known]
    instead = f" instead of {' and '.join([plain_name(name), *others])}" if others else ""
    return f"{here}: write {spelt(found.settings, spelling)}{instead}"


def _fits(text: str, known: Collection[str]) -> bool:
    """Whether a command has every flag that a text names; one that names a whole command fits everywhere."""
    if "gemma2 " in text:
        return True
    flags = {plain_name(flag) for flag in re.findall(r"--[a-z][a-z-]*", text)} - {*RUN_FLAGS, "set"}
    return flags <= set(known) and ("trainer." not in text or "trainer" in known)


def command_here(word: str) -> str | None:
    """The fix for a sub-command of another tool; None for a word that none of them has."""
    return COMMANDS_ELSEWHERE.get(word.replace("_", "-"))


# --- spelling ---------------------------------------------------------------------------------------------------------


def spelt_key(key: str, spelling: Spelling) -> str:
    """A key as a hint names it."""
    if spelling != "flags":
        return f"'{key}'"
    return f"--set {key}=..." if "." in key else f"--{key.replace('_', '-')}"


def spelt(settings: Settings, spelling: Spelling) -> str:
    """Settings as the words to type, or as the lines of a file."""
    if spelling == "keys":
        return ", ".join(f"{key}: {_text(value, in_file=True)}" for key, value in settings.items())
    if spelling == "sets":
        return " ".join(
            f"--set {shlex.quote(f'{key}={_text(value, in_file=True)}')}" for key, value in settings.items()
        )
    words: list[str] = []
    for key, value in settings.items():
        flag = f"--{key.replace('_', '-')}"
        if "." in key:
            words += ["--set", shlex.quote(f"{key}={_text(value, in_file=True)}")]
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, shlex.quote(_text(value))]
    return " ".join(words)


def _text(value: object, in_file: bool = False) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        items = (", " if in_file else ",").join(map(str, value))
        return f"[{items}]" if in_file else items
    return f"{value:g}" if isinstance(value, float) else str(value)


def is_off(value: object) -> bool:
    """Whether a value says that something is not wanted: null, false, a word for it, -1 steps, nothing in a list."""
    if isinstance(value, str):
        return value.lower() in OFF
    return value is None or value is False or value == -1 or (isinstance(value, list | dict) and not value)


# --- values -----------------------------------------------------------------------------------------------------------


def converted(name: str, key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    """Our settings for the value of a name; {} if ours are the same without, None if it cannot be converted."""
    if key in RUN_FLAGS:
        return _of_run(key, value)
    if name in CONVERSIONS:
        return CONVERSIONS[name](key, value, given)
    if is_off(value):
        return {}
    return {key: list_of(value) if key in LISTS else value}


LISTS = ("data", "reward", "reward_fn", "weights", "lora_targets", "report_to")


def list_of(value: object) -> object:
    """A value of a list: items separated by commas or blanks become a list; one item stays what it is."""
    if isinstance(value, str):
        parts = [part for part in value.replace(",", " ").split() if part]
        return parts if len(parts) > 1 else value
    return value


def _of_run(key: str, value: object) -> Settings | None:
    if key == "out":
        return {"out": value}
    return {} if is_off(value) else {key: True}


def _targets(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    targets = list_of(value)
    names = targets if isinstance(targets, list) else [targets]
    return {} if is_off(value) or any(name in ALL for name in names) else {key: targets}


def _share(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    """A share of the rows; a number of rows has no counterpart."""
    return {key: value} if isinstance(value, int | float) and 0 <= value < 1 else None


def _overlong(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    return {key: {"raise": "error"}.get(str(value), value)}


def _attention(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    found = ATTENTIONS.get(value if isinstance(value, bool) else str(value))
    return {key: found} if found else {}


def _sdpa(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    return {} if is_off(value) else {key: "sdpa"}


def _packing(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    return {} if is_off(value) else {key: True, "attention": "flash_attention_2"}


def _compared(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    """An option that compares held-out losses, which needs their interval."""
    if is_off(value):
        return {}
    every = {} if given.get("eval_every") else {"eval_every": EVERY}
    return {key: "best" if key == "keep" else value, **every}


def _fixed(text: str) -> Callable[[str, object, Mapping[str, object]], Settings | None]:
    return lambda key, value, given: {} if is_off(value) else {key: text}


def _average(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    """TRL keeps `alpha` of the reference; mu is what moves."""
    return {key: round(1 - value, 9)} if isinstance(value, int | float) and 0 <= value <= 1 else None


def _engine(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    return {key: "vllm"} if value == "vllm" else {}


def _optimizer(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    return {} if value in ADAMW else {key: value}


def _schedule(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    return {} if value == "linear" else {key: value}


def _whole_steps(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    """A number of steps; a share of the training has no counterpart."""
    if is_off(value):
        return {}
    return {key: int(value)} if isinstance(value, int | float) and value >= 1 else None


def _functions(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    """TRL writes module.function, we module:function; a name without a module is one of TRL's functions."""
    names = list_of(value)
    written = [_function(name) for name in (names if isinstance(names, list) else [names])]
    return None if None in written else {key: written[0] if len(written) == 1 else written}


def _function(name: object) -> str | None:
    if not isinstance(name, str) or ":" in name:
        return name if isinstance(name, str) else None
    module, dot, function = name.rpartition(".")
    return f"{module}:{function}" if dot else None


def _bits(bits: int) -> Callable[[str, object, Mapping[str, object]], Settings | None]:
    """A switch that stands for a number of bits."""
    return lambda key, value, given: {} if is_off(value) else {key: bits}


def _given_bits(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    """Bits that are ours as well; without any nothing is quantised."""
    if is_off(value):
        return {}
    return {key: int(str(value))} if str(value) in ("4", "8") else None


def _merged(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    return {} if value is True else {key: "adapter"}


def _files(key: str, value: object, given: Mapping[str, object]) -> Settings | None:
    """Paths; records with a `path`, as axolotl and TRL have them, give theirs."""
    items = value if isinstance(value, list) else [value]
    paths = [item.get("path") if isinstance(item, dict) else item for item in items]
    if not all(isinstance(path, str) for path in paths):
        return None
    return {key: list_of(paths[0]) if len(paths) == 1 else paths}


CONVERSIONS: dict[str, Callable[[str, object, Mapping[str, object]], Settings | None]] = {
    **dict.fromkeys(("lora_target", "lora_target_modules", "target_modules", "lora_attn_modules"), _targets),
    **dict.fromkeys(("val_size", "val_set_size", "test_split_size"), _share),
    **dict.fromkeys(("attn_implementation", "flash_attn", "flash_attention"), _attention),
    "sdp_attention": _sdpa,
    **dict.fromkeys(("sample_packing", "neat_packing"), _packing),
    **dict.fromkeys(("load_best_model_at_end", "early_stopping_patience", "early_stopping_steps"), _compared),
    **dict.fromkeys(("wandb_project", "use_wandb"), _fixed("wandb")),
    **dict.fromkeys(("optim", "optimizer"), _optimizer),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type"), _schedule),
    **dict.fromkeys(("eval_steps", "save_steps", "logging_steps", "max_steps"), _whole_steps),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "eval_dataset", "test_datasets"), _files),
    "load_in_4bit": _bits(4),
    "load_in_8bit": _bits(8),
    "quantization_bit": _given_bits,
    "use_tensorboard": _fixed("tensorboard"),
    "use_vllm": _fixed("vllm"),
    "sync_ref_model": _fixed("ema"),
    "ref_model_mixup_alpha": _average,
    "infer_backend": _engine,
    "excess_length_strategy": _overlong,
    "merge_lora": _merged,
    "reward_funcs": _functions,
}


def batch_settings(given: Mapping[str, object], known: Collection[str]) -> Settings | None:
    """Our batch for theirs: per device times accumulation is one optimizer step; None if a number is missing."""
    per = next((given[name] for name in BATCH if name != BATCH[1] and isinstance(given.get(name), int)), None)
    steps = given.get("gradient_accumulation_steps", 1)
    if not isinstance(per, int) or not isinstance(steps, int) or per < 1 or steps < 1:
        return None
    rows = per * steps
    micro: Settings = {"micro_batch_size": per} if steps > 1 and "micro_batch_size" in known else {}
    if "prompts_per_step" not in known:
        n = given.get("n", 1)
        return {"batch_size": rows, **micro} if isinstance(n, int) and rows % n == 0 else None
    n = next((given[name] for name in ("n", "num_generations", "rloo_k") if isinstance(given.get(name), int)), 4)
    if not isinstance(n, int) or n < 2 or rows % n:
        return None
    return {"prompts_per_step": rows // n, "n": n, **micro}
