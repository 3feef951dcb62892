"""Estimates what `gemma2 generate` will read, draw and cost, from the text of the prompts: tokens, dollars at a server.

    prompt tokens    = bytes / 4 + 5 per message, summed over all requests          (rule of thumb for English)
    drawn tokens    <= max_new_tokens per request
    cost            <= prompt tokens * price_in + drawn tokens * price_out          (USD per million tokens)

With several turns each request holds the turns before it, at most max_new_tokens per turn. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Message, Prompt
from gemma2.posttrain.schemas import GenerateConfig

__all__ = ["PromptSource", "generate_budget", "source_of"]

BYTES_PER_TOKEN, TOKENS_PER_MESSAGE = 4, 5


@dataclass(frozen=True)
class PromptSource:
    """The prompts of a data path, read again by every iteration. `system` is the system text of prompts without one.
    `reading` knows which rows are left out.
    """

    path: Path
    reading: Reading
    limit: int | None = None
    system: str | None = None

    def __iter__(self) -> Iterator[Prompt]:
        for prompt in self.reading.each_prompt(self.path, self.limit):
            if self.system is not None and prompt.messages[0]["role"] != "system":
                prompt = replace(prompt, messages=[{"role": "system", "content": self.system}, *prompt.messages])
            yield prompt


def source_of(config: GenerateConfig) -> PromptSource:
    """The prompts of a `gemma2 generate`."""
    return PromptSource(config.prompts, Reading(config), config.limit, config.system)


def generate_budget(config: GenerateConfig) -> dict[str, float]:
    """Figures for --dry-run. Raises InputError for a row that is not a prompt."""
    rows = asked = 0
    source = source_of(config)
    for prompt in source:
        rows += 1
        asked += about(prompt.messages)
    source.reading.check_columns()
    figures: dict[str, float] = {
        "prompts": rows,
        "completions": rows * config.n,
        "requests": rows * config.n * (2 * config.turns - 1),
        "prompt_tokens_about": config.n * (asked * (2 * config.turns - 1) + rows * _carried(config)),
        "drawn_tokens_at_most": rows * config.n * (2 * config.turns - 1) * config.max_new_tokens,
    }
    if config.price_in is not None and config.price_out is not None:
        cost = figures["prompt_tokens_about"] * config.price_in + figures["drawn_tokens_at_most"] * config.price_out
        return figures | {"cost_usd_at_most": round(cost / 1e6, 4)}
    return figures


def about(messages: list[Message]) -> int:
    """Approximate number of tokens of messages."""
    size = sum(len(message["content"].encode()) for message in messages)
    return size // BYTES_PER_TOKEN + TOKENS_PER_MESSAGE * len(messages)


def _carried(config: GenerateConfig) -> int:
    """Most tokens of drawn turns and instructions that the later requests of one conversation read again."""
    turn = config.max_new_tokens + TOKENS_PER_MESSAGE
    drawn_before = sum(range(2 * config.turns - 1)) * turn
    return drawn_before + (config.turns - 1) * about([{"role": "user", "content": config.user_instruction}])
