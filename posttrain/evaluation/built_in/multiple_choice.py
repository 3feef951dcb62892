"""Multiple choice: the choice with the largest log-probability is the model's answer.

    acc        by log p(choice | question)
    acc_norm   by log p(choice | question) / bytes of the choice (UTF-8), as lm-eval does by characters

The first of equal choices counts, as in lm-eval. Choices are told apart by the text that follows the question, not by a
letter: `choices` of {"A", "B"} and the texts in the question give the other form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gemma2.core.errors import GuardStop, InputError
from gemma2.core.json_files import JsonObject
from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Prompt, located
from gemma2.posttrain.data.sources import no_rows
from gemma2.posttrain.evaluation.suite.chat_choice import uses_chat
from gemma2.posttrain.evaluation.suite.encoding import TokenRequest
from gemma2.posttrain.evaluation.suite.shared_scoring import SharedScorer
from gemma2.posttrain.models.loading import quiet_libraries
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult
from gemma2.posttrain.schemas.measures.built_in import ChoicesConfig

from .keeping import Kept, MeasureOutcome, as_document, keeping, task_names
from .loaded import context_of, loaded, models_of, settle_kernel
from .prompting import QuestionForm, asking_of, cut_left, drawn_shots, ids_hash
from .question_rows import choices_of, each_choice_row, right_choice
from .row_means import row_figures

__all__ = ["best", "run_choices"]

PART = 8  # batches between two flushes of the journal
DIGITS = 6  # of nats, after the point


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question and its choices as token ids; `cut`: how many tokens the beginning of the question lost."""

    context: list[int]
    choices: list[list[int]]
    cut: int


def run_choices(config: ChoicesConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Score every choice of every row of `config.choices` by `config.model`, and by `config.against`."""
    quiet_libraries()
    with keeping("eval choices", config, options) as kept:
        progress = progress if kept.ranks.is_main else SILENT
        reading = Reading(config)
        rows = list(each_choice_row(config.choices, reading, config.limit))
        if not rows:
            raise InputError(f"{config.choices} has no rows", reading.first_error() or no_rows(config.choices).hint)
        name = task_names([config.choices])[0]
        outcomes = []
        settle_kernel(config, kept.run, progress)
        for number, path in enumerate(models_of(config)):
            model, tokenizer = loaded(path, config.dtype, config.attention)
            asking, _ = asking_of(tokenizer, model.generation_config, uses_chat(path, config.chat), config.system)
            asked = [_asked(rows, i, asking, config, context_of(model)) for i in range(len(rows))]
            _score(kept, number, SharedScorer(model, config.batch_size, kept.ranks), asked, progress)
            outcomes.append(_outcome(config, kept, number, name, rows, asked, asking, progress))
            del model
        return as_document(kept, config, outcomes, reading, progress)


def _asked(
    rows: Sequence[Prompt], number: int, asking: QuestionForm, config: ChoicesConfig, most: int | None
) -> ChoiceQuestion:
    shots = [
        (shot, choices_of(shot)[right_choice(shot)]) for shot in drawn_shots(rows, number, config.shots, config.seed)
    ]
    with located(rows[number].where):
        whole = asking.ids(rows[number], shots)
        choices = [asking.answer_ids(choice) for choice in choices_of(rows[number])]
        longest = max(map(len, choices))
        if most is not None and longest > most - 2:
            raise InputError(f"a choice of {longest} tokens does not fit into the model's context", "shorten it")
    context = cut_left(whole, None if most is None else most - longest)
    return ChoiceQuestion(context, choices, len(whole) - len(context))


def _score(kept: Kept, number: int, scorer: SharedScorer, asked: Sequence[ChoiceQuestion], progress: Progress) -> None:
    """Keep the log-probs of the choices of every row, a part at a time."""
    part = PART * scorer.batch_size
    with progress.task("choices", total=len(asked), unit="rows") as bar:
        for start in range(0, len(asked), part):
            chunk = asked[start : start + part]
            keys = [(number, start + i) for i in range(len(chunk))]
            if not all(key in kept for key in keys):
                found = _log_probs(scorer, chunk)
                kept.add({"key": key, "logprobs": values} for key, values in zip(keys, found, strict=True))
            bar.advance(len(chunk))


def _log_probs(scorer: SharedScorer, asked: Sequence[ChoiceQuestion]) -> list[list[float]]:
    """Log-probs of the choices of each row; what they have in common runs once (`suite/shared_scoring.py`)."""
    rows = [[TokenRequest([*row.context, *ids], len(ids)) for ids in row.choices] for row in asked]
    found = [[round(value, DIGITS) for value in values] for _, batch in scorer.group(rows) for values in batch]
    wrong = next((value for values in found for value in values if not math.isfinite(value)), None)
    if wrong is not None:
        raise GuardStop(f"the log-probability of a choice is {wrong}", "check the weights: gemma2 doctor MODEL")
    return found


def best(values: Sequence[float]) -> int:
    """The index of the largest value, the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)


def _outcome(
    config: ChoicesConfig,
    kept: Kept,
    number: int,
    name: str,
    rows: Sequence[Prompt],
    asked: Sequence[ChoiceQuestion],
    asking: QuestionForm,
    progress: Progress,
) -> MeasureOutcome:
    samples: list[JsonObject] = []
    for i, (row, question) in enumerate(zip(rows, asked, strict=True)):
        logprobs, choices, right = kept[number, i]["logprobs"], choices_of(row), right_choice(row)
        per_byte = [value / len(choice.strip().encode()) for value, choice in zip(logprobs, choices, strict=True)]
        samples.append(
            {
                "id": i,
                "prompt": row.messages,
                "prompt_ids_hash": ids_hash(question.context),
                "choices": choices,
                "logprobs": logprobs,
                "answer": best(logprobs),
                "answer_norm": best(per_byte),
                "target": right,
                "acc": best(logprobs) == right,
                "acc_norm": best(per_byte) == right,
            }
        )
    task = row_figures({key: [float(row[key]) for row in samples] for key in ("acc", "acc_norm")})
    cut = sum(question.cut > 0 for question in asked)
    if cut:
        progress.warn(f"{cut} of {len(asked)} questions are longer than the model's context and lost their beginning")
    task |= {
        "metric": "acc",
        "chance": sum(1 / len(choices_of(row)) for row in rows) / len(rows),
        "shots": config.shots,
        "fewshot_from": "other rows of the same file" if config.shots else None,
        "chat": asking.chat is not None,
        "cut_questions": cut,
    }
    return MeasureOutcome({name: task}, {name: samples})
