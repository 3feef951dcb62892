"""WARP (arXiv 2406.16768), Algorithm 1: its stages (`warp_stages.py`) run as a separate pipeline.

    OUT/iteration-i/{policy-m, slerp, init, front}    OUT/front    OUT/model    OUT/report.html

Every policy, slerp and init stays on disk. OUT appears when all is done; until then `.OUT.partial` holds the finished
part. `resume` continues at the interrupted stage, and inside an RL run at its last checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from gemma2.core.errors import Gemma2Error, UsageError
from gemma2.core.json_files import JsonObject, load_json
from gemma2.core.progress import SILENT, Progress
from gemma2.core.rounding import SAME_AS_START, differ
from gemma2.posttrain.checks.merging_gain import measured_angle
from gemma2.posttrain.launch.agreement import divides
from gemma2.posttrain.planning.estimates import Sources
from gemma2.posttrain.planning.memory import SPARE, Lengths, memory_of, place_for
from gemma2.posttrain.planning.named_models import NOTHING, sizes_of
from gemma2.posttrain.reports.headline import SINGLE, rows_of
from gemma2.posttrain.rewards.functions import load_function
from gemma2.posttrain.runs.machine import Gpu, visible_devices
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult, open_run
from gemma2.posttrain.schemas import PipelineFile, RlhfConfig, WarpConfig
from gemma2.posttrain.schemas.config import validated

from .check import check_pipeline
from .compile import Pipeline, compile_pipeline
from .run import Watcher, executor_of, run_stages
from .scheduler import Observer
from .warp_stages import FIRST_MERGE, warp_stages

__all__ = ["run_warp", "warp_pipeline"]


def warp_pipeline(config: WarpConfig, root: Path) -> Pipeline:
    """The stages of a WARP run with outputs below `root`."""
    return replace(compile_pipeline(PipelineFile(stages=warp_stages(config)), root), warps={"": config})


def run_warp(
    config: WarpConfig, options: RunOptions, progress: Progress = SILENT, observer: Observer | None = None
) -> RunResult:
    """Run Algorithm 1 and evaluate its front; `OUT/model` is the chosen point.

    Raises UsageError or InputError before the first stage for what can be known then, StageFailed for a stage.
    """
    for option, names in (("--reward-fn", config.reward_fn), ("--judge-fn", filter(None, [config.judge_fn]))):
        for name in names:
            load_function(name, option)  # a typo must show before an hour of RL, not after it
    _check_gpus(config)
    with open_run("warp", config, options) as run:
        gpus = visible_devices()[: config.gpus] if config.executor == "local" else ()
        pipeline = warp_pipeline(with_gpus(config, gpus, progress), run.path)
        keys = tuple(gpu.key for gpu in gpus) if config.gpus is not None else None
        _say_how_many_at_once(config, pipeline, len(gpus), progress)
        executor = executor_of(config.executor, config.jobs, slurm=config.slurm, gpus=keys)
        plan = check_pipeline(pipeline, contents=False)  # the stages read what the command reads
        run_stages(pipeline, plan, executor, observer=observer or Watcher(), progress=progress)
        from gemma2.posttrain.reports.page import write_report

        write_report(run.path, run.path / "report.html")
        found = summarise(run.path) | _angle(run.path, config)
        if not found["differs"]:
            progress.warn(f"{SAME_AS_START}: there is no gain to report; raise --learning-rate or --steps")
        return run.finish(found)


def _check_gpus(config: WarpConfig) -> None:
    """Raise UsageError for more GPUs than this machine has."""
    if config.executor != "local":
        return
    visible = len(visible_devices())
    for flag, asked, most in (
        ("--gpus", config.gpus, visible),
        ("--gpus-per-policy", config.gpus_per_policy, min(visible, config.gpus or visible)),
    ):
        if (asked or 0) > most:
            what = f"{flag} {asked}: the stages of this run have {most} GPUs"
            raise UsageError(what, f"give {flag} {most}, or drop it" if most else f"drop {flag}", flag)


def _say_how_many_at_once(config: WarpConfig, pipeline: Pipeline, gpus: int, progress: Progress) -> None:
    """Note that GPUs stay idle where more RL runs fit next to each other than `jobs` allows."""
    of_each = pipeline.stages["iteration-1/policy-1"].resources.gpus or 1
    at_once = min(config.policies, gpus // of_each)
    if at_once > config.jobs:
        progress.note(f"{gpus} GPUs hold {at_once} RL runs of {of_each} at once; --jobs {config.jobs} runs fewer")


def with_gpus(config: WarpConfig, gpus: Sequence[Gpu], progress: Progress = SILENT) -> WarpConfig:
    """The configuration with `gpus_per_policy` set, where it is not: the fewest of these GPUs that an RL run fits.

    One GPU is left to the stages' own default, and so is a run that the plan does not know or that fits nowhere: its
    own checks say what it lacks.
    """
    sizes = [gpu.memory.free for gpu in gpus if not math.isnan(gpu.memory.free)]
    if config.gpus_per_policy is not None or len(sizes) < 2:
        return config
    stage = warp_stages(config)["iteration-1/policy-1"]
    least = min(sizes)
    models = sizes_of(NOTHING, Sources())
    for count in range(1, len(sizes) + 1):
        with suppress(Gemma2Error):
            policy = validated(RlhfConfig, dict(stage.options))
            place = place_for(policy, models, Lengths(), "accelerator", least, count)
            plan = memory_of(policy, models, place)
            if plan is not None and plan.peak.bytes <= (1 - SPARE) * least and divides(policy, count):
                if count > 1:
                    progress.note(f"each RL run gets {count} of {len(gpus)} GPUs: the fewest that it fits by the plan")
                return config.model_copy(update={"gpus_per_policy": count})
    return config


def summarise(root: Path) -> JsonObject:
    """The chosen model, the best single run of the first iteration, and what the one gains over the other."""
    from gemma2.posttrain.evaluation.front_files import read_front

    points = read_front(root / "front", "front")["points"]
    chosen = load_json(root / "model" / "gemma2.json")["summary"]
    moved = differ(points)
    best = next((row.point for row in rows_of(points, None) if row.role == SINGLE), None) if moved else None
    single = {f"single_{key}": best[key] for key in ("label", *FIGURES)} if best else {}
    gains = {key: chosen[key] for key in chosen if key == "single" or "_over_" in key} if moved else {}
    shown = {key: chosen[key] for key in ("label", "eta", "iteration", *FIGURES) if key in chosen}
    return {"model": "model", "differs": moved, **shown, **single, **gains}


def _angle(root: Path, config: WarpConfig) -> JsonObject:
    """The angle between the policies of iteration 1 and the noise scale; nothing with one policy."""
    if config.policies < 2:
        return {}
    found = measured_angle(config, load_json(root / FIRST_MERGE / "gemma2.json")["summary"])
    return found.as_dict() if found is not None else {}


FIGURES = ("reward", "reward_se", "kl", "kl_se")
