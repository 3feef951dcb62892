"""A pipeline checked whole before anything runs: names, types, files, models that fit, disk. Torch-free and quick.

options of every stage against its schema -> the checks of its command (`checks/`), where an input that another stage
makes has the properties that are promised -> what is complete, what will run -> memory, disk, time
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma2.core.errors import Gemma2Error, InputError, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.hub import is_hub_id
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.outputs.staging import partial_path
from gemma2.core.sizes import sizes_apart
from gemma2.merging.methods.request import file_named, is_input
from gemma2.posttrain.checks.kinds import wanted_kind
from gemma2.posttrain.checks.merging_gain import is_embedded, low_gain
from gemma2.posttrain.checks.of_command import CommandChecks
from gemma2.posttrain.checks.plan import Planned, look, memory_problem, place_of, work_of
from gemma2.posttrain.evaluation.suite.suite_plan import check_engine, plan_suite, tables_of
from gemma2.posttrain.planning.estimates import Promise, Sources, Work
from gemma2.posttrain.planning.learning import Sizes
from gemma2.posttrain.planning.memory import MemoryPlace
from gemma2.posttrain.planning.named_models import NOTHING, NamedModels, name_models, sizes_of
from gemma2.posttrain.planning.verdicts import Verdict, judge
from gemma2.posttrain.provenance.output_state import broken_files
from gemma2.posttrain.runs.commands import output_hash
from gemma2.posttrain.runs.inputs import located
from gemma2.posttrain.runs.machine import Memory, free_disk, free_memory
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import (
    ExtractLoraConfig,
    MergeConfig,
    PipelineFile,
    ReplaceTokenizerConfig,
    TinyConfig,
    WarpConfig,
)
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.measures import SuiteConfig

from .compile import Pipeline, Stage, compile_pipeline
from .decision import COMPLETE, LEFT_OUT, Choice, Decision, decide, outside, prospect, status_after
from .expected_outputs import promised_by
from .state import recorded_stages
from .warp_stages import warp_stages

__all__ = ["Checked", "PipelinePlan", "check_pipeline", "look_at_pipeline", "plan_step"]

IDLE = ("skip", "reuse", "not needed", "left out")  # actions that start nothing
ALL = Choice()
MOST_NAMED = 5


@dataclass(frozen=True)
class Checked:
    """One stage in its present state: what a run would do (`decision.py`).

    work  memory, disk, tokens; None where nothing is known
    hash  of what a complete output was made from
    """

    decision: Decision
    work: Work | None = None
    hash: str | None = None

    @property
    def stage(self) -> Stage:
        """The stage itself."""
        return self.decision.stage

    @property
    def action(self) -> str:
        """What becomes of it."""
        return self.decision.action

    @property
    def why(self) -> tuple[str, ...]:
        """The differences that are the reason, then what else is worth knowing; a line each."""
        return (*map(str, self.decision.why), *self.decision.notes)

    @property
    def other_versions(self) -> str:
        """The versions that a complete output was made with, where they are not those of now."""
        state = self.decision.state
        return ", ".join(map(str, state.versions)) if state else ""

    @property
    def runs(self) -> bool:
        """Whether a run would, or might, start it."""
        return self.action not in IDLE


@dataclass(frozen=True)
class PipelinePlan:
    """The whole pipeline in its present state, in the order of its needs."""

    stages: Mapping[str, Checked]
    sizes: Sizes
    disk_free: float = 0.0
    warnings: tuple[str, ...] = ()  # of settings that run, and from which little can come

    @property
    def disk(self) -> float:
        """Bytes that the stages to run will write, as far as that is known."""
        return sum(one.work.disk for one in self.to_run if one.work and math.isfinite(one.work.disk))

    @property
    def problems(self) -> list[str]:
        """What does not fit on this machine, a line each."""
        if self.disk <= self.disk_free:
            return []
        needed, free = sizes_apart(self.disk, self.disk_free)
        what = f"disk: the stages to run need about {needed}, {free} are free"
        return [f"{what}; free some space, or choose another --out"]

    def without_memory(self, memory: Memory) -> list[str]:
        """The stages to run that need more memory than this, a line each; on a cluster other machines count."""
        found = [(one.stage.name, self._verdict(one, place_of(memory))) for one in self.to_run]
        problems = [(name, memory_problem(verdict, memory)) for name, verdict in found if verdict is not None]
        return [f"stages.{name}: {problem}" for name, problem in problems if problem]

    def _verdict(self, one: Checked, place: MemoryPlace) -> Verdict | None:
        return judge(one.decision.config, self.sizes, place) if one.decision.config is not None else None

    @property
    def to_run(self) -> list[Checked]:
        """The stages that are chosen and not complete."""
        return [one for one in self.stages.values() if one.runs]

    @property
    def is_done(self) -> bool:
        """Whether a run would find nothing to do."""
        return not any(one.runs or one.action == "reuse" for one in self.stages.values())

    def kept_with_other_versions(self) -> list[str]:
        """A line about the outputs that are kept although other versions made them; none without such an output."""
        kept = [one for one in self.stages.values() if one.action == "skip" and one.other_versions]
        if not kept:
            return []
        names = ", ".join(f"{one.stage.name} ({one.other_versions})" for one in kept[:MOST_NAMED])
        more = f" and {len(kept) - MOST_NAMED} more" if len(kept) > MOST_NAMED else ""
        return [f"{len(kept)} outputs are kept that other versions made: {names}{more}; --force STAGE makes one again"]

    def rows(self) -> list[JsonObject]:
        """A table: stage, command, what will be done, memory and disk in GiB, tokens."""
        place = place_of(free_memory())
        return [_row(one, self._verdict(one, place) if one.runs else None) for one in self.stages.values()]


def _row(one: Checked, verdict: Verdict | None) -> JsonObject:
    work = one.work if one.runs else None

    def figure(value: float | None, unit: float) -> float | None:
        return None if value is None or not math.isfinite(value) else float(f"{value / unit:.3g}")

    return {
        "stage": one.stage.name,
        "command": one.stage.command,
        "action": one.action,
        "memory_gib": figure(verdict.needed if verdict else work.memory if work else None, 2.0**30),
        "disk_gib": figure(work.disk if work else None, 2.0**30),
        "tokens": figure(work.tokens if work and work.tokens else None, 1.0),
        "why": "; ".join(one.why),
    }


def check_pipeline(
    pipeline: Pipeline, choice: Choice = ALL, contents: bool = True, named: NamedModels | None = None
) -> PipelinePlan:
    """Check every stage and say what a run would do.

    contents  also read rows and import the functions of the stages that will run
    named     for a plan that nothing follows: models that are not on this disk, to which those of the stages are added;
              without it, models of the hub are fetched

    Raises UsageError or InputError naming stage and key for anything that would fail later and can be known before.
    """
    promised: dict[Path, Promise] = {}
    places = [stage.out for stage in pipeline.stages.values()]
    sources = Sources(promised, places)
    known = NamedModels() if named is None else named
    _promise(known, promised, places)
    checks = CommandChecks(sources)
    status = outside(pipeline, choice, recorded_stages(pipeline.root))
    found: dict[str, Checked] = {}
    reused: dict[str, Path] = {}
    for stage in pipeline.stages.values():
        ahead = prospect(stage, pipeline, status, reused)
        with stage.located():
            if ahead.needed is not False and choice.within is not None and stage.name in choice.within:
                _check_taken(stage, status, pipeline, choice.within)
            if ahead.config is None:
                promised[stage.out] = Promise(stage.kind.makes)
                decision, work = decide(ahead, pipeline, choice, status), None
            else:
                if named is None:
                    config = located(ahead.config, places)
                else:
                    config, more = name_models(ahead.config, wanted_kind(ahead.config), places, bool(known.sizes))
                    known.add(more)
                    _promise(more, promised, places)
                    if not (stage.out.exists() or partial_path(stage.out).exists()):  # nothing to compare weights with
                        ahead = replace(ahead, config=config)
                check_merge(config, places)
                models = checks.inputs(config)
                promised |= dict(promised_by(stage, config, sources))
                decision = decide(ahead, pipeline, choice, status)
                if contents and decision.action not in IDLE:
                    checks.contents(config, models)
                    check_suite(config, places)
                work = work_of(config, sources, sizes_of(known, sources))
        status[stage.name] = status_after(decision)
        reused |= {stage.name: decision.source} if decision.source else {}
        found[stage.name] = Checked(decision, work, _hash(decision))
    return PipelinePlan(found, sizes_of(known, sources), free_disk(pipeline.root), tuple(_low_gains(pipeline, found)))


def _low_gains(pipeline: Pipeline, found: Mapping[str, Checked]) -> Iterator[str]:
    """A line about every WARP run with RL before it whose merges can gain little."""
    for prefix, config in pipeline.warps.items():
        runs = [one for name, one in found.items() if name.startswith(prefix) and one.stage.command == "rlhf"]
        if any(one.runs for one in runs):
            start = Path(str(runs[0].stage.options["policy"]))  # of iteration 1: the SFT policy
            line = low_gain(config, _is_embedded(start, pipeline))
            if line:
                yield f"stages.{prefix.rstrip('/')}: {line}" if prefix else line


def _is_embedded(model: Path, pipeline: Pipeline) -> bool:
    """Whether a model descends from the student of `gemma2 tiny`, also by stages that have not run."""
    stage = next((one for one in pipeline.stages.values() if model.is_relative_to(one.out)), None)
    if stage is None:
        return is_embedded(model)
    if stage.command == "tiny":
        width = TinyConfig.model_fields["width"].default
        return model.name == "student" and stage.options.get("width", width) == width
    start = stage.options.get("model") or stage.options.get("policy") or stage.options.get("base")
    return isinstance(start, str) and _is_embedded(Path(start), pipeline)


def _promise(models: NamedModels, promised: dict[Path, Promise], places: list[Path]) -> None:
    """Count models that are not on this disk among those that other stages make."""
    promised |= models.promised
    places += [path for path in models.promised if path not in places]


def look_at_pipeline(pipeline: Pipeline, choice: Choice = ALL) -> dict[str, Checked]:
    """Say what a run would do, and never refuse: a stage that cannot be decided is "unknown", and why."""
    status = outside(pipeline, choice, recorded_stages(pipeline.root))
    found: dict[str, Checked] = {}
    reused: dict[str, Path] = {}
    for stage in pipeline.stages.values():
        try:
            decision = decide(prospect(stage, pipeline, status, reused), pipeline, choice, status)
        except (Gemma2Error, OSError) as error:
            decision = Decision(stage, "unknown", notes=(str(error),), needed=None)
        status[stage.name] = status_after(decision)
        reused |= {stage.name: decision.source} if decision.source else {}
        found[stage.name] = Checked(decision, hash=_hash(decision))
    return found


def _hash(decision: Decision) -> str | None:
    if decision.action != "skip":
        return None
    manifest = read_manifest(decision.stage.out)
    return output_hash(manifest) if manifest else None


def check_suite(config: Config, promised: Sequence[Path]) -> None:
    """Refuse rows of the suite that do not fit their tasks, if no earlier stage writes them."""
    if isinstance(config, SuiteConfig):
        check_engine(config)
        if not any(config.data.is_relative_to(place) for place in promised):
            tables_of(config)


def check_merge(config: Config, promised: Sequence[Path]) -> None:
    """Refuse options that a merge method does not take, and missing models."""
    if isinstance(config, ExtractLoraConfig):
        if config.rank is None and config.explained is None:
            raise UsageError("extract-lora needs a rank", "give rank: 16, or explained: 0.95")
        _check_there([config.base], promised)
    if isinstance(config, ReplaceTokenizerConfig):
        _check_there([config.tokenizer], promised)
    if not isinstance(config, MergeConfig):
        return
    config.recorded()  # raises what the engine would
    _check_there([*config.models, *([config.base] if config.base else [])], promised)
    for option in ("generation_config", "special_tokens"):
        choice = getattr(config, option)
        if choice is None or is_input(choice) or any(Path(choice).is_relative_to(place) for place in promised):
            continue
        if file_named(choice) is None:
            raise InputError(f"{option} {choice} is not a file", "give the number of a model, base, or a file")


def _check_there(paths: Sequence[Path], promised: Sequence[Path]) -> None:
    for path in paths:
        # MODEL+ADAPTER names two directories, and a hub id none here; the engine distinguishes them.
        elsewhere = path.exists() or "+" in str(path) or is_hub_id(path)
        if not elsewhere and not any(path.is_relative_to(place) for place in promised):
            raise InputError(f"{path} is not a directory", "give the path of a model directory")


def _check_taken(stage: Stage, status: Mapping[str, str], pipeline: Pipeline, within: Container[str]) -> None:
    """Refuse a chosen stage whose input is missing or damaged, unless a chosen stage makes it or nothing needs it."""
    for name in stage.needs:
        if status[name] == LEFT_OUT:
            raise InputError(f"needs {name}, which is neither complete nor chosen", "run that too")
        out = pipeline.stages[name].out
        manifest = read_manifest(out) if name not in within and status[name] == COMPLETE else None
        for change in broken_files(manifest, out) if manifest else ():
            raise InputError(f"needs {name}, which is not chosen and damaged: {change}", "run that too")


# --- one command -----------------------------------------------------------------------------------------------------


def plan_step(config: Config, options: RunOptions | None, named: NamedModels = NOTHING) -> Planned:
    """The plan of one command. Raises what its run would raise before it begins, also about the stages of WARP.

    named  models that are not on this disk
    """
    planned = look(config, options, named)
    if isinstance(config, SuiteConfig):
        if named.promised.keys() & {config.model, config.data}:  # nothing to read
            return planned
        return replace(planned, document=planned.document | plan_suite(config))
    if not isinstance(config, WarpConfig):
        return planned
    stages = PipelineFile(stages=warp_stages(config))
    out = options.out if options is not None else Path("out")
    compiled = replace(compile_pipeline(stages, partial_path(out)), warps={"": config})
    checked = check_pipeline(compiled, named=named.copy())
    rows = checked.rows()
    more: JsonObject = {"stages_to_run": sum(row["action"] != "skip" for row in rows), "stages": rows}
    more |= {"warnings": list(checked.warnings)} if checked.warnings else {}
    return replace(planned, document=planned.document | more)
