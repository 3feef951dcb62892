"""What a server may send in answer to `POST .../chat/completions`: one table, checked where the body is read.

    choices[0].message.content      text, null, or a list of text parts, which are joined
    choices[0].message.tool_calls   a list or null; with an item in it, the answer is a call, whatever its reason says
    choices[0].finish_reason        text; `stop` and `length` are answers, `AGAIN` is asked again, the rest is dropped
    choices[0].logprobs.content     items with a finite `logprob`; anything else counts as not given
    usage.*_tokens                  whole numbers from 0; anything else counts as not given
    model                           text: the model that the server says it used
    error                           an error with status 200: its text, and its code if that is a status

A body that does not fit, or is not JSON, is `Unreadable` and may be asked for again. Text that UTF-8 cannot hold (half
a surrogate pair) is an answer that is dropped: the same seed would bring it again, and it would be paid for again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gemma2.core.outputs.safetensors_header import printable

from .base import LENGTH, STOP

__all__ = ["AGAIN", "MOST_BYTES", "Answer", "ServerError", "Unreadable", "read_reply"]

# Any: JSON that is checked on its own, so that a bad figure does not cost the answer that it belongs to.
Loose = Any

AGAIN = ("abort", "error", "insufficient_system_resource")  # the server says that it failed: another attempt may not
CALL, NOT_TEXT, UNKNOWN = "tool_calls", "not_utf8", "unknown"  # reasons that we give
MOST_BYTES = 64 * 2**20  # of a body: a completion of a million tokens with log-probs
LARGEST = 2**53  # of a count: what every reader of JSON can hold
LEAST = -1e6  # of a log-prob, nats: servers send -9999 for "none"


class Unreadable(Exception):
    """A body that is not a completion."""


class ServerError(Exception):
    """An error in a body with status 200. `status` is None where the error does not name one."""

    def __init__(self, error: object) -> None:
        super().__init__("an error with status 200")
        self.error = error
        code = error.get("code") if isinstance(error, dict) else None
        digits = code if isinstance(code, int) else int(code) if isinstance(code, str) and code.isdecimal() else 0
        self.status = digits if 400 <= digits <= 599 else None


@dataclass(frozen=True)
class Answer:
    """A checked answer. `reason` is `stop`, `length`, one of `AGAIN`, or why the answer is dropped.

    ill_formed: figures that were sent and could not be read.
    """

    text: str
    reason: str
    tokens: int | None
    prompt_tokens: int | None
    logprob: float | None
    model: str | None
    ill_formed: tuple[str, ...]


class _Sent(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, defer_build=True, protected_namespaces=())


S = TypeVar("S", bound=_Sent)


class _Part(_Sent):
    type: Literal["text"]
    text: str


class _Message(_Sent):
    content: str | list[_Part] | None = None
    tool_calls: list[Loose] | None = None
    function_call: Loose = None


class _Choice(_Sent):
    message: _Message
    finish_reason: Loose = None
    logprobs: Loose = None


class _Body(_Sent):
    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: Loose = None
    model: Loose = None


def _whole(value: object) -> object:
    """7.0 as 7: some servers have only one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Count = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=LARGEST)]


class _Usage(_Sent):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None


class _Logprob(_Sent):
    logprob: Annotated[float, Field(ge=LEAST, le=1, allow_inf_nan=False)]


class _Logprobs(_Sent):
    content: list[_Logprob] | None = None


def read_reply(body: bytes) -> Answer:
    """Return the answer in a body. Raises Unreadable if it is not a completion, ServerError if it is an error."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON: {error}") from error
    if isinstance(document, dict) and document.get("error"):
        raise ServerError(document["error"])
    try:
        sent = _Body.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise Unreadable(f"{place}: {first['msg'].lower()}") from error
    choice = sent.choices[0]
    ill_formed: list[str] = []
    usage = _figures(_Usage, sent.usage, "usage", ill_formed)
    logprobs = _figures(_Logprobs, choice.logprobs, "logprobs", ill_formed)
    text = _text(choice.message)
    return Answer(
        text=text if _is_utf8(text) else "",
        reason=_reason(choice, text),
        tokens=usage.completion_tokens,
        prompt_tokens=usage.prompt_tokens,
        logprob=None if logprobs.content is None else round(sum(item.logprob for item in logprobs.content), 4),
        model=printable(sent.model) if isinstance(sent.model, str) and sent.model else None,
        ill_formed=tuple(ill_formed),
    )


def _figures(schema: type[S], value: object, name: str, ill_formed: list[str]) -> S:
    """Figures next to an answer; those that cannot be read are not given."""
    try:
        return schema.model_validate({} if value is None else value)
    except ValidationError:
        ill_formed.append(name)
        return schema()


def _text(message: _Message) -> str:
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or ""


def _reason(choice: _Choice, text: str) -> str:
    """The reason of an answer: the server's, unless what it sent is not a text."""
    if choice.message.tool_calls or choice.message.function_call:
        return CALL
    said = choice.finish_reason
    if not isinstance(said, str) or not said:
        return UNKNOWN
    if said in (STOP, LENGTH) and not _is_utf8(text):
        return NOT_TEXT
    return printable(said[:40])


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
