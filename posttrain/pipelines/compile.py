"""A pipeline file as stages in the order of their needs: copies of a matrix, WARP's stages, references. Torch-free.

    file -> ${vars} -> copies of every matrix -> stages of every `command: warp` -> ${STAGE.out} -> order

Only the file is read. The output of a stage is ROOT/NAME: its name decides its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.posttrain.foreign.counterparts import command_here, hint_for
from gemma2.posttrain.runs.commands import COMMANDS, TOOLS, Command
from gemma2.posttrain.schemas import PipelineFile, Resources, StageFile, WarpConfig
from gemma2.posttrain.schemas.config import Config, ValueSource, closest, validated
from gemma2.posttrain.schemas.pipeline import LONGEST_NAME, RESERVED, STAGE_NAME

from .executors.reservations import check_reserved, fitting, over
from .pipeline_file import read_pipeline
from .references import lookup, parse_condition, references, replaced, texts
from .warp_stages import warp_stages

__all__ = ["Pipeline", "Stage", "compile_pipeline", "read_pipeline"]


@dataclass(frozen=True)
class Stage:
    """One command of a pipeline.

    options  `${STAGE.out}` is replaced by its path; `${STAGE.summary.KEY}` is not replaced yet
    needs    names of the stages that must be done before it, in the order of the pipeline
    """

    name: str
    command: str
    options: JsonMapping
    out: Path
    needs: tuple[str, ...] = ()
    when: str | None = None
    retries: int = 0
    resources: Resources = field(default_factory=Resources)
    source: ValueSource = field(default_factory=ValueSource, compare=False)

    @property
    def kind(self) -> Command:
        """The entry of the command."""
        return COMMANDS[self.command]

    @property
    def deferred(self) -> frozenset[str]:
        """Options whose value is known when other stages are done."""
        return frozenset(name for name, value in self.options.items() if any(references(t) for _, t in texts(value)))

    def config(self, options: JsonMapping | None = None) -> Config:
        """The validated configuration. Raises UsageError that names the stage and the key."""
        values = dict(self.options if options is None else options)
        source = self.source.below("stages", self.name, "options")
        return validated(self.kind.schema, with_method(self.command, values), source)

    def _named_in(self, what: str) -> tuple[str, ...]:
        """The keys of the option that an error is about: by its flag, else by its value, as a file that it names."""
        for word in what.split():
            if word.startswith("--") and (name := word[2:].replace("-", "_")) in self.options:
                return ("options", name)
        values = ((name, item) for name, value in self.options.items() for _, item in texts(value))
        return next((("options", name) for name, item in values if len(item) > 1 and what.startswith(item)), ())

    @contextmanager
    def located(self) -> Iterator[None]:
        """Name the stage, and the place of the option that an error names (`--model x is ...`), in the error."""
        try:
            yield
        except (UsageError, InputError) as error:
            keys = self._named_in(error.what)
            with self.source.located("stages", self.name, *keys, prefix=f"stages.{self.name}: "):
                raise type(error)(error.what, error.hint) from error


@dataclass(frozen=True)
class Pipeline:
    """Stages in an order in which each comes after what it needs.

    groups  name -> its copies, or WARP's stages
    warps   what the names of a WARP run's stages begin with -> its settings
    """

    root: Path
    file: PipelineFile
    stages: Mapping[str, Stage]
    groups: Mapping[str, tuple[str, ...]]
    warps: Mapping[str, WarpConfig] = field(default_factory=dict)

    def chosen(self, patterns: Iterable[str]) -> set[str]:
        """The stages that patterns name: a stage, a group, a folder of stages, or a pattern with `*`.

        Raises UsageError for a pattern that fits nothing.
        """
        found: set[str] = set()
        for pattern in patterns:
            fits = {name for name in self.stages if name == pattern or name.startswith(f"{pattern}/")}
            fits |= {name for name in self.stages if "*" in pattern and fnmatchcase(name, pattern)}
            if not fits:
                raise UsageError(f"no stage is called '{pattern}'", closest(pattern, [*self.stages, *self.groups]))
            found |= fits
        return found

    def after(self, names: Iterable[str]) -> set[str]:
        """These stages and every one that needs one of them."""
        found = set(names)
        for stage in self.stages.values():
            if found & set(stage.needs):
                found.add(stage.name)
        return found


def with_method(command: str, options: JsonMapping) -> JsonObject:
    """Options as the schema takes them: the method of a merge is a word of its command."""
    first, _, method = command.partition(" ")
    return {**options, "method": method} if first == "merge" and method not in TOOLS else dict(options)


def compile_pipeline(file: PipelineFile, root: Path) -> Pipeline:
    """The stages of a file with outputs below `root`.

    Raises UsageError for a name, command, option, reference or cycle that is wrong, naming the stage.
    """
    source = file.source
    drafts, copies = _copies(dict(_with_vars(file)), source)
    drafts, made, warps = _with_warp(drafts, source)
    with source.located("stages"):
        _check_places(drafts)
    maker = _Maker(root, drafts, copies, {**copies, **made}, file.resources, source)
    stages = {name: maker.stage(name) for name in drafts}
    with source.located("stages"):
        order = _ordered(stages)
    return Pipeline(root, file, {name: stages[name] for name in order}, {**copies, **made}, warps)


def _with_vars(file: PipelineFile) -> Iterator[tuple[str, StageFile]]:
    """The stages with `${vars.X}` replaced, names and commands checked."""

    def of(name: str) -> object:
        if not name.startswith("vars."):
            return None
        value = lookup(file.vars, name.split(".")[1:], name)
        for place, text in texts(value, name):
            if references(text):
                what = f"{place} = {text!r}: the value of a variable cannot be a reference"
                raise file.source.wrong(what, "write it out", *name.split("."))
        return value

    for name, stage in file.stages.items():
        _check_name(name, file.source)
        if stage.command not in COMMANDS:
            what = f"stages.{name}: unknown command '{stage.command}'"
            fix = command_here(stage.command) or closest(stage.command, COMMANDS)
            raise file.source.wrong(what, fix, "stages", name, "command")
        values = stage.model_dump()
        changed: JsonObject = {"options": {}, "matrix": {}}
        for section, options in changed.items():
            for option, value in values[section].items():
                with file.source.located("stages", name, section, option):
                    options[option] = replaced(value, of)
        with file.source.located("stages", name, "when"):
            when = None if stage.when is None else str(replaced(stage.when, of))
        yield name, stage.model_copy(update={**changed, "when": when})


def _check_name(name: str, source: ValueSource) -> None:
    """Refuse a text that is not a folder's name, or that would be read as another reference."""
    long = any(len(part.encode()) > LONGEST_NAME for part in name.split("/"))
    taken = name.partition("/")[0] in RESERVED or name.startswith(("vars.", "matrix.")) or ".summary." in name
    if long or taken or not re.fullmatch(STAGE_NAME, name):
        what = f"'{name[:LONGEST_NAME]}' cannot be the name of a stage"
        hint = "use letters, digits, _ . - and / between them; not 'logs', 'vars' or a file of the pipeline's folder"
        raise source.wrong(what, hint, "stages", name, of_key=True)


