"""Reads the output of a pipeline, of WARP or of one command into plain records for the report. Torch-free.

Each gemma2.json below the directory is a stage; a hidden `.NAME.partial` with a run.json is a stage that did not
finish; pipeline.json adds the stages that never began, and why. Missing and unreadable files become gaps, a sentence
each, and never exceptions: a report matters most after a failed run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject, load_json
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.manifest import MANIFEST, STATE, read_manifest
from gemma2.core.outputs.safetensors_header import weight_files
from gemma2.core.outputs.staging import partial_path

from .fronts import Front, choose_front, read_front, read_lines

__all__ = ["Collected", "RecordedStage", "collect", "name_of"]

PARTIAL = re.compile(r"(^|/)\.([^/]+)\.partial(?=/|$)")
PIPELINE = "pipeline.json"
RESUME_STATE = {"checkpoints", "ema"}
# Commands in the order in which they run, for stages that ended in the same second.
WORK = (
    *("tiny", "generate", "filter", "sft", "distill", "reward pairs", "reward"),
    *("rlhf", "merge slerp", "merge liti", "pareto", "pick"),
)
NAMED = 6  # stages that a gap names; it counts the others

MOST_FOLDERS = 1000  # of a folder that may hold outputs without being one


@dataclass(frozen=True)
class RecordedStage:
    """One command's output, or a stage without output so far.

    name    path below the report's directory; "." is the directory itself
    record  entry of the stage in pipeline.json
    """

    name: str
    path: Path
    manifest: JsonMapping
    weights: str | None = None  # "blake3:..." of the stage's own weights
    record: JsonMapping = field(default_factory=dict)

    @property
    def command(self) -> str:
        return str(self.manifest.get("command") or self.record.get("command") or "")

    @property
    def status(self) -> str:
        """The status in its manifest if that is complete, else the one in pipeline.json."""
        own = str(self.manifest.get("status", "unfinished" if self.manifest else "missing"))
        recorded = str(self.record.get("status") or "")
        return own if own == "complete" or recorded in ("", "complete") else recorded

    @property
    def error(self) -> str:
        """The error line of a failed stage, else ""."""
        return str(self.record.get("error") or "").removeprefix("error: ")

    @property
    def summary(self) -> JsonMapping:
        found = self.manifest.get("summary")
        return found if isinstance(found, Mapping) else {}

    @property
    def config(self) -> JsonMapping:
        found = self.manifest.get("config")
        return found if isinstance(found, Mapping) else {}

    @property
    def iteration(self) -> int | None:
        found = re.search(r"(?:^|/)iteration-(\d+)(?:/|$)", self.name)
        return int(found[1]) if found else None

    @property
    def round(self) -> str:
        """The folder of its WARP iteration, such as `warp/iteration-2`; "" outside an iteration."""
        found = re.match(r"(?:.*/)?iteration-\d+(?=/|$)", self.name)
        return found[0] if found else ""

    @property
    def seconds(self) -> float | None:
        """Seconds from start to end, if both are recorded."""
        try:
            ends = [datetime.fromisoformat(str(self.manifest[key])) for key in ("started", "ended")]
        except (KeyError, ValueError):
            return None
        return (ends[1] - ends[0]).total_seconds()


@dataclass(frozen=True)
class Collected:
    """Everything that the report shows, and the gaps: sentences about missing parts."""

    root: Path
    title: str
    stages: Sequence[RecordedStage]
    fronts: Sequence[Front]  # of every measurement, in the order of the stages
    front: Front  # the one with the most points; an empty front without any
    samples: Sequence[JsonMapping]  # samples.jsonl of the front
    curves: Mapping[str, Sequence[JsonMapping]]  # RL run -> metrics.jsonl with "iteration"
    gaps: Sequence[str] = field(default_factory=tuple)

    def of(self, *commands: str) -> list[RecordedStage]:
        """The stages that ran one of these commands."""
        return [stage for stage in self.stages if stage.command in commands]


def name_of(text: str) -> str:
    """The final form of a path: `a/.warp.partial/b` becomes `a/warp/b`."""
    return PARTIAL.sub(r"\1\2", text)


def collect(directory: Path) -> Collected:
    """Read a directory; if it does not exist yet, the hidden directory in which it is being made.

    Raises InputError if it holds no output of a gemma2 command.
    """
    root = directory if directory.is_dir() else partial_path(directory)
    if not root.is_dir():
        raise InputError(f"{directory} is not a directory", "give the output of a gemma2 command or pipeline")
    gaps: list[str] = []
    records = read_records(root, gaps)
    place = {name: i for i, name in enumerate(records)}
    found = with_records(root, latest(find_stages(root, gaps)), records)
    stages = sorted(found, key=lambda stage: order(stage, place))
    if not stages:
        why = f": {gaps[0]}" if gaps else ""
        raise InputError(
            f"{directory} holds no output of a gemma2 command{why}", "give the output of a command or pipeline"
        )
    gaps += incomplete(stages)
    measured = [stage for stage in stages if stage.command == "pareto" or (stage.path / "front.json").is_file()]
    every = [read_front(stage.name, stage.path, gaps) for stage in measured if stage.manifest]
    fronts = [front for front in every if front.points]
    front = choose_front(fronts)
    benchmarked = any(stage.command.startswith("eval ") for stage in stages)
    if not front.points and (measured or (len(stages) > 1 and not benchmarked)):
        gaps.append("there is no front: no policy was measured (gemma2 pareto)")
    return Collected(
        root=root,
        title=name_of(root.resolve().name),
        stages=stages,
        fronts=fronts,
        front=front,
        samples=read_lines(front.path / "samples.jsonl", f"{front.name}/samples.jsonl", gaps) if front.points else [],
        curves={stage.name: read_curve(stage, gaps) for stage in stages if stage.command == "rlhf" and stage.manifest},
        gaps=gaps,
    )


def order(stage: RecordedStage, place: Mapping[str, int]) -> tuple[int, str, int, int, str]:
    """Sort key: the place in pipeline.json, with stages inside another right after it; without a pipeline the end, and
    for stages that ended in the same second the place of the command in WORK."""
    parts = stage.name.split("/")
    owners = ("/".join(parts[:end]) for end in range(len(parts), 0, -1))
    rank = WORK.index(stage.command) if stage.command in WORK else len(WORK)
    ended = str(stage.manifest.get("ended") or "~")
    return next((place[o] for o in owners if o in place), len(place)), ended, stage.iteration or 0, rank, stage.name


# --- stages ---------------------------------------------------------------------------------------------------------


def find_stages(root: Path, gaps: list[str]) -> Iterator[RecordedStage]:
    """Yield every directory with a manifest and every interrupted run.

    Raises InputError for a folder of very many folders, unless it is an output itself.
    """
    is_output = any((root / name).is_file() for name in (MANIFEST, STATE, PIPELINE))
    for count, (folder, children, files) in enumerate(os.walk(root)):
        path = Path(folder)
        if count == MOST_FOLDERS and not is_output:
            what = f"{root} is not an output of a gemma2 command, and holds more than {MOST_FOLDERS:,} folders"
            raise InputError(what, "give the output of one command or pipeline")
        hidden = {child for child in children if child.startswith(".") and not PARTIAL.search(child)}
        children[:] = sorted(set(children) - hidden - RESUME_STATE)
        name = name_of(path.relative_to(root).as_posix())
        try:
            if MANIFEST in files:
                yield RecordedStage(name, path, read_manifest(path) or {}, own_weights(path))
            elif STATE in files and PARTIAL.search(path.name):
                state = load_json(path / STATE)
                yield RecordedStage(name, path, {**state, "status": "unfinished"} if isinstance(state, dict) else {})
        except (InputError, OSError, ValueError) as error:
            gaps.append(f"{name} cannot be read ({error})")


def own_weights(path: Path) -> str | None:
    """Digest of a stage's weights, or None without weights."""
    return digest_weights(path) if weight_files(path) else None


