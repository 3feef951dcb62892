"""The KL-reward front: every policy, and the line from init to merge, measured alike.

    line(eta) = (1 - eta) * theta_init + eta * theta_merged,  eta in [0, 1]     (WARP 2406.16768, Algorithm 1)

The paper's front starts at the SFT policy and ends at the last SLERP, before LITI. Points of the line are formed in
memory, in fp32, and never written. All policies answer the same held-out prompts with common random numbers.

Deviation: the RL trajectory is what each run measured on the way (its own evaluation prompts and sample count), so
those points are drawn for orientation and are neither candidates for the front nor part of the hypervolume.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemma2.merging.errors import InputError, UsageError
from gemma2.merging.outputs import digest_weights, read_manifest, write_json
from gemma2.merging.progress import SILENT, Progress
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt, read_prompts
from gemma2.posttrain.data.sources import data_files
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.rewards.functions import Score
from gemma2.posttrain.rewards.terms import reward_parents
from gemma2.posttrain.rundir import Parent, Run, RunOptions, RunResult, open_run
from gemma2.posttrain.schemas import ParetoConfig, RewardFields
from gemma2.posttrain.training.trainer import quiet_libraries

from .evaluate import Settings, check_same_vocabulary, measure, scores_of, settings_of

__all__ = ["best_at", "hypervolume", "interpolate_", "pareto_front", "run_pareto"]

Point = Mapping[str, Any]  # has at least "kl" (nats) and "reward"


# --- pure -----------------------------------------------------------------------------------------------------------


def pareto_front(points: Sequence[Point]) -> list[bool]:
    """Which points no other beats: at most its KL and at least its reward, one of them strictly. Ties stay."""
    return [not any(_beats(other, point) for other in points) for point in points]


def _beats(a: Point, b: Point) -> bool:
    no_worse = a["kl"] <= b["kl"] and a["reward"] >= b["reward"]
    return no_worse and (a["kl"] < b["kl"] or a["reward"] > b["reward"])


def hypervolume(points: Sequence[Point], reference: tuple[float, float]) -> float:
    """Area in the (KL, reward) plane that the points dominate, bounded by `reference` = (largest KL, least reward).

    Points with more KL or less reward than the reference add nothing. Unit: nats times reward.
    """
    limit, floor = reference
    front = sorted(
        (point["kl"], point["reward"]) for point in points if point["kl"] < limit and point["reward"] > floor
    )
    area, height = 0.0, floor
    for kl, reward in front:
        if reward > height:
            area += (limit - kl) * (reward - height)
            height = reward
    return area


def best_at(points: Sequence[Point], kl: float) -> Point | None:
    """The point with the highest reward among those with KL <= `kl` nats; None when there is none."""
    within = [point for point in points if point["kl"] <= kl]
    return max(within, key=lambda point: point["reward"], default=None)


# --- what is measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A point to measure: a policy directory, or a place on the line where `source` is None."""

    name: str
    kind: str  # base (what the SFT policy was made from), sft, policy, slerp, liti or line
    source: Path | None
    iteration: int | None = None
    eta: float | None = None
    title: str = ""  # of what comes before RL: base, SFT, distilled

    @property
    def labels(self) -> dict[str, Any]:
        titled = {"title": self.title} if self.title else {}
        return {"name": self.name, "kind": self.kind, **titled, "iteration": self.iteration, "eta": self.eta}


def plan_candidates(config: ParetoConfig) -> list[Candidate]:
    """Every point of the front in the order of measuring. Raises UsageError for an incomplete line."""
    if config.init is not None and config.merged is None:
        raise UsageError("--init is given and --merged is not", "give --merged, where the line ends")
    if any(not 0 <= eta <= 1 for eta in config.etas):
        raise UsageError(f"--etas {' '.join(map(str, config.etas))}: not all in 0 .. 1", "the line goes from 0 to 1")
    paths = [path for path in config.policies if path.resolve() != config.sft.resolve()]
    candidates = [Candidate("SFT", "sft", config.sft, title=title_of(config.sft, "SFT"))]
    before = ancestors(config.sft)
    for path, name in zip(paths, short_names(paths), strict=True):
        kind = kind_of(path, before)
        title = title_of(path, "base") if kind == "base" else ""
        candidates.append(Candidate(name, kind, path, iteration_of(path), title=title))
    if config.merged is not None:
        ends = {0.0: config.init or config.sft, 1.0: config.merged}
        iteration = iteration_of(config.merged)
        candidates += [
            Candidate(f"eta {eta:g}", "line", ends.get(eta), iteration, eta) for eta in sorted(set(config.etas))
        ]
    return candidates