def _check_places(names: Iterable[str]) -> None:
    """Refuse an output inside another one: replacing the outer one would remove it."""
    known = set(names)
    for name in known:
        for outer in PurePosixPath(name).parents:
            if str(outer) in known:
                raise UsageError(f"stages.{name} would lie in the output of {outer}", "rename one of them")


def _copies(
    drafts: Mapping[str, StageFile], source: ValueSource
) -> tuple[dict[str, StageFile], dict[str, tuple[str, ...]]]:
    """Every matrix as copies of its stage, and the names of the copies."""
    found: dict[str, StageFile] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for name, draft in drafts.items():
        if not draft.matrix:
            found[name] = draft
            continue
        copies = {}
        for values in product(*draft.matrix.values()):
            chosen = dict(zip(draft.matrix, values, strict=True))
            with source.located("stages", name, "matrix"):
                copies[f"{name}/{_label(chosen, draft.matrix)}"] = _copy(name, draft, chosen)
        total = len(list(product(*draft.matrix.values())))
        if len(copies) < total:
            what = f"stages.{name}.matrix gives copies with equal names"
            raise source.wrong(what, "give values that differ in text", "stages", name, "matrix")
        groups[name] = tuple(copies)
        found |= copies
    for name in found.keys() & groups.keys():
        raise source.wrong(f"stages.{name}: two stages have this name", "rename one", "stages", name, of_key=True)
    return found, groups


