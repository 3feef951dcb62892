"""Prompts of a task as text: examples drawn as lm-eval draws them, plain or as chat turns. Torch-free.

The examples of a row are the next ones of one random series per task, so a row's prompt does not depend on which rows
are run; examples from the evaluated rows themselves are one more, without the row itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from .task import Doc, SuiteTask
from .task_rows import TaskRows

__all__ = ["Asked", "ChatText", "asked_of"]

Turn = dict[str, str]
ChatText = Callable[[list[Turn]], str]  # turns that end with the user's -> the text up to the model's turn
BETWEEN = "\n\n"
BEFORE_ANSWER = " "


@dataclass(frozen=True)
class Asked:
    """One row as it is asked.

    contexts       one text, or one for each choice where the choice is a part of the text
    continuations  what is scored after them; empty where the model writes an answer
    choices        texts of the choices, for acc_norm
    """

    doc: Doc
    id: str
    group: str
    contexts: list[str]
    continuations: list[str]
    choices: list[str]
    target: int | str

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(context, continuation) of each choice."""
        contexts = self.contexts if len(self.contexts) > 1 else self.contexts * len(self.continuations)
        return list(zip(contexts, self.continuations, strict=True))


def asked_of(rows: TaskRows, seed: int, chat: ChatText | None = None, multiturn: bool = True) -> Iterator[Asked]:
    """The evaluated rows with their prompts; `chat` writes them as turns, `multiturn` the examples as well."""
    task, drawn = rows.task, Random(seed)
    for doc in rows.evaluated:
        shots = _shots(rows, doc, drawn)
        choices = [] if task.generates else task.choices(doc)
        variants = (
            [task.text(doc, number) for number in range(len(choices))] if task.choice_in_text else [task.text(doc)]
        )
        contexts = [_context(task, doc, shots, text, chat, multiturn) for text in variants]
        before = "" if chat else BEFORE_ANSWER
        endings = [task.answer(doc)] * len(choices) if task.choice_in_text else choices
        yield Asked(
            doc,
            str(doc["id"]),
            task.group_of(doc),
            contexts,
            [before + text for text in endings],
            choices,
            task.target(doc),
        )


def _shots(rows: TaskRows, doc: Doc, drawn: Random) -> list[Doc]:
    task, pool = rows.task, rows.examples[rows.task.group_of(doc)]
    if task.sampler == "first_n":
        return [row for row in pool if row is not doc][: task.num_fewshot]
    if not rows.shares_rows and not task.spare_shot:
        return drawn.sample(pool, task.num_fewshot)
    return [row for row in drawn.sample(pool, task.num_fewshot + 1) if row is not doc][: task.num_fewshot]


def _context(task: SuiteTask, doc: Doc, shots: list[Doc], question: str, chat: ChatText | None, multiturn: bool) -> str:
    description = task.describe(doc)
    examples = [(task.text(shot), task.answer(shot)) for shot in shots]
    written = "".join(f"{text}{BEFORE_ANSWER}{answer}{BETWEEN}" for text, answer in examples)
    if chat is None:
        return description + written + question
    turns: list[Turn] = [{"role": "system", "content": description}] if description else []
    if multiturn:
        for text, answer in examples:
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        turns.append({"role": "user", "content": question})
    else:
        turns.append({"role": "user", "content": written + question})
    return chat(turns)
