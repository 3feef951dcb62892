"""`gemma2 distill` and `gemma2 distill cache`"""

from __future__ import annotations

import inspect

from gemma2.cli.terminal.options import add_stage, stage_group
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_options import RunOptions, RunResult
from gemma2.posttrain.schemas import DistillCacheConfig, DistillConfig


def run(config: DistillConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.distillation.distill import run_distill

    return run_distill(config, options, progress)


def run_cache(config: DistillCacheConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.distillation.teacher_cache import run_cache

    return run_cache(config, options, progress)


app = stage_group(
    DistillConfig,
    run,
    examples="""gemma2 distill --teacher teacher --model sft --prompts prompts.jsonl --out student
gemma2 distill --teacher teacher --model sft --prompts prompts.jsonl --data data --lambda 0.5 --out student
gemma2 distill --teacher-cache cache --model sft --divergence forward-kl --out student""",
)
assert app.registered_callback is not None and app.registered_callback.callback is not None
# GKD calls this share lambda, a keyword of Python that can name neither a field nor a parameter, only a flag.
_share = inspect.signature(app.registered_callback.callback).parameters["on_policy_fraction"].default
_share.param_decls = (*_share.param_decls, "--lambda")
add_stage(
    app,
    DistillCacheConfig,
    run_cache,
    name="cache",
    examples="gemma2 distill cache --teacher teacher --data data --top-k 64 --out cache",
)
