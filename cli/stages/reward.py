"""`gemma2 reward`, `reward probe`, `reward pairs`, `reward score` and `reward eval`"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.options import add_stage, stage_group
from gemma2.core.json_files import JsonObject
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_options import RunOptions, RunResult
from gemma2.posttrain.schemas import PairsConfig, ProbeConfig, RewardConfig, RewardEvalConfig, RewardScoreConfig

NOT_SHOWN = ("model", "reliability", "by", "accuracy_error")  # shown in separate tables, or next to the accuracy


def run(config: RewardConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.preferences.train import run_reward

    return run_reward(config, options, progress)


def run_probe(config: ProbeConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.preferences.probe import run_probe

    return run_probe(config, options, progress)


def run_pairs(config: PairsConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.preferences.pairs import run_pairs

    return run_pairs(config, options, progress)


def run_score(config: RewardScoreConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.preferences.score import run_score

    return run_score(config, options, progress)


def run_eval(config: RewardEvalConfig, options: RunOptions, progress: Progress) -> RunResult:
    """Print the figures with one column per model, or return them as one document for --json."""
    from gemma2.posttrain.preferences.reward_eval import run_reward_eval

    found = run_reward_eval(config, progress)
    if not isinstance(progress, Console) or progress.as_json:
        return RunResult(Path(), found)
    show(found, progress)
    return RunResult(Path())


def show(found: JsonObject, console: Console) -> None:
    """Print the tables of an evaluation: figures, reliability, and accuracy by value of a column."""
    models = found["models"]
    names = _short([model["model"] for model in models])
    figures = [key for key in models[0] if key not in NOT_SHOWN]
    console.table(
        [
            {"figure": key.replace("_", " "), **{name: _cell(m, key) for name, m in zip(names, models, strict=True)}}
            for key in figures
        ]
    )
    for name, model in zip(names, models, strict=True):
        console.text("")
        console.table(model["reliability"], f"reliability of {name}" if len(models) > 1 else "reliability")
    if "by" in models[0]:
        console.text("")
        console.table(list(_by(models, names)), "accuracy by value")


def _by(models: list[JsonObject], names: list[str]) -> Iterator[dict[str, object]]:
    for value, first in models[0]["by"].items():
        cells = {name: _cell(m["by"].get(value, {}), "accuracy") for name, m in zip(names, models, strict=True)}
        yield {"value": value, "pairs": first["pairs"], **cells}


def _cell(figures: JsonObject, key: str) -> object:
    value = figures.get(key)
    if key == "accuracy" and value is not None:
        return f"{value:.4f} ± {figures['accuracy_error']:.4f}"
    return value


def _short(paths: list[str]) -> list[str]:
    """The last part of every path if these are distinct, else the whole paths."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else paths


app = stage_group(
    RewardConfig,
    run,
    examples="""
    gemma2 reward --model sft --data pairs --out reward
    gemma2 reward --model sft --data pairs --from-head probe --dropout 0.05 --seed 1 --out rm1
    """,
)
add_stage(
    app,
    ProbeConfig,
    run_probe,
    name="probe",
    examples="gemma2 reward probe --model sft --data pairs --out probe",
)
add_stage(
    app,
    PairsConfig,
    run_pairs,
    name="pairs",
    examples="""
    gemma2 reward pairs --model sft --prompts prompts.jsonl --judge my.module:score --out pairs
    gemma2 reward pairs --model sft --prompts prompts.jsonl --judge openai:NAME --judge-style compare --out pairs
    """,
)
add_stage(
    app,
    RewardScoreConfig,
    run_score,
    name="score",
    positional="model",
    examples="gemma2 reward score reward --data data --out scored",
)
add_stage(
    app,
    RewardEvalConfig,
    run_eval,
    name="eval",
    positional="models",
    writes=False,
    examples="gemma2 reward eval rm1 rm2 --data pairs --by task",
)
