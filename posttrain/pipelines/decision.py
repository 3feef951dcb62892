"""What becomes of one stage: the one function that plan, status and run ask. Torch-free.

    skip        its output is complete and current
    run         there is nothing of it yet
    continue    an interrupted run of the same goes on
    again       its output is of something else, or damaged: it is replaced when the new one is done
    reuse       an output elsewhere was made from the same: it is linked (shelf.py)
    perhaps     it depends on what stages before it will make
    not needed  its `when` does not hold, or an input is of a stage that is not needed
    left out    not chosen, and not complete
    unknown     `why` says what stands against a decision (status only)

A run asks when everything that a stage needs is done: then it never hears `perhaps`. A plan asks beforehand, and takes
for done only what will be skipped: whatever it says without `perhaps` is what the run does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.permissions import versions_allowed
from gemma2.posttrain.provenance.change import Change
from gemma2.posttrain.provenance.output_state import OutputState, is_complete, output_state
from gemma2.posttrain.provenance.version_rule import way_on
from gemma2.posttrain.runs.inputs import located
from gemma2.posttrain.schemas.config import Config

from .compile import Pipeline, Stage
from .references import condition_holds, filled, lookup, references, replaced, texts
from .shelf import NO_SHELF, Shelf

__all__ = [
    "COMPLETE",
    "DONE",
    "GOES_ON_IF",
    "LEFT_OUT",
    "Choice",
    "Decision",
    "Prospect",
    "decide",
    "outside",
    "prospect",
    "status_after",
]

# The status of a stage: as a run records it; and of one that a plan is about, whether it will certainly run.
COMPLETE, NOT_NEEDED, LEFT_OUT = "complete", "not needed", "left out"
WILL_RUN, UNDECIDED = "will run", "undecided"
DONE = (COMPLETE, NOT_NEEDED)

EMPTY: Mapping[str, Path] = {}
GOES_ON_IF = "an interrupted run goes on if its inputs come out the same"
ACTIONS = {"complete": "skip", "interrupted": "continue", "changed": "again", "missing": "run"}


@dataclass(frozen=True)
class Choice:
    """Which stages a run is about.

    within      the others must be complete, whatever they were made from; None is all
    force       made again though they are current
    keep_going  after a failure go on with what does not need the failed stage
    shelf       outputs of other pipelines that may stand for a stage
    """

    within: frozenset[str] | None = None
    force: frozenset[str] = frozenset()
    keep_going: bool = False
    shelf: Shelf = NO_SHELF


@dataclass(frozen=True)
class Prospect:
    """A stage with its options as far as they are known.

    options  with summaries filled in and without inputs that are not needed
    config   None if a required option is not known yet, or if the stage is not needed
    unknown  options that name what another stage has yet to make
    needed   False: certainly not; None: not known yet
    """

    stage: Stage
    options: JsonObject = field(default_factory=dict)
    config: Config | None = None
    unknown: frozenset[str] = frozenset()
    needed: bool | None = True


@dataclass(frozen=True)
class Decision:
    """What becomes of a stage, the differences that are the reason, and what is worth knowing.

    source  the output elsewhere that stands for its own
    """

    stage: Stage
    action: str
    why: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    options: JsonObject = field(default_factory=dict)
    config: Config | None = None
    state: OutputState | None = None
    needed: bool | None = True
    source: Path | None = None


def outside(pipeline: Pipeline, choice: Choice, recorded: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """Return the status of every stage that is not chosen: its output is used as it is. recorded: by an earlier run."""
    if choice.within is None:
        return {}

    def status(stage: Stage) -> str:
        if is_complete(stage.out):
            return COMPLETE
        return NOT_NEEDED if recorded.get(stage.name, {}).get("status") == NOT_NEEDED else LEFT_OUT

    return {name: status(stage) for name, stage in pipeline.stages.items() if name not in choice.within}


def prospect(
    stage: Stage, pipeline: Pipeline, status: Mapping[str, str], sources: Mapping[str, Path] = EMPTY
) -> Prospect:
    """Return a stage with its options as far as they are known.

    status   of the stages that it needs
    sources  of stages that are planned to be reused: where their outputs are now

    Raises UsageError for a condition, a reference or an option that is wrong.
    """

    def value(reference: str) -> object:
        name, _, key = reference.partition(".summary.")
        if status.get(name) != COMPLETE:
            return None
        summary = (read_manifest(sources.get(name, pipeline.stages[name].out)) or {}).get("summary", {})
        return lookup(summary, key.split("."), reference)

    needed: bool | None = True
    if stage.when is not None:
        asked = [status.get(name) for name in stage.needs if f"${{{name}.summary." in stage.when]
        if NOT_NEEDED in asked:
            return Prospect(stage, needed=False)
        if all(one == COMPLETE for one in asked):
            if not condition_holds(stage.when, value):
                return Prospect(stage, needed=False)
        else:
            needed = None
    options = _without_dropped(stage, pipeline, status)
    if options is None:
        return Prospect(stage, needed=False)
    options = {key: replaced(one, value) for key, one in options.items()}
    if any(status.get(name) == UNDECIDED for name in stage.needs):
        needed = None
    open_stages = [pipeline.root / name for name in stage.needs if status.get(name) not in DONE]
    unknown = frozenset(key for key, one in options.items() if _waits(one, open_stages))
    moved = {str(pipeline.root / name): str(path) for name, path in sources.items() if name in stage.needs}
    known = {key: _moved(filled(one), moved) for key, one in options.items() if not _waits(one, ())}
    return Prospect(stage, known, _configured(stage, known, options.keys() - known.keys()), unknown, needed)


def _without_dropped(stage: Stage, pipeline: Pipeline, status: Mapping[str, str]) -> JsonObject | None:
    """Return the options without inputs that are not needed; None if an option loses its only one."""
    names = [name for name in stage.needs if status.get(name) == NOT_NEEDED]
    folders = [pipeline.root / name for name in names]
    summaries = tuple(f"{name}.summary." for name in names)

    def is_dropped(value: object) -> bool:
        """Whether a value is the output of a stage that is not needed, or has a figure of its summary in it."""
        figures = (reference for _, text in texts(value) for reference in references(text))
        return _is_inside(value, folders) or any(reference.startswith(summaries) for reference in figures)

    options: JsonObject = {}
    for key, value in stage.options.items():
        if isinstance(value, list):
            kept = [item for item in value if not is_dropped(item)]
            if value and not kept:
                return None
            options[key] = kept
        elif is_dropped(value):
            return None
        else:
            options[key] = value
    return options


def _is_inside(value: object, folders: Sequence[Path]) -> bool:
    return isinstance(value, str) and any(Path(value).is_relative_to(folder) for folder in folders)


def _waits(value: object, folders: Sequence[Path]) -> bool:
    """Whether a value names what is in one of these folders, or has a reference that is not known yet."""
    return any(_is_inside(text, folders) or bool(references(text)) for _, text in texts(value))


def _moved(value: object, places: Mapping[str, str]) -> object:
    """A nested value with paths in these folders replaced by those in others."""
    if isinstance(value, str):
        inside = (folder for folder in places if Path(value).is_relative_to(folder))
        folder = next(inside, None) if places else None
        return value if folder is None else str(Path(places[folder]) / Path(value).relative_to(folder))
    if isinstance(value, list):
        return [_moved(item, places) for item in value]
    return {key: _moved(item, places) for key, item in value.items()} if isinstance(value, dict) else value


def _configured(stage: Stage, known: JsonObject, deferred: Collection[str]) -> Config | None:
    """Return the configuration; None if what it needs, or is compared with, is the result of another stage."""
    try:
        return stage.config(known)
    except UsageError as error:
        cause = error.__cause__
        problems = cause.errors() if isinstance(cause, ValidationError) else []
        own = [one for one in problems if one["loc"] and one["loc"][0] not in deferred]
        if own or not problems or not deferred:  # without a place: of options that do not go together
            raise
        return None


def decide(found: Prospect, pipeline: Pipeline, choice: Choice, status: Mapping[str, str]) -> Decision:
    """Return what becomes of a stage.

    Raises InputError for an input that is not there, for a foreign directory in the place of the output, and for an
    interrupted run of other versions.
    """
    stage = found.stage
    if choice.within is not None and stage.name not in choice.within:
        return Decision(stage, {COMPLETE: "skip"}.get(status[stage.name], status[stage.name]))
    if found.needed is False:
        return Decision(stage, "not needed", needed=False)
    waits = [name for name in stage.needs if status.get(name) not in DONE]
    if found.config is None:
        perhaps = found.needed is None or is_complete(stage.out)
        action = "perhaps" if perhaps else "run"
        return Decision(stage, action, notes=_after(waits), options=found.options, needed=found.needed)
    config = located(found.config, [one.out for one in pipeline.stages.values()])
    state = output_state(stage.command, config, stage.out, found.unknown)
    action, why, notes = ACTIONS[state.state], state.why, state.notes
    source = None
    if state.state == "interrupted" and stage.name not in choice.force:
        _check_versions(state, stage)
    if stage.name in choice.force:
        action, why, notes = "again", (Change("--force"),), ()
    elif action != "skip" and not found.unknown and found.needed:
        source = choice.shelf.output_for(stage.command, config, stage.out)
        if source is not None:
            action, notes = "reuse", (f"from {source}",)
    elif found.unknown:
        if action == "continue":
            notes = (*notes, GOES_ON_IF)
        action = {"skip": "perhaps", "continue": "run"}.get(action, action)
        notes = (*notes, *_after(waits))
    if found.needed is None:
        action = "perhaps"
    return Decision(stage, action, why, notes, found.options, config, state, found.needed, source)


def _check_versions(state: OutputState, stage: Stage) -> None:
    """Raise InputError for an interrupted run that other versions began, unless the user allows that."""
    if state.versions and not versions_allowed():
        raise InputError(
            f"the interrupted run of {stage.name} was begun with other versions: {', '.join(map(str, state.versions))}",
            way_on(f"--force {stage.name}"),
        )


def _after(waits: Sequence[str]) -> tuple[str, ...]:
    return (f"after {', '.join(waits)}",) if waits else ()


def status_after(decision: Decision) -> str:
    """Return the status by which a plan goes on: what will be skipped is complete, what will run is not."""
    known = {"skip": COMPLETE, "reuse": COMPLETE, "not needed": NOT_NEEDED, "left out": LEFT_OUT}
    if decision.action in known:
        return known[decision.action]
    # A stage that may turn out not to be needed may take those which name it along.
    return WILL_RUN if decision.needed else UNDECIDED
