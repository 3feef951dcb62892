"""`gemma2 filter`"""

from __future__ import annotations

from dataclasses import replace

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.options import stage
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_options import RunOptions, RunResult
from gemma2.posttrain.schemas import FilterConfig


def run(config: FilterConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.filters.runner import run_filter

    result = run_filter(config, options, progress)
    if not isinstance(progress, Console) or progress.as_json:
        return result
    counts, rows = result.summary["dropped"], result.summary["rows"] or 1
    progress.table([{"filter": name, "dropped": count, "share": count / rows} for name, count in counts.items()])
    return replace(result, summary={name: value for name, value in result.summary.items() if name != "dropped"})


app = stage(
    FilterConfig,
    run,
    positional="data",
    examples="""gemma2 filter data/ --out clean
    gemma2 filter data/ --out clean --decontaminate gsm8k-test.jsonl --language en --max-refusal-share 0.05
    gemma2 filter data/ --out clean --min-words 5 --keep attribution,hedging,refusal --skip near-duplicate""",
)
