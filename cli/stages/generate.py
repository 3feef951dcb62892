"""`gemma2 generate`"""

from __future__ import annotations

from gemma2.cli.terminal.options import stage
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_options import RunOptions, RunResult
from gemma2.posttrain.schemas import GenerateConfig


def run(config: GenerateConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.generation.generate import run_generate

    return run_generate(config, options, progress)


app = stage(
    GenerateConfig,
    run,
    examples="""gemma2 generate --teacher teacher --prompts prompts.jsonl --out data
                gemma2 generate --teacher teacher --prompts prompts.jsonl --n 8 --best 1 --reward reward --out data
                gemma2 generate --engine openai --teacher NAME --base-url http://host/v1 --prompts p.txt --out data""",
)
