"""Outputs that are damaged, made again: `gemma2 verify --fix`.

A stage of a pipeline is made by an ordinary run of the pipeline, which is about the damaged stages. What depends on
them is skipped if they come out with the same bytes. Another output is made by the command that its manifest records,
if its inputs are there and unchanged. What no command made (a hub model, a user's data) cannot be made again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from gemma2.core.errors import Gemma2Error, InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.manifest import MANIFEST, read_manifest
from gemma2.core.progress import SILENT, Progress
from gemma2.merging.methods.option import OPTIONS
from gemma2.posttrain.pipelines.check import look_at_pipeline
from gemma2.posttrain.pipelines.compile import Pipeline, with_method
from gemma2.posttrain.pipelines.decision import COMPLETE, Choice, prospect
from gemma2.posttrain.pipelines.run import FILE, run_pipeline
from gemma2.posttrain.pipelines.scheduler import Executor, Observer
from gemma2.posttrain.provenance.change import Change
from gemma2.posttrain.provenance.named_inputs import KIND_OF_OPTION, names_a_path
from gemma2.posttrain.provenance.origin import changes
from gemma2.posttrain.provenance.output_state import is_for_people
from gemma2.posttrain.runs.commands import COMMANDS, Command
from gemma2.posttrain.runs.inputs import located
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import ExtractLoraConfig, MergeConfig, ReplaceTokenizerConfig
from gemma2.posttrain.schemas.config import Config, validated

from .recorded import FOLDERS, Gathered, entries
from .verification import Verification

__all__ = ["Remade", "Tools", "recorded_config", "remake"]

PARTIAL = re.compile(r"(^|/)\.([^/]+)\.partial(?=/|$)")  # where an output was while it was made


@dataclass(frozen=True)
class Remade:
    """An output that was to be made again.

    problem   why it was not; "" if it was
    other     the files with other bytes than before the damage, without those that only people read
    compared  whether there was a record to compare with
    """

    output: Path
    problem: str = ""
    other: tuple[str, ...] = ()
    compared: bool = True

    @property
    def same(self) -> bool:
        """Whether it was made, with the bytes that were recorded."""
        return not self.problem and not self.other and self.compared


@dataclass(frozen=True)
class Tools:
    """What making again needs of its caller.

    pipeline  opens the pipeline of a folder
    executor  runs its stages
    observer  is shown them
    """

    pipeline: Callable[[Path], Pipeline]
    executor: Callable[[], Executor]
    observer: Callable[[Pipeline], Observer]
    progress: Progress = SILENT


def remake(found: Verification, tools: Tools) -> list[Remade]:
    """Make every damaged output of a lineage again; what could not be made has a problem."""
    units = dict.fromkeys(_unit(path) for path in found.broken)
    before = {unit: _files(unit) for unit in units}
    stages: dict[Path, list[Path]] = {}
    single: list[Path] = []
    problems: dict[Path, str] = {}
    for unit in units:
        if (unit / FILE).is_file():
            again = f"gemma2 pipeline run {unit} writes it again"
            problems[unit] = f"the {MANIFEST} of a pipeline's folder is not made from anything; remove it: {again}"
            continue
        if lost := _only_for_people(unit, found):
            fix = "its own command makes it again, with --force"
            problems[unit] = f"only {', '.join(lost)} is damaged, which no command reads; {fix}"
            continue
        folder = next((path for path in unit.parents if (path / FILE).is_file()), None)
        stages.setdefault(folder, []).append(unit) if folder else single.append(unit)
    for folder, made in stages.items():
        try:
            with chdir(Path.cwd()):  # opening a pipeline enters the folder that its paths start from
                pipeline = tools.pipeline(folder)
                against = {unit: str(error) for unit, error in _against(pipeline, made)}
                problems |= against
                left = _remake_stages(pipeline, [unit for unit in made if unit not in against], tools)
        except Gemma2Error as error:
            problems |= dict.fromkeys(made, str(error))
        else:
            single += left
    for unit in _in_order(single, found.gathered):
        try:
            remake_output(unit, tools.progress)
        except Gemma2Error as error:
            problems[unit] = str(error)
    return [Remade(unit, problems.get(unit, ""), _other(unit, before[unit]), bool(before[unit])) for unit in units]


def _unit(path: Path) -> Path:
    """Return the output that a command makes whole, for a directory with a manifest: itself or one around it."""
    for folder in path.parents:
        if (folder / MANIFEST).is_file():
            return path if _command(folder) in FOLDERS else folder
    return path


def _only_for_people(unit: Path, found: Verification) -> list[str]:
    """Return the damaged files of an output if only people read them: a training is not repeated for a card."""
    try:
        manifest = read_manifest(unit)
    except InputError:
        return []
    broken = [fault for fault in found.faults if fault.kind != "input changed" and fault.output.is_relative_to(unit)]
    names = [fault.file for fault in broken if fault.output == unit]
    if manifest is None or len(names) < len(broken):  # of an output inside it
        return []
    return names if all(name and is_for_people(name, manifest) for name in names) else []


def _command(folder: Path) -> str:
    try:
        return str((read_manifest(folder) or {}).get("command"))
    except InputError:
        return ""


def _files(unit: Path) -> Mapping[str, str]:
    """The recorded digests of an output, without those of files that only people read."""
    try:
        manifest = read_manifest(unit)
    except InputError:
        return {}
    files = manifest.get("files", {}) if manifest else {}
    return {name: entry.get("digest", "") for name, entry in files.items() if not is_for_people(name, manifest or {})}


def _other(unit: Path, before: Mapping[str, str]) -> tuple[str, ...]:
    now = _files(unit)
    return tuple(sorted(name for name in now.keys() | before.keys() if before and now.get(name) != before.get(name)))


# --- stages -----------------------------------------------------------------------------------------------------------


def _against(pipeline: Pipeline, units: Sequence[Path]) -> Iterator[tuple[Path, InputError]]:
    """Yield the damaged outputs of stages that would come out as something else: what they are made from has changed.

    A fix brings back what was there. A change is for a run to take, when its user wants it.
    """
    places = {stage.out.resolve(): stage for stage in pipeline.stages.values()}
    damaged = {places[unit].name for unit in units if unit in places}
    status = {name: "will run" if name in damaged else COMPLETE for name in pipeline.stages}
    for unit in units:
        stage = places.get(unit)
        recorded = _record(unit)
        ahead = prospect(stage, pipeline, status) if stage is not None and recorded else None
        if stage is None or ahead is None or ahead.config is None:
            continue
        config = located(ahead.config, [one.out for one in pipeline.stages.values()])
        found = changes(recorded, stage.command, config, ahead.unknown)
        if found:
            what = f"changed since {stage.name} was made: {', '.join(map(str, found))}"
            yield (
                unit,
                InputError(what, f"restore that, or make what follows from it: gemma2 pipeline run {pipeline.root}"),
            )


def _record(unit: Path) -> JsonObject:
    """The manifest of an output; empty where it cannot be read: then nothing says what it was made from."""
    try:
        return {**(read_manifest(unit) or {})}
    except InputError:
        return {}


def _remake_stages(pipeline: Pipeline, units: Sequence[Path], tools: Tools) -> list[Path]:
    """Run the stages that make these outputs; return the outputs that no stage makes.

    Where nothing but these would run, the whole pipeline is gone through: what they feed runs again if it has to.
    """
    places = {stage.out.resolve(): name for name, stage in pipeline.stages.items()}
    damaged = frozenset(places[unit] for unit in units if unit in places)
    if damaged:
        found = look_at_pipeline(pipeline)
        running = {name for name, one in found.items() if one.runs}
        within = damaged if running - pipeline.after(damaged) else None
        # The others are made again for what is damaged, which a run says of each.
        force = frozenset(name for name in damaged if found[name].action in ("skip", "perhaps"))
        choice, observer = Choice(within, force), tools.observer(pipeline)
        run_pipeline(pipeline, tools.executor(), choice=choice, observer=observer, progress=tools.progress)
    return [unit for unit in units if unit not in places]


# --- single outputs ---------------------------------------------------------------------------------------------------


def _in_order(units: Sequence[Path], gathered: Gathered) -> list[Path]:
    """Return outputs so that each comes after those that it was made from."""
    graph: dict[Path, set[Path]] = {unit: set() for unit in units}
    for use in gathered.uses:
        user = next((unit for unit in units if use.user.is_relative_to(unit)), None)
        source = next((unit for unit in units if use.path.resolve().is_relative_to(unit)), None)
        if user and source and user != source:
            graph[user].add(source)
    try:
        return [*TopologicalSorter(graph).static_order()]
    except CycleError:  # manifests that were edited
        return [*units]


def remake_output(out: Path, progress: Progress = SILENT) -> None:
    """Run the command that an output records, in its place.

    Raises InputError where the record is not enough, or where the inputs are gone or are not those that it was made
    from.
    """
    manifest: JsonMapping = {**(read_manifest(out) or {})}
    name = str(manifest.get("command"))
    command = COMMANDS.get(name)
    if command is None:
        raise InputError(f"{out} does not record the command that made it", "make it again, with --force")
    config, changed = recorded_config(out, manifest, name, command)
    if changed:
        what = f"{out} cannot be made again: changed since it was made: {', '.join(map(str, changed))}"
        raise InputError(what, "restore that, or make it from what is there, with --force")
    progress.note(f"{out}: gemma2 {name} with its recorded settings")
    command.run(config, RunOptions(out, force=True), progress)


def recorded_config(out: Path, manifest: JsonMapping, name: str, command: Command) -> tuple[Config, Sequence[Change]]:
    """Return the configuration of a record with its inputs found, and what differs from the record all the same."""
    best: tuple[Config, Sequence[Change]] | None = None
    problem: Gemma2Error | None = None
    for values in _candidates(out, manifest, command):
        try:
            config = located(validated(command.schema, with_method(name, values)))
            changed = changes(manifest, name, config)
        except Gemma2Error as error:
            problem = problem or error
            continue
        if best is None or len(changed) < len(best[1]):
            best = config, changed
        if not changed:
            break
    if best is None:
        cause = problem.what if problem else "its settings are not recorded"
        raise InputError(f"{out} cannot be made again: {cause}", "restore that, or make it again, with --force")
    return best


def _candidates(out: Path, manifest: JsonMapping, command: Command) -> Iterator[JsonObject]:
    """Yield the recorded settings, with paths from every folder that the record allows."""
    recorded = manifest.get("config")
    config: JsonObject = dict(recorded) if isinstance(recorded, Mapping) else {}
    if command.schema is MergeConfig:
        yield from _of_merge(out, manifest, config)
        return
    if command.schema in (ExtractLoraConfig, ReplaceTokenizerConfig):
        yield config | _inputs_of_tool(out, manifest)
        return
    fields = command.schema.model_fields
    held = (key for key in config if key in KIND_OF_OPTION or (key in fields and names_a_path(fields[key].annotation)))
    paths = {key: config[key] for key in held}
    for folder in _folders(out, manifest, paths):
        yield {**config, **{key: _placed(value, folder) for key, value in paths.items()}}


def _of_merge(out: Path, manifest: JsonMapping, config: JsonObject) -> Iterator[JsonObject]:
    """A merge records its models as parents only."""
    parents = [(str(one.get("role")), str(_place(out, one))) for one in entries(manifest, "parents")]
    etas = config.get("etas")
    if isinstance(etas, list) and len(etas) > 1:
        raise InputError(f"{out} is one of several outputs of a merge (--etas)", "run that merge again, with --force")
    if any(role not in ("base", "input") for role, _ in parents):
        raise InputError(f"{out} was merged from LoRA adapters, whose places it does not record", "merge again")
    base = [path for role, path in parents if role == "base"]
    names = {option.attribute: name for name, option in OPTIONS.items()}
    values = {names.get(key, key): value for key, value in config.items() if value not in ([], None)}
    yield {
        **{key: value for key, value in values.items() if key in MergeConfig.model_fields},
        "models": [path for role, path in parents if role == "input"],
        **({"base": base[0]} if base else {}),
    }


def _inputs_of_tool(out: Path, manifest: JsonMapping) -> JsonObject:
    """The inputs of extract-lora and replace-tokenizer, which their records name as parents and data only."""
    roles = {"input": "model", "adapter-base": ""}
    found = {str(one.get("role")): str(_place(out, one)) for one in entries(manifest, "parents")}
    if "adapter-base" in found:
        raise InputError(f"{out} was made from LoRA adapters, whose places it does not record", "make it again")
    found = {roles.get(role, role): path for role, path in found.items()}
    donors = [str(_place(out, one).parent) for one in entries(manifest, "data")]
    return found | ({"tokenizer": donors[0]} if donors else {})


def _place(out: Path, record: JsonMapping) -> Path:
    return Path(os.path.normpath(out / str(record.get("path") or "")))


def _folders(out: Path, manifest: JsonMapping, paths: JsonMapping) -> Iterator[Path]:
    """Yield the folders that relative paths may start from: the present one, and those that the inputs point to."""
    found = [Path.cwd()]
    inputs = [_place(out, one) for key in ("parents", "data") for one in entries(manifest, key)]
    for text in _texts(paths):
        parts = Path(_published(text)).parts
        for place in (path for one in inputs for path in (one, one.parent)):
            if parts and place.parts[-len(parts) :] == parts:
                found.append(Path(*place.parts[: -len(parts)]))
    yield from dict.fromkeys(found)


def _texts(values: JsonMapping) -> Iterator[str]:
    for value in values.values():
        yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))


def _placed(value: object, folder: Path) -> object:
    """Return a value with every path that is found below a folder as that path; other texts as they are."""
    if isinstance(value, list):
        return [_placed(item, folder) for item in value]
    if not isinstance(value, str):
        return value
    place = folder / _published(value)
    without_split = folder / _published(value.rpartition("@")[0] or value)
    return str(place) if place.exists() or without_split.exists() else value


def _published(text: str) -> str:
    """A path in an output that was not finished yet, as it is now."""
    return PARTIAL.sub(r"\1\2", text)
