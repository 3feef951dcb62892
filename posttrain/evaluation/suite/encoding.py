"""Requests as token ids: exactly one <bos>, the boundary of context and continuation as lm-eval draws it. Torch-free.

    ids = <bos> + tokens(context + continuation);   targets = what follows the tokens of the context alone

Blanks at the end of a context belong to the continuation, so that words keep their tokens (TemplateLM._encode_pair of
lm-eval 0.4.13). What is longer than the context window is cut on the left.

Deviation from lm-eval: <bos> is ours whatever the tokenizer's post-processor does (0.4.13 leaves it to the tokenizer:
none or two, silently), and a cut keeps it, so one more token of text goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from gemma2.core.errors import InputError

from .prompts import Asked, ChatText, Turn

if TYPE_CHECKING:
    from gemma2.posttrain.data.chat import ChatFormat
    from gemma2.posttrain.data.tokenizer import Tokenizer

__all__ = ["Encoder", "TokenRequest", "chat_text", "hash_of"]


@dataclass(frozen=True)
class TokenRequest:
    """Token ids, of which the last `targets` are scored; `cut`: tokens left out on the left."""

    ids: list[int]
    targets: int
    cut: int = 0


class Encoder:
    """Encodes texts for a model with a context of `length` tokens."""

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.bos = tokenizer.bos_token_id

    def with_bos(self, text: str) -> str:
        """The text with <bos> in front, once, for an engine that encodes by itself."""
        bos = self.tokenizer.bos_token
        return text if bos is None or text.startswith(bos) else bos + text

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, with <bos> in front of each, once."""
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        if self.bos is None:
            return found
        return [ids if ids[:1] == [self.bos] else [self.bos, *ids] for ids in found]

    def choices(self, asked: Sequence[Asked]) -> list[list[TokenRequest]]:
        """The requests of rows with choices: one list for each row."""
        pairs = [self._moved(*pair) for row in asked for pair in row.pairs]
        contexts = list(dict.fromkeys(context for context, _ in pairs))
        lengths = {text: len(ids) for text, ids in zip(contexts, self.encode(contexts), strict=True)}
        wholes = iter(zip(pairs, self.encode([context + ending for context, ending in pairs]), strict=True))
        return [[self._request(row, lengths, *next(wholes)) for _ in row.continuations] for row in asked]

    def prompts(self, asked: Sequence[Asked], max_new_tokens: int) -> list[TokenRequest]:
        """The prompts of rows whose answers are written, with room for `max_new_tokens`."""
        room = self.length - max_new_tokens
        if room < 2:
            raise InputError(
                f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in a context of {self.length} tokens",
                f"give {self.length // 2} or fewer",
            )
        return [
            self._cut(row, ids, 0, room)
            for row, ids in zip(asked, self.encode([row.contexts[0] for row in asked]), strict=True)
        ]

    def _moved(self, context: str, continuation: str) -> tuple[str, str]:
        kept = context.rstrip() or context
        return kept, context[len(kept) :] + continuation

    def _request(self, row: Asked, lengths: dict[str, int], pair: tuple[str, str], ids: list[int]) -> TokenRequest:
        targets = len(ids) - lengths[pair[0]]
        if targets < 1:
            raise InputError(f"row {row.id}: a choice has no tokens after its question", "correct the choices")
        return self._cut(row, ids, targets, self.length + 1)

    def _cut(self, row: Asked, ids: list[int], targets: int, room: int) -> TokenRequest:
        cut = len(ids) - room
        kept = 0 if self.bos is None else 1
        if targets > room - 2:
            raise InputError(
                f"row {row.id}: a choice of {targets} tokens does not fit a context of {self.length}", "remove the row"
            )
        short = ids if cut <= 0 else [*ids[:kept], *ids[cut + kept :]]
        if self.bos is not None and (short[0] != self.bos or short.count(self.bos) != 1):
            raise InputError(
                f"row {row.id}: its prompt has {short.count(self.bos)} <bos> tokens, and one belongs there",
                f"take {self.tokenizer.bos_token} out of the row's text",
            )
        return TokenRequest(short, targets, max(cut, 0))


def hash_of(requests: Sequence[TokenRequest]) -> str:
    """A digest of the token ids of a row."""
    digest = blake2b(digest_size=16)
    for request in requests:
        digest.update(b"|" + ",".join(map(str, request.ids)).encode() + b"/%d" % request.targets)
    return digest.hexdigest()


def chat_text(chat: ChatFormat) -> ChatText:
    """Turns as the model's own template writes them; a system text that it refuses goes into the first user turn."""

    def text(turns: list[Turn]) -> str:
        return str(
            chat.tokenizer.apply_chat_template(chat.normalise(turns), tokenize=False, add_generation_prompt=True)
        )

    return text
