"""Every fault of a YAML file at once, each with line, column and fix: recipes, pipelines, files of merges. Torch-free.

    keys and values against the schemas -> references between stages -> what keys say together

No model, data set or function is opened: that a path exists is checked by `--dry-run` of the command.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from gemma2.core.errors import Gemma2Error, InputError, UsageError
from gemma2.core.json_files import JsonMapping, JsonObject, load_json
from gemma2.core.outputs.manifest import MANIFEST
from gemma2.core.secret_text import secret_in
from gemma2.core.yaml_files import closest, read_documents
from gemma2.merging.recipes.every_fault import faults_of
from gemma2.merging.recipes.mergekit import is_mergekit
from gemma2.posttrain.foreign.counterparts import command_here
from gemma2.posttrain.pipelines.compile import compile_pipeline, read_pipeline, with_method
from gemma2.posttrain.pipelines.references import lookup, references, replaced, texts
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.schemas import PipelineFile
from gemma2.posttrain.schemas.config import Config, ValueSource
from gemma2.posttrain.schemas.messages import explained_each
from gemma2.posttrain.training.trainer_options import check_trainer_options

from .schema_index import commands_of_keys, schema_for, with_inputs

__all__ = ["FileFault", "FileReport", "check_file", "command_named_in"]

FOR = re.compile(r"# gemma2 ([a-z][a-z -]*[a-z]):")  # begins the first line of a recipe
GIVEN = "given"  # in the place of what the command line or another stage gives
MOST_NAMED = 4  # commands whose keys a file may have
PLACE = re.compile(r":(\d+):(\d+)$")


@dataclass(frozen=True)
class FileFault:
    """One fault of a file. where: `FILE:LINE:COLUMN`."""

    where: str
    what: str
    fix: str


@dataclass(frozen=True)
class FileReport:
    """What a file was read as, how that was known, and its faults in the order of its lines."""

    kind: str
    known_by: str
    faults: tuple[FileFault, ...]

    def as_json(self) -> JsonObject:
        """The report as a JSON document."""
        faults = [{"where": one.where, "what": one.what, "fix": one.fix} for one in self.faults]
        return {"ok": not faults, "kind": self.kind, "known_by": self.known_by, "problems": faults}


def check_file(path: Path, command: str = "") -> FileReport:
    """Check every key and value of a recipe, a pipeline or a file of merges.

    command  whose recipe it is; "": what its first line or its keys say
    Raises UsageError for a file that is not YAML, or whose command cannot be known.
    """
    documents = read_documents(path)
    document = documents[0] if documents else {}
    recorded = path.name == MANIFEST and isinstance(document.get("config"), dict)
    if recorded:
        command, document = command or str(load_json(path).get("command", "")), document["config"]
    named = command_named_in(path)
    if (not command and "stages" in document) or command == "pipeline":
        return FileReport("pipeline", "its stages", _sorted(_pipeline_faults(path, document)))
    if command == "merge" or (not command and _is_merge(document, named)):
        return FileReport("merge", "its keys", _sorted(faults_of(path)))
    if len(documents) > 1:
        raise UsageError(f"{path} holds {len(documents)} YAML documents", "give one recipe per file")
    likely = [] if command or named else commands_of_keys({str(key) for key in document})
    others = f", which {' and '.join(likely[1:MOST_NAMED])} have too: --as names another" if likely[1:] else ""
    known_by = "--as" if command else "its first line" if named else f"its keys{others}"
    command = command or named or next(iter(likely), "")
    if not command:
        raise InputError(f"{path} has no key of any command", "name the command that it is for: --as sft")
    schema = schema_for(command)
    faults = _settings_faults(schema, with_inputs(schema, document), ValueSource(path))
    return FileReport(command, known_by, _sorted(faults))


def command_named_in(path: Path) -> str:
    """The command that the first line of a recipe names, "" without one."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        found = FOR.match(lines.readline())
    return found[1] if found else ""


def _is_merge(document: JsonMapping, named: str) -> bool:
    ours = bool({"method", "merge_method"} & document.keys()) or isinstance(document.get("steps"), dict)
    return ours or (is_mergekit(document) and not named)


def _sorted(errors: Iterator[Gemma2Error] | list[UsageError]) -> tuple[FileFault, ...]:
    """The faults by line and column; those without a place last."""

    def order(fault: FileFault) -> tuple[bool, int, int]:
        found = PLACE.search(fault.where)
        return (found is None, int(found[1]) if found else 0, int(found[2]) if found else 0)

    found = {}
    for error in errors:
        what = error.what.replace(f" in {error.where}", "", 1) if error.where else error.what
        found[what, error.where] = FileFault(error.where, what, error.hint)
    return tuple(sorted(found.values(), key=order))


# --- settings of one command ------------------------------------------------------------------------------------------


def _settings_faults(
    schema: type[Config], values: JsonMapping, source: ValueSource, deferred: frozenset[str] = frozenset()
) -> Iterator[Gemma2Error]:
    """The faults of the settings of one command; values of the keys `deferred` are not known yet."""
    if found := secret_in(values):
        hint = "keep it in the environment, and name the variable with --api-key-env or --judge-key-env"
        yield source.wrong(f"'{found[0]}' is not accepted: {found[1]}", hint, *found[0].split("."))
    problems = []
    try:
        schema.model_validate(values)
    except ValidationError as error:
        problems = [one for one in error.errors() if not (one["loc"] and one["loc"][0] in deferred)]
    errors = explained_each(schema, problems, source)
    foreign = [error for error in errors if "gemma2 config import" in error.hint]
    yield from foreign[:1] or errors
    trainer = {} if foreign else _mapping(values.get("trainer"))
    for key, value in trainer.items():
        fields: JsonObject = {"trainer": {key: value}}
        try:
            check_trainer_options(schema.model_construct(**fields))
        except UsageError as error:
            yield source.wrong(error.what, error.hint, "trainer", str(key), of_key="unknown key" in error.what)