def short_names(paths: Sequence[Path]) -> list[str]:
    """Directory names, with as many parent folders in front as it takes to tell all apart (at most three)."""
    for depth in (1, 2, 3):
        names = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def iteration_of(path: Path) -> int | None:
    """The number in the `iteration-<i>` folder that holds a policy of a WARP run."""
    found = re.search(r"iteration-(\d+)(?:/|$)", path.resolve().as_posix())
    return int(found[1]) if found else None


def title_of(path: Path, otherwise: str) -> str:
    """What a policy before RL is called: by the command that made it."""
    command = (read_manifest(path) or {}).get("command")
    return {"sft": "SFT", "distill": "distilled"}.get(str(command), otherwise)


def ancestors(path: Path) -> set[str]:
    """Digests of the weights of every model that this one was made from, as far as directories are still there."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        directory = waiting.pop()
        for parent in (read_manifest(directory) or {}).get("parents", []):
            if parent.get("role") == "model" and parent["weights"] not in found:
                found.add(parent["weights"])
                waiting += [directory / parent["path"]] if "path" in parent else []
    return found


def kind_of(path: Path, before: Collection[str]) -> str:
    """What a policy directory is: slerp or liti by its manifest, base when it is among `before`, else policy."""
    manifest = read_manifest(path) or {}
    described = f"{manifest.get('command', '')} {(manifest.get('config') or {}).get('method', '')}"
    for kind in ("slerp", "liti"):
        if kind in described:
            return kind
    return "base" if digest_weights(path) in before else "policy"


def trajectory(path: Path, name: str) -> list[dict[str, Any]]:
    """What an RL run measured on the way: the `"kind": "eval"` lines of its metrics.jsonl, as points."""
    file = path / "metrics.jsonl"
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    labels = {"kind": "trajectory", "iteration": iteration_of(path), "eta": None, "run": name, "on_front": False}
    return [
        {**labels, "name": f"{name} step {row['step']}"}
        | {key: row[key] for key in ("step", "reward", "reward_se", "kl", "kl_se", "length") if key in row}
        for row in rows
        if row.get("kind") == "eval" and "reward" in row and "kl" in row
    ]


# --- measuring ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def interpolate_(model: torch.nn.Module, init: Mapping[str, Any], merged: Mapping[str, Any], eta: float) -> None:
    """Set every parameter to (1 - eta) * init + eta * merged, in fp32, cast back once. A tied tensor is one parameter.

    init, merged: tensors by parameter name, as `dict(model.named_parameters())` gives them.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.lerp(init[name].float(), merged[name].float(), eta))


class Bench:
    """Holds what every measurement shares, and the models that a line needs, loaded once."""

    def __init__(self, config: ParetoConfig, progress: Progress) -> None:
        self.config = config
        self.progress = progress
        self.rows: list[Prompt] = read_prompts(config.prompts, config.limit)
        self.reference, tokenizer = load_policy(config.sft)
        self.chat = ChatFormat(tokenizer, self.reference.generation_config)
        self.scores: list[Score] = scores_of(config, self.chat)
        self.settings: Settings = settings_of(config)
        self._line: tuple[Any, dict[str, Any], dict[str, Any]] | None = None

    def measure(self, candidate: Candidate) -> dict[str, Any]:
        """`{"point": flat columns, "samples": rows}` of one candidate."""
        measured = measure(
            self._model(candidate),
            self.reference,
            self.chat,
            self.rows,
            self.scores,
            self.settings,
            self.progress,
            candidate.name,
        )
        samples = [{"index": i, **row} for i, row in enumerate(measured.samples)]
        return {"point": {**measured.columns(), "n": measured.n}, "samples": samples}

    def _model(self, candidate: Candidate) -> Any:
        if candidate.source is None:
            model, init, merged = self._line_models()
            interpolate_(model, init, merged, float(candidate.eta or 0.0))
            return model
        return self._load(candidate.source)

    def _load(self, path: Path) -> Any:
        if path.resolve() == self.config.sft.resolve():
            return self.reference
        model, _ = load_policy(path)
        check_same_vocabulary(model, self.reference, str(path), str(self.config.sft))
        return model

    def _line_models(self) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """(a model to write into, init, merged): the SFT policy serves as init without a copy."""
        if self._line is None:
            init = dict(self._load(self.config.init or self.config.sft).named_parameters())
            model, _ = load_policy(Path(str(self.config.merged)))
            merged = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            shapes = [{name: tuple(tensor.shape) for name, tensor in end.items()} for end in (init, merged)]
            if shapes[0] != shapes[1]:
                raise InputError("--init and --merged have different tensors", "give two policies of one architecture")
            self._line = model, init, merged
        return self._line


