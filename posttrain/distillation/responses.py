"""Rows with responses to learn from, as tensors: tokens, the mask of learned ones, the states that predict them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma2.core.progress import Progress
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.examples import Example, report_overlong, tokenise
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Conversation
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.sampler import Completions
from gemma2.posttrain.models.scorer import masked_states
from gemma2.posttrain.schemas.distill import FixedDataFields

__all__ = ["as_examples", "collate", "fixed_examples", "response_states"]


def response_states(model: CausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """The last hidden states that predict the tokens of `mask`, (K, d), row by row. ids, mask: (N, T), right-padded."""
    result: Tensor = masked_states(model, ids)[:, :-1][mask[:, 1:]]  # the state at position t predicts token t + 1
    return result


def collate(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids (N, T), padded on the right, and the mask (N, T) of what is learned."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.mask)] = torch.tensor(example.mask)
    return ids.to(device), mask.to(device)


def as_examples(prompts: Sequence[Sequence[int]], drawn: Completions) -> list[Example]:
    """Prompt and completion as one row each, the completion's tokens as its targets."""
    return [
        Example([*prompts[i], *ids], [False] * len(prompts[i]) + [True] * len(ids))
        for i, ids in zip(drawn.prompt_index, drawn.ids, strict=True)
    ]


def fixed_examples(
    rows: Sequence[Conversation],
    chat: ChatFormat,
    config: FixedDataFields,
    reading: Reading,
    progress: Progress,
    what: str = "rows",
) -> list[Example]:
    """Rows of a file as gemma2 sft would learn them; what is too long is reported."""
    examples, overlong = tokenise(rows, chat, config, reading, what)
    report_overlong(overlong, len(rows), config, progress, what)
    return examples
