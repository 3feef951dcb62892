"""Batch, length, schedule, LoRA, precision and evaluation of a foreign file, as settings of ours."""

from __future__ import annotations

import math
import re

from gemma2.core.errors import UsageError
from gemma2.core.yaml_files import place_of
from gemma2.posttrain.foreign.counterparts import converted, is_off

from .account import KeyAccount, shown
from .dialects import Dialect, Kind

__all__ = ["read_training"]

QUANTISED = ("load_in_4bit", "load_in_8bit", "quantization_bit", "gptq")
NOT_QUANTISED = "only the frozen base of an adapter is quantised, in 4 bits (NF4) or 8"
PLAIN_NAME = re.compile(r"\w+")
BF16 = ("bf16", "bfloat16")


def read_training(account: KeyAccount, dialect: Dialect, kind: Kind) -> None:
    """Say what becomes of every setting of the training itself; data and model are others' business."""
    _batch(account, dialect, kind)
    _duration(account, dialect, kind)
    _rate(account, dialect, kind)
    _schedule(account, dialect)
    _length(account, dialect, kind)
    _lora(account, dialect, kind)
    _precision(account)
    _optimizer(account)
    _attention(account, dialect)
    _evaluation(account, dialect)
    if "seed" in account.left:
        account.take("seed", {"seed": account.left["seed"]} if account.has("seed") else {"seed": dialect.seed})
    else:
        account.imply("seed", dialect.seed, {"seed": dialect.seed}, f"the default of {dialect.title}")


def name_in(account: KeyAccount, dialect: Dialect, canonical: str) -> str | None:
    """The file's key for a setting, if it gives one."""
    return next((key for key in dialect.names.get(canonical, ()) if account.has(key)), None)


def number(account: KeyAccount, key: str | None, default: float) -> float:
    """The number that a key gives, also as text; the default if it gives none. Raises UsageError for another value."""
    value = account.given.get(key) if key else None
    if value is None:
        return default
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        where = place_of(account.path, (str(key),))
        raise UsageError(f"'{key}' = {shown(value)} in {where} is not a number", "write a number", where) from error


def whole(value: float) -> float:
    """A number without a needless `.0`."""
    return int(value) if value == int(value) else value


