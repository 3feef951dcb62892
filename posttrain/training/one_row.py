"""One row seen twice before a training starts: as it was rendered, and as the trainer will read it.

targets   a row has one `<bos>`, in front; what is learned begins behind the header of a model turn and ends with
          an end of turn, unless it was cut off
batch     tokens and labels that the collator makes are those of the row
loss      the trainer's loss of the row is the one that another implementation gives
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gemma2.core.errors import GuardStop
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.examples import Example
from gemma2.posttrain.models.loading import default_device

__all__ = ["ROWS", "agree", "check_bos", "check_targets", "same_tokens", "shortest"]

ROWS = 16  # looked at, evenly spaced over the data
TOLERANCE, TOLERANCE_HALF = 1e-3, 5e-2  # of a loss, in its own size
FORMAT = "see the tokens with --show-tokens, and check the chat template of --model"
REPORT = "nothing was trained; check the versions of torch, transformers and trl, or report it"


def check_targets(chat: ChatFormat, examples: Sequence[Example]) -> None:
    """Raise GuardStop for a row whose `<bos>` or targets are not in their places."""
    header = _header(chat)
    ends = {chat.end_of_turn_id, chat.eos_id}
    for example in examples[:: max(1, len(examples) // ROWS)]:
        check_bos(chat, example.ids)
        if not any(example.mask):
            raise GuardStop("a row has no token that is learned", FORMAT)
        for start, end in _runs(example.mask):
            if example.ids[:start][-len(header) :] != header:
                near = chat.token_text(example.ids[start])
                raise GuardStop(
                    f"what is learned of a row begins at {near!r}, not behind a model turn's header", FORMAT
                )
            inside = [i for i in example.ids[start:end] if chat.is_control(i) and i not in ends]
            if (end < len(example.ids) and example.ids[end - 1] not in ends) or chat.tokenizer.bos_token_id in inside:
                raise GuardStop("what is learned of a row does not end with its model turn", FORMAT)


def check_bos(chat: ChatFormat, ids: Sequence[int]) -> None:
    """Raise GuardStop unless a row has exactly one `<bos>`, in front, where its tokenizer and template have one.

    Where the same token opens every turn (SmolLM's `<|im_start|>`), one in front, and not two in a row.
    """
    bos, template = chat.tokenizer.bos_token_id, str(chat.tokenizer.chat_template)
    token = str(chat.tokenizer.bos_token)
    if bos is None or bos == chat.eos_id:
        return
    count = list(ids).count(bos)
    writes = "bos_token" in template or token in template
    doubled = count > 1 and (list(ids[:2]) == [bos, bos] or not _opens_turns(chat, bos))
    if doubled or (writes and (not count or ids[0] != bos)):
        raise GuardStop(
            f"a row has {count} {token} and begins with {chat.token_text(ids[0])!r}, not one {token}", FORMAT
        )


def _opens_turns(chat: ChatFormat, bos: int) -> bool:
    """Whether the number of `<bos>` grows with the turns: each is opened by it."""
    turn = {"role": "user", "content": "a"}
    few, many = ([turn], [turn, {"role": "assistant", "content": "a"}, turn])
    return chat.prompt_ids(many).count(bos) > chat.prompt_ids(few).count(bos)


def _header(chat: ChatFormat) -> list[int]:
    """The tokens of a generation prompt from its last control token on."""
    ids = chat.prompt_ids([{"role": "user", "content": "a"}])
    last = max((place for place, token in enumerate(ids) if chat.is_control(token)), default=len(ids) - 1)
    return ids[last:]


def _runs(mask: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(start, end) of every stretch of targets."""
    edges = [
        place
        for place in range(len(mask) + 1)
        if (place < len(mask) and mask[place]) != (place > 0 and mask[place - 1])
    ]
    return zip(edges[::2], edges[1::2], strict=True)


def shortest(lengths: Sequence[int]) -> int:
    """The number of the shortest row: the cheapest one to look at."""
    return min(range(len(lengths)), key=lengths.__getitem__)


def same_tokens(what: str, batch: Tensor, row: Sequence[int]) -> None:
    """Raise GuardStop if one row of a batch, padded on the right, does not hold these tokens."""
    if batch.flatten().tolist()[: len(row)] != list(row):
        raise GuardStop(f"the {what} of a batch are not those of its row", REPORT)


def agree(what: str, found: float, expected: float) -> None:
    """Raise GuardStop if two implementations of one loss differ by more than rounding."""
    half = any(torch.is_autocast_enabled(device) for device in {"cpu", default_device().type})
    limit = TOLERANCE_HALF if half else TOLERANCE
    if not abs(found - expected) <= limit * max(1.0, abs(expected)):
        raise GuardStop(f"{what} is {found:.6g} in the trainer and {expected:.6g} by another implementation", REPORT)
