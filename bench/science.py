"""WARP's findings in miniature: one pipeline over several seeds on the embedded models, and a table with the paper's.

    python bench/science.py [--seeds 0 1 2] [--width 96] [--jobs 2] [--out runs/science]

The paper is WARP, arXiv 2406.16768. The seeds are fixed beforehand; a seed draws everything: models, the styles that
are wanted, teacher data, SFT, reward model, RL. The chain up to the reward model is that of configs/quickstart.yaml;
RL has the settings of CHOSEN, calibrated on seed 99 without computing a finding (docs/log.md, 2026-11-30). RL starts
from the distilled policy, to which KL is measured. At another width every learning rate falls as the width grows.

Of every seed, after the chain of the recipe up to the reward model:

    iteration-1/policy-1 .. 4           RL with the EMA anchor, each from the distilled policy with another seed
    iteration-1/slerp, linear, slerp-4  SLERP and plain average of the first two, SLERP of all four
    iteration-1/init                    LITI from the distilled policy towards slerp
    iteration-2/policy-1, 2, slerp      RL from that init, and their merge
    fixed/policy-1, 2                   the first two of iteration 1 again, with the distilled policy as their anchor
    long/policy                         one run of as many steps as the four of both iterations
    measured/...                        `gemma2 pareto`: what is compared, and five eta lines, on the same held-out
                                        prompts with common random numbers

The trajectory of a run is what it measured of itself 19 times on the way, on the prompts and the random numbers of the
fronts. M = 1 is policy-1, M = 2 slerp, M = 4 slerp-4, each with the line from the distilled policy.

Findings, errors and the rule by which a claim holds are in findings.py, the table that came out is in docs/warp.md;
a second table, by the judge that RL never sees, has the rows of judged.py. It
is no test: the exit code is 0 whatever holds. A run that was interrupted goes on; a finished one is only read.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from findings import (
    FINDINGS,
    FOUR,
    LERP,
    ONE,
    RUNS,
    SECOND,
    START,
    STEPS,
    TWO,
    Finding,
    Floats,
    Seed,
    left_out,
    over_seeds,
    path,
    steps_of,
    stop,
    stops_of,
)
from judged import JUDGED

from gemma2.cli.terminal.console import Console
from gemma2.cli.tools.pipeline import Announcer
from gemma2.configs import recipes
from gemma2.merging.inspect.difference import Difference, diff_models
from gemma2.posttrain.evaluation.front_files import FrontEntry, read_entries, read_front
from gemma2.posttrain.pipelines.compile import Pipeline, compile_pipeline, read_pipeline
from gemma2.posttrain.pipelines.executors.processes import LocalExecutor
from gemma2.posttrain.pipelines.references import lookup, replaced
from gemma2.posttrain.pipelines.run import run_pipeline
from gemma2.posttrain.pipelines.warp_stages import warp_stages
from gemma2.posttrain.reports.plots.figures import HUES, INK, new_figure, styled, write_figure
from gemma2.posttrain.schemas import PipelineFile, Resources, StageFile, WarpConfig
from gemma2.posttrain.schemas.config import validated

SEEDS = (0, 1, 2)
CHAIN = ("models", "data", "clean", "sft", "distilled", "pairs", "reward")  # of the recipe
USED = ("policy-1", "policy-2", "policy-3", "policy-4", "slerp", "init")  # of Algorithm 1's stages
CHOSEN = {"steps": STEPS, "learning_rate": 3e-4, "beta": 0.5, "mu": 20 / STEPS, "eta": 0.5}
WIDTH = 96  # of the quickstart's student


# --- the pipeline ---------------------------------------------------------------------------------------------------


def pipeline_of(seeds: Sequence[int], root: Path, width: int = WIDTH) -> Pipeline:
    """The stages of all seeds, one thread each."""
    stages = {f"seed-{seed}/{name}": stage for seed in seeds for name, stage in stages_of(seed, width).items()}
    return compile_pipeline(PipelineFile(stages=stages, resources=Resources(cpus=1)), root)


def stages_of(seed: int, width: int = WIDTH) -> dict[str, StageFile]:
    """The stages of one seed, by the names above; their references have the seed's folder in front."""
    prefix = f"seed-{seed}/"
    recipe = read_pipeline(recipes()["quickstart"], [f"vars.seed={seed}"])

    def own(reference: str) -> Any:
        if reference.startswith("vars."):
            return lookup(recipe.vars, reference.split(".")[1:], reference)
        return f"${{{prefix}{reference}}}"

    chain = {name: recipe.stages[name] for name in CHAIN}
    found = {name: _with(stage, **replaced(stage.options, own)) for name, stage in chain.items()}
    found["models"] = _with(found["models"], width=width)
    found |= _trained({**replaced(recipe.stages["warp"].options, own), **CHOSEN, "compare": []}, prefix)
    return {name: _narrower(stage, WIDTH / width) for name, stage in found.items()}


