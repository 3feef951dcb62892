"""The answers of two models to the same prompts, side by side: by a reward, or by a judge (`side_by_side.py`).

    win_rate        wins + half of the ties, of the prompts that have a verdict
    side_by_side    mean verdict on the +-1.5 scale; of a reward model as --judge, its expected verdict
    reward, reward_other, reward_difference    means, where rewards decide

Both models draw with the same random numbers for the same prompt, so that what differs is the model; at temperature 0,
the default of this form, answers are greedy. Rewards that differ by no more than --margin are a tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.json_files import JsonObject
from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.attention.choice import settle_attention
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.evaluation.suite.suite_plan import refuse_broken
from gemma2.posttrain.generation.answers import Answering
from gemma2.posttrain.generation.dialogues import Dialogue, DialoguePlan
from gemma2.posttrain.generation.engines.local import SamplerEngine
from gemma2.posttrain.generation.scoring import scored
from gemma2.posttrain.models.loading import default_device, quiet_libraries
from gemma2.posttrain.models.precision import frozen_dtype
from gemma2.posttrain.models.sampler import SamplingParams
from gemma2.posttrain.preferences.judge import PLACES, judge_engine, judged, read_template
from gemma2.posttrain.rewards.functions import Score
from gemma2.posttrain.rewards.terms import reward_score
from gemma2.posttrain.runs.generation_budget import PromptSource
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult
from gemma2.posttrain.schemas import RewardFields
from gemma2.posttrain.schemas.measures.built_in import WinRateConfig

from .keeping import Kept, MeasureOutcome, as_document, keeping, task_names
from .row_means import row_figures
from .side_by_side import LARGEST, SIDE_PROMPT, SideBySide, by_reward, order_figures

__all__ = ["run_win_rate"]

ANY = (float("-inf"), float("inf"))
BOUNDS = {"side_by_side": (-LARGEST, LARGEST), "reward": ANY, "reward_other": ANY, "reward_difference": ANY}


@dataclass(frozen=True)
class Sides:
    """The answers of both models: one job each, over the same prompts in the same chunks."""

    jobs: list[Answering]
    chats: list[ChatFormat]
    seed: int

    @property
    def rows(self) -> int:
        """Prompts in a chunk."""
        return self.jobs[0].rows

    @property
    def plan(self) -> DialoguePlan:
        """Two answers to each prompt, as a judge sees them."""
        return DialoguePlan(2, self.seed, empty_counts=True)

    def dialogues(self) -> Iterator[list[Dialogue]]:
        """The two answers of each prompt, the first model's first."""
        for ours, theirs in zip(*(job.dialogues() for job in self.jobs), strict=True):
            yield [dialogue for pair in zip(ours, theirs, strict=True) for dialogue in pair]


