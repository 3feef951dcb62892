"""Messages as data sets write them, read into role and content; nothing else of a message is lost in silence.

    {"role": ..., "content": TEXT | [{"type": "text", "text": ...}, ...]}       {"from": ..., "value": ...}

A message may say whether it is learned: `weight` 0 or 1 (OpenAI), `train` or `trainable` (axolotl and others). Every
other key that has a value is refused, unless `--ignore-keys` names it. Null, an empty list and an empty text are no
value: files of columns fill the keys of all messages.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonMapping, parse_json
from gemma2.posttrain.data.files.row import kind

__all__ = [
    "IgnoredKeys",
    "Message",
    "TurnError",
    "Turns",
    "UnknownKeys",
    "check_order",
    "fold_system",
    "turns_of",
    "unknown_hint",
]

Message = dict[str, str]  # {"role": "system" | "user" | "assistant" | "tool", "content": TEXT}

ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "model": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
CALL_KEYS = {"tool_calls", "function_call", "tool_call_id"}
CALLS = ("function_call", "tool_call")  # roles of ShareGPT files
NAMES = (("role", "from"), ("content", "value", "text"))  # of the two parts of a message: ours, then other people's
WHETHER_LEARNED = ("weight", "train", "trainable")
PART_SEPARATOR = "\n"
SKIP_HINT = "leave such rows out: --on-bad-row skip"


class TurnError(InputError):
    """A conversation whose messages cannot be learned from, in a row that is sound otherwise."""


class UnknownKeys(TurnError):
    """Messages that say more than role and content. `keys`: what else they say."""

    def __init__(self, what: str, hint: str = "", keys: Collection[str] = ()) -> None:
        super().__init__(what, hint)
        self.keys = frozenset(keys)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.what, self.hint, self.keys)


class IgnoredKeys(frozenset[str]):
    """The keys of `--ignore-keys`. `used`: those that a message had, so that the others can be named.

    Raises UsageError for a key that decides what a message is: without it there is no message to learn.
    """

    used: set[str]

    def __new__(cls, keys: Collection[str] = ()) -> IgnoredKeys:
        """The keys, none of them used yet."""
        for key in keys:
            if key in ("role", "content", *WHETHER_LEARNED):
                raise UsageError(f"--ignore-keys {key}: every message is read by it", f"leave out {key}")
        found = super().__new__(cls, keys)
        found.used = set()
        return found


@dataclass(frozen=True)
class Turns:
    """Messages, and the numbers of those that the row excludes from learning."""

    messages: list[Message]
    masked: frozenset[int] = frozenset()


def turns_of(where: str, column: str, value: object, role: str, ignored: Collection[str] = ()) -> Turns:
    """A column as messages; a plain text is one message of `role`. `ignored`: keys of messages that are left out.

    Raises InputError for other values, TurnError for a message that cannot be learned from.
    """
    if isinstance(value, str):
        if column in ("messages", "conversations", "conversation") or _is_a_list_in_a_text(value):
            what = f"{where}: '{column}' is a text, not a list of messages"
            raise InputError(what, _list_hint(where, column, value))
        return Turns([{"role": role, "content": _whole(where, column, value)}])
    if isinstance(value, Mapping):
        value = _rows_of_columns(value)
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: '{column}' is {kind(value)}", "write a text, or a list of messages")
    messages: list[Message] = []
    masked: set[int] = set()
    unknown: list[UnknownKeys] = []
    for index, item in enumerate(value):
        try:
            message, learned = _message(where, f"{column}[{index}]", item, ignored)
        except UnknownKeys as error:
            unknown.append(error)
            continue
        messages.append(message)
        if not learned:
            masked.add(index)
    if unknown:
        keys = frozenset().union(*(error.keys for error in unknown))
        raise UnknownKeys(unknown[0].what, unknown_hint(keys), keys)
    return Turns(messages, frozenset(masked))


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Put a system message in front of the first user message, "{system}\\n\\n{user}", for a template without the role.

    Raises TurnError where no user message follows.
    """
    if not messages or messages[0]["role"] != "system":
        return list(messages)
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise TurnError("a system message is not followed by a user message", "add the user message")
    folded = f"{messages[0]['content']}\n\n{messages[1]['content']}".strip()
    return [{"role": "user", "content": folded}, *messages[2:]]


def check_order(messages: Sequence[Message], ends_with: str | None = None) -> None:
    """Raise TurnError unless user and assistant alternate, beginning with the user, as Gemma's template demands."""
    for index, message in enumerate(messages):
        role = message["role"]
        if role not in ("user", "assistant"):
            raise TurnError(f"the chat template has no role {role!r} (message {index + 1})", SKIP_HINT)
        if role != ("user", "assistant")[index % 2]:
            order = ", ".join(message["role"] for message in messages)
            raise TurnError(
                f"the chat template refuses the turns {order}", "let user and assistant alternate, beginning with user"
            )
    if ends_with is not None and messages[-1]["role"] != ends_with:
        raise TurnError("the conversation does not end with a model turn", 'end it with role "assistant"')


def _rename_hint(name: str, present: Iterable[str]) -> str:
    """The fix for a missing name: most often it is misspelt."""
    present = list(present)
    near = difflib.get_close_matches(name, present, n=1)
    return f"rename '{near[0]}' to '{name}'" if near else f"add '{name}' to {', '.join(present) or 'the empty row'}"


