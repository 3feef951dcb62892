"""The files of a front: written once, read again by later fronts and by `pick`. Torch-free.

    front.json       the points, the front's area with its interval and reference point, the best within KL limits
    front.csv        one row per point, the columns of front.json
    hypervolume.csv  one row: the areas, their intervals, the reference point that they are bounded by
    prompts.json     {"prompts": n, "points": {name: {"reward": [...], "kl": [...], ...}}}: one value per prompt of
                     reward, KL and every other score, in the order of the prompts, null where a score had no opinion
    samples.jsonl    the first completions of every point
    front.png, .svg  the picture

The values per prompt are JSON: every digit is kept, any tool reads it, and at one line a point it stays small (40 bytes
a prompt and point). Paths in front.json are relative to its directory, so a run that is moved as a whole still works.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject, parse_json, write_json
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.outputs.safetensors_header import printable
from gemma2.posttrain.provenance.recorded_files import check_recorded, remake

from .bootstrap import Answers
from .candidates import Candidate, Weights
from .comparison import is_gain

__all__ = [
    "FRONT",
    "READ",
    "FrontEntry",
    "answers_of",
    "place_of",
    "read_entries",
    "read_front",
    "step_name",
    "values_of",
    "write_front",
]

FRONT, VALUES, SAMPLES = "front.json", "prompts.json", "samples.jsonl"
READ = (FRONT, VALUES, SAMPLES)  # what a later front takes over
KEPT = ("reward", "kl")  # the values per prompt that every point has: the axes of the front
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what begins a formula in a spreadsheet
PLACES = {1: ("source",), 2: ("init", "merged")}  # where the models of a point are, by their number
LABELS = frozenset({"name", "label", "kind", "title", "end", "iteration", "eta", "on_front"})


@dataclass(frozen=True)
class FrontEntry:
    """A measured point with its figures, samples, values and trajectory.

    figures     flat columns: reward, reward_se, ..., n
    samples     prompts and completions
    values      "reward", "kl" and other scores -> one value per prompt, None where a score had no opinion
    trajectory  what an RL run measured on the way, alike: figures, and "values" as above
    """

    candidate: Candidate
    figures: JsonMapping
    samples: Sequence[JsonMapping]
    values: Mapping[str, Sequence[float | None]]
    trajectory: Sequence[JsonMapping] = field(default_factory=tuple)


def answers_of(entries: Sequence[FrontEntry]) -> Answers:
    """KL and reward of every point on every prompt."""
    columns = {
        name: [[math.nan if value is None else value for value in entry.values[name]] for entry in entries]
        for name in KEPT
    }
    return Answers.of(columns["kl"], columns["reward"])


def values_of(entries: Sequence[FrontEntry], names: Sequence[str]) -> dict[str, Mapping[str, Sequence[float | None]]]:
    """The values per prompt of every point, also of the trajectories, by the names in front.json."""
    found = {name: entry.values for name, entry in zip(names, entries, strict=True)}
    for name, entry in zip(names, entries, strict=True):
        found |= {step_name(name, point): point["values"] for point in entry.trajectory}
    return found


def step_name(run: str, point: JsonMapping) -> str:
    """The name of an evaluation of a run."""
    return f"{run} step {point['step']}"


# --- writing --------------------------------------------------------------------------------------------------------


def places(candidate: Candidate, out: Path) -> dict[str, str]:
    """The places of a point's models, relative to the front, and the digests of their weights."""
    found = {}
    for name, model in zip(PLACES[len(candidate.models)], candidate.models, strict=True):
        found[name] = os.path.relpath(model.path.resolve(), out.resolve())
        found[f"{name}_weights"] = model.digest
    return found


