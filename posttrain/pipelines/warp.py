"""WARP (arXiv 2406.16768), Algorithm 1: its stages (`warp_stages.py`) run as a separate pipeline.

    OUT/iteration-i/{policy-m, slerp, init, front}    OUT/front    OUT/model    OUT/report.html

Every policy, slerp and init stays on disk. OUT appears when all is done; until then `.OUT.partial` holds the finished
part. `resume` continues at the interrupted stage, and inside an RL run at its last checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from gemma2.core.json_files import JsonObject, load_json
from gemma2.core.progress import SILENT, Progress
from gemma2.core.rounding import SAME_AS_START, differ
from gemma2.posttrain.reports.headline import SINGLE, rows_of
from gemma2.posttrain.rewards.functions import load_function
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult, open_run
from gemma2.posttrain.schemas import PipelineFile, WarpConfig

from .check import check_pipeline
from .compile import Pipeline, compile_pipeline
from .run import Watcher, executor_of, run_stages
from .scheduler import Observer
from .warp_stages import warp_stages

__all__ = ["run_warp", "warp_pipeline"]


def warp_pipeline(config: WarpConfig, root: Path) -> Pipeline:
    """The stages of a WARP run with outputs below `root`."""
    return compile_pipeline(PipelineFile(stages=warp_stages(config)), root)


def run_warp(
    config: WarpConfig, options: RunOptions, progress: Progress = SILENT, observer: Observer | None = None
) -> RunResult:
    """Run Algorithm 1 and evaluate its front; `OUT/model` is the chosen point.

    Raises UsageError or InputError before the first stage for what can be known then, StageFailed for a stage.
    """
    for option, names in (("--reward-fn", config.reward_fn), ("--judge-fn", filter(None, [config.judge_fn]))):
        for name in names:
            load_function(name, option)  # a typo must show before an hour of RL, not after it
    with open_run("warp", config, options) as run:
        pipeline = warp_pipeline(config, run.path)
        executor = executor_of(config.executor, config.jobs)
        plan = check_pipeline(pipeline, contents=False)  # the stages read what the command reads
        run_stages(pipeline, plan, executor, observer=observer or Watcher(), progress=progress)
        from gemma2.posttrain.reports.page import write_report

        write_report(run.path, run.path / "report.html")
        found = summarise(run.path)
        if not found["differs"]:
            progress.warn(f"{SAME_AS_START}: there is no gain to report; raise --learning-rate or --steps")
        return run.finish(found)


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


FIGURES = ("reward", "reward_se", "kl", "kl_se")