def _batch(account: KeyAccount, dialect: Dialect, kind: Kind) -> None:
    per_key, steps_key = (name_in(account, dialect, name) for name in ("per_device", "accumulation"))
    per, steps = int(number(account, per_key, dialect.per_device)), int(number(account, steps_key, 1))
    rows, why = per * steps, f"{per} per device x {steps} accumulated, on one device"
    if kind == "rlhf":
        n = int(account.fields.get("n", 4) or 4)  # type: ignore[call-overload]
        settings = {"prompts_per_step": max(1, rows // n), "n": n}
        why = f"{rows} sequences a step, {n} of each prompt"
    else:
        settings = {"batch_size": rows}
    if rows > per:
        settings["micro_batch_size"] = per
    if per_key is None and steps_key is None:
        account.imply(dialect.names["per_device"][0], per, settings, f"the default of {dialect.title}")
        return
    for key in filter(None, (per_key, steps_key)):
        account.take(key, settings, why)


def _duration(account: KeyAccount, dialect: Dialect, kind: Kind) -> None:
    epochs_key, steps_key = (name_in(account, dialect, name) for name in ("epochs", "max_steps"))
    steps = int(number(account, steps_key, -1))
    if kind == "rlhf":
        if steps_key and steps > 0:
            account.take(steps_key, {"steps": steps})
        if epochs_key:
            account.lack(epochs_key, "the length of rlhf is a number of steps: set steps")
        return
    if steps_key and steps > 0:
        account.take(steps_key, {"max_steps": steps})
        if epochs_key:
            account.drop(epochs_key, f"{steps_key} decides")
        return
    if steps_key:
        account.drop(steps_key, "it is off")
    epochs = whole(number(account, epochs_key, dialect.epochs))
    if epochs_key:
        account.take(epochs_key, {"epochs": epochs})
    else:
        account.imply(dialect.names["epochs"][0], epochs, {"epochs": epochs}, f"the default of {dialect.title}")


def _rate(account: KeyAccount, dialect: Dialect, kind: Kind) -> None:
    if kind in ("dpo", "rlhf"):
        if account.has("learning_rate"):
            method = {"dpo": "DPO", "rlhf": "PPO"}[kind]
            account.lack("learning_rate", f"a rate for {method}; the default of the command here is kept")
        return
    if account.has("learning_rate"):
        account.take("learning_rate", {"learning_rate": number(account, "learning_rate", 0.0)})
    elif kind in dialect.rates:
        rate = dialect.rates[kind]
        account.imply("learning_rate", rate, {"learning_rate": rate}, f"the default of {dialect.title}")
    else:
        account.gap("learning_rate", None, f"{dialect.title} has no default, and the file gives none")


def _schedule(account: KeyAccount, dialect: Dialect) -> None:
    key = name_in(account, dialect, "schedule")
    schedule = str(account.given[key]) if key else dialect.schedule
    settings: dict[str, object] = {} if schedule == "linear" else {"trainer.lr_scheduler_type": schedule}
    if key:
        account.take(key, settings, "a linear fall to 0 is the default here" if not settings else "")
    else:
        key = dialect.names["schedule"][0]
        account.imply(key, schedule, settings, f"the default of {dialect.title}")
    ratio_key, steps_key = (name_in(account, dialect, name) for name in ("warmup_ratio", "warmup_steps"))
    given = number(account, steps_key, -1)
    if steps_key and (given >= 1 or (given == 0 and not ratio_key)):
        account.take(steps_key, {"warmup_steps": int(given)})
        if ratio_key:
            account.drop(ratio_key, f"{steps_key} decides")
        return
    if steps_key and 0 < given < 1:  # transformers 5: a share
        ratio_key, steps_key = steps_key, None
    if steps_key:
        account.drop(steps_key, "it is 0, and the ratio decides")
    ratio = number(account, ratio_key, dialect.warmup)
    warmup = _warmup(account, ratio)
    title = f"the default of {dialect.title}"
    if warmup is None:
        why = f"{ratio:g} of the steps, whose number is not known yet: set warmup_steps"
        if ratio_key:
            account.lack(ratio_key, why)
        else:
            account.gap("warmup_ratio", ratio, f"{title}: {why}")
    elif ratio_key:
        account.take(ratio_key, warmup)
    else:
        account.imply("warmup_ratio", ratio, warmup, title)


def _warmup(account: KeyAccount, ratio: float) -> dict[str, object] | None:
    """Our warm-up for a share of the steps; None where only a number of steps can be given and it is not known."""
    if "warmup_ratio" in account.fields:
        return {"warmup_ratio": ratio}
    if ratio == 0:
        return {"warmup_steps": 0}
    steps = account.ours.get("max_steps", account.ours.get("steps"))
    return {"warmup_steps": math.ceil(ratio * steps)} if isinstance(steps, int) else None


def _length(account: KeyAccount, dialect: Dialect, kind: Kind) -> None:
    if kind == "rlhf":
        return
    keys = [key for key in dialect.names["length"] if account.has(key)]
    length = int(number(account, keys[0] if keys else None, dialect.length))
    if keys:
        account.take(keys[0], {"max_length": length})
    else:
        account.imply(dialect.names["length"][0], length, {"max_length": length}, f"the default of {dialect.title}")
    if "on_overlong" not in account.fields:  # pairs over the limit are left out and counted
        for key in ("excess_length_strategy", "truncation_mode"):
            account.drop(key, "pairs over the limit are left out and counted")
        return
    if account.has("excess_length_strategy"):
        account.take(
            "excess_length_strategy",
            converted("excess_length_strategy", "on_overlong", account.given["excess_length_strategy"], {}) or {},
        )
    else:
        account.imply(
            "rows over the limit", dialect.overlong, {"on_overlong": dialect.overlong}, f"what {dialect.title} does"
        )


def _lora(account: KeyAccount, dialect: Dialect, kind: Kind) -> None:
    adapts = _adapts(account, dialect)
    for key in QUANTISED:
        if not is_off(account.given.get(key)):
            settings = converted(key, "base_bits", account.given[key], {}) if adapts and key != "gptq" else None
            if settings is None:
                account.lack(key, NOT_QUANTISED)
            else:
                account.take(key, settings)
    if not adapts:
        for key in [key for key in account.left if key.startswith("lora_")]:
            account.drop(key, "all weights are trained")
        return
    rank_key = name_in(account, dialect, "rank")
    rank = int(number(account, rank_key, dialect.rank or 0))
    alpha = number(account, "lora_alpha", 2.0 * rank if dialect.alpha is None else dialect.alpha)
    rooted = next((key for key in ("use_rslora", "peft_use_rslora") if account.given.get(key) is True), None)
    if rooted:
        alpha *= math.sqrt(rank)
        account.take(rooted, {"lora_alpha": alpha}, "alpha / sqrt(rank): alpha times sqrt(rank) gives the same scale")
    said = f"the default of {dialect.title}"
    for key, name, value in (
        (rank_key or dialect.names["rank"][0], "lora_rank", rank),
        ("lora_alpha", "lora_alpha", alpha),
        ("lora_dropout", "lora_dropout", number(account, "lora_dropout", dialect.dropout)),
    ):
        if name == "lora_dropout" and kind == "rlhf" and value:
            account.lack(key, "a dropout would train a different policy from the one that sampled")
        elif account.has(key):
            account.take(key, {name: whole(value)})
        else:
            account.imply(key, value, {name: whole(value)}, said)
    _targets(account, dialect, said)


def _adapts(account: KeyAccount, dialect: Dialect) -> bool:
    """Whether the file trains an adapter, by the tool's own switch."""
    switch = {"TRL": "use_peft", "axolotl": "adapter", "LLaMA-Factory": "finetuning_type"}[dialect.title]
    value = account.given.get(switch)
    if value == "qlora":
        account.take(switch, {"base_bits": 4})
        return True
    if is_off(value) or value == "full":
        implied = value is None and dialect.title == "LLaMA-Factory"  # lora is its default
        if switch in account.left and not implied:
            account.take(switch, {"lora_rank": 0})
        return implied
    if value not in (True, "lora"):
        account.lack(switch, "all weights are trained, or a LoRA adapter")
        return False
    account.drop(switch, "a lora_rank above 0 trains an adapter")
    return True


def _targets(account: KeyAccount, dialect: Dialect, said: str) -> None:
    (key,) = dialect.names["targets"]
    if account.has(key):
        settings = converted(key, "lora_targets", account.given[key], {}) or {}
        found = settings.get("lora_targets", [])
        names = found if isinstance(found, list) else [found]
        if all(PLAIN_NAME.fullmatch(str(name)) for name in names):
            account.take(key, {"lora_targets": names} if names else {})
        else:
            account.lack(key, "modules are named by the last part of their names: set lora_targets")
        account.drop("lora_target_linear", f"{key} decides")
    elif account.given.get("lora_target_linear"):
        account.take("lora_target_linear", {}, "all linear layers are the default here")
    elif dialect.targets:
        account.imply(key, list(dialect.targets), {"lora_targets": list(dialect.targets)}, said)


def _precision(account: KeyAccount) -> None:
    for key in BF16:
        if account.given.get(key) is False and "trainer" in account.fields:
            account.take(key, {"trainer.bf16": False})
    if account.given.get("gradient_checkpointing") is False:
        account.take("gradient_checkpointing", {"trainer.activation_checkpointing": False})
    if account.given.get("disable_gradient_checkpointing") is True:
        account.take("disable_gradient_checkpointing", {"trainer.activation_checkpointing": False})


def _optimizer(account: KeyAccount) -> None:
    for key in ("optim", "optimizer"):
        if account.has(key) and any(part in str(account.given[key]) for part in ("8bit", "4bit", "paged")):
            why = (
                "AdamW keeps its state in 32 bit, with more memory; trainer.optim takes it if bitsandbytes is installed"
            )
            account.lack(key, why, decides=False)


def _attention(account: KeyAccount, dialect: Dialect) -> None:
    if "attention" in account.fields:
        for key in dialect.names["attention"]:
            if account.has(key):
                name = "attn_implementation" if key == "flex_attention" else key
                value = "flex_attention" if key == "flex_attention" and account.given[key] else account.given[key]
                settings = converted(name, "attention", value, {}) or {}
                account.take(key, settings, "" if settings else "auto, which takes what fits, is the default")
    packed = any(not is_off(account.given.get(key)) for key in dialect.names["packing"])
    for key in dialect.names["packing"]:
        if account.has(key) and not packed:
            account.drop(key, "it is off")
        elif account.has(key) and str(account.ours.get("attention", "")).startswith("flash"):
            account.take(key, {"packing": True})
        elif account.has(key):
            why = (
                "packing needs flash attention (attention: flash_attention_2); without it batch_size counts single rows"
            )
            account.lack(key, why)


def _evaluation(account: KeyAccount, dialect: Dialect) -> None:
    if "eval_fraction" not in account.fields:
        return
    key = name_in(account, dialect, "share")
    share = number(account, key, 0.0)
    if key and not 0 <= share < 1:
        account.lack(key, f"{share:g} rows; the held-out part is a share here: set eval_fraction", decides=False)
        return
    if key:
        account.take(key, {"eval_fraction": whole(share)})
    elif "eval_data" not in account.ours:
        title = f"what {dialect.title} does"
        account.imply(dialect.names["share"][0], 0, {"eval_fraction": 0}, f"nothing is held out: {title}")
    held_out = share > 0 or "eval_data" in account.ours
    named = [account.given[name] for name in ("eval_strategy", "evaluation_strategy") if name in account.given]
    off = any(map(is_off, named))  # YAML reads `no` as false
    every = number(account, "eval_steps", 0)
    if account.has("eval_steps"):
        if off or not held_out:
            account.drop("eval_steps", "nothing is held out")
        elif every >= 1:
            account.take("eval_steps", {"eval_every": int(every)})
        else:
            account.lack("eval_steps", "eval_every counts optimizer steps", decides=False)
    if "eval_every" not in account.ours:
        for name in ("load_best_model_at_end", "early_stopping_patience", "early_stopping_steps"):
            if not is_off(account.given.get(name)):
                account.lack(name, "set eval_every, in optimizer steps, then keep: best or patience: N")
