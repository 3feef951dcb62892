"""The schema of every command that takes settings, by the words of the command line. Torch-free."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.yaml_files import closest
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.schemas import (
    DistillConfig,
    EvalConfig,
    ParetoConfig,
    RewardEvalConfig,
    RlhfConfig,
    WarpConfig,
)
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.measures.built_in import WinRateConfig

__all__ = ["FILE_KINDS", "commands_of_keys", "commands_with_settings", "schema_for", "with_inputs"]

FIRST = ("sft", "rlhf", "reward", "distill", "generate")  # whose recipe a file most likely is, where keys fit several
FILE_KINDS = ("pipeline", "merge")  # files that are not the recipe of one command

# Inputs that no schema can require, because another one may stand for them: what a recipe leaves to the command line.
ALTERNATIVES: dict[type[Config], JsonMapping] = {
    DistillConfig: {"teacher": "given", "prompts": "given", "data": "given"},
    **{schema: {"reward": ("given",)} for schema in (EvalConfig, ParetoConfig, RlhfConfig, WarpConfig, WinRateConfig)},
}
# What is given instead of them.
STANDS_FOR = {"teacher_cache": ("teacher", "prompts", "data"), "reward_fn": ("reward",), "judge": ("reward",)}


@cache
def commands_with_settings() -> dict[str, type[Config]]:
    """Command -> its schema; merge methods have other files."""
    found = {name: command.schema for name, command in COMMANDS.items() if not _is_method(name)}
    return found | {"reward eval": RewardEvalConfig, "eval": EvalConfig}


def _is_method(name: str) -> bool:
    return "method" in COMMANDS[name].schema.model_fields and name.startswith("merge ")


def schema_for(command: str) -> type[Config]:
    """The schema of a command. Raises UsageError for a command that takes no settings from a file."""
    known = commands_with_settings()
    if command not in known:
        raise UsageError(f"'{command}' is not a command with settings", closest(command, [*known, *FILE_KINDS]))
    return known[command]


def with_inputs(schema: type[Config], values: JsonMapping) -> JsonObject:
    """Values with a placeholder for each input that they leave to the command line."""
    given = {name for key in values for name in STANDS_FOR.get(str(key), ())}
    missing: JsonObject = {
        name: _placeholder(field.annotation)
        for name, field in schema.model_fields.items()
        if field.is_required() and name not in values
    }
    missing |= {name: item for name, item in ALTERNATIVES.get(schema, {}).items() if name not in {*values, *given}}
    return missing | dict(values)


def _placeholder(annotation: object) -> object:
    return (
        ("given",) if str(annotation).startswith("tuple") else Path("given") if "Path" in str(annotation) else "given"
    )


def commands_of_keys(keys: set[str]) -> list[str]:
    """The commands that know the most of these keys, in the order of the table; none where no key is known."""
    scores = {name: len(keys & schema.model_fields.keys()) for name, schema in commands_with_settings().items()}
    most = max(scores.values())
    ranked = sorted(scores, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    return [name for name in ranked if scores[name] == most] if most else []
