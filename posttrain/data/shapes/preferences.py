"""Preference pairs as data sets write them, brought to one form: a prompt, and two answers that do not repeat it.

    prompt | question | query | instruction | messages | conversations, chosen, rejected
    chosen, rejected                               the prompt implied: what both begin with

`chosen` and `rejected` are texts, "Human: ... Assistant: ..." texts, messages, or one message. Where they repeat the
prompt, as the best-known sets do, it is taken once (TRL's `maybe_extract_prompt`).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from itertools import takewhile

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping
from gemma2.posttrain.data.files.row import Row

from .recognise import LISTS, Shaped, columns_hint, present, prompt_of_row, with_system
from .texts import dialogue_of, is_dialogue
from .turns import SKIP_HINT, Message, TurnError, Turns, turns_of

__all__ = ["ShapedPair", "pair_shape"]

REPEATED = "the answers repeat the prompt, which is taken once"
IMPLIED = "the prompt is what both answers begin with"


@dataclass(frozen=True)
class ShapedPair:
    """A pair in our form; `read`: the columns that were used; `note`: what a reader of the data should know."""

    shape: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    read: frozenset[str]
    note: str | None = None


def pair_shape(row: Row, ignored: Collection[str] = ()) -> ShapedPair:
    """The pair of a row. Raises InputError with file, line and fix for a row without one."""
    columns = present(row)
    for name in ("chosen", "rejected"):
        if name not in columns:
            raise InputError(
                f"{row.where}: no '{name}'", columns_hint(columns, name, known=("prompt", "chosen", "rejected"))
            )
    sides = [_side(row, name, columns[name], ignored) for name in ("chosen", "rejected")]
    given = _given(row, columns, ignored)
    if given is None:
        prompt, chosen, rejected = _implied(row, columns, sides)
        note: str | None = IMPLIED
        shaped = Shaped("pair", Turns(prompt), frozenset({"chosen", "rejected"}))
    else:
        prompt, chosen, rejected, note = _once(row, given.turns.messages, sides, columns)
        shaped = Shaped("pair", Turns(prompt), given.read)
    shaped = with_system(row, shaped)
    return ShapedPair("pair", shaped.turns.messages, chosen, rejected, shaped.read | {"chosen", "rejected"}, note)


def _given(row: Row, columns: JsonMapping, ignored: Collection[str]) -> Shaped | None:
    """The prompt that a row has in its own column."""
    asked = prompt_of_row(row, columns, ignored)
    if asked is not None:
        return Shaped("pair", asked[0], asked[1])
    for name in LISTS:
        if name in columns:
            turns = turns_of(row.where, name, columns[name], "user", ignored)
            return Shaped("pair", turns, frozenset({name}))
    return None


def _side(row: Row, name: str, value: object, ignored: Collection[str]) -> list[Message]:
    if isinstance(value, str) and is_dialogue(value):
        return dialogue_of(value)
    turns = turns_of(row.where, name, value, "assistant", ignored)
    if turns.masked:
        raise TurnError(
            f"{row.where}: '{name}' excludes a turn from learning", "remove the weight: answers are compared whole"
        )
    return turns.messages


def _once(
    row: Row, prompt: list[Message], sides: list[list[Message]], columns: JsonMapping
) -> tuple[list[Message], list[Message], list[Message], str | None]:
    """The prompt, and both answers without it where they repeat it; what they say before it belongs to the prompt."""
    plain = [[(turn["role"], turn["content"].strip()) for turn in side] for side in [prompt, *sides]]
    if all(len(side) > len(prompt) and side[: len(prompt)] == plain[0] for side in plain[1:]):
        return prompt, sides[0][len(prompt) :], sides[1][len(prompt) :], REPEATED
    begins = {side[0]["role"] for side in sides}
    if begins - {"assistant", "tool"}:
        chosen, rejected = _common(sides)
        hint = "write the answers alone, or leave the prompt out (--columns unused=prompt)"
        if (
            chosen is None
            or rejected is None
            or prompt[-1]["content"].strip() not in sides[0][-len(chosen) - 1]["content"]
        ):
            raise InputError(
                f"{row.where}: 'chosen' and 'rejected' begin with a turn of the {'/'.join(sorted(begins))}, "
                "but not with the prompt",
                hint if chosen is not None else f"write the answers alone, or {SKIP_HINT}",
            )
        return sides[0][: -len(chosen)], chosen, rejected, REPEATED
    texts = [columns["chosen"], columns["rejected"]]
    asked = columns.get("prompt")
    if isinstance(asked, str) and len(asked.split()) > 1 and all(_repeats(text, asked) for text in texts):
        cut = [[{"role": "assistant", "content": text.lstrip()[len(asked.strip()) :].strip()}] for text in texts]
        return prompt, cut[0], cut[1], REPEATED
    return prompt, sides[0], sides[1], None


def _repeats(text: object, prompt: str) -> bool:
    """Whether a text begins with the prompt and then goes on behind white space."""
    if not isinstance(text, str) or not text.lstrip().startswith(prompt.strip()):
        return False
    rest = text.lstrip()[len(prompt.strip()) :]
    return bool(rest.strip()) and rest[0].isspace()


def _common(sides: list[list[Message]]) -> tuple[list[Message] | None, list[Message] | None]:
    """Both answers behind the messages that they share; each keeps at least one message."""
    chosen, rejected = sides
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return (chosen[shared:], rejected[shared:]) if shared else (None, None)


def _implied(
    row: Row, columns: JsonMapping, sides: list[list[Message]]
) -> tuple[list[Message], list[Message], list[Message]]:
    texts = [columns[name] for name in ("chosen", "rejected") if isinstance(columns[name], str)]
    if len(texts) == 1:
        raise InputError(f"{row.where}: of 'chosen' and 'rejected' one is a text", "write two texts, or two lists")
    if texts and not all(is_dialogue(text) for text in texts):
        return _common_words(row, columns, *texts)
    chosen, rejected = _common(sides)
    if chosen is None or rejected is None:
        raise InputError(f"{row.where}: 'chosen' and 'rejected' share no prompt", "add the column 'prompt'")
    return sides[0][: -len(chosen)], chosen, rejected


def _common_words(
    row: Row, columns: JsonMapping, chosen: str, rejected: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Two texts parted behind the last word that they share, so that each keeps at least one word.

    As TRL's `extract_prompt`, which parts them at the first character that differs, also inside a word.
    """
    meant = difflib.get_close_matches("prompt", columns, n=1)
    if meant:  # a column of that name is the prompt, and not what two answers happen to begin with
        raise InputError(f"{row.where}: no 'prompt'", columns_hint(columns, "prompt"))
    chosen, rejected = chosen.rstrip(), rejected.rstrip()
    shared = sum(1 for _ in takewhile(lambda letters: letters[0] == letters[1], zip(chosen, rejected, strict=False)))
    end = max((place for place, letter in enumerate(chosen[:shared]) if letter.isspace()), default=0)
    prompt = chosen[:end].rstrip()
    if not prompt.strip():
        raise InputError(
            f"{row.where}: 'chosen' and 'rejected' share no prompt",
            columns_hint(columns, "prompt", known=("chosen", "rejected")),
        )
    better, worse = ([{"role": "assistant", "content": text[len(prompt) :]}] for text in (chosen, rejected))
    return [{"role": "user", "content": prompt}], better, worse
