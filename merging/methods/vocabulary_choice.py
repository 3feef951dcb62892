"""What a request says about single rows of the vocabulary. Numpy-free."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TokenSource", "VocabularyChoice"]


@dataclass(frozen=True)
class TokenSource:
    """The row of one token of the output.

    model  whose row it is; None is a row of zeros
    force  for all models, also those that have the token; else for those that lack it
    other  the token of that model whose row it is, `index` the number of the row; the token itself when both are None
    """

    token: str
    model: str | None
    force: bool = False
    other: str | None = None
    index: int | None = None


@dataclass(frozen=True)
class VocabularyChoice:
    """Rows of the vocabulary that are not those that follow from the tokenizers.

    tokens    rows of single tokens
    multiple  the number of rows is rounded up to a multiple of it, with rows of zeros
    """

    tokens: tuple[TokenSource, ...] = ()
    multiple: int | None = None
