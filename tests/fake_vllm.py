"""A stand-in for vLLM with the signatures of its offline interface, drawing with a model of transformers.

`LLM.generate(prompts, sampling_params, *, use_tqdm)` takes token prompts and one SamplingParams each, or one for all,
and returns RequestOutputs in the order of the prompts; a CompletionOutput's ids hold the stop token. The k-th of a
request's n completions is drawn with its seed plus k, without a seed with the global random numbers. Weights are loaded
through the engine, as TRL does it. `Client` stands for TRL's client of a server. Unknown arguments are errors.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma2ForCausalLM

from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.models.sampler import SamplingParams as Ours
from gemma2.posttrain.models.sampler import sample


@dataclass
class SamplingParams:
    """The fields of vLLM's that a client may set here, with its defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
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
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass
class Logprob:
    logprob: float
    rank: int = 1


KWARGS = {
    *("disable_log_stats", "dtype", "max_model_len", "tensor_parallel_size", "gpu_memory_utilization", "max_num_seqs"),
    *("enable_sleep_mode", "model_impl", "distributed_executor_backend", "max_num_batched_tokens", "logprobs_mode"),
    *("quantization", "trust_remote_code", "skip_tokenizer_init", "max_logprobs", "enforce_eager"),
}
Change = Callable[[torch.nn.Module], object]