def run_win_rate(config: WinRateConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Let `config.model` and `config.win_rate` answer the prompts, and compare the answers."""
    quiet_libraries()
    if config.doctor:
        refuse_broken(config.model)
        refuse_broken(config.win_rate)
    template = ""
    if config.judge_model is not None:
        template = read_template(config.judge_prompt, SIDE_PROMPT, PLACES["compare"], "eval win-rate")
    with keeping("eval win-rate", config, options) as kept:
        progress = progress if kept.ranks.is_main else SILENT
        reading = Reading(config)
        source = PromptSource(config.prompts, reading, config.limit)
        sides, prompts = _answered(config, kept, source, progress)
        rewards = [] if template else _rewards(config, kept, sides, progress)
        outcome = MeasureOutcome({})
        if kept.ranks.is_main:  # it has the answers, and asks the judge
            if template:
                samples, more = _by_judge(config, kept, sides, SideBySide(template, True), prompts, progress)
            else:
                samples, more = _by_reward(config, sides, rewards), {}
            name = task_names([config.prompts])[0]
            outcome = MeasureOutcome({name: _figures(samples) | more}, {name: samples})
        return as_document(kept, config, [outcome], reading, progress)


def _answered(config: WinRateConfig, kept: Kept, source: PromptSource, progress: Progress) -> tuple[Sides, int]:
    """Draw the answers of both models; the number of prompts."""
    params = SamplingParams(config.max_new_tokens, config.temperature)
    plan = DialoguePlan(1, config.seed, empty_counts=True)
    sides, prompts = Sides([], [], config.seed), 0
    for number, path in enumerate((config.model, config.win_rate)):
        with closing(
            SamplerEngine.load(
                path, params, config.batch_size, config.dtype, attention=config.attention, ranks=kept.ranks
            )
        ) as engine:
            job = Answering(source, plan, kept.journal(f"answers-{number}.jsonl"), engine.chunk, True, kept.ranks)
            prompts = job.check(engine, progress)
            job.run(engine, prompts, progress)
            sides.jobs.append(job)
            sides.chats.append(engine.chat)
    return sides, prompts


def _by_judge(
    config: WinRateConfig, kept: Kept, sides: Sides, judge: SideBySide, prompts: int, progress: Progress
) -> tuple[list[JsonObject], JsonObject]:
    """The rows with a judge's verdicts in both orders, and the figures of the orders."""
    with closing(judge_engine(config, progress)) as server, kept.journal("judge.jsonl") as journal:
        verdicts = [
            score for chunk in judged(sides, journal, server, judge, prompts, progress) for _, score in chunk[::2]
        ]
    samples = _rows(sides, {"side_by_side": verdicts}, 0.0)
    for row, (first, second) in zip(samples, judge.verdicts, strict=True):
        row |= {"verdict": first, "verdict_swapped": second}
    return samples, {**order_figures(judge.verdicts), **judge.facts()}


def _rewards(config: WinRateConfig, kept: Kept, sides: Sides, progress: Progress) -> list[list[float | None]]:
    """The rewards of the answers of each model, on every process."""
    judges = config.judge is not None
    judge = Path(str(config.judge))
    terms = RewardFields(reward=(judge,), dtype=config.dtype, attention=config.attention) if judges else config
    settled = settle_attention(
        config.attention, terms.reward, progress, dtype=frozen_dtype(config.dtype), device=default_device()
    )
    if kept.run is not None:
        kept.run.origin["attention"] = settled
    rewards: list[list[float | None]] = []
    score: Score | None = None
    for number, (job, chat) in enumerate(zip(sides.jobs, sides.chats, strict=True)):
        if score is None or not _alike(*sides.chats):
            score = reward_score(terms, chat, config.batch_size)
        with kept.journal(f"rewards-{number}.jsonl") as journal:
            chunks = scored(job, journal, score, chat, lambda dialogue: bool(dialogue.answers), progress)
            rewards.append([value for chunk in chunks for _, value in chunk])
    return rewards


def _by_reward(config: WinRateConfig, sides: Sides, rewards: Sequence[Sequence[float | None]]) -> list[JsonObject]:
    """The rows with the rewards of both answers; a reward model that judges gives its expected verdict too."""
    ours, theirs = rewards
    same = [_text(a) == _text(b) and a.fate == b.fate for chunk in sides.dialogues() for a, b in _pairs(chunk)]
    # Equal answers are a tie: what padding and batches change in a sum is not a difference of the models.
    differences = [
        None if a is None or b is None else 0.0 if equal else a - b
        for a, b, equal in zip(ours, theirs, same, strict=True)
    ]
    found = {"reward": ours, "reward_other": theirs, "reward_difference": differences}
    if config.judge is not None:
        found["side_by_side"] = [None if value is None else by_reward(value) for value in differences]
    return _rows(sides, found, config.margin)


def _pairs(chunk: Sequence[Dialogue]) -> Iterator[tuple[Dialogue, Dialogue]]:
    return zip(chunk[::2], chunk[1::2], strict=True)


def _alike(one: ChatFormat, other: ChatFormat) -> bool:
    """Whether a reward model can read the ids of both."""
    a, b = one.tokenizer, other.tokenizer
    return a.chat_template == b.chat_template and a.get_vocab() == b.get_vocab()


def _rows(sides: Sides, columns: Mapping[str, Sequence[float | None]], margin: float) -> list[JsonObject]:
    """One row per prompt: both answers, and whether the first one won (1), tied (1/2) or lost (0)."""
    decides = columns.get("reward_difference") or columns["side_by_side"]
    rows: list[JsonObject] = []
    for chunk in sides.dialogues():
        for ours, theirs in _pairs(chunk):
            i = len(rows)
            value = decides[i]
            rows.append(
                {
                    "id": i,
                    "prompt": ours.prompt.messages,
                    "answer": _text(ours),
                    "answer_other": _text(theirs),
                    "truncated": ours.fate == "length",
                    "truncated_other": theirs.fate == "length",
                    **{name: values[i] for name, values in columns.items()},
                    "outcome": None if value is None else 0.5 + 0.5 * (value > margin) - 0.5 * (value < -margin),
                }
            )
    return rows


def _text(dialogue: Dialogue) -> str | None:
    return dialogue.answers[-1].text if dialogue.answers else None


def _figures(rows: Sequence[JsonObject]) -> JsonObject:
    outcomes = [row["outcome"] for row in rows]
    columns: dict[str, list[float | None]] = {"win_rate": outcomes}
    for name, value in (("win", 1.0), ("tie", 0.5), ("loss", 0.0)):
        columns[name] = [None if found is None else float(found == value) for found in outcomes]
    for name in BOUNDS:
        if name in rows[0]:
            columns[name] = [row[name] for row in rows]
    return row_figures(columns, BOUNDS)
