"""A stand-in for vLLM 0.10 with the signatures of its offline interface, drawing with a model of transformers.

`LLM.generate(prompts, sampling_params, *, use_tqdm)` takes token prompts and one SamplingParams each and returns
RequestOutputs in the order of the prompts; a CompletionOutput's ids hold the stop token, its log-prob is that of
temperature 1. Unknown arguments are errors, as there.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.models.sampler import SamplingParams as Ours
from gemma2.posttrain.models.sampler import sample


@dataclass(frozen=True)
class SamplingParams:
    """The fields of vLLM's that a client may set here, with its defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: Any
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True


class LLM:
    calls: list[list[SamplingParams]] = []  # noqa: RUF012 - what the tests look at

    def __init__(self, model: str, *, seed: int = 0, **kwargs: Any) -> None:
        assert set(kwargs) <= {"disable_log_stats", "dtype", "max_model_len", "tensor_parallel_size"}
        if not (Path(model) / "config.json").is_file():
            raise OSError(f"{model} is no model")
        self.model, _ = load_policy(Path(model))
        length = self.model.config.max_position_embeddings
        self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=length))

    def generate(self, prompts, sampling_params, *, use_tqdm=True, lora_request=None, priority=None):
        assert len(prompts) == len(sampling_params)
        type(self).calls.append(list(sampling_params))
        pairs = enumerate(zip(prompts, sampling_params, strict=True))
        return [self._one(i, prompt["prompt_token_ids"], params) for i, (prompt, params) in pairs]

    def _one(self, number, ids, given):
        params = Ours(given.max_tokens, given.temperature, 1, given.top_p, max(0, given.top_k))
        generator = torch.Generator().manual_seed(given.seed)
        drawn = sample(self.model, [ids], params, given.stop_token_ids, 0, generator)
        reason = "length" if drawn.truncated[0] else "stop"
        logprob = None if given.logprobs is None else sum(drawn.logps[0])
        output = CompletionOutput(0, "", drawn.ids[0], logprob, None, reason)
        return RequestOutput(str(number), None, ids, [output])


def module() -> types.ModuleType:
    """As `import vllm` gives it."""
    fake = types.ModuleType("vllm")
    fake.__version__ = "0.10.2"
    fake.LLM, fake.SamplingParams = LLM, SamplingParams
    fake.TokensPrompt = lambda prompt_token_ids: {"prompt_token_ids": prompt_token_ids}
    return fake