def latest(stages: Iterator[RecordedStage]) -> dict[str, RecordedStage]:
    """Stages by name; a complete output takes precedence over an unfinished attempt to replace it."""
    found: dict[str, RecordedStage] = {}
    for stage in stages:
        if stage.name not in found or found[stage.name].status != "complete":
            found[stage.name] = stage
    return found


def read_records(root: Path, gaps: list[str]) -> Mapping[str, JsonMapping]:
    """The stages of pipeline.json by name; empty if the file is missing or unreadable."""
    try:
        stages = load_json(root / PIPELINE)["stages"]
        return {str(name): record for name, record in stages.items() if isinstance(record, Mapping)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        gaps.append(f"{PIPELINE} cannot be read ({type(error).__name__})")
        return {}


def with_records(
    root: Path, stages: Mapping[str, RecordedStage], records: Mapping[str, JsonMapping]
) -> Iterator[RecordedStage]:
    """Yield the stages with their entries in pipeline.json, then the stages without output."""
    for stage in stages.values():
        yield RecordedStage(stage.name, stage.path, stage.manifest, stage.weights, records.get(stage.name, {}))
    for name in records.keys() - stages.keys():
        yield RecordedStage(name, root / name, {}, None, records[name])


def incomplete(stages: Sequence[RecordedStage]) -> Iterator[str]:
    """Yield sentences about incomplete stages: one per stage that went wrong, one for all that wait."""
    waiting: dict[str, list[str]] = {}
    for stage in stages:
        if stage.status in ("complete", "not needed"):
            continue
        if stage.status in ("waiting", "blocked", "running"):
            waiting.setdefault(stage.status, []).append(stage.name)
        elif stage.error:
            yield f"{stage.name} {stage.status}: {stage.error}"
        elif stage.status in ("failed", "missing"):
            yield f"{stage.name} {'failed' if stage.status == 'failed' else 'is missing'}"
        else:
            yield f"{stage.name} did not finish (status {stage.status})"
    for status, names in waiting.items():
        why = {"waiting": "waiting to start", "blocked": "not started, because an earlier stage failed"}
        listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        yield f"{why.get(status, status)}: {listed}"


def read_curve(stage: RecordedStage, gaps: list[str]) -> list[JsonObject]:
    """Rows of the metrics of an RL run. Training rows have `reward`, evaluations `heldout_reward` and `kl`, so that no
    metric mixes training with held-out prompts."""
    rows = []
    for row in read_lines(stage.path / "metrics.jsonl", f"{stage.name}/metrics.jsonl", gaps):
        if isinstance(row.get("step"), int):
            evaluation = row.get("kind") == "eval"
            renamed = {"heldout_reward" if evaluation and key == "reward" else key: row[key] for key in row}
            if evaluation:
                renamed.pop("length", None)
            rows.append({**renamed, "iteration": stage.iteration})
    return rows
