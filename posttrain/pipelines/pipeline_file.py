"""A pipeline file as it is written, with `--set` applied; its stages are compiled in `compile`. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonMapping
from gemma2.posttrain.schemas import PipelineFile
from gemma2.posttrain.schemas.config import ValueSource, apply_sets, closest, load_yaml, validated

from .references import references, texts

__all__ = ["read_pipeline"]


def read_pipeline(path: Path, sets: Iterable[str] = ()) -> PipelineFile:
    """A pipeline file with `--set` applied: `vars.x=1`, `stages.sft.options.steps=9` or, shorter, `sft.steps=9`.

    Raises UsageError with the key that is wrong.
    """
    document = load_yaml(path)
    stages = document.get("stages")
    if not stages:
        raise UsageError(f"{path} has no stages", "write stages: {NAME: {command: ..., options: {...}}}", str(path))
    names = stages if isinstance(stages, dict) else {}
    source = ValueSource(path, tuple(_in_full(item, names) for item in sets))
    _check_variables(document, source)
    return validated(PipelineFile, apply_sets(document, source.sets), source).read_from(source)


def _check_variables(document: JsonMapping, source: ValueSource) -> None:
    """Refuse a `--set vars.X=...` that the file neither defines nor reads: it would have no effect."""
    defined = document.get("vars")
    known = {*defined} if isinstance(defined, dict) else set()
    read = (name for _, text in texts(document) for name in references(text))
    known |= {name.split(".")[1] for name in read if name.startswith("vars.")}
    for item in source.sets:
        section, _, name = item.partition("=")[0].partition(".")
        name = name.partition(".")[0]
        if section == "vars" and not {name, name.replace("-", "_")} & known:
            hint = closest(name, known) if known else "it has none; add it to the file below vars:"
            raise UsageError(f"--set {item}: the pipeline has no variable '{name}'", hint, f"--set {item}")


def _in_full(item: str, stages: JsonMapping) -> str:
    """`sft.steps=9` as `stages.sft.options.steps=9`."""
    name, dot, rest = item.partition(".")
    return f"stages.{name}.options.{rest}" if dot and name in stages and "=" not in name else item
