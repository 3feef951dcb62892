"""Conversations that are written as one text: "Human: ... Assistant: ..." (the form of Anthropic's HH sets)."""

from __future__ import annotations

import re

from .turns import Message

__all__ = ["dialogue_of", "is_dialogue"]

# A turn begins a line; the blank line in front of it is what the sets write.
TURN = re.compile(r"(?:\A|\n\s*\n)\s*(Human|Assistant):[ \t]*")
ROLES = {"Human": "user", "Assistant": "assistant"}


def is_dialogue(text: str) -> bool:
    """Whether a text begins with a turn of the human and goes on with one of the assistant."""
    names = [found[1] for found in TURN.finditer(text)]
    first = TURN.match(text)
    return first is not None and len(names) > 1 and ROLES[names[0]] == "user" and ROLES[names[1]] == "assistant"


def dialogue_of(text: str) -> list[Message]:
    """The turns of such a text; a last turn of the assistant without words, which asks for an answer, is left out."""
    starts = list(TURN.finditer(text))
    ends = [found.start() for found in starts[1:]] + [len(text)]
    messages = [
        {"role": ROLES[found[1]], "content": text[found.end() : end].strip()}
        for found, end in zip(starts, ends, strict=True)
    ]
    asks = messages[-1]["role"] == "assistant" and not messages[-1]["content"]
    return messages[:-1] if asks else messages
