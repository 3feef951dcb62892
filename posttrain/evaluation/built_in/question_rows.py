"""Rows with a question and its answers, and rows with choices, in the shapes that data sets have. Torch-free.

    question   as the prompts of every command: prompt | question | query | problem | instruction, or messages; a text
               in `context` or `passage` comes in front of it
    answers    answer | answers | completion | response | output | solution | target: a text, a number, a list of them,
               or an object with `text` or with `value` and `aliases`; of messages, the last turn
    choices    choices | options | endings: a list of texts, or {"text": [...], "label": [...]}, or columns A, B, C, ...
    right one  answer | answerKey | label | gold | target: an index from 0, a letter, a label of the choices, or the
               text of a choice

Other names are given with --columns, as for every other data set.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from string import ascii_uppercase

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Message, Prompt, conversation_of, prompt_of
from gemma2.posttrain.data.shapes.recognise import LISTS, columns_hint, present
from gemma2.posttrain.data.sources import Row, kind

__all__ = ["answers_of", "choices_of", "each_choice_row", "each_question", "right_choice", "the_answers"]

ANSWERS = ("answer", "answers", "completion", "response", "output", "solution", "target")
CHOICES = ("choices", "options", "endings")
RIGHT = ("answer", "answerKey", "label", "gold", "target")
FURTHER = ("context", "passage")
OURS_ANSWERS, OURS_CHOICES, OURS_RIGHT = "accepted_answers", "choice_texts", "right_choice"  # in Prompt.extra


def each_question(path: Path, reading: Reading, limit: int | None = None) -> Iterator[Prompt]:
    """The questions of a data path; `the_answers` gives those of each. Raises InputError at the first bad row."""
    return islice(reading.each(path, lambda row: _question(row, reading.ignored)), limit)


def each_choice_row(path: Path, reading: Reading, limit: int | None = None) -> Iterator[Prompt]:
    """The questions with choices of a data path. Raises InputError at the first bad row."""
    return islice(reading.each(path, lambda row: _choice_row(row, reading.ignored)), limit)


def the_answers(prompt: Prompt) -> list[str]:
    """The accepted answers of a question."""
    found: list[str] = prompt.extra[OURS_ANSWERS]
    return found


def choices_of(prompt: Prompt) -> list[str]:
    """The choices of a question."""
    found: list[str] = prompt.extra[OURS_CHOICES]
    return found


def right_choice(prompt: Prompt) -> int:
    """The index of the right choice."""
    found: int = prompt.extra[OURS_RIGHT]
    return found


def _question(row: Row, ignored: Collection[str]) -> Prompt:
    columns = present(row)
    if set(LISTS) & columns.keys() and not set(ANSWERS) & columns.keys():
        talk = conversation_of(row, ignored)
        if talk.messages[-1]["role"] != "assistant" or len(talk.messages) < 2:
            raise InputError(f"{row.where}: the conversation does not end with the answer", "add the assistant's turn")
        prompt = Prompt(row.where, talk.messages[:-1], talk.extra, talk.shape, talk.notes)
        return _with(prompt, {OURS_ANSWERS: [talk.messages[-1]["content"]]})
    prompt = prompt_of(row, ignored)
    name = next((name for name in ANSWERS if name in columns), None)
    if name is None:
        known = [name for name in columns if name not in prompt.extra]
        raise InputError(f"{row.where}: no 'answer'", columns_hint(columns, "answer", known=known))
    return _with(_with_context(prompt, columns), {OURS_ANSWERS: answers_of(row.where, name, columns[name])})


def answers_of(where: str, name: str, value: object) -> list[str]:
    """The accepted answers in a column. Raises InputError for anything that is not text or a number."""
    if isinstance(value, Mapping):
        inner = [value[key] for key in ("text", "value", "aliases") if key in value]
        value = [item for part in inner for item in (part if isinstance(part, list) else [part])]
    values = value if isinstance(value, list) else [value]
    found = []
    for item in values:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise InputError(f"{where}: '{name}' holds {kind(item)}", "write a text, a number, or a list of them")
        found.append(str(item))
    if not any(text.strip() for text in found):
        raise InputError(f"{where}: '{name}' is empty", "write the answer, or leave the row out (--on-bad-row skip)")
    return found


def _choice_row(row: Row, ignored: Collection[str]) -> Prompt:
    columns = present(row)
    prompt = _with_context(prompt_of(row, ignored), columns)
    name, texts, labels = _choices(row, columns)
    right = next((name for name in RIGHT if name in columns), None)
    if right is None:
        known = [*(key for key in columns if key not in prompt.extra), name]
        raise InputError(f"{row.where}: no 'answer'", _scalar_hint(columns, known))
    index = _index(row.where, right, columns[right], texts, labels)
    return _with(prompt, {OURS_CHOICES: texts, OURS_RIGHT: index})


def _scalar_hint(columns: JsonMapping, known: Collection[str]) -> str:
    left = [name for name, value in columns.items() if name not in known and isinstance(value, str | int)]
    return f"name the column: --columns answer={left[0] if len(left) == 1 else 'NAME'}"


def _choices(row: Row, columns: JsonMapping) -> tuple[str, list[str], list[str]]:
    """The column, texts and labels of the choices."""
    name = next((name for name in CHOICES if name in columns), None)
    if name is None:
        letters = [letter for letter in ascii_uppercase if letter in columns]
        if len(letters) < 2 or letters != list(ascii_uppercase[: len(letters)]):
            lists = [key for key, value in columns.items() if isinstance(value, list)]
            hint = f"name the column: --columns choices={lists[0] if len(lists) == 1 else 'NAME'}"
            raise InputError(f"{row.where}: no 'choices'", hint)
        return "A", _texts(row.where, "A", [columns[letter] for letter in letters]), letters
    given = columns[name]
    labelled = isinstance(given, Mapping)
    labels = (given.get("label") or []) if labelled else []
    texts = _texts(row.where, name, given.get("text") if labelled else given)
    if not isinstance(labels, list) or (labels and len(labels) != len(texts)):
        raise InputError(f"{row.where}: '{name}' has {len(texts)} texts and other labels", "give a label for each")
    return name, texts, [str(label) for label in labels]


def _texts(where: str, name: str, value: object) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise InputError(f"{where}: '{name}' is {kind(value)}", "write a list of two or more texts")
    texts = [str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item for item in value]
    wrong = next((item for item in texts if not isinstance(item, str) or not item.strip()), None)
    if wrong is not None or None in texts:
        raise InputError(f"{where}: '{name}' holds an empty choice or one that is not a text", "write a text for each")
    return texts


def _index(where: str, name: str, value: object, texts: Sequence[str], labels: Sequence[str]) -> int:
    """The index of the right choice. Raises InputError for an answer that could be no choice, or two of them."""
    count = len(texts)
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < count:
            return value
        raise InputError(f"{where}: '{name}' is {value}, and the choices are 0 to {count - 1}", "count from 0")
    if not isinstance(value, str):
        raise InputError(f"{where}: '{name}' is {kind(value)}", "write the index from 0, the letter, or the text")
    text = value.strip()
    found = {i for i, choice in enumerate(texts) if choice.strip() == text}
    if text in labels:
        found.add(list(labels).index(text))
    elif len(text) == 1 and text.upper() in ascii_uppercase[:count]:
        found.add(ascii_uppercase.index(text.upper()))
    elif text.isdecimal() and int(text) < count:
        found.add(int(text))
    if len(found) > 1:
        raise InputError(
            f"{where}: '{name}' {text!r} could be choice {' or '.join(map(str, sorted(found)))}",
            "write the index as a number",
        )
    if not found:
        raise InputError(f"{where}: '{name}' {text!r} is not one of the {count} choices", "write the index from 0")
    return found.pop()


def _with_context(prompt: Prompt, columns: JsonMapping) -> Prompt:
    """The question behind the text that it is about, where the row has one that is not part of it yet."""
    name = next((name for name in FURTHER if isinstance(columns.get(name), str) and name in prompt.extra), None)
    if name is None:
        return prompt
    last = prompt.messages[-1]
    asked: Message = {"role": last["role"], "content": f"{columns[name]}\n\n{last['content']}".strip()}
    rest = {key: value for key, value in prompt.extra.items() if key != name}
    return Prompt(prompt.where, [*prompt.messages[:-1], asked], rest, prompt.shape, prompt.notes)


def _with(prompt: Prompt, ours: JsonObject) -> Prompt:
    return Prompt(prompt.where, prompt.messages, prompt.extra | ours, prompt.shape, prompt.notes)
