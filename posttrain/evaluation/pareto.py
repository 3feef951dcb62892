"""The KL-reward front: every policy, and the line from init to merge, measured alike.

    line(eta) = (1 - eta) * theta_init + eta * theta_merged,  eta in [0, 1]     (WARP 2406.16768, Algorithm 1)

The paper's front starts at the SFT policy and ends at the last SLERP, before LITI. Points of the line are formed in
memory, in fp32, and never written. All policies answer the same held-out prompts with common random numbers.

The front's hypervolume is the area gained over the SFT policy; `areas.py` says what bounds it. With `fronts` the points
of earlier fronts are taken over, and the gain is the area that the points of this one add to theirs, bounded alike.

The trajectory of an RL run is what it measured on the way, on the same prompts and by the same procedure
(`trajectory.py`); evaluations that differ in anything are left out. Their weights are not on disk, so they are neither
candidates for the front nor part of the hypervolume; every other point is compared with them, paired over the prompts
(`comparison.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch

from gemma2.core.json_files import JsonMapping, JsonObject, load_json, write_json
from gemma2.core.progress import SILENT, Progress
from gemma2.core.ranks import ALONE, Ranks
from gemma2.core.rounding import SAME_AS_START, differ, still_points
from gemma2.posttrain.attention.choice import settle_attention
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.models.loading import default_device, load_policy, quiet_libraries
from gemma2.posttrain.models.precision import frozen_dtype
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.reports.plots.values import label_of
from gemma2.posttrain.rewards.functions import Score
from gemma2.posttrain.runs.run_directory import Parent, Run, RunOptions, RunResult, check_parents, open_run
from gemma2.posttrain.runs.together import together
from gemma2.posttrain.schemas import ParetoConfig

from .areas import Reference, area_columns, gain_columns, given_reference, note_other_references, reference_of
from .bootstrap import Answers, chosen_elsewhere
from .candidates import Candidate, assign_names, plan_candidates
from .carried import measured_with, previous_flat, take_over
from .comparison import is_gain, with_gains
from .evaluate import OWN_METRICS, MeasureSettings, check_same_vocabulary, measure, scores_of, settings_of
from .front import best_at, best_table, hypervolume, pareto_front, round_limits
from .front_files import KEPT, FrontEntry, answers_of, places, read_front, step_name, values_of, write_front
from .same_family import check_policies
from .trajectory import procedure, trajectory

__all__ = ["best_at", "hypervolume", "interpolate_", "pareto_front", "run_pareto"]

FIGURES = ("reward", "reward_se", "reward_low", "reward_high", "kl", "kl_se", "kl_low", "kl_high")


# --- measuring ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def interpolate_(model: CausalLM | torch.nn.Module, init: JsonMapping, merged: JsonMapping, eta: float) -> None:
    """Set every parameter to (1 - eta) * init + eta * merged, in fp32, cast back once. A tied tensor is one parameter.

    init, merged: tensors by parameter name, as `dict(model.named_parameters())` gives them.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.lerp(init[name].float(), merged[name].float(), eta))