def _narrower(stage: StageFile, share: float) -> StageFile:
    """With the learning rate that suits another width: Adam's falls as the width grows."""
    rate = stage.options.get("learning_rate")
    return stage if rate is None or share == 1 else _with(stage, learning_rate=float(rate) * share)


def _trained(warp: Mapping[str, Any], prefix: str) -> dict[str, StageFile]:
    """RL, merges and measurements, of the options of a WARP run."""
    iterated = warp_stages(validated(WarpConfig, {**warp, "policies": 2, "iterations": 2}), prefix)
    four = warp_stages(validated(WarpConfig, {**warp, "policies": 4, "iterations": 1}), prefix)
    found = {name: stage for name, stage in {**four, **iterated}.items() if name.endswith(USED)}
    del found["iteration-2/init"]
    found[FOUR] = four[TWO]
    found[LERP] = StageFile(command="merge linear", options={"models": found[TWO].options["models"]})
    for m in (1, 2):
        moving = found[f"iteration-1/policy-{m}"]
        found[f"fixed/policy-{m}"] = _with(_without(moving, "mu"), anchor="sft")  # which refuses what it ignores
    first = found[ONE].options
    found[RUNS["long"]] = _with(found[ONE], steps=steps_of(RUNS["long"]), seed=first["seed"] + 50)
    rare = {"eval_every": 10_000, "eval_prompts": 8, "save_every": 10_000}
    for name, stage in found.items():
        if name in RUNS.values():
            found[name] = _with(stage, eval_every=stops_of(name)[0], save_every=10_000)
        elif stage.command == "rlhf":
            found[name] = _with(stage, **rare)
    return found | dict(_measured(iterated["iteration-1/front"], found, prefix))


def _with(stage: StageFile, **options: Any) -> StageFile:
    return stage.model_copy(update={"options": {**stage.options, **options}})


def _without(stage: StageFile, name: str) -> StageFile:
    return stage.model_copy(update={"options": {key: value for key, value in stage.options.items() if key != name}})


def _measured(front: StageFile, stages: Mapping[str, StageFile], prefix: str) -> Iterator[tuple[str, StageFile]]:
    """A front for each line, and every other policy in one of them, so that they take about as long."""
    others = {
        ONE: ["iteration-1/policy-2"],
        TWO: ["iteration-1/policy-3"],
        LERP: ["iteration-1/policy-4"],
        FOUR: ["fixed/policy-1", "fixed/policy-2"],
        SECOND: [RUNS["long"]],
    }
    for end, more in others.items():
        policies = [f"${{{prefix}{name}.out}}" for name in (end, *more)]
        yield f"measured/{end.replace('/', '-')}", _with(front, merged=policies[0], policies=policies)


# --- what it measured -----------------------------------------------------------------------------------------------


def read_seed(folder: Path) -> Seed:
    """The rewards of every policy, of every place on a line and of the stops of every run, and the geometry."""
    kl: dict[object, Floats] = {}
    reward: dict[object, Floats] = {}
    for place, entry in _measurements(folder):
        kl[place], reward[place] = (np.asarray(entry.values[name], dtype=np.float64) for name in ("kl", "reward"))
        for point in entry.trajectory:
            measured = [np.asarray(point["values"][name], dtype=np.float64) for name in ("kl", "reward")]
            kl[stop(str(place), point["step"])], reward[stop(str(place), point["step"])] = measured
    for run in RUNS.values():
        missing = [step for step in stops_of(run) if stop(run, step) not in kl]
        if missing:
            raise SystemExit(f"{folder / run} has no evaluation that is made as the fronts are at step {missing[0]}")
    return _seed(kl, reward, geometry_of(folder))


