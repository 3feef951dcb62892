"""Preference pairs from n samples of a model and a judge, as RLAIF does (WARP 2406.16768 takes its rewards from one).

    chosen, rejected = the samples with the highest and the lowest score            (select: extremes)
                       two samples with different scores, drawn at random           (select: random)
                       every two samples with different scores, so several pairs    (select: all)

A prompt whose samples differ by no more than `min_margin` gives no pair; how many is counted and reported.

    pairs.jsonl: {"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES, "chosen_truncated": bool,
                  "rejected_truncated": bool, "chosen_score": s, "rejected_score": s, ...the prompt row's columns}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

from gemma2.merging.errors import InputError, UsageError
from gemma2.merging.progress import SILENT, Progress

from .batching import derived_seed
from .chat import ChatFormat
from .data import read_prompts
from .rundir import Parent, Run, RunOptions, RunResult, open_run
from .schemas import PairsConfig, RewardFields
from .scores import Sampled, Score, function_score, reward_score
from .sources import data_files, to_line
from .synthesize import Answers, Rows, Sampler, answer_chunks, saved_rows
from .training import quiet_libraries

__all__ = ["choose", "run_pairs"]


def run_pairs(config: PairsConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Sample from `config.model`, judge, and write `pairs.jsonl` to `options.out`.

    Raises InputError when no prompt gives a pair, UsageError for a judge that cannot be found.
    """
    quiet_libraries()
    judge_model = Path(config.judge) if ":" not in config.judge else None
    if judge_model is not None and not judge_model.is_dir():
        raise UsageError(
            f"--judge {config.judge!r} is neither a directory nor module:function", "name a reward model or a function"
        )
    parents = [Parent("model", config.model)] + ([Parent("judge", judge_model)] if judge_model else [])
    with open_run("reward pairs", config, options, parents=parents, data=data_files(config.prompts)) as run:
        rows = read_prompts(config.prompts, config.limit)
        sampler = Sampler.load(config.model, config)
        score = _judge(config, judge_model, sampler.chat)
        answer_chunks(run, sampler, rows, _described(score), progress)
        return run.finish(_write(run, config, progress))


def choose(scores: Sequence[float], select: str, min_margin: float, draw: Random) -> list[tuple[int, int]]:
    """(chosen, rejected) indices of samples whose scores differ by more than `min_margin`; empty where none do."""
    different = [
        (i, j) if scores[i] > scores[j] else (j, i)
        for i, j in combinations(range(len(scores)), 2)
        if abs(scores[i] - scores[j]) > min_margin
    ]
    if select == "all" or not different:
        return different
    if select == "random":
        return [draw.choice(different)]
    return [max(different, key=lambda pair: scores[pair[0]] - scores[pair[1]])]


def _judge(config: PairsConfig, judge_model: Path | None, chat: ChatFormat) -> Score:
    if judge_model is None:
        return function_score(config.judge, "--judge", "reward")
    return reward_score(RewardFields(reward=judge_model), chat, config.batch_size)


def _described(score: Score) -> Callable[[Answers], Rows]:
    """One row per prompt: its columns and its samples with their scores."""

    def describe(answers: Answers) -> Rows:
        drawn = answers.drawn
        columns = score(Sampled(answers.rows, answers.prompts, drawn.ids, answers.texts, drawn.truncated))
        if "reward" not in columns:
            raise InputError(f"the judge returned {', '.join(columns)} and no 'reward'", "return plain numbers")
        rows: dict[int, dict[str, Any]] = {}
        for index, row, text, cut, value in zip(
            drawn.prompt_index, answers.rows, answers.texts, drawn.truncated, columns["reward"], strict=True
        ):
            entry = rows.setdefault(index, {"prompt": row.messages, "extra": row.extra, "samples": []})
            entry["samples"].append({"text": text, "truncated": cut, "score": value})
        return list(rows.values())

    return describe


def _write(run: Run, config: PairsConfig, progress: Progress) -> dict[str, Any]:
    prompts = pairs = ties = 0
    margin = 0.0
    with (run.path / "pairs.jsonl").open("wb") as file:
        for prompts, row in enumerate(saved_rows(run), start=1):
            samples = row["samples"]
            draw = Random(derived_seed(config.seed, prompts))
            chosen = choose([sample["score"] for sample in samples], config.select, config.min_margin, draw)
            for better, worse in chosen:
                file.write(to_line(_pair_row(row, samples[better], samples[worse])))
                margin += samples[better]["score"] - samples[worse]["score"]
            pairs, ties = pairs + len(chosen), ties + (not chosen)
    if not pairs:
        what = f"the judge told no two samples of any of {prompts} prompts apart"
        raise InputError(what, "raise --n or --temperature, lower --min-margin, or check the judge")
    if 2 * ties > prompts:
        progress.warn(f"{ties} of {prompts} prompts gave no pair: the scores of their samples do not differ")
    return {"prompts": prompts, "pairs": pairs, "ties": ties, "mean_margin": round(margin / pairs, 4)}


def _pair_row(row: dict[str, Any], chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    ours = {
        "prompt": row["prompt"],
        "chosen": [{"role": "assistant", "content": chosen["text"]}],
        "rejected": [{"role": "assistant", "content": rejected["text"]}],
        "chosen_truncated": chosen["truncated"],
        "rejected_truncated": rejected["truncated"],
        "chosen_score": chosen["score"],
        "rejected_score": rejected["score"],
    }
    return ours | {name: value for name, value in row["extra"].items() if name not in ours}
