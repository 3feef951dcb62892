"""The default engine: our batched sampler on a model of transformers (`posttrain/models/sampler.py`).

Requests are sorted by length and cut into batches; a batch, its order and its padding follow from the requests alone,
and every row has a generator with its own seed. So a batch that is drawn again after a kill gives the same bytes, and a
batch of which every completion is known is skipped. Several processes are dealt the batches in turns; each gets all
completions, in the order of one process.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gemma2.core.json_files import JsonObject
from gemma2.core.ranks import ALONE, Ranks
from gemma2.posttrain.attention.choice import drawing_kernel
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.models.precision import free_cached, frozen_dtype
from gemma2.posttrain.models.protocols import ModelConfig
from gemma2.posttrain.models.sampler import SamplingParams, decode, evaluating, length_batches
from gemma2.posttrain.schemas import GenerateConfig
from gemma2.posttrain.schemas.fields import Attention, Dtype

from .base import LENGTH, STOP, Completion, Key, Message, Request
from .stops import stops_at, text_completion

__all__ = ["SamplerEngine", "window_of"]

BATCHES = 16  # batches that are sorted by length together


class SamplerEngine:
    """A loaded model that answers in batches of at most `batch_size` completions."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        chat: ChatFormat,
        params: SamplingParams,
        batch_size: int,
        stops: Sequence[str] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.model = model
        self.stops = stops
        self.chat = chat
        self.params = params
        self.batch_size = batch_size
        self.window = window_of(model.config, params.max_new_tokens)
        self.chunk = BATCHES * batch_size

    @classmethod
    def load(
        cls,
        path: Path,
        params: SamplingParams,
        batch_size: int,
        dtype: Dtype = "auto",
        stops: Sequence[str] = (),
        attention: Attention = "auto",
        ranks: Ranks = ALONE,
    ) -> SamplerEngine:
        """Load a model that only generates; of the attention kernels, eager and sdpa do."""
        model, tokenizer = load_policy(path, frozen_dtype(dtype), attention=drawing_kernel(attention))
        return cls(model, ChatFormat(tokenizer, model.generation_config), params, batch_size, stops, ranks)

    @classmethod
    def load_for(cls, config: GenerateConfig, ranks: Ranks = ALONE) -> SamplerEngine:
        """The engine of a `gemma2 generate`."""
        params = SamplingParams(
            config.max_new_tokens, config.temperature, top_p=config.top_p, top_k=config.top_k, min_p=config.min_p
        )
        return cls.load(config.teacher, params, config.batch_size, config.dtype, config.stop, config.attention, ranks)

    def encode(self, messages: list[Message]) -> list[int]:
        """Token ids of a prompt."""
        return self.chat.prompt_ids(messages)

    def complete(self, requests: Sequence[Request], known: Container[Key]) -> Iterator[list[Completion]]:
        """One group per batch, the longest prompts first."""
        batches = [
            [requests[i] for i in batch]
            for batch in length_batches([len(request.ids) for request in requests], self.batch_size)
        ]
        missing = [batch for batch in batches if not all(request.key in known for request in batch)]
        yield from self.ranks.dealt(missing, self._draw)

    def _draw(self, requests: Sequence[Request]) -> list[Completion]:
        uniforms = torch.stack([_uniforms(request.seed, self.params.max_new_tokens) for request in requests])
        pad_id = self.chat.tokenizer.pad_token_id or 0
        ends = stops_at(self.stops, self.chat.decode) if self.stops else None
        prompts = [request.ids for request in requests]
        with evaluating(self.model):
            drawn = decode(self.model, prompts, self.params, self.chat.stop_ids, pad_id, uniforms, ends)
        return [
            text_completion(
                Completion(
                    key=request.key,
                    text=self.chat.decode(ids),
                    finish_reason=LENGTH if truncated else STOP,
                    tokens=len(ids),
                    prompt_tokens=len(request.ids),
                    logprob=round(sum(logps), 4),
                    ids=ids,
                ),
                self.stops,
            )
            for request, (ids, logps, truncated) in zip(requests, drawn, strict=True)
        ]

    def facts(self) -> JsonObject:
        """Nothing: the parents and the configuration describe the engine."""
        return {}

    def close(self) -> None:
        """Release the model, so that the reward model finds the memory free."""
        self.model = None
        free_cached()


def _uniforms(seed: int, count: int) -> torch.Tensor:
    """The random numbers (count,) of one completion, float64 in [0, 1)."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def window_of(config: ModelConfig, max_new_tokens: int) -> int | None:
    """Longest prompt in tokens that leaves room for a completion; None where a model has no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    return None if positions is None else int(positions) - max_new_tokens