def measure_all(
    candidates: Sequence[Candidate], config: ParetoConfig, run: Run, progress: Progress
) -> list[dict[str, Any]]:
    """One `{"point", "samples"}` per candidate. Done ones are kept in the run's checkpoints, for a resume."""
    bench: Bench | None = None
    done: dict[Path, dict[str, Any]] = {}
    results = []
    run.checkpoints.mkdir(exist_ok=True)
    with progress.task("front", total=len(candidates), unit="policies") as task:
        for i, candidate in enumerate(candidates):
            file = run.checkpoints / f"point-{i:03d}.json"
            key = candidate.source.resolve() if candidate.source else None
            if key is not None and key in done:
                result = done[key]  # the ends of the line are policies that may have been measured
            elif file.is_file():
                result = json.loads(file.read_text(encoding="utf-8"))
            else:
                bench = bench or Bench(config, progress)
                result = bench.measure(candidate)
                write_json(file, result)
            if key is not None:
                done[key] = result
            results.append({"point": candidate.labels | result["point"], "samples": result["samples"]})
            task.advance(1, reward=result["point"]["reward"], kl=result["point"]["kl"])
    return results


# --- the command ----------------------------------------------------------------------------------------------------


def run_pareto(config: ParetoConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Measure every policy and the line, and write front.json, front.csv, front.png, front.svg and samples.jsonl.

    The hypervolume's reference point is (the largest KL measured, the reward of the SFT policy): the area gained over
    the SFT policy. Summary: number of points, hypervolume, best point.
    """
    quiet_libraries()
    candidates = plan_candidates(config)
    parents = [Parent("sft", config.sft), *(Parent("policies", path) for path in config.policies)]
    parents += [
        Parent(role, path) for role, path in (("init", config.init), ("merged", config.merged)) if path is not None
    ]
    parents += reward_parents(config)
    with open_run("pareto", config, options, parents=parents, data=data_files(config.prompts)) as run:
        results = measure_all(candidates, config, run, progress)
        front = build_front([result["point"] for result in results], trajectories(candidates), config)
        write_front(run.path, front, [(c, r["samples"]) for c, r in zip(candidates, results, strict=True)])
        best = max(front["points"], key=lambda point: (point["on_front"], point["reward"]))
        return run.finish(
            {
                "points": len(results),
                "hypervolume": front["hypervolume"],
                "best": {key: best[key] for key in ("name", "reward", "reward_se", "kl", "kl_se")},
            }
        )


def trajectories(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """The RL trajectories of all measured policies."""
    runs = [candidate for candidate in candidates if candidate.kind == "policy" and candidate.source]
    return [point for candidate in runs for point in trajectory(Path(str(candidate.source)), candidate.name)]


def build_front(
    points: Sequence[dict[str, Any]], extra: Sequence[dict[str, Any]], config: ParetoConfig
) -> dict[str, Any]:
    """The content of front.json."""
    sft = next(point for point in points if point["kind"] == "sft")
    reference = (max(point["kl"] for point in points), sft["reward"])
    marked = [point | {"on_front": flag} for point, flag in zip(points, pareto_front(points), strict=True)]
    return {
        "points": [*marked, *extra],
        "hypervolume": hypervolume(points, reference),
        "reference": {"kl": reference[0], "reward": reference[1]},
        "settings": config.model_dump(
            mode="json",
            include={"temperature", "max_new_tokens", "n", "limit", "seed", "judge_fn", *RewardFields.model_fields},
        ),
    }


def write_front(directory: Path, front: Mapping[str, Any], samples: Sequence[tuple[Candidate, list[Any]]]) -> None:
    """front.json, front.csv, front.png, front.svg and samples.jsonl."""
    from gemma2.posttrain.evaluation.reporting.figures import front_figure, write_figure

    write_json(directory / "front.json", front)
    columns = list(dict.fromkeys(key for point in front["points"] for key in point))
    with (directory / "front.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(front["points"])
    lines = [json.dumps(c.labels | row, ensure_ascii=False) for c, rows in samples for row in rows]
    (directory / "samples.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    figure = front_figure(front["points"])
    for name in ("front.png", "front.svg"):
        write_figure(figure, directory / name)
