"""A question as token ids, with solved questions in front: as chat turns, or as plain text.

    chat    <bos><start_of_turn>user Q1<end_of_turn> <start_of_turn>model A1<end_of_turn> ... Q <start_of_turn>model
    plain   <bos>Question: Q1\\nAnswer: A1\\n\\n ... Question: Q\\nAnswer:

Every sequence has exactly one <bos>, whatever the tokenizer adds by itself. A question that is longer than the model's
context loses its beginning behind the <bos>, as in lm-eval; such rows are counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from gemma2.core.errors import InputError
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Message, Prompt
from gemma2.posttrain.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig  # imports torch

__all__ = ["STOPS", "QuestionForm", "asking_of", "bos_of", "cut_left", "drawn_shots", "ids_hash", "text_ids"]

STOPS = ("\n\n", "\nQuestion:")  # what ends a plain answer


def bos_of(tokenizer: Tokenizer) -> int:
    """The token that every sequence begins with: <bos>, of a tokenizer without one <eos>. Raises InputError."""
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise InputError(f"{tokenizer.name_or_path} has neither a bos nor an eos token", "set bos_token")
    return found


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text alone: nothing is added, and a control token that is spelled in it is plain text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def ids_hash(ids: Sequence[int]) -> str:
    """A short digest of token ids: equal ones mean that two runs read the same."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


def drawn_shots(rows: Sequence[Prompt], number: int, shots: int, seed: int) -> list[Prompt]:
    """The solved questions in front of row `number`: the first of one drawn list that are not this row.

    Raises InputError for fewer other rows than shots.
    """
    if not shots:
        return []
    if len(rows) <= shots:
        raise InputError(
            f"{len(rows)} rows are too few for --shots {shots}: the shots come from the other rows",
            f"give --shots {len(rows) - 1} or fewer, or more rows",
        )
    drawn = Random(seed).sample(range(len(rows)), shots + 1)
    return [rows[i] for i in drawn if i != number][:shots]


@dataclass(frozen=True)
class QuestionForm:
    """The form of the questions of one model. `chat` None: plain text."""

    tokenizer: Tokenizer
    chat: ChatFormat | None
    system: str | None

    def ids(self, question: Prompt, shots: Sequence[tuple[Prompt, str]]) -> list[int]:
        """Token ids up to where the answer begins."""
        if self.chat is not None:
            return self.chat.prompt_ids(self._turns(question, shots))
        head = f"{self.system}\n\n" if self.system else ""
        solved = "".join(f"Question: {_text(shot.messages)}\nAnswer: {answer}\n\n" for shot, answer in shots)
        text = f"{head}{solved}Question: {_text(question.messages)}\nAnswer:"
        return [bos_of(self.tokenizer), *text_ids(self.tokenizer, text)]

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer behind `ids`."""
        return text_ids(self.tokenizer, answer.strip() if self.chat is not None else f" {answer.strip()}")

    def _turns(self, question: Prompt, shots: Sequence[tuple[Prompt, str]]) -> list[Message]:
        messages = question.messages
        first = [messages[0]] if messages[0]["role"] == "system" else []
        if not first and self.system is not None:
            first = [{"role": "system", "content": self.system}]
        solved: list[Message] = []
        for shot, answer in shots:
            solved += [message for message in shot.messages if message["role"] != "system"]
            solved.append({"role": "assistant", "content": answer})
        return [*first, *solved, *(message for message in messages if message["role"] != "system")]


def asking_of(
    tokenizer: Tokenizer, generation: GenerationConfig | None, chat: bool, system: str | None
) -> tuple[QuestionForm, ChatFormat]:
    """The form of the questions of a model, and its chat format, which also decodes and stops plain answers.

    chat  whether questions are turns
    """
    formatted = ChatFormat(tokenizer, generation)
    return QuestionForm(tokenizer, formatted if chat else None, system), formatted


def _text(messages: Sequence[Message]) -> str:
    return "\n\n".join(message["content"].strip() for message in messages)


def cut_left(ids: list[int], most: int | None) -> list[int]:
    """At most `most` tokens: <bos> and the last ones."""
    return ids if most is None or len(ids) <= most else [ids[0], *ids[len(ids) - most + 1 :]]