class Bench:
    """Holds what every measurement shares, and the models that a line needs, loaded once."""

    def __init__(self, config: ParetoConfig, progress: Progress, ranks: Ranks = ALONE) -> None:
        self.config = config
        self.progress = progress
        reading = Reading(config)
        rows = reading.prompts(config.prompts, config.limit)
        self.dtype = frozen_dtype(config.dtype)
        self.reference, tokenizer = load_policy(config.sft, self.dtype, attention=config.attention)
        self.chat = ChatFormat(tokenizer, self.reference.generation_config)
        self.rows: list[Prompt] = reading.renderable(rows, self.chat)
        reading.report(progress)
        self.scores: list[Score] = scores_of(config, self.chat)
        self.settings: MeasureSettings = settings_of(config, ranks)
        self._line: tuple[CausalLM, JsonObject, JsonObject] | None = None

    def measure(self, candidate: Candidate, name: str) -> JsonObject:
        """`{"figures": flat columns, "samples": rows, "values": per prompt}` of one candidate."""
        measured = measure(
            self._model(candidate),
            self.reference,
            self.chat,
            self.rows,
            self.scores,
            self.settings,
            self.progress,
            name,
        )
        return {
            "figures": {**measured.columns(), "n": measured.n},
            "samples": [{"index": i, **row} for i, row in enumerate(measured.samples)],
            "values": {
                name: [_finite(value) for value in measured.per_prompt[name]]
                for name in (*KEPT, *(name for name in measured.per_prompt if name not in {*KEPT, *OWN_METRICS}))
            },
        }

    def _model(self, candidate: Candidate) -> CausalLM:
        if candidate.whole is None:
            model, init, merged = self._line_models()
            interpolate_(model, init, merged, float(candidate.eta or 0.0))
            return model
        return self._load(candidate.whole.path)

    def _load(self, path: Path) -> CausalLM:
        if path.resolve() == self.config.sft.resolve():
            result: CausalLM = self.reference
            return result
        model, _ = load_policy(path, self.dtype, attention=self.config.attention)
        check_same_vocabulary(model, self.reference, str(path), str(self.config.sft))
        found: CausalLM = model
        return found

    def _line_models(self) -> tuple[CausalLM, JsonObject, JsonObject]:
        """(a model to write into, init, merged): the SFT policy serves as init without a copy.

        In half precision the ends stay in fp32 on the host: a point is rounded once, as a merge would be.
        """
        if self._line is None:
            start, end = self.config.init or self.config.sft, Path(str(self.config.merged))
            model, _ = load_policy(end, self.dtype, attention=self.config.attention)
            init: JsonObject
            merged: JsonObject
            if self.dtype == torch.float32:
                init = dict(self._load(start).named_parameters())
                merged = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            else:
                host = torch.device("cpu")
                init, merged = ({**load_policy(path, device=host)[0].state_dict()} for path in (start, end))
            self._line = model, init, merged
        return self._line


def _finite(value: float) -> float | None:
    return None if value != value else value  # NaN is a score without an opinion


def measure_all(
    candidates: Sequence[Candidate], known: Sequence[FrontEntry], config: ParetoConfig, run: Run, progress: Progress
) -> list[FrontEntry]:
    """One entry per candidate. Done ones are kept in the run's checkpoints, for a resume.

    A model that is measured already, here or in `known`, is not measured again. The processes of a job share the
    prompts of each point; each gets all entries.
    """
    ranks = run.ranks
    bench: Bench | None = None
    run.origin["attention"] = settle_attention(
        config.attention,
        [config.sft, *config.policies, *config.reward],
        progress,
        dtype=frozen_dtype(config.dtype),
        device=default_device(),
    )
    done = {entry.candidate.whole.digest: _record(entry) for entry in known if entry.candidate.whole}
    entries = []
    if ranks.is_main:
        run.checkpoints.mkdir(exist_ok=True)
    names = assign_names([*(entry.candidate for entry in known), *candidates])[len(known) :]
    alike = procedure(config, config.sft, config.prompts, config.n, config.seed, frozen_dtype(config.dtype))
    with progress.task("front", total=len(candidates), unit="policies") as task:
        for i, (candidate, name) in enumerate(zip(candidates, names, strict=True)):
            file = run.checkpoints / f"point-{i:03d}.json"
            digest = candidate.whole.digest if candidate.whole else None
            if digest is not None and digest in done:
                record = done[digest]  # the ends of the line are policies that may have been measured
            elif (kept := ranks.on_main(lambda: load_json(file) if file.is_file() else None)) is not None:  # noqa: B023
                record = kept
            else:
                bench = bench or Bench(config, progress, ranks)
                record = bench.measure(candidate, name)
                if ranks.is_main:
                    write_json(file, record)
            if digest is not None:
                done[digest] = record
            path = []
            if candidate.kind == "policy":
                count = len(record["values"]["kl"])
                path = trajectory(candidate.models[0].path, candidate.iteration, alike, count, progress)
            entries.append(FrontEntry(candidate, record["figures"], record["samples"], record["values"], path))
            task.advance(1, reward=record["figures"]["reward"], kl=record["figures"]["kl"])
    return entries


