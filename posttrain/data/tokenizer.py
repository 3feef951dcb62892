"""The members that the suite uses of a tokenizer: the shape of transformers' tokenizers, for type checkers.

A member is listed when the suite uses it; nothing here exists at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import BatchEncoding

from gemma2.core.json_files import JsonMapping

__all__ = ["Tokenizer"]


class AddedToken(Protocol):
    """A token that was added to the vocabulary of a tokenizer."""

    content: str
    special: bool
    lstrip: bool
    rstrip: bool


class Tokenizer(Protocol):
    """A tokenizer that transformers has loaded."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    chat_template: str | None
    name_or_path: str
    padding_side: str
    model_max_length: int

    def __len__(self) -> int:
        """Number of tokens, the added ones included."""
        ...

    def __call__(self, text: str | Sequence[str], **kwargs: object) -> JsonMapping:
        """Token ids (`input_ids`) of one text, or of several."""
        ...

    def encode(self, text: str, **kwargs: object) -> list[int]:
        """Token ids of one text."""
        ...

    def pad(self, encoded_inputs: Sequence[Mapping[str, Sequence[int]]], **kwargs: object) -> BatchEncoding:
        """A batch of token ids, padded to one length, with its attention mask."""
        ...

    def decode(self, token_ids: Sequence[int], **kwargs: object) -> str:
        """The text of token ids."""
        ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """The added tokens by id."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """The id of every token."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> str:
        """The token of an id."""
        ...

    def convert_tokens_to_ids(self, tokens: str) -> int:
        """The id of a token."""
        ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **kwargs: object) -> Any:  # noqa: ANN401
        """A conversation as text, or as token ids with `tokenize=True`."""
        ...

    def save_pretrained(self, save_directory: str | Path) -> object:
        """Write the tokenizer's files."""
        ...
