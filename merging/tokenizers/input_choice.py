"""What a flag like `--chat-template 2` names: that of a model by its number, or that of the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from gemma2.core.errors import UsageError
from gemma2.merging.inputs.checkpoint import Checkpoint

__all__ = ["either", "of_input"]

T = TypeVar("T")


def of_input(
    flag: str, choice: str, inputs: Sequence[Checkpoint], read: Callable[[Checkpoint], T | None]
) -> tuple[Checkpoint, T]:
    """Return the input that a choice names, and what `read` finds in it. Raises UsageError naming those that have it.

    flag  like `--chat-template`
    """
    role = choice if choice == "base" else f"model {int(choice)}"
    model = next((model for model in inputs if model.role == role), None)
    found = read(model) if model else None
    if model is None or found is None:
        having = [one.role.removeprefix("model ") for one in inputs if read(one) is not None]
        what = f"has no {flag.removeprefix('--').replace('-', ' ')}" if model else "is not among the inputs"
        raise UsageError(f"{flag} {choice}: {role} {what}", f"choose {either([*having, 'a file'])}")
    return model, found


def either(words: Sequence[str]) -> str:
    """Return words as a choice: a, b or c."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