class LLM:
    calls: list[list[SamplingParams]] = []  # noqa: RUF012 - what the tests look at
    made: list[LLM] = []  # noqa: RUF012
    drops: Change = staticmethod(lambda network: None)  # what is wrong with this vLLM's attention

    def __init__(self, model: str, *, seed: int = 0, **kwargs: Any) -> None:
        assert set(kwargs) <= KWARGS
        if not (Path(model) / "config.json").is_file():
            raise OSError(f"{model} is no model")
        self.kwargs = kwargs
        if kwargs.get("skip_tokenizer_init"):
            self.model, self.tokenizer = Gemma2ForCausalLM.from_pretrained(model, attn_implementation="eager"), None
        else:
            self.model, self.tokenizer = load_policy(Path(model))
        type(self).drops(self.model)
        self.off_by = 0.0  # nats: what is added to every log-prob that is told
        length = self.model.config.max_position_embeddings
        runner = types.SimpleNamespace(model=types.SimpleNamespace(load_weights=self.load_weights))
        executor = types.SimpleNamespace(driver_worker=types.SimpleNamespace(model_runner=runner))
        config = types.SimpleNamespace(max_model_len=length)
        self.llm_engine = types.SimpleNamespace(model_config=config, model_executor=executor)
        self.loaded: list[str] = []
        self.resets = 0
        self.asleep: set[str] = set()
        self.slept = 0
        type(self).made.append(self)

    def sleep(self, level=1):
        """Level 2 discards the weights: they must be loaded again."""
        assert self.kwargs["enable_sleep_mode"]
        self.asleep, self.slept = {"weights", "kv_cache"}, self.slept + 1
        if level == 2:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.fill_(torch.nan)

    def wake_up(self, tags=None):
        self.asleep -= set(tags or ("weights", "kv_cache"))

    def load_weights(self, weights):
        assert "weights" not in self.asleep
        for name, tensor in weights:
            with torch.no_grad():
                self.model.get_parameter(name).copy_(tensor)
            self.loaded.append(name)

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, prompts, sampling_params, *, use_tqdm=True, lora_request=None, priority=None):
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        assert len(prompts) == len(sampling_params)
        assert not self.asleep
        type(self).calls.append(list(sampling_params))
        pairs = enumerate(zip(prompts, sampling_params, strict=True))
        return [self._one(i, prompt["prompt_token_ids"], params) for i, (prompt, params) in pairs]

    def _one(self, number, ids, given):
        if given.prompt_logprobs is not None:
            return RequestOutput(str(number), None, ids, prompt_logprobs=self._read(ids, given.prompt_logprobs))
        outputs = [self._drawn(k, ids, given) for k in range(given.n)]
        return RequestOutput(str(number), None, ids, outputs)

    @torch.no_grad()
    def _read(self, ids, count):
        """Log-probs of the `count` most probable tokens, and of the prompt's, after each prefix."""
        assert count <= self.kwargs["max_logprobs"]
        logps = (
            self.model.to(getattr(torch, self.kwargs["dtype"]))(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        )
        best = [row.topk(count).indices.tolist() for row in logps]
        pairs = zip(logps, best, ids[1:], strict=False)
        return [None, *({i: Logprob(float(row[i])) for i in {*top, token}} for row, top, token in pairs)]

    def _drawn(self, k, ids, given):
        params = Ours(given.max_tokens, given.temperature, 1, given.top_p, max(0, given.top_k), given.min_p)
        generator = None if given.seed is None else torch.Generator().manual_seed(given.seed + k)
        drawn = sample(self.model, [ids], params, given.stop_token_ids, 0, generator)
        reason = "length" if drawn.truncated[0] else "stop"
        if given.stop:
            assert given.detokenize, "vLLM finds stop strings only in text"
            reason = self._cut(drawn, given.stop) or reason
        total, each = None, None
        if given.logprobs is not None:
            total = sum(drawn.logps[0])
        if given.logprobs is not None and self.kwargs.get("logprobs_mode") == "processed_logprobs":
            told = zip(drawn.ids[0], drawn.logps[0], strict=True)
            each = [{token: Logprob(value + self.off_by)} for token, value in told]
        return CompletionOutput(k, "", drawn.ids[0], total, each, reason)

    def _cut(self, drawn, stops):
        """End the ids with the token that completes a stop string, as vLLM does; its text is cut, its ids are not."""
        for length in range(1, len(drawn.ids[0]) + 1):
            text = self.tokenizer.decode(drawn.ids[0][:length], skip_special_tokens=True)
            if any(stop in text for stop in stops):
                del drawn.ids[0][length:], drawn.logps[0][length:]
                return "stop"
        return None


class Client:
    """A server that answers, with the methods of TRL's VLLMClient that its trainers call."""

    model: str = ""  # the directory that the server was started with
    made: list[Client] = []  # noqa: RUF012

    def __init__(
        self, base_url=None, host="0.0.0.0", server_port=8000, group_port=51216, connection_timeout=0.0
    ) -> None:
        self.base_url = base_url
        self.llm = LLM(self.model)
        self.joined = None
        type(self).made.append(self)

    def init_communicator(self, device=0):
        self.joined = device

    def close_communicator(self):
        self.joined = None

    def update_named_params(self, metadata, named_params):
        named = list(named_params)
        assert metadata == [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in named]
        self.llm.load_weights(named)

    def reset_prefix_cache(self):
        self.llm.reset_prefix_cache()

    def generate(
        self,
        prompts,
        features=None,
        n=1,
        repetition_penalty=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        max_tokens=16,
        logprobs=0,
        structured_outputs_regex=None,
        generation_kwargs=None,
    ):
        assert features is None
        assert structured_outputs_regex is None
        params = SamplingParams(
            n=n,
            repetition_penalty=repetition_penalty,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            max_tokens=max_tokens,
            logprobs=logprobs,
            **(generation_kwargs or {}),
        )
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        return {
            "prompt_ids": [output.prompt_token_ids for output in outputs],
            "completion_ids": [each.token_ids for output in outputs for each in output.outputs],
            "logprobs": None,
            "logprob_token_ids": None,
        }


def module() -> types.ModuleType:
    """As `import vllm` gives it."""
    fake = types.ModuleType("vllm")
    fake.__version__ = "0.10.2"
    fake.LLM, fake.SamplingParams = LLM, SamplingParams
    fake.TokensPrompt = lambda prompt_token_ids: {"prompt_token_ids": prompt_token_ids}
    return fake
