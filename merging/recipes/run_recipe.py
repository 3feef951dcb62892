"""Carries out the merges of a recipe one after the other; every step's output is a complete model with its lineage.

All requests are checked, all inputs found and all outputs compared with them before the first step runs. What only a
step's output can show (its tensors, its angles) is checked when that step has run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.hub import is_hub_id
from gemma2.core.outputs.staging import check_output
from gemma2.core.progress import SILENT, Progress
from gemma2.core.yaml_files import closest
from gemma2.merging.engine import MergeResult, merge
from gemma2.merging.methods.request import MergeRequest
from gemma2.merging.plan.merge_plan import MergePlan, plan_merge

from .step import Recipe, Step

__all__ = ["PlacedStep", "merge_recipe", "plan_recipe"]


@dataclass(frozen=True, kw_only=True)
class PlacedStep:
    """A step whose inputs and output have their places. `plan` is None while an input is still to be made."""

    step: Step
    request: MergeRequest
    out: Path
    plan: MergePlan | None

    def describe(self) -> JsonObject:
        """The plan; before the inputs are there, what is asked for."""
        if self.plan is not None:
            return self.plan.describe()
        paths = {"models": [str(path) for path in self.request.models], "outputs": [str(self.out)]}
        base = {"base": str(self.request.base)} if self.request.base else {}
        return {**self.request.options(), **base, **paths, "after": ", ".join(self.step.needs)}


def plan_recipe(recipe: Recipe, out: Path, force: bool = False) -> tuple[PlacedStep, ...]:
    """Check all steps as far as that can be done before any runs; writes nothing.

    The only merge of a file is `out` itself, each of several steps is `out/NAME`.
    Raises UsageError, InputError or OutputError.
    """
    names = {step.name for step in recipe.steps}
    requests = [step.checked(_placed(step, names, out)) for step in recipe.steps]
    places = [out / step.name if step.name else out for step in recipe.steps]
    used = [path for step in recipe.steps for path in _inputs(step.request)]
    outside = {f"input {index + 1}": path for index, path in enumerate(used) if str(path) not in names}
    _check_inputs(recipe, outside.values())
    for place in places:
        check_output(place, force, outside)
    return tuple(
        PlacedStep(
            step=step, request=request, out=place, plan=None if step.needs else plan_merge(request, place, force)
        )
        for step, request, place in zip(recipe.steps, requests, places, strict=True)
    )


def merge_recipe(
    recipe: Recipe, *, out: Path, force: bool = False, verify: bool = True, progress: Progress = SILENT
) -> tuple[MergeResult, ...]:
    """Merge all steps of a recipe: one result per step, in the order in which they ran.

    A step that fails leaves the outputs of those before it. Raises what `plan_recipe` and `merge` raise.
    """
    results = []
    for placed in plan_recipe(recipe, out, force):
        for note in placed.step.notes:
            progress.note(note)
        results.append(merge(placed.request, out=placed.out, force=force, verify=verify, progress=progress))
    return tuple(results)


def _placed(step: Step, names: Iterable[str], out: Path) -> MergeRequest:
    """The request with the outputs of other steps in the place of their names."""

    def find(path: Path) -> Path:
        head, plus, adapter = str(path).partition("+")
        return Path(f"{out / head}{plus}{adapter}") if head in frozenset(names) - {""} else path

    request = step.request
    tokenizer = request.tokenizer and str(find(Path(request.tokenizer)))
    base, vocabulary = find(request.base) if request.base else None, request.vocabulary
    if vocabulary is not None:
        tokens = [replace(token, model=token.model and str(find(Path(token.model)))) for token in vocabulary.tokens]
        vocabulary = replace(vocabulary, tokens=tuple(tokens))
    models = tuple(map(find, request.models))
    return replace(request, models=models, base=base, tokenizer=tokenizer, vocabulary=vocabulary)


def _inputs(request: MergeRequest) -> list[Path]:
    """The directories and hub ids that a request reads."""
    named = [*request.models, *([request.base] if request.base else [])]
    return [Path(part) for path in named for part in ([path] if path.exists() else str(path).rsplit("+", 1))]


def _check_inputs(recipe: Recipe, paths: Iterable[Path]) -> None:
    """Refuse a name that is not a step, a directory or a possible hub id, before an earlier step has run."""
    names = [step.name for step in recipe.steps if step.name]
    for path in paths:
        if not path.exists() and not is_hub_id(path):
            hint = closest(str(path), names) if names else "check the path"
            kinds = "a step, a directory or a hub id" if names else "a directory or a hub id"
            where = _place_of(recipe, path)
            raise InputError(f"{where} names {path}, which is not {kinds}", hint, where)


def _place_of(recipe: Recipe, path: Path) -> str:
    """Where a file names a model."""
    for step in recipe.steps:
        named: list[tuple[Path, tuple[str | int, ...]]] = [
            (model, ("models", index)) for index, model in enumerate(step.request.models)
        ]
        named += [(step.request.base, ("base",))] if step.request.base else []
        for model, keys in named:
            if step.place is not None and str(path) in (str(model), *str(model).split("+")):
                return replace(step.place, keys=(*step.place.keys, *keys)).where()
    return str(recipe.path)