def read_judged(folder: Path) -> Seed:
    """The judge's marks of every policy and of every place on a line, in place of rewards."""
    kl: dict[object, Floats] = {}
    marks: dict[object, Floats] = {}
    for place, entry in _measurements(folder):
        kl[place], marks[place] = (np.asarray(entry.values[name], dtype=np.float64) for name in ("kl", "judge"))
    return _seed(kl, marks, {})


def _seed(kl: Mapping[object, Floats], reward: Mapping[object, Floats], geometry: Mapping[str, float]) -> Seed:
    means = [left_out(np.stack(list(values.values()))) for values in (kl, reward)]
    return Seed({name: column for column, name in enumerate(kl)}, means[0], means[1], geometry)


def _measurements(folder: Path) -> Iterator[tuple[object, FrontEntry]]:
    """Every point of the fronts, by its policy or its place on a line."""
    for directory in sorted((folder / "measured").iterdir()):
        for entry in read_entries(directory, read_front(directory, "measured")):
            candidate = entry.candidate
            place = candidate.models[-1].path.relative_to(folder.resolve()).as_posix()
            yield (place, candidate.eta) if candidate.kind == "line" else place, entry


def geometry_of(folder: Path) -> dict[str, float]:
    """Angles in degrees of the pairs of iteration 1, and norms of the merges of the first two over theirs; in the
    blocks, where nothing else is said, as means over blocks and pairs."""
    pairs = [f"iteration-1/policy-{a} iteration-1/policy-{b}".split() for a, b in combinations(range(1, 5), 2)]
    groups = [group for a, b in pairs for group in _compared(folder, a, b)]
    mean_norm = _mean(group.task_norm_a for group in _blocks(_compared(folder, *pairs[0])))
    mean_norm = (mean_norm + _mean(group.task_norm_b for group in _blocks(_compared(folder, *pairs[0])))) / 2
    merges = _blocks(_compared(folder, TWO, LERP))
    return {
        "blocks": _mean(group.task_angle for group in _blocks(groups)),
        "embedding": _mean(group.task_angle for group in groups if "embed" in group.group),
        "norm": _mean(group.task_angle for group in groups if group.group == "norm"),
        "weights": max(group.angle or 0.0 for group in groups),
        "slerp": _mean(group.task_norm_a for group in merges) / mean_norm,
        "lerp": _mean(group.task_norm_b for group in merges) / mean_norm,
    }


def _compared(folder: Path, a: str, b: str) -> tuple[Difference, ...]:
    return diff_models(folder / a, folder / b, base=folder / START).groups


def _blocks(groups: Sequence[Difference]) -> list[Difference]:
    return [group for group in groups if group.group.startswith("layers.")]


def _mean(values: Iterator[float | None]) -> float:
    found = [value for value in values if value is not None]
    return sum(found) / len(found)


# --- the table ------------------------------------------------------------------------------------------------------


def table(sections: Mapping[str, Sequence[Finding]], seeds: Mapping[int, Seed]) -> str:
    """The findings as a Markdown table, a line in bold before each section."""
    head = ["finding", "the paper", "here, mean ± error", *(f"seed {seed}" for seed in seeds), "holds?"]
    lines = [_line(head), _line(["---"] * len(head))]
    for section, findings in sections.items():
        lines.append(_line([f"**{section}**", *[""] * (len(head) - 1)]))
        lines += [_row(finding, list(seeds.values())) for finding in findings]
    return "\n".join(lines)


def _row(finding: Finding, seeds: Sequence[Seed]) -> str:
    found = [finding.estimate(seed) for seed in seeds]
    mean, error = over_seeds(found)
    signed = finding.claim.sign != 0 and finding.claim.bound == 0
    cells = [_number(mean, error, signed), *(_number(one.value, one.se, signed) for one in found)]
    return _line([finding.name, finding.claim.words, *cells, finding.claim.verdict(found)])


