"""Tokenizers compared by their ids: two models of one size may give one token two numbers. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.outputs.tokenizer_ids import tokenizer_difference
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.load_tokenizer import load_light_tokenizer, require_tokenizer
from gemma2.posttrain.schemas import DistillConfig, MergeConfig
from gemma2.posttrain.schemas.config import Config

from .kinds import Input

__all__ = ["chat_of", "check_tokenizers"]

FAMILY = "give models that were trained with one tokenizer"
FROM_TEXT = "distil from a teacher of the same family, or fine-tune on its completions (gemma2 generate, gemma2 sft)"


@lru_cache(maxsize=4)
def chat_of(path: Path) -> ChatFormat | None:
    """The chat format of a model directory; None where only torch's libraries can load its tokenizer."""
    tokenizer = load_light_tokenizer(path)
    return None if tokenizer is None else ChatFormat(tokenizer)


def check_tokenizers(config: Config, models: Sequence[Input]) -> None:
    """Refuse models whose tokenizers give one token different ids, and a teacher with another chat template.

    models  those whose distributions are compared; a promised one has the tokenizer of its start. Raises InputError.
    """
    if isinstance(config, MergeConfig):  # the merge compares them itself, before it reads a tensor
        return
    places = [(name, path, found.tokenizer) for name, path, found in models if found.tokenizer is not None]
    for _, _, place in places:
        require_tokenizer(place)
    for name, path, place in places[1:]:
        first_name, first_path, first = places[0]
        difference = tokenizer_difference(first, place)
        if difference:
            raise InputError(
                f"the tokenizers of --{first_name} {first_path} and --{name} {path} differ: {difference}",
                FROM_TEXT if isinstance(config, DistillConfig) else FAMILY,
            )
        if isinstance(config, DistillConfig):
            _check_template(first_path, first, path, place)


def _check_template(student: Path, ours: Path, teacher: Path, theirs: Path) -> None:
    formats = chat_of(ours), chat_of(theirs)
    if None not in formats and len({one.tokenizer.chat_template for one in formats if one}) > 1:
        raise InputError(
            f"{teacher} and {student} have different chat templates",
            "copy the template that both were trained with into both",
        )
