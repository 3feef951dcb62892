"""The interface of an engine: requests for one turn each in, completions out. Torch-free.

An engine knows nothing of data files, journals or conversations. It may answer in any order; the key says which
request a completion belongs to, and the caller restores the order. Engines: `local.py` (our sampler), `offline.py`
(vLLM), `server.py` (an OpenAI-compatible server).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Protocol

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject

if TYPE_CHECKING:
    from gemma2.posttrain.data.chat import ChatFormat

__all__ = ["LENGTH", "OVERLONG", "STOP", "Completion", "Engine", "Key", "Message", "Request"]

Message = dict[str, str]
Key = tuple[int, int, int]  # number of the prompt, of the sample, of the turn
STOP, LENGTH = "stop", "length"  # the reasons of an answer; every other one drops it
OVERLONG = "overlong"


@dataclass(frozen=True)
class Request:
    """One turn to be drawn. `where`: `file:line` of its prompt; `ids`: token ids, empty where a server tokenises."""

    key: Key
    where: str
    messages: list[Message]
    ids: list[int]
    seed: int  # 32 bits; with the same one an engine that can repeat itself does


@dataclass(frozen=True)
class Completion:
    """One drawn turn.

    finish_reason: `stop`; `length` (the limit came first); anything else drops the turn: `overlong` (the prompt did not
    fit, nothing was drawn), `content_filter`, `tool_calls` and whatever else an engine reports. Token counts are None
    where a server does not report them, `logprob` (nats) where it is not asked for. `model`: the model that a server
    says it used; `redirect`: the address that answered, where it is not the one that was asked.
    """

    key: Key
    text: str
    finish_reason: str
    tokens: int | None = None
    prompt_tokens: int | None = None
    logprob: float | None = None
    ids: list[int] = field(default_factory=list)
    model: str | None = None
    redirect: str | None = None

    @classmethod
    def overlong(cls, key: Key, prompt_tokens: int | None = None) -> Completion:
        """The completion of a prompt that does not fit."""
        return cls(key, "", OVERLONG, 0, prompt_tokens)

    def record(self) -> JsonObject:
        """As a line of a journal."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: JsonObject) -> Completion:
        """The inverse of `record`. Raises InputError for a record that another program wrote."""
        try:
            row, sample, turn = record["key"]
            return cls(**{**record, "key": (row, sample, turn)})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                "the journal of answers holds a record that is not a completion", "start over with --force"
            ) from error


class Engine(Protocol):
    """Something that answers."""

    @property
    def chat(self) -> ChatFormat | None:
        """The chat format that turns prompts into token ids; None where a server does it."""
        ...

    @property
    def window(self) -> int | None:
        """Longest prompt in tokens; None where only the server knows."""
        ...

    @property
    def chunk(self) -> int:
        """Requests that should be given at once."""
        ...

    def encode(self, messages: list[Message]) -> list[int]:
        """Token ids of a prompt, generation prompt included; empty for a server. Raises InputError."""
        ...

    def complete(self, requests: Sequence[Request], known: Container[Key]) -> Iterator[list[Completion]]:
        """Answer the requests, as groups of completions that are ready to be saved.

        Keys in `known` are answered already and may be left out. The answer to a request does not depend on `known`.
        Raises InputError for a failure that another attempt cannot fix.
        """
        ...

    def facts(self) -> JsonObject:
        """Facts about the engine that the manifest records beyond the configuration; nothing secret."""
        ...

    def close(self) -> None:
        """Release memory and connections."""
        ...
