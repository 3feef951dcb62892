"""The plan that `--dry-run` prints: that of the command, and of `gemma2 warp` the plan of its stages. Torch-free."""

from __future__ import annotations

from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.staging import partial_path
from gemma2.posttrain.checks.plan import plan
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import PipelineFile, WarpConfig
from gemma2.posttrain.schemas.config import Config

from .check import check_pipeline
from .compile import compile_pipeline
from .warp_stages import warp_stages

__all__ = ["plan_step"]


def plan_step(config: Config, options: RunOptions | None) -> JsonObject:
    """The plan of one command. Raises what its run would raise before it begins, also about the stages of WARP."""
    document = plan(config, options)
    if not isinstance(config, WarpConfig) or options is None:
        return document
    stages = PipelineFile(stages=warp_stages(config))
    rows = check_pipeline(compile_pipeline(stages, partial_path(options.out))).rows()
    return document | {"stages_to_run": sum(row["action"] != "skip" for row in rows), "stages": rows}