def _record(entry: FrontEntry) -> JsonObject:
    return {"figures": entry.figures, "samples": entry.samples, "values": entry.values}


# --- the command ----------------------------------------------------------------------------------------------------


def run_pareto(config: ParetoConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Measure every policy and the line that no earlier front has measured, and write the files of the front.

    Summary: number of points, hypervolume with its interval and reference point, best point, best within KL limits;
    `flat` (fronts in a row that gained nothing), and with `fronts` the gain with its interval and whether it is one.
    """
    quiet_libraries()
    with together(config) as ranks:
        return _shared(config, options, progress if ranks.is_main else SILENT, ranks)


def _shared(config: ParetoConfig, options: RunOptions, progress: Progress, ranks: Ranks) -> RunResult:
    plan = ranks.on_main(lambda: _planned(config, progress))
    with open_run("pareto", config, options, ranks=ranks) as run:
        taken = {entry.candidate.key for entry in plan.carried}
        fresh = [candidate for candidate in plan.candidates if candidate.key not in taken]
        entries = in_order([*plan.carried, *measure_all(fresh, plan.carried, config, run, progress)])
        return run.finish(ranks.on_main(lambda: _written(config, options.out, run.path, plan, entries, progress)))


@dataclass(frozen=True)
class FrontPlan:
    """A front before anything is measured. alike: what it is measured with; earlier: fronts by path."""

    candidates: list[Candidate]
    carried: list[FrontEntry]
    alike: JsonObject
    earlier: dict[Path, JsonObject]
    given: Reference | None


def _planned(config: ParetoConfig, progress: Progress) -> FrontPlan:
    candidates = plan_candidates(config, progress)
    parents = [Parent("sft", config.sft), *(Parent("policies", path) for path in config.policies)]
    parents += [
        Parent(role, path) for role, path in (("init", config.init), ("merged", config.merged)) if path is not None
    ]
    parents += [Parent("reward", path) for path in config.reward]
    check_parents(parents)
    check_policies(parents)
    alike = measured_with(config, frozen_dtype(config.dtype))
    earlier = {path: read_front(path, "--fronts") for path in config.fronts}
    given = given_reference(config.reference, earlier)
    return FrontPlan(candidates, take_over(earlier, alike), alike, earlier, given)


def _written(
    config: ParetoConfig,
    out: Path,
    folder: Path,
    plan: FrontPlan,
    entries: Sequence[FrontEntry],
    progress: Progress,
) -> JsonObject:
    """Write the files of the front; its summary."""
    names = assign_names([entry.candidate for entry in entries])
    front = plan.alike | build_front(entries, names, out, config, plan.given)
    if config.fronts:
        taken = {entry.candidate.key for entry in plan.carried}
        front |= gain_of(entries, front, [entry.candidate.key in taken for entry in entries], config)
        note_other_references(Reference(**front["reference"], source=""), plan.earlier, progress)
    warn_of_rounding(front["points"], progress)
    write_front(folder, front, entries, names)
    return summarise(front)


def in_order(entries: Sequence[FrontEntry]) -> list[FrontEntry]:
    """The SFT policy first, from this or an earlier front; then the others in their order."""
    return sorted(entries, key=lambda entry: entry.candidate.kind != "sft")


def build_front(
    entries: Sequence[FrontEntry],
    names: Sequence[str],
    out: Path,
    config: ParetoConfig,
    given: Reference | None = None,
) -> JsonObject:
    """The content of front.json, without what it was measured with and what it gains over others.

    given: the reference point, if the points do not decide it.
    """
    named = list(zip(names, entries, strict=True))
    points = [
        {"name": name, **entry.candidate.labels, **places(entry.candidate, out), **entry.figures}
        for name, entry in named
    ]
    drawn = [
        {"name": step_name(name, point), "run": name, **{key: point[key] for key in point if key != "values"}}
        for name, entry in named
        for point in entry.trajectory
    ]
    marked = [point | {"on_front": flag} for point, flag in zip(points, pareto_front(points), strict=True)]
    reference = given or reference_of(points)
    moved, answers = differ(points), answers_of(entries)
    limits = config.kl_limits or round_limits([point for point in points if point["kind"] != "base"])
    return {
        "points": with_gains([labelled(point) for point in (*marked, *drawn)], values_of(entries, names)),
        "differs": moved,
        **reference.columns,
        **area_columns(points, answers, reference, moved),
        "best_at": best_rows(points, limits, answers) if moved else [],
        "flat": 0,
    }


def best_rows(points: Sequence[JsonMapping], limits: Sequence[float], answers: Answers) -> list[JsonObject]:
    """The best point within each limit, with its reward on prompts that did not choose it, where they can say."""
    rows = best_table(points, limits)
    elsewhere = chosen_elsewhere(answers, [row["limit"] for row in rows]) if answers.kl.shape[1] > 1 else []
    return [row | {"reward_elsewhere": value} for row, value in zip_longest(rows, elsewhere)]


def labelled(point: JsonMapping) -> JsonObject:
    """The point with its label after its name."""
    return {"name": point["name"], "label": label_of(point), **point}


def gain_of(
    entries: Sequence[FrontEntry], front: JsonMapping, taken: Sequence[bool], config: ParetoConfig
) -> JsonObject:
    """The area that this front's own points add to that of those taken over, whether it is more than noise, and `flat`.

    taken: per entry, whether it is one of an earlier front.
    """
    reference = Reference(front["reference"]["kl"], front["reference"]["reward"], front["reference_from"])
    points = front["points"][: len(entries)]
    found = gain_columns(points, answers_of(entries), reference, front["differs"], taken)
    return {**found, "flat": 0 if found["improved"] else 1 + previous_flat(config.fronts)}


def warn_of_rounding(points: Sequence[JsonMapping], progress: Progress) -> None:
    """Say which policies are the start but for rounding: their rewards differ by chance."""
    still = still_points(points)
    if not differ(points):
        largest = max(abs(point["kl"]) for point in still)
        progress.warn(
            f"{SAME_AS_START}: the largest KL is {largest:.1g} nats per sequence, so there is no front to draw; "
            "train for more steps, or with a larger --learning-rate"
        )
        return
    for point in still:
        if point["kind"] in ("policy", "slerp", "liti"):
            progress.warn(f"{point['name']} does not differ from the start: its KL is {abs(point['kl']):.1g} nats")


def _best_of(point: JsonMapping) -> JsonObject:
    gains = {key: value for key, value in point.items() if is_gain(key)}
    return {key: point[key] for key in ("name", "label", *FIGURES)} | gains


def summarise(front: JsonMapping) -> JsonObject:
    """The figures for the manifest and the screen; without a best point if none differs from the start."""
    measured = [point for point in front["points"] if point["kind"] != "trajectory"]
    best = max(measured, key=lambda point: (point["on_front"], point["reward"]))
    areas = {key: value for key, value in front.items() if key.startswith("hypervolume") or key == "improved"}
    return {
        "points": len(measured),
        "differs": front["differs"],
        **areas,
        "reference": front["reference"],
        "reference_from": front["reference_from"],
        "flat": front["flat"],
        "best": _best_of(best) if front["differs"] else None,
        "best_at": front["best_at"],
    }