def _label(values: JsonMapping, matrix: Mapping[str, Sequence[Any]]) -> str:
    """The folder of a copy: `seed-1-learning_rate-3e-06`; of a path its last part, where that is unique."""
    parts = []
    for key, value in values.items():
        last = [Path(other).name for other in matrix[key] if isinstance(other, str)]
        text = Path(value).name if isinstance(value, str) and len({*last}) == len(last) else str(value)
        parts.append(f"{key}-{re.sub(r'[^A-Za-z0-9_.+-]+', '_', text.strip('/'))}")
    return "-".join(parts)


def _copy(name: str, draft: StageFile, chosen: JsonMapping) -> StageFile:
    """The stage with one combination of values: in the place of `${matrix.X}`, or as the option X."""
    used = {
        reference
        for _, text in texts([draft.options, draft.when or ""])
        for reference in references(text)
        if reference.startswith("matrix.")
    }

    def of(reference: str) -> object:
        return lookup(chosen, reference.split(".")[1:], reference) if reference.startswith("matrix.") else None

    options = replaced(draft.options, of)
    for key, value in chosen.items():
        if f"matrix.{key}" in used:
            continue
        if key not in COMMANDS[draft.command].schema.model_fields:
            raise UsageError(
                f"stages.{name}.matrix.{key} is not an option of {draft.command}, and nothing says ${{matrix.{key}}}",
                hint_for(key, COMMANDS[draft.command].schema.model_fields, spelling="keys")
                or closest(key, COMMANDS[draft.command].schema.model_fields),
            )
        options[key] = value
    when = None if draft.when is None else str(replaced(draft.when, of))
    return draft.model_copy(update={"options": options, "matrix": {}, "when": when})


def _with_warp(
    drafts: Mapping[str, StageFile], source: ValueSource
) -> tuple[dict[str, StageFile], dict[str, tuple[str, ...]], dict[str, WarpConfig]]:
    """Every `command: warp` as the stages of Algorithm 1, their names, and its settings by their prefix."""
    found: dict[str, StageFile] = {}
    groups: dict[str, tuple[str, ...]] = {}
    warps: dict[str, WarpConfig] = {}
    for name, draft in drafts.items():
        if draft.command != "warp":
            found[name] = draft
            continue
        if any(".summary." in reference for _, text in texts(draft.options) for reference in references(text)):
            what = f"stages.{name}: warp takes no ${{STAGE.summary...}}"
            raise source.wrong(what, "its stages must be known at once", "stages", name, "options")
        for option in sorted({"jobs", "executor", "slurm", "gpus"} & draft.options.keys()):
            what = f"stages.{name}.options.{option} is for a whole pipeline"
            hint = f"drop it; give --{option} to the run"
            raise source.wrong(what, hint, "stages", name, "options", option, of_key=True)
        config = validated(WarpConfig, draft.options, source.below("stages", name, "options"))
        made = {
            f"{name}/{inner}": stage.model_copy(
                update={
                    "after": draft.after,
                    "retries": draft.retries,
                    "resources": over(stage.resources, _of_inner(stage, draft.resources)),
                }
                | ({"when": draft.when} if draft.when and not stage.when else {})
            )
            for inner, stage in warp_stages(config, prefix=f"{name}/").items()
        }
        groups[name], warps[f"{name}/"] = tuple(made), config
        found |= made
    return found, groups, warps