def _number(value: float, error: float, signed: bool) -> str:
    """A number with its error; three decimals, one for angles."""
    digits = 1 if abs(value) >= 10 else 3
    text = f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")
    return f"{text} ± {error:.{digits}f}" if math.isfinite(error) else text


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


# --- the run --------------------------------------------------------------------------------------------------------


def draw(seeds: Mapping[int, Seed], place: Path) -> None:
    """A panel per seed: RL runs thin, eta lines thick. Without errors: those of a point are mostly common to all."""
    lines = {ONE: "line, M = 1", TWO: "line, M = 2", FOUR: "line, M = 4", SECOND: "line, iteration 2"}
    with styled():
        columns = min(3, len(seeds))
        rows = -(-len(seeds) // columns)
        figure, axes = new_figure(4.0 * columns, 4.2 * rows, rows, columns)
        for axis in axes[len(seeds) :]:
            axis.set_axis_off()
        for axis, (number, seed) in zip(axes, seeds.items(), strict=False):
            for run in RUNS:
                curve, fixed = path(seed, run), "fixed" in run
                axis.plot(
                    curve.kl[0],
                    curve.reward[0],
                    "--" if fixed else "-",
                    color=INK,
                    lw=0.9,
                    alpha=0.6,
                    marker=".",
                    ms=4,
                    label=f"RL, {'fixed' if fixed else 'EMA'} anchor" if "1" in run else None,
                )
            for (end, label), colour, marker in zip(lines.items(), HUES, "os^D", strict=False):
                curve = seed.line(end)
                axis.plot(curve.kl[0], curve.reward[0], color=colour, marker=marker, ms=5, lw=1.6, label=label)
            axis.set_title(f"seed {number}")
            axis.set_xlabel("KL to the distilled policy (nats per sequence)")
        axes[0].set_ylabel("reward on held-out prompts")
        axes[0].legend(frameon=False, fontsize=8.5, loc="lower right")
        for suffix in (".png", ".svg"):
            write_figure(figure, place.with_suffix(suffix))  # fmt: skip


def cpu_seconds() -> float | None:
    """CPU seconds of this process and of its children with those that they waited for; None where nothing tells."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    if not listed.exists():
        return None
    for child in listed.read_text(encoding="ascii").split():
        # After the name in brackets: state is field 3, utime, stime, cutime and cstime are fields 14 to 17.
        fields = Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def commit() -> str:
    """The commit of this checkout, with a plus where files differ from it; "unknown" without git."""
    root = Path(__file__).resolve().parent
    try:
        found, changed = (
            subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()
            for words in (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + ("+" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--width", type=int, default=WIDTH, help="hidden size of the student: 96, 192, 384")
    parser.add_argument("--jobs", type=int, default=2, help="stages at once, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/science"))
    parser.add_argument("--quiet", action="store_true", help="no line per stage on stderr")
    options = parser.parse_args()
    started = time.monotonic()
    pipeline = pipeline_of(options.seeds, options.out, options.width)
    announcer = Announcer(Console(quiet=options.quiet), len(pipeline.stages))
    result = run_pipeline(pipeline, LocalExecutor(options.jobs), observer=announcer)
    spent = cpu_seconds()
    folders = {seed: options.out / f"seed-{seed}" for seed in options.seeds}
    seeds = {seed: read_seed(folder) for seed, folder in folders.items()}
    text = table(FINDINGS, seeds)
    text += f"\n\n{table(JUDGED, {seed: read_judged(folder) for seed, folder in folders.items()})}"
    draw(seeds, options.out / "science")
    told = "" if spent is None else f", {spent:.0f} CPU seconds"
    cost = f"{len(result.ran)} of {len(pipeline.stages)} stages run: {time.monotonic() - started:.0f} s{told}"
    head = f"Commit {commit()}, seeds {', '.join(map(str, seeds))}, width {options.width}; {cost}"
    (options.out / "science.md").write_text(f"{head}\n\n{text}\n", encoding="utf-8")
    print(f"{head}\n\n{text}")


if __name__ == "__main__":
    sys.exit(main())
