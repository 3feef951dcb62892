"""Scores for answered prompts, chunk by chunk, with a separate journal: a reward model reads each answer once.

The score of a conversation is that of its last model turn, given everything before it.

Several processes are dealt the chunks in turns, whole ones, so that the same rows share a batch with any number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING

from gemma2.core.errors import InputError
from gemma2.core.progress import Progress
from gemma2.posttrain.rewards.functions import Sampled, Score

from .answers import Answering
from .dialogues import Dialogue
from .journal import Journal

if TYPE_CHECKING:
    from gemma2.posttrain.data.chat import ChatFormat

__all__ = ["Scored", "scored"]

Scored = list[tuple[Dialogue, float | None]]  # of one chunk; None where there was nothing to score


def scored(
    answering: Answering,
    journal: Journal,
    score: Score,
    chat: ChatFormat | None,
    wanted: Callable[[Dialogue], bool],
    progress: Progress,
) -> Iterator[Scored]:
    """The chunks of a finished job with the score of every wanted dialogue.

    `chat` gives token ids: that of the engine, or the reward model's own where a server answered; None for functions
    that read text. A chunk is scored as a whole, so that a resumed run puts the same rows into the same batches.
    Every rank of the job must walk all of it; journal and dialogues are those of rank 0.
    """
    ranks = answering.ranks
    known = (record["scores"] for record in journal.records())
    chunks = zip(answering.dialogues(), chain(known, repeat(None))) if ranks.is_main else iter(())  # noqa: B905 - endless
    with progress.task("score", total=None, unit="completions") as bar:
        while several := ranks.on_main(lambda: list(islice(chunks, ranks.size))):
            missing = [dialogues for dialogues, values in several if values is None]
            scores = ranks.dealt(missing, lambda dialogues: _score(dialogues, score, chat, wanted))
            for dialogues, values in several:
                found = next(scores) if values is None else values
                if values is None:
                    journal.append([{"scores": found}])
                bar.advance(len(dialogues))
                yield list(zip(dialogues, found, strict=True))


def _score(
    dialogues: Sequence[Dialogue], score: Score, chat: ChatFormat | None, wanted: Callable[[Dialogue], bool]
) -> list[float | None]:
    chosen = [i for i, dialogue in enumerate(dialogues) if wanted(dialogue)]
    values: list[float | None] = [None] * len(dialogues)
    if chosen:
        columns = score(_sampled([dialogues[i] for i in chosen], chat))
        if "reward" not in columns:
            raise InputError(f"the judge returned {', '.join(columns)} and no 'reward'", "return plain numbers")
        for i, value in zip(chosen, columns["reward"], strict=True):
            values[i] = value
    return values


def _sampled(dialogues: Sequence[Dialogue], chat: ChatFormat | None) -> Sampled:
    """Dialogues for a score: everything before the last model turn is the prompt."""
    rows = [replace(dialogue.prompt, messages=dialogue.messages[:-1]) for dialogue in dialogues]
    prompts = [chat.prompt_ids(row.messages) if chat else [] for row in rows]
    return Sampled(
        rows=rows,
        prompts=prompts,
        completions=[_ids(d, prompt, chat) for d, prompt in zip(dialogues, prompts, strict=True)],
        texts=[dialogue.answers[-1].text for dialogue in dialogues],
        truncated=[dialogue.fate == "length" for dialogue in dialogues],
    )


def _ids(dialogue: Dialogue, prompt: list[int], chat: ChatFormat | None) -> Sequence[int]:
    """Token ids of the last model turn: as drawn, as `chat` writes its text, or only as many as a server counted."""
    answer = dialogue.answers[-1]
    if answer.ids:
        return answer.ids
    if chat is None:
        return range(answer.tokens or 0)
    whole, _ = chat.example(dialogue.messages, "eot", truncated=dialogue.fate == "length")
    return whole[len(prompt) :]
