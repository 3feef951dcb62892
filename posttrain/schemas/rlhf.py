"""`gemma2 rlhf`, and the fields that RL shares with `gemma2 warp`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from .config import Config, Need
from .fields import (
    CallFields,
    Data,
    LoraFields,
    LoraOutputFields,
    Model,
    PrecisionFields,
    RowFields,
    StrategyFields,
    TrainingFields,
    check_address,
)


class RewardFields(CallFields, PrecisionFields):
    """The reward of a completion: the weighted sum of reward models and functions, minus the penalties."""

    REWARD_NEEDED: ClassVar[bool] = True

    reward: tuple[Path, ...] = Field((), description="reward models, directories or hub ids")
    reward_fn: tuple[str, ...] = Field((), description="reward functions, each as module:function")
    reward_weights: tuple[float, ...] = Field(
        (), description="weight of each term, reward models first, then functions; default: 1 each"
    )
    reward_ensemble: Literal["mean", "min", "warm"] | None = Field(
        None,
        description="use the reward models as one term: mean or minimum of their scores, or one model with the mean "
        "of their weights (WARM)",
    )
    reward_clip: float | None = Field(
        None, gt=0, description="clip the weighted reward to [-C, C] before penalties; default: no clipping"
    )
    length_penalty: float = Field(0.0, ge=0, description="subtracted per token (WARP, App. E: 0.0005)")
    missing_eos_penalty: float = Field(0.0, ge=0, description="subtracted from a completion that was cut off")

    @field_validator("reward", "reward_fn", mode="before")
    @classmethod
    def _one_term_is_a_list_of_one(cls, value: object) -> object:
        if value is None:
            return ()
        return (value,) if isinstance(value, str | Path) else value

    @property
    def reward_terms(self) -> tuple[str, ...]:
        """The terms of the reward as they were given, in the order of the weights."""
        models = tuple(str(path) for path in self.reward)
        if self.reward_ensemble is not None:
            models = (f"{self.reward_ensemble} of {len(models)} reward models",)
        return (*models, *self.reward_fn)

    @model_validator(mode="after")
    def _terms_fit_each_other(self) -> Self:
        names = [*map(str, self.reward), *self.reward_fn]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"the reward names {min(twice)} twice; give it a larger weight instead")
        if self.reward_ensemble is not None and len(self.reward) < 2:
            raise ValueError(f"--reward-ensemble {self.reward_ensemble} needs two reward models or more in --reward")
        terms, weights = self.reward_terms, self.reward_weights
        if weights and len(weights) != len(terms):
            named = f" ({', '.join(terms)})" if terms else ""
            raise ValueError(f"--reward-weights gives {len(weights)} weights for {len(terms)} terms{named}")
        if weights and not any(weights):
            raise ValueError("--reward-weights are all 0: every completion would get the same reward")
        return self


class VllmFields(Config):
    """The engine that draws the samples of RL. TRL's names are use_vllm, vllm_mode, vllm_server_base_url,
    vllm_gpu_memory_utilization, vllm_tensor_parallel_size, vllm_max_model_length and vllm_enable_sleep_mode.
    """

    INCIDENTAL = frozenset({"vllm_server_url", "vllm_memory", "vllm_sleep_mode"})

    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="engine that draws the samples: the built-in sampler, or vLLM, which needs a GPU"
    )
    vllm_mode: Literal["colocate", "server"] = Field(
        "colocate", description="vllm: in this process on the same GPU, or a server started with vllm serve"
    )
    vllm_server_url: str | None = Field(None, description="vllm server: its address, without /v1")
    vllm_memory: float = Field(0.3, gt=0, lt=1, description="vllm colocate: share of the GPU's memory for vLLM")
    vllm_tensor_parallel: int = Field(1, ge=1, description="vllm colocate: processes that hold one copy of the policy")
    vllm_max_model_len: int | None = Field(
        None, ge=2, description="vllm colocate: longest prompt and completion, tokens; default: the model's context"
    )
    vllm_seeds: Literal["batch", "request"] = Field(
        "batch",
        description="vllm colocate: one seed for all samples of a step, which is faster; or one for each, so that what "
        "is drawn next to a sample does not change it",
    )
    vllm_sleep_mode: bool = Field(
        False, description="vllm colocate: give its weights and cache back to the GPU while the policy is updated"
    )

    @model_validator(mode="after")
    def _vllm_options_fit_each_other(self) -> Self:
        server = self.vllm_mode == "server"
        shared = self.vllm_memory != type(self).model_fields["vllm_memory"].default
        shared = shared or self.vllm_max_model_len is not None or self.vllm_sleep_mode
        shared = shared or self.vllm_seeds != type(self).model_fields["vllm_seeds"].default
        given = self.vllm_server_url is not None or server or self.vllm_tensor_parallel > 1 or shared
        if self.engine != "vllm" and given:
            raise ValueError("the options of vLLM are for --engine vllm; give it, or drop them")
        if server != (self.vllm_server_url is not None):
            raise ValueError("--vllm-mode server and --vllm-server-url go together; give both, or neither")
        if server and (self.vllm_tensor_parallel > 1 or shared):
            raise ValueError(
                "--vllm-tensor-parallel, --vllm-memory, --vllm-max-model-len, --vllm-seeds and --vllm-sleep-mode are "
                "for colocate; set them where the server is started"
            )
        if self.vllm_server_url is not None:
            check_address(self.vllm_server_url, "--vllm-server-url")
        return self


class RlFields(RewardFields, VllmFields, LoraFields, RowFields):
    """The RL stage of WARP (2406.16768, Algorithm 1, lines 3-8)."""

    NEEDS: ClassVar[tuple[Need, ...]] = (Need(("mu",), "without --anchor ema", lambda config: config.anchor == "ema"),)

    prompts_per_step: int = Field(16, ge=1, description="distinct prompts per optimizer step")
    n: int = Field(4, ge=2, description="samples per prompt: the group of the leave-one-out baseline")
    beta: float = Field(0.1, ge=0, description="weight of the KL to the anchor, per nat")
    anchor: Literal["ema", "sft", "none"] = Field(
        "ema", description="reference of the KL penalty: the policy's average, the SFT policy, or no penalty"
    )
    mu: float = Field(
        0.01, ge=0, le=1, description="EMA rate of the anchor, per optimizer step, or per --ema-every of them"
    )
    ema_every: int = Field(
        1, ge=1, description="optimizer steps between updates of the anchor; --mu is then per that many steps"
    )
    anchor_memory: Literal["gpu", "cpu"] = Field(
        "gpu",
        description="where the fp32 average is kept: on the GPU, or on the host with a bf16 copy for scoring",
    )
    lora_anchor: Literal["dense", "factors"] = Field(
        "dense",
        description="what is averaged for a LoRA policy: W + s B A, exact; or A and B, small but an approximation; "
        "with --base-bits the default is factors",
    )
    temperature: float = Field(0.9, gt=0, le=5, description="sampling temperature")
    max_new_tokens: int = Field(256, ge=1, description="completion limit, tokens")
    micro_batch_size: int | None = Field(None, ge=1, description="sequences per forward pass; default: the whole batch")
    eval_every: int = Field(100, ge=1, description="optimizer steps between evaluations on held-out prompts")
    eval_prompts: int = Field(64, ge=2, description="held-out prompts per evaluation")
    max_kl: float | None = Field(
        200.0, gt=0, description="stop when the KL to the SFT policy reaches this limit, nats per sequence"
    )
    max_dead_steps: int = Field(50, ge=1, description="stop after this many steps without any difference in reward")

    @model_validator(mode="before")
    @classmethod
    def _few_bits_keep_a_small_anchor(cls, values: object) -> object:
        """Fill in the anchor of a quantised base: a dense one has its matrices in fp32, 8 times the base's 4 bits."""
        if not isinstance(values, dict) or values.get("lora_anchor") is not None or not values.get("base_bits"):
            return values
        averaged = values.get("anchor", "ema") == "ema" and values.get("anchor_memory", "gpu") == "gpu"
        return (
            values | {"lora_anchor": "factors"}
            if averaged and values.get("lora_rank") not in (None, 0, "0")
            else values
        )

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> RlFields:
        if self.vllm_max_model_len is not None and self.vllm_max_model_len <= self.max_new_tokens:
            raise ValueError(
                f"vllm_max_model_len {self.vllm_max_model_len} leaves no room for a prompt before max_new_tokens "
                f"{self.max_new_tokens}; raise it, or lower max_new_tokens"
            )
        if self.lora_dropout > 0:
            raise ValueError("lora_dropout would train a different policy from the one that sampled; leave it at 0")
        if self.anchor_memory == "cpu" and (self.anchor != "ema" or self.lora_anchor == "factors"):
            raise ValueError("anchor_memory=cpu is for an average of full weights; leave it at gpu")
        if self.ema_every > 1 and self.anchor != "ema":
            raise ValueError("ema_every is for anchor=ema; drop it")
        if self.lora_anchor == "factors" and (self.lora_rank == 0 or self.anchor != "ema"):
            raise ValueError("lora_anchor=factors is an EMA of adapters; give lora_rank and anchor=ema, or drop it")
        return self


class RlhfConfig(TrainingFields, RlFields, LoraOutputFields, StrategyFields):
    """RL from a reward model, with a KL penalty to an EMA of the policy."""

    policy: Model
    prompts: Data
    steps: int = Field(100, ge=1, description="optimizer steps T")
    sft: Path | None = Field(None, description="policy that the reported KL is measured to; default: --policy")
    heldout: Path | None = Field(None, description="JSONL of evaluation prompts; default: a tenth of --prompts")
    eval_seed: int | None = Field(None, ge=0, description="seed of the evaluations' random numbers; default: --seed")
    learning_rate: float = Field(
        1e-6, gt=0, lt=1, description="peak learning rate (Adam); with LoRA the default is ten times as large"
    )

    @model_validator(mode="after")
    def _warmup_is_shorter_than_the_run(self) -> RlhfConfig:
        self.check_warmup(self.steps)
        return self