def _of_inner(stage: StageFile, own: Resources) -> Resources:
    """The resources of `command: warp` for one of its stages: GPUs and machines of a gang are those of its RL runs."""
    return own if stage.command == "rlhf" or not own.is_gang else own.model_copy(update={"gpus": None, "nodes": None})


def _ordered(stages: Mapping[str, Stage]) -> list[str]:
    """The names in the order of the file, but every stage after those that it needs."""
    try:
        sorter = TopologicalSorter({name: stage.needs for name, stage in stages.items()})
        sorter.prepare()
    except CycleError as error:
        raise UsageError(f"stages need each other: {' <- '.join(error.args[1])}", "break the circle") from error
    places = {name: place for place, name in enumerate(stages)}
    order: list[str] = []
    ready: list[str] = []
    while sorter.is_active():
        ready += sorter.get_ready()
        ready.sort(key=places.__getitem__)
        order.append(ready.pop(0))
        sorter.done(order[-1])
    return order


@dataclass(frozen=True)
class _Maker:
    """Turns drafts into stages: replaces `${STAGE.out}` and finds what each stage needs.

    copies: group -> copies, each of which is a stage or a group. groups: those, and WARP's.
    """

    root: Path
    drafts: Mapping[str, StageFile]
    copies: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, tuple[str, ...]]
    shared: Resources
    source: ValueSource

    def stage(self, name: str) -> Stage:
        draft = self.drafts[name]
        needs: set[str] = set()
        for place, text in [*texts(draft.options, "options"), *texts(draft.when or "", "when")]:
            keys = [int(key) if key.isdigit() else key for key in place.split(".")]
            for reference in references(text):
                rest = text.partition(f"${{{reference}}}")[2]
                with self.source.located("stages", name, *keys):
                    needs |= self._needed(reference, rest, f"stages.{name}.{place}")
        for number, other in enumerate(draft.after):
            with self.source.located("stages", name, "after", number):
                needs |= self._members(other, f"stages.{name}.after")
        if draft.when is not None:
            with self.source.located("stages", name, "when"):
                parse_condition(draft.when)
        resources = over(fitting(draft.command, self.shared), draft.resources)
        with self.source.located("stages", name):
            check_reserved(name, draft.command, draft.options, resources)
        return Stage(
            name=name,
            command=draft.command,
            options=replaced(draft.options, self._out),
            out=self.root / name,
            needs=tuple(other for other in self.drafts if other in needs),
            when=draft.when,
            retries=draft.retries,
            resources=resources,
            source=self.source,
        )

    def _out(self, reference: str) -> object:
        """The path of `STAGE.out`, or the paths of a group's copies; None for a summary."""
        if not reference.endswith(".out"):
            return None
        name = reference.removesuffix(".out")
        return [str(self.root / copy) for copy in self.copies[name]] if name in self.copies else str(self.root / name)

    def _needed(self, reference: str, rest: str, place: str) -> set[str]:
        """The stages behind one reference; `rest` is the text after it."""
        name, _, key = reference.partition(".summary.")
        if key:
            if name not in self.drafts:
                self._unknown(name, place, [*self.drafts])
            return {name}
        if not reference.endswith(".out"):
            raise UsageError(
                f"{place}: ${{{reference}}} is not a reference", "write ${STAGE.out}, ${STAGE.summary.KEY} or ${vars.X}"
            )
        name = reference.removesuffix(".out")
        members = self._members(name, place)
        inside = PurePosixPath(name + rest)
        exact = {member for member in members if inside == PurePosixPath(member) or member in map(str, inside.parents)}
        return exact or members

    def _members(self, name: str, place: str) -> set[str]:
        """The stage of this name, or those of a group."""
        if name in self.drafts:
            return {name}
        if name not in self.groups:
            self._unknown(name, place, [*self.drafts, *self.groups])
        return {member for part in self.groups[name] for member in self._members(part, place)}

    def _unknown(self, name: str, place: str, known: list[str]) -> None:
        raise UsageError(f"{place}: no stage is called '{name}'", closest(name, known))
