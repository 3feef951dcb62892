"""Loads a tokenizer for checks, which must not wait for torch: its files alone, by transformers' own classes.

`models/loading.py` loads the tokenizers that models train and answer with. AutoTokenizer, which it uses, imports torch;
the class that tokenizer_config.json names, and the general one, do not.
"""

from __future__ import annotations

from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.foreign.code_keys import refuse_code
from gemma2.core.foreign.links import refuse_irregular
from gemma2.core.json_files import load_json

from .tokenizer import Tokenizer

__all__ = ["load_light_tokenizer", "require_tokenizer"]

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt"),
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def require_tokenizer(path: Path) -> None:
    """Raise InputError for a model directory without the files of a tokenizer: transformers would make one up."""
    refuse_irregular(path, TOKENIZER_FILES)
    if not any((path / name).is_file() for name in VOCABULARIES):
        raise InputError(f"{path} holds no tokenizer", "copy the tokenizer files next to the weights")


def load_light_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of a model directory; None where tokenizer.json is missing, so that only torch's way is left.

    Raises InputError for a directory without a tokenizer, and for one that cannot be read.
    """
    require_tokenizer(path)
    if not (path / "tokenizer.json").is_file():
        return None
    import transformers

    refuse_code(path)

    general = transformers.PreTrainedTokenizerFast
    named = getattr(transformers, _class_name(path), general)
    usable = isinstance(named, type) and issubclass(named, general)
    try:
        tokenizer: Tokenizer = (named if usable else general).from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises whatever its parsers raise
        raise InputError(
            f"no tokenizer can be loaded from {path}", "copy the tokenizer files next to the weights"
        ) from error
    return tokenizer


def _class_name(path: Path) -> str:
    try:
        config = load_json(path / "tokenizer_config.json")
    except (OSError, ValueError):
        return ""
    return str(config.get("tokenizer_class") or "") if isinstance(config, dict) else ""
