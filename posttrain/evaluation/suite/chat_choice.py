"""Whether prompts are written as chat turns (`--chat`). Torch-free."""

from __future__ import annotations

from pathlib import Path

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonObject, load_json
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.load_tokenizer import load_light_tokenizer

__all__ = ["uses_chat"]


def uses_chat(model: Path, chat: str) -> bool:
    """Whether the prompts for a model are turns: asked for, or by its files.

    `auto`: the model brings a chat template, and its generation config ends answers at the template's end of turn. A
    pre-trained Gemma 2 has neither. Raises UsageError if turns are asked for and there is no template.
    """
    if chat == "off":
        return False
    tokenizer = load_light_tokenizer(model)
    own = tokenizer is not None and tokenizer.chat_template is not None
    if chat == "on":
        if tokenizer is None:
            return True
        try:
            ChatFormat(tokenizer)
        except InputError as error:
            raise UsageError(f"--chat on: {error.what}", "leave --chat out, or give --chat off") from error
        return True
    if not own or tokenizer is None:
        return False
    try:
        return ChatFormat(tokenizer).end_of_turn_id in _ends(model)
    except InputError:
        return False


def _ends(model: Path) -> list[int]:
    """Ids that end an answer, by the generation config, or by config.json without one."""
    for name in ("generation_config.json", "config.json"):
        try:
            found: JsonObject = load_json(model / name)
        except (OSError, ValueError):
            continue
        ends = found.get("eos_token_id")
        return ends if isinstance(ends, list) else [] if ends is None else [ends]
    return []
