"""One table of shapes: by which columns a row is recognised, and what it becomes.

    shape               columns                                                becomes
    messages            messages                                               the conversation
    sharegpt            conversations | conversation                           the conversation
    prompt-completion   prompt, completion                                     prompt, completion
    alpaca              instruction [, input | context] [, history], output    prompt, completion
    question-answer     prompt | question | query | problem | instruction,     prompt, completion
                        completion | answer | response | output | solution
    dialogue            text, "Human: ... Assistant: ..."                      the conversation

A row with `chosen` and `rejected` is a preference pair, whatever other columns it has: as a conversation it is refused.
Of several names for one thing ours wins (`prompt`, `completion`), and a list of messages wins over both. A text in
`system`, `system_prompt` becomes the system message in front. `Shaped.read` names the columns that were used; what is
left is for the caller to name. A null column is an absent one.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.posttrain.data.files.row import ColumnNames, Row, kind

from .texts import dialogue_of, is_dialogue
from .turns import SKIP_HINT, Message, TurnError, Turns, check_order, fold_system, turns_of

__all__ = [
    "Ambiguous",
    "Shaped",
    "columns_hint",
    "conversation_shape",
    "present",
    "prompt_of_row",
    "prompt_shape",
    "with_system",
]

ASKED = ("prompt", "question", "query", "problem", "instruction")  # names of the prompt
ANSWERED = ("completion", "answer", "response", "output", "solution")  # names of the answer
FURTHER = ("input", "context")  # what Alpaca's and Dolly's instructions are about
SYSTEM = ("system", "system_prompt")
LISTS = ("messages", "conversations", "conversation")  # names of a list of messages


class Ambiguous(InputError):
    """A row of which several columns could be the prompt, or the answer."""


@dataclass(frozen=True)
class Shaped:
    """A row in our form. `answer`: number of the first message of the completion, where a row has one."""

    shape: str
    turns: Turns
    read: frozenset[str]
    answer: int | None = None
    notes: tuple[str, ...] = field(default=())


def present(row: Row) -> JsonObject:
    """The columns of a row that are not null."""
    return {name: value for name, value in row.columns.items() if value is not None}


def conversation_shape(row: Row, ignored: Collection[str] = ()) -> Shaped:
    """The conversation of a row. Raises InputError with file, line and fix for a row without one."""
    columns = present(row)
    if {"chosen", "rejected"} <= columns.keys():  # first: its other columns are metadata of the pair
        what = f"{row.where}: a preference pair, where a conversation is needed"
        raise InputError(what, f"train on it with gemma2 reward{_chosen_hint(row, ignored)}")
    for name in LISTS:
        if name in columns:
            turns = turns_of(row.where, name, columns[name], "user", ignored)
            return with_system(row, Shaped("messages" if name == "messages" else "sharegpt", turns, frozenset({name})))
    if "text" in columns and isinstance(columns["text"], str) and not (columns.keys() & set(ANSWERED)):
        return _dialogue(row, columns["text"])
    answer = _one_of(row, columns, ANSWERED, "completion")
    asked = prompt_of_row(row, columns, ignored)
    if answer is None or asked is None:
        raise _unrecognised(row, columns)
    given, read, shape = asked
    completion = turns_of(row.where, answer, columns[answer], "assistant", ignored)
    if answer not in ("output", "response") and shape == "alpaca" and "instruction" not in read:
        shape = "question-answer"
    return with_system(row, _joined(row, shape, given, completion, read | {answer}))


def prompt_shape(row: Row, ignored: Collection[str] = ()) -> Shaped:
    """The prompt of a row. Raises InputError with file, line and fix for a row without one."""
    columns = present(row)
    if (asked := prompt_of_row(row, columns, ignored)) is not None:
        turns, read, shape = asked
        return with_system(row, Shaped(shape, turns, read))
    for name in LISTS:
        if name in columns:
            turns = turns_of(row.where, name, columns[name], "user", ignored)
            if turns.messages[-1]["role"] != "user":
                path = row.where.rpartition(":")[0]
                raise InputError(
                    f"{row.where}: '{name}' end with a turn of the {turns.messages[-1]['role']}",
                    f"end a prompt with a user message: gemma2 data convert {path} --to prompts --out prompts.jsonl",
                )
            return with_system(row, Shaped("messages", turns, frozenset({name})))
    if isinstance(columns.get("text"), str) and is_dialogue(columns["text"]):
        return with_system(row, Shaped("dialogue", Turns(dialogue_of(columns["text"])), frozenset({"text"})))
    if "prompt" in row.columns:
        raise InputError(f"{row.where}: 'prompt' is null", "write a text, or a list of messages")
    raise InputError(f"{row.where}: no 'prompt'", columns_hint(columns, "prompt"))


def with_system(row: Row, shaped: Shaped) -> Shaped:
    """The row with the text of its system column as the first message. Raises TurnError where there are two."""
    columns = present(row)
    names = [name for name in SYSTEM if isinstance(columns.get(name), str) and columns[name].strip()]
    if not names:
        return shaped
    text, messages = columns[names[0]], shaped.turns.messages
    if len(names) > 1 or (messages[0]["role"] == "system" and messages[0]["content"].strip() != text.strip()):
        raise TurnError(f"{row.where}: two system texts, in '{names[0]}' and in the messages", "keep one")
    read = shaped.read | {names[0]}
    if messages[0]["role"] == "system":
        return Shaped(shaped.shape, shaped.turns, read, shaped.answer, shaped.notes)
    turns = Turns(
        [{"role": "system", "content": text}, *messages], frozenset(index + 1 for index in shaped.turns.masked)
    )
    answer = None if shaped.answer is None else shaped.answer + 1
    return Shaped(shaped.shape, turns, read, answer, shaped.notes)


def prompt_of_row(row: Row, columns: JsonMapping, ignored: Collection[str]) -> tuple[Turns, frozenset[str], str] | None:
    """The prompt of a row that has it in its own column: messages, the columns that were read, the shape."""
    name = _one_of(row, columns, ASKED, "prompt")
    if name is None:
        return None
    turns = _asked(row, name, columns[name], ignored)
    if name != "instruction":
        return turns, frozenset({name}), "prompt-completion" if name == "prompt" else "question-answer"
    read = {name}
    text = turns.messages[-1]["content"]
    for further in FURTHER:
        if isinstance(columns.get(further), str):
            read.add(further)
            text = f"{text}\n\n{columns[further]}".strip()
    messages = [*turns.messages[:-1], {"role": "user", "content": text}]
    if columns.get("history"):
        messages = [*_history(row, columns["history"]), *messages]
    return Turns(messages), frozenset(read | ({"history"} & columns.keys())), "alpaca"


def _asked(row: Row, name: str, value: object, ignored: Collection[str]) -> Turns:
    if isinstance(value, str) and is_dialogue(value):
        return Turns(dialogue_of(value))
    return turns_of(row.where, name, value, "user", ignored)


def _history(row: Row, value: object) -> list[Message]:
    """The earlier turns of an Alpaca row: [[question, answer], ...]."""
    pairs = value if isinstance(value, list) else None
    if pairs is None or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise InputError(f"{row.where}: 'history' is {kind(value)}", "write [[question, answer], ...]")
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _one_of(row: Row, columns: JsonMapping, names: Sequence[str], ours: str) -> str | None:
    """The column that holds what we call `ours`. Raises Ambiguous where several could."""
    if ours in columns:
        return ours
    found = [name for name in names if name in columns]
    if len(found) > 1:
        raise Ambiguous(
            f"{row.where}: {' and '.join(repr(name) for name in found)} could both be the {ours}",
            f"say which one: --columns {ours}={found[0]}",
        )
    return found[0] if found else None


def _joined(row: Row, shape: str, prompt: Turns, completion: Turns, read: frozenset[str]) -> Shaped:
    """Prompt and completion as one conversation; a completion that repeats the prompt gets it once."""
    given, said = prompt.messages, completion.messages
    notes: tuple[str, ...] = ()
    if len(said) > len(given) and said[: len(given)] == given:
        return Shaped(shape, completion, read, len(given), ("the completion repeats the prompt, which is taken once",))
    masked = prompt.masked | {index + len(given) for index in completion.masked}
    return Shaped(shape, Turns([*given, *said], frozenset(masked)), read, len(given), notes)


def _dialogue(row: Row, text: str) -> Shaped:
    if not is_dialogue(text):
        raise InputError(
            f"{row.where}: 'text' is one text, without turns",
            "write 'prompt' and 'completion', or 'messages'; texts without turns are for pre-training",
        )
    return with_system(row, Shaped("dialogue", Turns(dialogue_of(text)), frozenset({"text"})))


def _unrecognised(row: Row, columns: JsonMapping) -> InputError:
    asked = [name for name in ASKED if name in columns]
    answered = [name for name in ANSWERED if name in columns]
    if asked:
        return InputError(f"{row.where}: no 'completion'", columns_hint(columns, "completion", known=asked))
    if answered:
        return InputError(f"{row.where}: no 'prompt'", columns_hint(columns, "prompt", known=answered))
    what = f"{row.where}: neither 'messages' nor 'prompt' and 'completion'"
    lists = [name for name, value in columns.items() if isinstance(value, list)]
    if lists or difflib.get_close_matches("messages", columns, n=1):
        return InputError(what, columns_hint({n: columns[n] for n in lists} or columns, "messages"))
    return InputError(what, columns_hint(columns, "prompt", "completion"))


def _chosen_hint(row: Row, ignored: Collection[str]) -> str:
    """How the chosen answer of a pair can be learned, if the row can then be read: where its prompt is decides it."""
    lists = [f"prompt={name},completion=chosen" for name in LISTS if name in present(row)]
    for renames in ("completion=chosen", *lists, "messages=chosen", "text=chosen"):
        ours = [item.partition("=")[0] for item in renames.split(",")]
        columns = ColumnNames(renames.split(",")).apply(row.columns)
        try:
            found = conversation_shape(Row(row.where, columns), ignored)
            check_order(fold_system(found.turns.messages), ends_with="assistant")
        except InputError:
            continue
        asked = found.turns.messages[: found.answer or 1]
        if found.read.issuperset(ours) and asked[-1]["role"] != "assistant":  # else the prompt has an answer already
            return f", or learn the chosen answer: --columns {renames}"
    return ""


def columns_hint(columns: JsonMapping, *wanted: str, known: Collection[str] = ()) -> str:
    """The `--columns` that names what is missing: a column of a similar name, or the only one that is left.

    Where several could be meant the hint lists them: a guess could train on the wrong ones.
    """
    left = [name for name in columns if name not in known and isinstance(columns[name], str | list)]
    found: dict[str, str] = {}
    for ours in wanted:
        near = difflib.get_close_matches(ours, [name.lower() for name in left], n=1)
        meant = [name for name in left if name.lower() in near] or (left if len(left) == len(wanted) == 1 else [])
        if meant:
            found[ours] = meant[0]
            left.remove(meant[0])
    if len(found) == len(wanted):
        return "name the columns: --columns " + ",".join(f"{ours}={theirs}" for ours, theirs in found.items())
    if not left:
        missing = " and ".join(repr(ours) for ours in wanted if ours not in found)
        return f"write {missing}, or {SKIP_HINT}"
    blanks = ",".join(f"{ours}={found.get(ours, 'NAME')}" for ours in wanted)
    return f"say which of {', '.join(left)} they are: --columns {blanks}"
