"""One model that answers turn by turn: tokens one at a time, the KV cache kept between turns.

Drawing is the sampler's (`models/sampler.py`): the same uniforms give the same tokens. What the cache holds and the
next prompt begins with is not computed again; `/undo` and `/edit` only shorten it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemma2.core.errors import InputError
from gemma2.posttrain.data.chat import ChatFormat, Message
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.models.attention import additive, empty_cache, layer_masks, taking_masks
from gemma2.posttrain.models.decoder import StepDecoder
from gemma2.posttrain.models.head import last_logits
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.models.precision import frozen_dtype
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.sampler import SamplingParams, draw, random_numbers
from gemma2.posttrain.schemas.fields import Attention

__all__ = ["Speaker", "Spoken"]

BROKEN = "�"  # the end of a text whose last character needs further tokens


@dataclass(frozen=True)
class Spoken:
    """A part of an answer.

    text  what is new; may be empty while a character needs several tokens
    end   "" while it goes on; "stop" at a stop token, "length" at the limit, "context" where the context is full
    """

    text: str
    end: str = ""


class Speaker:
    """A policy with its tokenizer, chat format and cache.

    name      as it is shown
    cached    ids that the cache holds
    computed  tokens that went through the network since it was loaded: what a kept cache saves is not counted
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.form = ChatFormat(tokenizer, getattr(model, "generation_config", None))
        self.context = int(getattr(model.config, "max_position_embeddings", 8192))
        self.cache = empty_cache(model.config)
        self.cached: list[int] = []
        self.computed = 0
        self.decoder = StepDecoder(model, self.context) if StepDecoder.fits(model) else None

    @classmethod
    def load(cls, path: Path, name: str, dtype: torch.dtype | None = None, attention: Attention = "eager") -> Speaker:
        """Load a model directory; by default in bf16 on an accelerator, in fp32 on a CPU. attention: eager or sdpa."""
        model, tokenizer = load_policy(
            path, dtype=frozen_dtype("auto") if dtype is None else dtype, attention=attention
        )
        return cls(model, tokenizer, name)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that ends with a user's message. Raises InputError for one that fills the context."""
        ids = self.form.prompt_ids(list(messages))
        if len(ids) >= self.context:
            raise InputError(
                f"the conversation has {len(ids)} tokens, the context {self.context}", "/clear begins a new one"
            )
        return ids

    @torch.no_grad()
    def answer(self, messages: Sequence[Message], params: SamplingParams, seed: int) -> Iterator[Spoken]:
        """Draw an answer to a conversation, piece by piece. May be left before its end."""
        ids = self.prompt(messages)
        uniforms = random_numbers(1, params, torch.Generator().manual_seed(seed)).to(self.model.device)
        with taking_masks(self.model):
            logits = self._prefill(ids)
            drawn: list[int] = []
            shown = ""
            for number in range(params.max_new_tokens):
                token = int(draw(logits, uniforms[:, number], params)[0])
                if token in self.form.stop_ids:
                    yield Spoken(self._text(drawn)[len(shown) :], "stop")
                    return
                drawn.append(token)
                text = self._text(drawn)
                if not text.endswith(BROKEN):
                    yield Spoken(text[len(shown) :])
                    shown = text
                else:
                    yield Spoken("")
                full = len(self.cached) + 1 >= self.context
                if full or number + 1 == params.max_new_tokens:
                    yield Spoken(text[len(shown) :], "context" if full else "length")
                    return
                logits = self._step(token)

    def _text(self, ids: list[int]) -> str:
        return self.form.decode(ids)

    def _prefill(self, ids: list[int]) -> Tensor:
        """Logits (1, V) after the last of `ids`; what the cache holds of their beginning is kept."""
        same = 0
        for held, wanted in zip(self.cached, ids[:-1], strict=False):  # the last one is computed for its logits
            if held != wanted:
                break
            same += 1
        for layer in self.cache.layers:
            layer.keep_columns(same)
        self.cached = ids[:same]
        new = torch.tensor([ids[same:]], device=self.model.device)
        columns = torch.arange(len(ids), device=self.model.device)
        mask = additive((columns <= columns[same:, None])[None, None], self.model.dtype)
        logits = self._forward(new, columns[None, same:], mask)
        self.cached = list(ids)
        return logits

    def _step(self, token: int) -> Tensor:
        """Logits (1, V) after one more token."""
        position = torch.tensor([len(self.cached)], device=self.model.device)
        mask = torch.zeros(1, 1, 1, len(self.cached) + 1, dtype=self.model.dtype, device=self.model.device)
        tokens = torch.tensor([token], device=self.model.device)
        if self.decoder is not None:
            self.computed += 1
            logits = self.decoder.step(self.cache, tokens, position, mask)
        else:
            logits = self._forward(tokens[None], position[None], mask)
        self.cached.append(token)
        return logits

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        self.computed += ids.shape[1]
        return last_logits(self.model, self.cache, ids, positions, layer_masks(self.model.config, mask))