def _message(where: str, place: str, item: object, ignored: Collection[str]) -> tuple[Message, bool]:
    """A message, and whether it is learned as far as it says itself."""
    if isinstance(item, dict) and len(item) == 2:  # the common form, without the questions that others raise
        role, content = item.get("role"), item.get("content")
        if isinstance(role, str) and role in ROLES and isinstance(content, str):
            return {"role": ROLES[role], "content": _whole(where, place, content)}, True
    if not isinstance(item, Mapping):
        raise InputError(f"{where}: '{place}' is {kind(item)}", 'write {"role": ..., "content": ...}')
    said = {
        name: value for name, value in item.items() if value not in (None, [], {}, "") or name in ("content", "value")
    }
    keys = [next((name for name in names if name in said), names[0]) for names in NAMES]
    role = _role(where, place, keys[0], said)
    learned = _learned(where, place, role, said)
    more = said.keys() - {*keys, *WHETHER_LEARNED}
    if isinstance(ignored, IgnoredKeys):
        ignored.used |= more & ignored
    unknown = sorted(more - set(ignored))
    if unknown:
        what = f"{where}: '{place}' also has {', '.join(unknown)}, which nothing learns"
        raise UnknownKeys(what, unknown_hint(unknown), unknown)
    return {"role": role, "content": _content(where, f"{place}.{keys[1]}", keys[1], said)}, learned


def _role(where: str, place: str, key: str, said: JsonMapping) -> str:
    value = _needed(where, place, key, said)
    if not isinstance(value, str):
        raise InputError(f"{where}: '{place}.{key}' is {kind(value)}", "write a text")
    if value in CALLS:
        raise TurnError(f"{where}: '{place}' is a function call, which nothing learns", SKIP_HINT)
    if value not in ROLES:
        near = difflib.get_close_matches(value, ROLES, n=1, cutoff=0.8)
        raise TurnError(
            f"{where}: '{place}.{key}' is {value!r}, an unknown role",
            f"write '{near[0]}'" if near else SKIP_HINT,
        )
    return ROLES[value]


def _needed(where: str, place: str, key: str, said: JsonMapping) -> object:
    if key in said and said[key] is None:
        raise TurnError(f"{where}: '{place}.{key}' is null", f"write a text, or {SKIP_HINT}")
    if key not in said:
        raise InputError(f"{where}: '{place}' has no '{key}'", _rename_hint(key, said))
    return said[key]


def _learned(where: str, place: str, role: str, said: JsonMapping) -> bool:
    """Whether a message is learned, as `weight`, `train` or `trainable` says; a model turn that says nothing is."""
    verdicts = {}
    for name in WHETHER_LEARNED:
        if (value := said.get(name)) is None:
            continue
        if isinstance(value, str | list | dict) or value not in (0, 1):
            raise TurnError(f"{where}: '{place}.{name}' is {kind(value)}", "write 0 or 1; shares are not supported")
        if value and role != "assistant":
            raise TurnError(
                f"{where}: '{place}.{name}' asks to learn a turn of the {role}",
                "only turns of the assistant are learned",
            )
        verdicts[name] = bool(value)
    if len(set(verdicts.values())) > 1:
        raise TurnError(f"{where}: '{place}' has {' and '.join(verdicts)}, which contradict each other", "keep one")
    return next(iter(verdicts.values()), True)


def _content(where: str, place: str, key: str, said: JsonMapping) -> str:
    value = _needed(where, place.rpartition(".")[0], key, said)
    if isinstance(value, list):
        return PART_SEPARATOR.join(_part(where, f"{place}[{index}]", part) for index, part in enumerate(value))
    if not isinstance(value, str):
        raise InputError(f"{where}: '{place}' is {kind(value)}", "write a text")
    return _whole(where, place.rpartition(".")[0], value)


def _part(where: str, place: str, part: object) -> str:
    """The text of a part of a message."""
    if isinstance(part, str):
        return _whole(where, place, part)
    if not isinstance(part, Mapping):
        raise InputError(f"{where}: '{place}' is {kind(part)}", 'write {"type": "text", "text": ...}')
    named = str(part.get("type") or "text")
    text = part.get("text", part.get("content"))
    if named not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise TurnError(f"{where}: '{place}' is of type {named!r}", f"only text is learned; {SKIP_HINT}")
    rest = [name for name, value in part.items() if name not in ("type", "text", "content") and value is not None]
    if rest:
        raise TurnError(f"{where}: '{place}' has {', '.join(rest)} next to its text", SKIP_HINT)
    return _whole(where, place, text)


def unknown_hint(keys: Collection[str]) -> str:
    """What to do about keys of messages that nothing reads; an answer without its tool call would be another answer."""
    if CALL_KEYS & set(keys):
        return SKIP_HINT
    return f"leave out the keys (--ignore-keys {','.join(sorted(keys))}), or the rows (--on-bad-row skip)"


def _rows_of_columns(value: JsonMapping) -> object:
    """A list of messages that was stored column by column: {"role": [...], "content": [...]}."""
    columns = list(value.values())
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]
    if {"role", "from"} & value.keys():  # one message in place of a list of one
        return [value]
    return value


def _list_hint(where: str, column: str, text: str) -> str:
    if not _is_a_list_in_a_text(text):
        return "write a list of messages"
    path = where.rpartition(":")[0]
    out = f"{Path(path).name.split('.')[0]}-lists.jsonl"
    return f"write the list itself: gemma2 data convert {path} --parse-json {column} --out {out}"


def _is_a_list_in_a_text(text: str) -> bool:
    """Whether a text is the JSON, or the Python notation, of a list of messages."""
    if not text.lstrip().startswith("[{"):
        return False
    try:
        found = parse_json(text)
    except ValueError:
        return "'role'" in text[:64] or "'from'" in text[:64] or "'content'" in text[:64]
    return all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in found)


def _whole(where: str, place: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: '{place}' holds half of a surrogate pair", "write the whole character") from error
    return text
