"""What computes log-likelihoods and answers: our scorer and sampler, or lm-eval's model classes.

Every engine gets the same texts and gives the same kinds of results, so tasks, metrics, samples and resume are the same
for all. lm-eval encodes by itself: it is given texts that begin with <bos>, to which it adds none.

Our answers are greedy and end at a stop id or at a text of `until`, which is cut off, as in lm-eval's `hf`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from itertools import islice
from typing import Protocol, TypeVar

import torch

from gemma2.core.json_files import JsonObject
from gemma2.core.ranks import ALONE, Ranks
from gemma2.posttrain.attention.choice import drawing_kernel
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.doctor.vllm_probe import refuse_wrong_attention
from gemma2.posttrain.models.loading import load_policy, load_tokenizer
from gemma2.posttrain.models.precision import frozen_dtype
from gemma2.posttrain.models.sampler import SamplingParams, decode, evaluating
from gemma2.posttrain.schemas.measures import SuiteConfig

from .encoding import Encoder, TokenRequest
from .prompts import Asked
from .shared_scoring import SharedScorer

__all__ = ["SuiteEngine", "open_engine"]

R = TypeVar("R")
TAIL = 24  # tokens at the end of an answer in which a text of `until` is looked for
CLASSES = {"hf": ("lm_eval.models.huggingface", "HFLM"), "vllm": ("lm_eval.models.vllm_causallms", "VLLM")}


class SuiteEngine(Protocol):
    """Scores choices and writes answers, batch by batch."""

    facts: JsonObject

    def score(
        self, asked: Sequence[Asked], requests: Sequence[Sequence[TokenRequest]], done: int
    ) -> Iterator[tuple[int, list[list[float]]]]:
        """Yield (number of a row, log-likelihoods of the choices of that row and the next ones)."""
        ...

    def answer(
        self, asked: Sequence[Asked], prompts: Sequence[TokenRequest], until: Sequence[str], done: int
    ) -> Iterator[tuple[int, list[str]]]:
        """Yield (number of a row, answers of that row and the next ones)."""
        ...


def open_engine(config: SuiteConfig, ranks: Ranks = ALONE) -> tuple[SuiteEngine, Encoder, JsonObject]:
    """Load the model; return its engine, the encoder of its requests, and its generation settings.

    ranks: the processes that share the batches of our engine.
    """
    dtype = frozen_dtype(config.dtype)
    if config.engine == "gemma2":
        own = OwnEngine(config, dtype, ranks)
        return own, own.encoder, own.facts
    theirs = LmEvalEngine(config, dtype)
    return theirs, theirs.encoder, theirs.facts


class OwnEngine:
    """The scorer and the sampler of this package; every process of a job gets all results."""

    def __init__(self, config: SuiteConfig, dtype: torch.dtype, ranks: Ranks = ALONE) -> None:
        self.config, self.ranks = config, ranks
        self.model, self.tokenizer = load_policy(config.model, dtype=dtype, attention=drawing_kernel(config.attention))
        self.encoder = Encoder(self.tokenizer, int(getattr(self.model.config, "max_position_embeddings", 8192)))
        self.scorer = SharedScorer(self.model, config.batch_size, ranks)
        ends = self.model.generation_config.eos_token_id
        listed = ends if isinstance(ends, list) else [ends]
        self.stop_ids = sorted({i for i in (self.tokenizer.eos_token_id, *listed) if i is not None})
        self.facts: JsonObject = {
            "engine": "gemma2",
            "dtype": str(dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "attention": self.model.config._attn_implementation,
        }

    def score(
        self, asked: Sequence[Asked], requests: Sequence[Sequence[TokenRequest]], done: int
    ) -> Iterator[tuple[int, list[list[float]]]]:
        return self.scorer.group(requests, done)

    def answer(
        self, asked: Sequence[Asked], prompts: Sequence[TokenRequest], until: Sequence[str], done: int
    ) -> Iterator[tuple[int, list[str]]]:
        params = SamplingParams(self.config.max_new_tokens, temperature=0.0)

        def draw(batch: tuple[int, list[TokenRequest]]) -> list[str]:
            numbers = torch.zeros(len(batch[1]), params.max_new_tokens, dtype=torch.float64)
            with evaluating(self.model):
                drawn = decode(
                    self.model,
                    [prompt.ids for prompt in batch[1]],
                    params,
                    self.stop_ids,
                    self.tokenizer.pad_token_id or 0,
                    numbers,
                    lambda ids: any(text in self._text(ids[-TAIL:]) for text in until),
                )
            return [_cut(self._text(ids), until) for ids, _, _ in drawn]

        batches = list(_batches(prompts, self.config.batch_size, done))
        for (start, _), texts in zip(batches, self.ranks.dealt(batches, draw), strict=True):
            yield start, texts

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class LmEvalEngine:
    """A model class of lm-eval, behind texts that begin with <bos>."""

    def __init__(self, config: SuiteConfig, dtype: torch.dtype) -> None:
        self.config = config
        self.tokenizer: Tokenizer = load_tokenizer(config.model)
        module, name = CLASSES[config.engine]
        kind = str(dtype).removeprefix("torch.")
        settings: dict[str, object] = {"pretrained": str(config.model), "dtype": kind, "batch_size": config.batch_size}
        if config.engine == "hf":
            settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
            settings["attn_implementation"] = "eager"
        else:
            refuse_wrong_attention(config.model, import_module("vllm"), dtype=kind)
        self.model = getattr(import_module(module), name)(**settings)
        self.instance = import_module("lm_eval.api.instance").Instance
        self.encoder = Encoder(self.tokenizer, int(self.model.max_length))
        self.facts: JsonObject = {"engine": config.engine, "dtype": kind, "lm_eval": version("lm_eval")}

    def score(
        self, asked: Sequence[Asked], requests: Sequence[Sequence[TokenRequest]], done: int
    ) -> Iterator[tuple[int, list[list[float]]]]:
        for start, batch in _batches(asked, self.config.batch_size, done):
            pairs = [(self.encoder.with_bos(context), ending) for row in batch for context, ending in row.pairs]
            found = iter(self.model.loglikelihood([self._instance("loglikelihood", pair) for pair in pairs], True))
            yield start, [[float(next(found)[0]) for _ in row.continuations] for row in batch]

    def answer(
        self, asked: Sequence[Asked], prompts: Sequence[TokenRequest], until: Sequence[str], done: int
    ) -> Iterator[tuple[int, list[str]]]:
        settings = {"until": [*until], "max_gen_toks": self.config.max_new_tokens, "do_sample": False}
        for start, batch in _batches(asked, self.config.batch_size, done):
            texts = [self.encoder.with_bos(row.contexts[0]) for row in batch]
            asks = [self._instance("generate_until", (text, {**settings, "until": [*until]})) for text in texts]
            yield start, [str(text) for text in self.model.generate_until(asks, True)]

    def _instance(self, kind: str, arguments: tuple[object, ...]) -> object:
        return self.instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def _cut(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.split(end)[0]
    return text


def _batches(rows: Sequence[R], size: int, done: int) -> Iterator[tuple[int, list[R]]]:
    """(number of its first row, rows) of each batch that is not known."""
    for start in range(done - done % size, len(rows), size):
        yield start, list(islice(rows, start, start + size))
