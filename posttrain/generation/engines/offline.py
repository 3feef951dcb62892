"""vLLM as an engine: `LLM.generate` on token ids, one seed per request (vLLM >= 0.10).

vLLM batches by itself, so all requests of a chunk go to it at once. It repeats itself only approximately: what a row
gets depends on its neighbours in the last bits of its logits. Log-probs are vLLM's, those of temperature 1.
Written to the documented interface; the tests run it on a stand-in with the same signatures (no GPU there).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from typing import Any

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.doctor.vllm_probe import refuse_wrong_attention
from gemma2.posttrain.models.loading import load_tokenizer, read_config
from gemma2.posttrain.schemas import GenerateConfig

from .base import Completion, Key, Message, Request
from .stops import text_completion

__all__ = ["VllmEngine"]

CHUNK = 2048  # requests at once: enough for vLLM to stay busy, few enough to lose in a kill


class VllmEngine:
    """A model in vLLM's offline mode."""

    def __init__(self, llm: Any, chat: ChatFormat, window: int, sampling: JsonObject) -> None:  # noqa: ANN401
        self.llm = llm
        self.chat = chat
        self.window = window
        self.sampling = sampling
        self.chunk = CHUNK

    @classmethod
    def load(cls, config: GenerateConfig) -> VllmEngine:
        """Start vLLM on the teacher. Raises UsageError without the package.

        Raises InputError when it refuses the model, or drops a part of its attention (doctor's probe, run once).
        """
        try:
            import vllm
        except ImportError as error:
            raise UsageError(
                f"--engine vllm: {error}", "pip install 'gemma2[vllm]' on a machine with a GPU, or use another engine"
            ) from error
        read_config(config.teacher)  # refuses models with code and damaged files, with our messages
        tokenizer = load_tokenizer(config.teacher)
        refuse_wrong_attention(config.teacher, vllm, dtype=config.dtype)
        try:
            llm = vllm.LLM(
                model=str(config.teacher),
                dtype=config.dtype,
                seed=config.seed,
                disable_log_stats=True,
                trust_remote_code=False,
            )
        except (ValueError, RuntimeError, OSError) as error:
            detail = " ".join(str(error).split())[:200]
            raise InputError(f"vLLM cannot load {config.teacher}: {detail}", "see vLLM's own log above") from error
        generation = _generation_config(config)
        sampling: JsonObject = {
            "n": 1,
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k if config.top_k > 0 else -1,
            "min_p": config.min_p,
            "logprobs": 0,  # of the drawn token alone
            "detokenize": bool(config.stop),  # only to find stop strings: text is ours to make, without control tokens
        }
        if config.stop:
            sampling["stop"] = list(config.stop)
        chat = ChatFormat(tokenizer, generation)
        window = int(llm.llm_engine.model_config.max_model_len) - config.max_new_tokens
        return cls(llm, chat, window, sampling | {"stop_token_ids": chat.stop_ids})

    def encode(self, messages: list[Message]) -> list[int]:
        """Token ids of a prompt."""
        return self.chat.prompt_ids(messages)

    def complete(self, requests: Sequence[Request], known: Container[Key]) -> Iterator[list[Completion]]:
        """All that is not known, in one group."""
        import vllm

        asked = [request for request in requests if request.key not in known]
        if not asked:
            return
        outputs = self.llm.generate(
            [vllm.TokensPrompt(prompt_token_ids=request.ids) for request in asked],
            [vllm.SamplingParams(**self.sampling, seed=request.seed) for request in asked],
            use_tqdm=False,
        )
        yield [self._completion(request, output) for request, output in zip(asked, outputs, strict=True)]

    def _completion(self, request: Request, output: Any) -> Completion:  # noqa: ANN401
        (drawn,) = output.outputs
        ids = list(drawn.token_ids)
        logprob = drawn.cumulative_logprob
        completion = Completion(
            key=request.key,
            text=self.chat.decode(ids),
            finish_reason=str(drawn.finish_reason or "unknown"),  # "abort" and "error" are not answers
            tokens=len(ids),
            prompt_tokens=len(request.ids),
            logprob=round(float(logprob), 4) if logprob is not None and math.isfinite(logprob) else None,
            ids=ids,
        )
        return text_completion(completion, self.sampling.get("stop", ()))

    def facts(self) -> JsonObject:
        """The version of vLLM, which decides what a seed gives."""
        import vllm

        return {"vllm": vllm.__version__}

    def close(self) -> None:
        """Let go of the model; vLLM frees the device when nothing refers to it."""
        self.llm = None


def _generation_config(config: GenerateConfig) -> Any:  # noqa: ANN401
    from transformers import GenerationConfig

    if not (config.teacher / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(config.teacher, local_files_only=True)