def write_front(directory: Path, front: JsonMapping, entries: Sequence[FrontEntry], names: Sequence[str]) -> None:
    """Every file of the output but the manifest. `names`: of the entries."""
    from gemma2.posttrain.reports.plots.figures import front_figure, write_figure

    write_json(directory / FRONT, front)
    _write_csv(directory / "front.csv", front["points"])
    reference = {f"reference_{key}": value for key, value in front["reference"].items()}
    reference |= {key: front[key] for key in ("reference_from", "reference_point")}
    areas = {key: value for key, value in front.items() if key.startswith(("hypervolume", "bootstrap"))}
    _write_csv(directory / "hypervolume.csv", [areas | reference])
    _write_values(directory / VALUES, entries, names)
    rows = [
        {"name": name, **entry.candidate.labels, **row}
        for name, entry in zip(names, entries, strict=True)
        for row in entry.samples
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (directory / SAMPLES).write_text("".join(lines), encoding="utf-8")
    figure = front_figure(front["points"])
    for name in ("front.png", "front.svg"):
        write_figure(figure, directory / name)


def _write_csv(path: Path, rows: Sequence[JsonMapping]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writerow({column: _cell(column) for column in columns})
        writer.writerows({column: _cell(value) for column, value in row.items()} for row in rows)


def _cell(value: object) -> object:
    """A value as a spreadsheet takes it for text: names of others may begin like a formula, `=cmd|...`."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _write_values(path: Path, entries: Sequence[FrontEntry], names: Sequence[str]) -> None:
    lines = [
        f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(dict(values), separators=(',', ':'))}"
        for name, values in values_of(entries, names).items()
    ]
    count = len(entries[0].values["kl"])
    text = f'{{"schema_version": 1, "prompts": {count}, "points": {{\n' + ",\n".join(lines) + "\n}}\n"
    path.write_text(text, encoding="utf-8")


# --- reading --------------------------------------------------------------------------------------------------------


def read_front(directory: Path, role: str) -> JsonObject:
    """front.json of a finished output of pareto.

    Raises InputError naming `role` for anything else, and for a file that was changed since.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise InputError(
            f"{role} {directory} is not an output of gemma2 pareto", "give the directory of a finished front"
        )
    if manifest.get("command") != "pareto" or manifest.get("status") != "complete":
        state = f"command {printable(str(manifest.get('command')))}, status {printable(str(manifest.get('status')))}"
        raise InputError(
            f"{role} {directory} is not a finished front ({state})",
            "give a directory that gemma2 pareto has completed",
        )
    front = _read(directory / FRONT)
    check_recorded(directory, [FRONT], remake("pareto", directory))
    points = front.get("points")
    if not isinstance(points, list) or not all(_is_point(point) for point in points):
        raise InputError(f"{directory / FRONT} holds no points", "measure it again with gemma2 pareto")
    return front


def _read(path: Path) -> JsonObject:
    """The JSON object in a file."""
    return _objects(path, lines=False)[0]


def _objects(path: Path, lines: bool) -> list[JsonObject]:
    """The JSON object that a file is, or those on its lines. Raises InputError if they are not."""
    try:
        text = path.read_text(encoding="utf-8")
        documents = [parse_json(part) for part in (text.splitlines() if lines else [text])]
    except (OSError, ValueError) as error:
        cause = type(error).__name__
        raise InputError(f"{path} cannot be read ({cause})", "measure it again with gemma2 pareto") from error
    if not all(isinstance(document, dict) for document in documents):
        raise InputError(f"{path} holds no JSON object", "measure it again with gemma2 pareto")
    return documents


def _is_point(point: object) -> bool:
    return isinstance(point, dict) and {"name", "kind", "kl", "reward", "eta", "iteration"} <= point.keys()


def place_of(point: JsonMapping, directory: Path) -> tuple[Weights, ...]:
    """The models of a point of `directory`'s front. Raises InputError where they are not recorded."""
    names = PLACES[2 if point["kind"] == "line" else 1]
    if any(not isinstance(point.get(key), str) for name in names for key in (name, f"{name}_weights")):
        raise InputError(
            f"{directory / FRONT} does not tell where the models of {printable(str(point['name']))!r} are",
            "measure it again with gemma2 pareto",
        )
    return tuple(
        Weights(Path(os.path.normpath(directory.resolve() / point[name])), point[f"{name}_weights"]) for name in names
    )


def read_entries(directory: Path, front: JsonMapping) -> list[FrontEntry]:
    """Every measured point of a front with its values, samples and trajectory. Raises InputError without them."""
    values = _read(directory / VALUES).get("points")
    check_recorded(directory, READ, remake("pareto", directory))
    if not isinstance(values, dict):
        raise InputError(f"{directory / VALUES} holds no points", "measure it again with gemma2 pareto")
    samples: dict[str, list[JsonObject]] = {}
    for row in _objects(directory / SAMPLES, lines=True):
        samples.setdefault(str(row.get("name")), []).append({key: row[key] for key in row if key not in LABELS})
    drawn: dict[str, list[JsonObject]] = {}
    for point in front["points"]:
        if point["kind"] == "trajectory":
            own = {key: point[key] for key in point if key not in ("name", "run") and not is_gain(key)}
            drawn.setdefault(point["run"], []).append({**own, "values": _values_in(values, point["name"], directory)})
    return [
        _entry(point, directory, values, samples.get(point["name"], []), drawn.get(point["name"], []))
        for point in front["points"]
        if point["kind"] != "trajectory"
    ]


def _entry(
    point: JsonMapping,
    directory: Path,
    values: JsonMapping,
    samples: Sequence[JsonMapping],
    drawn: Sequence[JsonMapping],
) -> FrontEntry:
    own = _values_in(values, point["name"], directory)
    models = place_of(point, directory)
    more = {name: point.get(name) or "" for name in ("title", "end")}
    candidate = Candidate(point["kind"], models, point["iteration"], point["eta"], **more)
    placed = {f"{name}{part}" for name in PLACES[len(models)] for part in ("", "_weights")}
    figures = {key: value for key, value in point.items() if key not in LABELS | placed and not is_gain(key)}
    return FrontEntry(candidate, figures, samples, own, drawn)


def _values_in(values: JsonMapping, name: str, directory: Path) -> JsonObject:
    """The values per prompt of one point."""
    own = values.get(name)
    if not isinstance(own, dict) or not all(isinstance(own.get(key), list) for key in KEPT):
        raise InputError(
            f"{directory / VALUES} has no values of {printable(str(name))!r}", "measure it again with gemma2 pareto"
        )
    return own
