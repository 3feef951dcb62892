"""Data sets that a plan can do without: a path that stands for rows which are not there yet. Torch-free.

A plan of a command without its data has no tokens and no time; memory is that of the longest rows that it allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.yaml_files import apply_sets
from gemma2.posttrain.schemas import DistillConfig
from gemma2.posttrain.schemas.config import Config, load_yaml

from .named_models import NO_ROWS

__all__ = ["with_stand_ins"]

ROWS = ("data", "prompts", "heldout")


def with_stand_ins(
    schema: type[Config], flags: JsonMapping, file: Path | None = None, sets: Sequence[str] = ()
) -> JsonObject:
    """Return the flags of a command, with stand-ins for data that it needs and that nothing gives."""
    given = apply_sets(load_yaml(file) if file else {}, sets) | {k: v for k, v in flags.items() if v is not None}
    needed = {name for name, field in schema.model_fields.items() if name in ROWS and field.is_required()}
    if schema is DistillConfig and not given.keys() & {"prompts", "data", "teacher_cache"}:
        needed.add("prompts")
    return {**flags, **{name: NO_ROWS for name in needed - given.keys()}}
