"""Preference pairs from n samples of a model and a judge, as in RLAIF (WARP, 2406.16768, gets its rewards from one).

    chosen, rejected = the samples with the highest and the lowest score            (select: extremes)
                       two samples with different scores, drawn at random           (select: random)
                       every two samples with different scores, so several pairs    (select: all)

A prompt gives no pair if its samples differ by no more than `min_margin`, or fewer than two of them have a score; both
cases are counted and reported. The judge is a reward model, a Python function, or a language model at a server
(`judge.py`).

    pairs.jsonl: {"prompt": MESSAGES, "chosen": MESSAGES, "chosen_truncated": bool, "chosen_score": s,
                  "rejected": MESSAGES, "rejected_truncated": bool, "rejected_score": s, ...the prompt row's columns}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import combinations, groupby
from pathlib import Path
from random import Random

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject
from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.attention.choice import settle_attention
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.seeds import derived_seed
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.generation.answers import Answering
from gemma2.posttrain.generation.dialogues import Dialogue, DialoguePlan
from gemma2.posttrain.generation.engines.local import SamplerEngine
from gemma2.posttrain.generation.journal import Journal
from gemma2.posttrain.generation.scoring import Scored, scored
from gemma2.posttrain.models.loading import default_device, quiet_libraries
from gemma2.posttrain.models.precision import frozen_dtype
from gemma2.posttrain.models.sampler import SamplingParams
from gemma2.posttrain.rewards.functions import Score, function_score
from gemma2.posttrain.rewards.terms import reward_score
from gemma2.posttrain.runs.generation_budget import PromptSource
from gemma2.posttrain.runs.inputs import check_judge
from gemma2.posttrain.runs.run_directory import Run, RunOptions, RunResult, open_run
from gemma2.posttrain.schemas import PairsConfig, RewardFields

from .judge import Judge, judge_engine, judged, template_of

__all__ = ["choose", "run_pairs"]


def run_pairs(config: PairsConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Sample from `config.model`, judge, and write `pairs.jsonl` to `options.out`.

    Raises InputError if no prompt gives a pair, UsageError for a judge that cannot be found.
    """
    quiet_libraries()
    score = _function_of(config)
    judge_model = Path(config.judge) if score is None and config.judge_model is None else None
    template = template_of(config) if config.judge_model is not None else ""
    with open_run("reward pairs", config, options) as run, ExitStack() as stack:
        run.checkpoints.mkdir(exist_ok=True)
        server = stack.enter_context(closing(judge_engine(config, progress))) if template else None
        journal = stack.enter_context(Journal(run.checkpoints / "answers.jsonl"))
        params = SamplingParams(config.max_new_tokens, config.temperature)
        with closing(
            SamplerEngine.load(config.model, params, config.batch_size, config.dtype, attention=config.attention)
        ) as engine:
            reading = Reading(config)
            source, plan = (
                PromptSource(config.prompts, reading, config.limit),
                DialoguePlan(config.n, config.seed, empty_counts=True),
            )
            answering = Answering(source, plan, journal, engine.chunk, keep_ids=judge_model is not None)
            prompts = answering.check(engine, progress)
            unread = reading.report(progress, run.path)
            answering.run(engine, prompts, progress)
            chat = engine.chat
        scores = stack.enter_context(Journal(run.checkpoints / "scores.jsonl"))
        judge = Judge(template, config.judge_style == "compare")
        if server is not None:
            chunks = judged(answering, scores, server, judge, prompts, progress)
        else:
            if judge_model is not None:
                run.origin["attention"] = settle_attention(
                    config.attention, [judge_model], progress, dtype=frozen_dtype("auto"), device=default_device()
                )
                terms = RewardFields(reward=(judge_model,), attention=config.attention)
                score = reward_score(terms, chat, config.batch_size)
            assert score is not None
            chunks = scored(answering, scores, score, chat, lambda dialogue: bool(dialogue.answers), progress)
        return run.finish(_write(run, config, chunks, progress) | unread | (judge.facts() if server else {}))


def _function_of(config: PairsConfig) -> Score | None:
    """Return the judge if it is a Python function. Raises UsageError for an unknown kind of judge."""
    check_judge(config.judge)
    if config.judge_model is not None or Path(config.judge).is_dir():
        return None
    return function_score(config.judge, "--judge", "reward", seconds=config.reward_timeout)


def choose(scores: Sequence[float], select: str, min_margin: float, draw: Random) -> list[tuple[int, int]]:
    """Return (chosen, rejected) indices of samples whose scores differ by more than `min_margin`; empty if none do."""
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


def _write(run: Run, config: PairsConfig, chunks: Iterator[Scored], progress: Progress) -> JsonObject:
    prompts = pairs = ties = unjudged = blank = 0
    margin = 0.0
    with (run.path / "pairs.jsonl").open("wb") as file:
        for prompts, group in enumerate(_by_prompt(chunks), start=1):
            samples = [(dialogue, score) for dialogue, score in group if score is not None and dialogue.answers]
            unjudged += len(group) - len(samples)
            scores = [score for _, score in samples]
            if len(scores) < 2:
                blank += 1
                continue
            draw = Random(derived_seed(config.seed, prompts))
            chosen = choose(scores, config.select, config.min_margin, draw)
            for better, worse in chosen:
                file.write(to_line(_pair_row(samples[better], samples[worse])))
                margin += scores[better] - scores[worse]
            pairs, ties = pairs + len(chosen), ties + (not chosen)
    if not pairs:
        what = f"the judge gave no two samples of any of {prompts} prompts different scores"
        raise InputError(what, "raise --n or --temperature, lower --min-margin, or check the judge")
    if 2 * (ties + blank) > prompts:
        progress.warn(
            f"{ties + blank} of {prompts} prompts gave no pair: the scores of the samples do not differ in {ties}, "
            f"fewer than two samples have a score in {blank}"
        )
    found: JsonObject = {"prompts": prompts, "pairs": pairs, "ties": ties}
    if config.judge_model is not None or unjudged:
        found |= {"unjudged": unjudged, "unjudged_prompts": blank}
    return found | {"mean_margin": round(margin / pairs, 4)}


def _by_prompt(chunks: Iterator[Scored]) -> Iterator[Scored]:
    """Yield the n samples of each prompt."""
    for chunk in chunks:
        for _, group in groupby(chunk, key=lambda pair: pair[0].row):
            yield list(group)


def _pair_row(chosen: tuple[Dialogue, float | None], rejected: tuple[Dialogue, float | None]) -> JsonObject:
    prompt = chosen[0].prompt
    ours: JsonObject = {"prompt": prompt.messages}
    for name, (dialogue, score) in (("chosen", chosen), ("rejected", rejected)):
        ours[name] = [{"role": "assistant", "content": dialogue.answers[0].text}]
        ours[f"{name}_truncated"] = dialogue.fate == "length"
        ours[f"{name}_score"] = score
    return ours | {name: value for name, value in prompt.extra.items() if name not in ours}
