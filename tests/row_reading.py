"""Reads a file of rows with the settings that a command has without flags."""

from pathlib import Path

from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Conversation, Pair, Prompt
from gemma2.posttrain.schemas.fields import RowFields


def plain_reading(**options: object) -> Reading:
    return Reading(RowFields(**options))


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    return plain_reading().prompts(path, limit)


def read_conversations(path: Path) -> list[Conversation]:
    return plain_reading().conversations(path)


def read_pairs(path: Path) -> list[Pair]:
    return plain_reading().pairs(path)
