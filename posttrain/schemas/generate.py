"""`gemma2 generate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from gemma2.core.json_files import JsonObject

from .config import Need
from .fields import (
    REPEATED,
    Data,
    LaunchFields,
    RowFields,
    SamplingFields,
    Seed,
    check_address,
    refuse_kernel_of_sampler,
)
from .rlhf import RewardFields

USER_INSTRUCTION = (
    "Let us swap roles. From now on you write what the user says in a conversation with an assistant, and I write the "
    "assistant's answers. Reply with the user's next message and nothing else: a follow-up question, a request to "
    "explain, correct or change something, or a further task on the same subject. Begin with the user's first message."
)

OF_THE_SERVER = ("base_url", "api_key_env", "concurrency", "timeout", "retries")
StopText = Annotated[str, Field(min_length=1)]


class GenerateConfig(SamplingFields, RewardFields, LaunchFields, RowFields):
    """Teacher completions for prompts, by a local model or a server; resumable at any row."""

    REWARD_NEEDED = False
    NEEDS = (
        Need(
            (*OF_THE_SERVER, "logprobs", "request", "price_in", "price_out"),
            "without --engine openai",
            lambda config: config.engine == "openai",
        ),
        Need(
            ("reward_clip", "length_penalty", "missing_eos_penalty"),
            "without a reward",
            lambda config: config.reward_terms,
            "give --reward DIR or --reward-fn module:function",
        ),
        Need(
            ("user_instruction",),
            "without --turns 2",
            lambda config: config.turns > 1,
            "give --turns 2 or more",
        ),
    )
    INCIDENTAL = frozenset({"concurrency", "timeout", "retries", "price_in", "price_out", "api_key_env"})

    teacher: Path = Field(description="model directory or hub id; with --engine openai the model's name on the server")
    prompts: Data
    engine: Literal["transformers", "vllm", "openai"] = Field(
        "transformers", description="engine: the built-in sampler, vLLM, or an OpenAI-compatible server"
    )
    system: str | None = Field(None, min_length=1, description="system text for every prompt without one")
    n: int = Field(1, ge=1, description="completions per prompt")
    best: int | None = Field(None, ge=1, description="keep this many of the n, by --reward or --reward-fn")
    turns: int = Field(1, ge=1, description="model turns; if 2 or more, the teacher also writes the user turns between")
    user_instruction: str = Field(
        USER_INSTRUCTION, min_length=1, description="instruction that makes the teacher write as the user"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="sample only from the most probable tokens with this total mass")
    top_k: int = Field(0, ge=0, description="sample only from this many most probable tokens; 0: all")
    min_p: float = Field(
        0.0, ge=0, le=1, description="sample only from tokens at least this probable relative to the most probable one"
    )
    stop: tuple[StopText, ...] = Field(
        (), json_schema_extra=REPEATED, description="text that ends a turn and is not part of it; repeatable"
    )
    keep_truncated: bool = Field(False, description="keep completions that reached the limit")
    on_overlong: Literal["error", "drop"] = Field(
        "error", description="if a prompt leaves no room for --max-new-tokens: stop, or drop and count it"
    )
    shard_rows: int = Field(100_000, ge=1, description="rows per output file")
    limit: int | None = Field(None, ge=1, description="use only the first prompts")
    seed: Seed = 0
    base_url: str | None = Field(None, description="openai: address of the server, including /v1")
    api_key_env: str = Field(
        "OPENAI_API_KEY", min_length=1, description="openai: environment variable that holds the key"
    )
    concurrency: int = Field(8, ge=1, le=4096, description="openai: requests at the same time")
    timeout: float = Field(
        300.0, gt=0, description="openai: longest time from a request to the end of its answer, seconds"
    )
    retries: int = Field(8, ge=0, description="openai: further attempts after a temporary failure")
    logprobs: bool = Field(False, description="openai: ask for log-probs, which not every server gives")
    request: JsonObject = Field(
        default_factory=dict, description="openai: further fields of each request; null removes a default field"
    )
    price_in: float | None = Field(None, ge=0, description="openai: USD per million prompt tokens, for --dry-run")
    price_out: float | None = Field(None, ge=0, description="openai: USD per million completion tokens")

    @model_validator(mode="after")
    def _consistent(self) -> GenerateConfig:
        if self.best is not None and not self.reward_terms:
            raise ValueError("--best needs --reward DIR or --reward-fn module:function")
        if self.best is not None and self.best > self.n:
            raise ValueError(f"--best {self.best} of --n {self.n} completions cannot be kept")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("give both --price-in and --price-out")
        if self.engine == "openai" and self.dtype != "auto" and not self.reward:
            raise ValueError(f"--dtype {self.dtype} has no effect with --engine openai: the server decides")
        if not self.reward:
            refuse_kernel_of_sampler(self.attention, "without --reward: the sampler's masks suit eager and sdpa")
            if self.engine != "transformers" and self.attention != "auto":
                raise ValueError(
                    f"--attention {self.attention} has no effect with --engine {self.engine}; leave it out"
                )
        if self.base_url is not None:
            check_address(self.base_url)
        check_key_variable(self.api_key_env)
        return self


def check_key_variable(name: str, option: str = "--api-key-env") -> None:
    """Raise ValueError for a text that cannot be a variable's name, without repeating it: it may be the key itself.

    Call it from a validator of the whole model: the error of a field's validator shows the value.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{option} is not a variable's name; give the name of the variable that holds the key")
