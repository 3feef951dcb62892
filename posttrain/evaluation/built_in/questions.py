"""Questions with known answers: greedy answers through our sampler, compared by `matching.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.attention.choice import drawing_kernel
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Prompt, located
from gemma2.posttrain.data.sources import no_rows
from gemma2.posttrain.evaluation.suite.chat_choice import uses_chat
from gemma2.posttrain.generation.engines.base import Request
from gemma2.posttrain.generation.engines.local import BATCHES, SamplerEngine
from gemma2.posttrain.models.loading import quiet_libraries
from gemma2.posttrain.models.sampler import SamplingParams
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult
from gemma2.posttrain.schemas.measures.built_in import QaConfig

from .keeping import Kept, MeasureOutcome, as_document, keeping, task_names
from .loaded import loaded, models_of
from .matching import contains, exact, extracted, numeric
from .prompting import STOPS, QuestionForm, asking_of, cut_left, drawn_shots, ids_hash
from .question_rows import each_question, the_answers
from .row_means import row_figures

__all__ = ["run_qa"]


def run_qa(config: QaConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Ask `config.model`, and `config.against`, every question of `config.qa`."""
    quiet_libraries()
    with keeping("eval qa", config, options) as kept:
        progress = progress if kept.ranks.is_main else SILENT
        reading = Reading(config)
        rows = list(each_question(config.qa, reading, config.limit))
        if not rows:
            raise InputError(f"{config.qa} has no rows", reading.first_error() or no_rows(config.qa).hint)
        name = task_names([config.qa])[0]
        outcomes = []
        for number, path in enumerate(models_of(config)):
            model, tokenizer = loaded(path, config.dtype, drawing_kernel(config.attention))
            asking, chat = asking_of(tokenizer, model.generation_config, uses_chat(path, config.chat), config.system)
            params = SamplingParams(config.max_new_tokens, temperature=0.0)
            stops = () if asking.chat is not None else STOPS
            engine = SamplerEngine(model, chat, params, config.batch_size, stops, kept.ranks)
            if engine.window is not None and engine.window < 2:
                raise UsageError("--max-new-tokens fills the model's context alone", "lower it")
            asked = [_asked(rows, i, asking, config, engine.window) for i in range(len(rows))]
            _answer(kept, number, engine, rows, asked, progress)
            outcomes.append(_outcome(config, kept, number, name, rows, asked, asking, progress))
            engine.close()
            del model
        return as_document(kept, config, outcomes, reading, progress)


@dataclass(frozen=True)
class PlainQuestion:
    """A question as token ids; `cut`: how many tokens its beginning lost."""

    ids: list[int]
    cut: int


def _asked(
    rows: Sequence[Prompt], number: int, asking: QuestionForm, config: QaConfig, most: int | None
) -> PlainQuestion:
    shots = [(shot, the_answers(shot)[0]) for shot in drawn_shots(rows, number, config.shots, config.seed)]
    with located(rows[number].where):
        whole = asking.ids(rows[number], shots)
    ids = cut_left(whole, most)
    return PlainQuestion(ids, len(whole) - len(ids))


def _answer(
    kept: Kept,
    number: int,
    engine: SamplerEngine,
    rows: Sequence[Prompt],
    asked: Sequence[PlainQuestion],
    progress: Progress,
) -> None:
    """Draw the answers that are not known yet, a part at a time."""
    part = BATCHES * engine.batch_size
    with progress.task("answers", total=len(asked), unit="answers") as bar:
        for start in range(0, len(asked), part):
            requests = [
                Request((i, number, 0), rows[i].where, rows[i].messages, asked[i].ids, 0)
                for i in range(start, min(start + part, len(asked)))
            ]
            known = {request.key for request in requests if (number, request.key[0]) in kept}
            bar.advance(len(known))
            for group in engine.complete(requests, known):
                kept.add(
                    {
                        "key": [number, drawn.key[0]],
                        "text": drawn.text,
                        "tokens": drawn.tokens,
                        "finish_reason": drawn.finish_reason,
                    }
                    for drawn in group
                )
                bar.advance(sum(drawn.key not in known for drawn in group))


def _outcome(
    config: QaConfig,
    kept: Kept,
    number: int,
    name: str,
    rows: Sequence[Prompt],
    asked: Sequence[PlainQuestion],
    asking: QuestionForm,
    progress: Progress,
) -> MeasureOutcome:
    samples: list[JsonObject] = []
    for i, (row, question) in enumerate(zip(rows, asked, strict=True)):
        drawn = kept[number, i]
        reply = extracted(drawn["text"], config.extract)
        answers = the_answers(row)
        samples.append(
            {
                "id": i,
                "prompt": row.messages,
                "prompt_ids_hash": ids_hash(question.ids),
                "text": drawn["text"],
                "answer": reply,
                "target": answers,
                "exact": exact(reply, answers),
                "contains": contains(reply, answers),
                "numeric": numeric(reply, answers),
                "truncated": drawn["finish_reason"] == "length",
                "tokens": drawn["tokens"],
            }
        )
    columns = {key: [_as_number(row[key]) for row in samples] for key in ("exact", "contains", "numeric", "truncated")}
    task = row_figures(columns)
    cut = sum(question.cut > 0 for question in asked)
    if cut:
        progress.warn(f"{cut} of {len(asked)} questions are longer than the model's context and lost their beginning")
    if config.extract is not None and not any(row["answer"] is not None for row in samples):
        progress.warn("--extract matches none of the replies; the first is " + repr(samples[0]["text"][:120]))
    task |= {
        "metric": _headline(config, asking, columns["numeric"]),
        "shots": config.shots,
        "fewshot_from": "other rows of the same file" if config.shots else None,
        "chat": asking.chat is not None,
        "cut_questions": cut,
        "no_answer_found": sum(row["answer"] is None for row in samples),
    }
    return MeasureOutcome({name: task}, {name: samples})


def _headline(config: QaConfig, asking: QuestionForm, numbers: Sequence[float | None]) -> str:
    """The metric that models are compared by: of numbers `numeric`; else `contains` where answers are sentences."""
    if None not in numbers:
        return "numeric"
    return "contains" if asking.chat is not None and config.extract is None else "exact"


def _as_number(value: bool | None) -> float | None:
    return None if value is None else float(value)