# --- pipelines --------------------------------------------------------------------------------------------------------


def _pipeline_faults(path: Path, document: JsonMapping) -> Iterator[Gemma2Error]:
    """The faults of a pipeline file: of each stage by itself, then of what stages say of each other."""
    source = ValueSource(path)
    found: list[Gemma2Error] = []
    try:
        PipelineFile.model_validate(document)
    except ValidationError as error:
        found += explained_each(PipelineFile, error.errors(), source)
    for name, stage in _mapping(document.get("stages")).items():
        if isinstance(stage, dict):
            found += _stage_faults(str(name), stage, document, source)
            found += _lost(str(name), stage, document, source)
    yield from found
    if found:
        return
    try:
        pipeline = compile_pipeline(read_pipeline(path), Path("out"))
        for compiled in pipeline.stages.values():
            if not compiled.deferred:
                compiled.config()
    except Gemma2Error as error:
        yield error


def _stage_faults(name: str, stage: JsonMapping, document: JsonMapping, source: ValueSource) -> Iterator[Gemma2Error]:
    """The faults of the command and the options of a stage."""
    command, options, matrix = (stage.get(key) for key in ("command", "options", "matrix"))
    if not isinstance(command, str) or not isinstance(options or {}, dict):
        return
    if command not in COMMANDS:
        fix = command_here(command) or closest(command, COMMANDS)
        yield source.wrong(f"stages.{name}: unknown command '{command}'", fix, "stages", name, "command")
        return
    chosen = {key: one[0] for key, one in _mapping(matrix).items() if isinstance(one, list) and one}
    used = {reference for _, text in texts([options, stage.get("when")]) for reference in references(text)}
    schema = COMMANDS[command].schema
    known = {**schema.model_fields, "lambda": None}
    for key in chosen:
        if f"matrix.{key}" not in used and key not in known:
            what = f"stages.{name}.matrix.{key} is not an option of {command}, and no option reads ${{matrix.{key}}}"
            yield source.wrong(what, closest(key, known), "stages", name, "matrix", key, of_key=True)
    asked = {key: value for key, value in chosen.items() if f"matrix.{key}" not in used and key in known}
    values, deferred = _filled({**asked, **_mapping(options)}, _mapping(document.get("vars")), chosen)
    inside = source.below("stages", name, "options")
    yield from _settings_faults(schema, with_method(command, values), inside, deferred)


def _filled(options: JsonMapping, variables: JsonMapping, matrix: JsonMapping) -> tuple[JsonObject, frozenset[str]]:
    """Options with a value for every reference that has one, and the names of those that still hold another."""
    sections: Mapping[str, JsonMapping] = {"vars": variables, "matrix": matrix}

    def of(reference: str) -> object:
        section, _, rest = reference.partition(".")
        if section in sections:
            try:
                return lookup(sections[section], rest.split("."), reference)
            except UsageError:
                return None
        return GIVEN if reference.endswith(".out") else None

    values = {key: replaced(value, of) for key, value in options.items()}
    return values, frozenset(key for key, value in values.items() if any(references(t) for _, t in texts(value)))


def _lost(name: str, stage: JsonMapping, document: JsonMapping, source: ValueSource) -> Iterator[Gemma2Error]:
    """References to variables and stages that the file does not have."""
    variables, stages = _mapping(document.get("vars")), _mapping(document.get("stages"))
    named = {*map(str, stages), *(part for one in stages for part in _folders(str(one)))}

    def is_stage(base: str) -> bool:
        return base in named or any(base.startswith(f"{one}/") for one in named)

    for section in ("options", "when"):
        for place, text in texts(stage.get(section), section):
            keys = ["stages", name, *(int(key) if key.isdigit() else key for key in place.split("."))]
            for reference in references(text):
                section_of, _, rest = reference.partition(".")
                key = rest.partition(".")[0]
                base = reference.partition(".summary.")[0].removesuffix(".out")
                if section_of in ("vars", "matrix"):
                    known = variables if section_of == "vars" else _mapping(stage.get("matrix"))
                    what = "" if key in known else f"there is no {section_of} '{key}'"
                    fix = closest(key, map(str, known)) if known else f"define it below {section_of}"
                elif is_stage(section_of) and not is_stage(base):
                    what, fix = f"${{{reference}}} is not a reference", f"write ${{{section_of}.out}}"
                else:
                    what, fix = "" if is_stage(base) else f"there is no stage '{base}'", closest(base, named)
                if what:
                    yield source.wrong(f"stages.{name}.{place}: {what}", fix, *keys)
    after = stage.get("after")
    for number, other in enumerate(after if isinstance(after, list) else []):
        if not is_stage(str(other)):
            what = f"stages.{name}.after: there is no stage '{other}'"
            yield source.wrong(what, closest(str(other), named), "stages", name, "after", number)


def _folders(name: str) -> Iterator[str]:
    parts = name.split("/")
    yield from ("/".join(parts[:end]) for end in range(1, len(parts)))


def _mapping(value: object) -> JsonObject:
    return value if isinstance(value, dict) else {}
