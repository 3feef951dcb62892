"""The options that a Trainer runs with, compared with the recipe that was asked for: no key is lost on the way.

A field that has no place in this table concerns data, models or sampling, and never passes through TRL.
"""

from __future__ import annotations

from enum import Enum

from transformers import TrainingArguments

from gemma2.core.errors import GuardStop
from gemma2.posttrain.schemas import TrainingFields

__all__ = ["check_recipe"]

# Field of a configuration -> option of TRL and transformers with the same value.
OPTIONS = {
    "learning_rate": ("learning_rate",),
    "max_grad_norm": ("max_grad_norm",),
    "seed": ("seed", "data_seed"),
    "save_every": ("save_steps",),
    "log_every": ("logging_steps",),
    "epochs": ("num_train_epochs",),
    "max_steps": ("max_steps",),
    "steps": ("max_steps",),
    "warmup_steps": ("warmup_steps",),
    "temperature": ("temperature",),
    "max_new_tokens": ("max_completion_length",),
    "center_coefficient": ("center_rewards_coefficient",),
}
HINT = "nothing was trained; report it, with the versions of trl and transformers"


def check_recipe(config: TrainingFields, built: TrainingArguments) -> None:
    """Raise GuardStop for an option of the recipe that the Trainer would run with another value."""
    asked = {(field, option): getattr(config, field, None) for field, places in OPTIONS.items() for option in places}
    if config.warmup_steps is None:
        asked["warmup_ratio", "warmup_steps"] = config.warmup_ratio
    asked |= {(f"trainer.{option}", option): value for option, value in config.trainer.items()}
    for (field, option), value in asked.items():
        if value is not None and not _same(value, getattr(built, option, None)):
            raise GuardStop(
                f"{field} is {value!r} in the recipe, the trainer has {getattr(built, option, None)!r}", HINT
            )
    rows = _rows_per_step(config)
    built_rows = built.per_device_train_batch_size * built.gradient_accumulation_steps * built.world_size
    if rows is not None and rows != built_rows:
        raise GuardStop(f"a step of the recipe has {rows} rows, the trainer takes {built_rows}", HINT)


def _rows_per_step(config: TrainingFields) -> int | None:
    prompts: int | None = getattr(config, "prompts_per_step", None)
    size: int | None = getattr(config, "batch_size", None)
    return size if prompts is None else prompts * int(getattr(config, "n", 1))


def _same(asked: object, built: object) -> bool:
    """Whether an option has the value asked for. What a library stores in another type is not compared."""
    if isinstance(built, Enum):
        built = built.value
    if isinstance(asked, bool) != isinstance(built, bool):
        return built is not None
    numbers = isinstance(asked, int | float) and isinstance(built, int | float)
    if numbers or type(asked) is type(built):
        return asked == built
    return built is not None or not asked
