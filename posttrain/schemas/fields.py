"""Field types and fields that several schemas share: sampling, training and LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, JsonValue, field_validator, model_validator

from gemma2.core.json_files import JsonObject
from gemma2.core.secret_text import LIKE_A_KEY

from .config import Config, Need

Model = Annotated[Path, Field(description="model directory or hub id")]
Data = Annotated[
    Path, Field(description="rows: JSONL, JSON, CSV, parquet or text file, directory, output, or hub data set")
]
Dtype = Literal["auto", "float32", "bfloat16"]
Attention = Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"]
Seed = Annotated[int, Field(ge=0, description="seed of every random choice")]


def _bound_an_area(values: tuple[float, ...]) -> tuple[float, ...]:
    if values and (len(values) != 2 or values[0] <= 0):
        raise ValueError("not a KL above 0 and a reward; give KL,REWARD, such as 10,0.5")
    return values


def _on_the_line(pick: str) -> str:
    if pick.startswith("eta=") and float(pick[4:]) > 1:
        raise ValueError("eta is not in 0 .. 1; the line goes from 0, the init, to 1, the merge")
    return pick


Bounds = Annotated[
    tuple[float, ...],
    AfterValidator(_bound_an_area),
    Field(description="KL,REWARD that bound the hypervolume; default: by the points with more reward than --sft"),
]
Pick = Annotated[
    str,
    AfterValidator(_on_the_line),
    Field(
        pattern=r"^(best-reward|kl<=\d+(\.\d+)?|eta=\d+(\.\d+)?)$",
        description="which point: best-reward, kl<=X (the best within X nats) or eta=E (on the last iteration's line)",
    ),
]

# `json_schema_extra` of a list whose items may hold commas and blanks: its flag is given once per item, as it is.
REPEATED: dict[str, JsonValue] = {"repeated": True}


class RowFields(Config):
    """Settings for reading rows as other people write them (docs/data.md)."""

    columns: tuple[str, ...] = Field(
        (), description="names that the data give to columns: prompt=question,completion=answer"
    )
    ignore_keys: tuple[str, ...] = Field((), description="keys of messages to leave out, which are refused otherwise")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="what to do with rows that cannot be read or learned: stop, or list them in skipped.jsonl"
    )

    @field_validator("columns", mode="before")
    @classmethod
    def _a_mapping_is_a_list_of_renames(cls, value: object) -> object:
        return tuple(f"{ours}={theirs}" for ours, theirs in value.items()) if isinstance(value, dict) else value

    @field_validator("columns")
    @classmethod
    def _columns_are_renames(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        for item in columns:
            if not all(part.strip() for part in item.partition("=")):
                raise ValueError(f"{item!r} does not say both names; write OURS=THEIRS, as in prompt=question")
        return columns


class SamplingFields(Config):
    """Settings for drawing completions."""

    temperature: float = Field(1.0, ge=0.0, le=5.0, description="sampling temperature; 0 is greedy")
    max_new_tokens: int = Field(256, ge=1, description="completion limit, tokens")
    batch_size: int = Field(32, ge=1, description="sequences generated or scored at once")


class AttentionFields(Config):
    """The attention kernel of the models of a command."""

    attention: Attention = Field(
        "auto",
        description="attention kernel; auto: eager on a CPU, flex_attention on an accelerator if it agrees with eager",
    )


def refuse_kernel_of_sampler(attention: str, where: str) -> None:
    """Raise ValueError for a kernel that would not run where models only draw: their masks suit eager and sdpa."""
    if attention not in ("auto", "eager", "sdpa"):
        raise ValueError(f"--attention {attention} has no effect {where}; leave it out, or give eager or sdpa")


class PrecisionFields(AttentionFields):
    """The precision of models that are not trained, and the attention kernel."""

    dtype: Dtype = Field(
        "auto",
        description="precision of models that are not trained; auto: bfloat16 on an accelerator, float32 on the CPU",
    )


class CallFields(Config):
    """A limit for functions of the user's."""

    INCIDENTAL: ClassVar[frozenset[str]] = frozenset({"reward_timeout"})

    reward_timeout: float | None = Field(
        1800.0, gt=0, le=1e7, description="seconds that a call of a reward or judge function may take; null: no limit"
    )


class TrainingFields(Config):
    """Settings of every training command."""

    INCIDENTAL: ClassVar[frozenset[str]] = frozenset({"report_to"})
    PATHS_AS_TEXT: ClassVar[frozenset[str]] = frozenset({"trainer"})

    learning_rate: float = Field(
        1e-5, gt=0, lt=1, description="peak learning rate (Adam); with LoRA the default is ten times as large"
    )
    warmup_ratio: float = Field(
        0.05, ge=0, lt=1, description="linear warm-up, share of the optimizer steps; the first step has a rate above 0"
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="linear warm-up, optimizer steps, instead of --warmup-ratio"
    )
    max_grad_norm: float = Field(1.0, ge=0, description="gradient norm limit; 0: no clipping")
    save_every: int = Field(100, ge=1, description="optimizer steps between checkpoints")
    log_every: int = Field(
        1, ge=1, description="optimizer steps between lines of metrics.jsonl; every checkpoint adds a line"
    )
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (), description="also send the metrics to tensorboard, wandb, trackio; metrics.jsonl is always written"
    )
    seed: Seed = 0
    trainer: JsonObject = Field(
        default_factory=dict, description="further options of the TRL trainer, under TRL's names"
    )

    def check_warmup(self, steps: int) -> None:
        """Raise ValueError, as "what; hint", for a warm-up that is as long as the training."""
        if self.warmup_steps is not None and self.warmup_steps >= steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} of {steps} steps would never reach the learning rate; "
                f"give --warmup-steps {steps - 1} or fewer, or more steps"
            )


class LaunchFields(Config):
    """On how many accelerators and machines a command runs (posttrain/launch)."""

    INCIDENTAL: ClassVar[frozenset[str]] = frozenset({"gpus", "nodes"})

    gpus: int | None = Field(
        None, ge=1, le=1024, description="GPUs of each machine, a process on each; default: as many as the models need"
    )
    nodes: int = Field(1, ge=1, le=1024, description="machines that run the command together, with --gpus on each")


class StrategyFields(LaunchFields):
    """How several processes hold the model that they train together."""

    INCIDENTAL: ClassVar[frozenset[str]] = frozenset({"strategy"})

    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="ddp: the whole model on every GPU; fsdp: a share of it on each; auto: ddp where that fits",
    )


LORA_RATE = 10  # LoRA's best rate over that of full training (Schulman et al. 2025, LoRA Without Regret)
LORA_SCALE = 2.0


class LoraFields(Config):
    """Low-rank adaptation."""

    NEEDS: ClassVar[tuple[Need, ...]] = (
        Need(
            ("lora_alpha", "lora_dropout", "lora_targets"),
            "without --lora-rank",
            lambda config: config.lora_rank > 0,
        ),
    )

    lora_rank: int = Field(0, ge=0, description="rank of the LoRA adapter; 0 trains all weights")
    lora_alpha: float | None = Field(None, gt=0, description="LoRA scale is alpha / rank; default: twice the rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability of the adapter's inputs")
    lora_targets: tuple[str, ...] = Field(
        (), description="modules to adapt, by the last part of their names; default: all linear layers except the head"
    )
    base_bits: Literal[4, 8] | None = Field(
        None,
        description="keep the linear layers under a LoRA adapter in 4 bits (NF4) or 8; outputs have the base as it was",
    )

    @property
    def alpha(self) -> float:
        """The effective alpha."""
        return LORA_SCALE * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @model_validator(mode="before")
    @classmethod
    def _lora_learns_at_ten_times_the_rate(cls, values: object) -> object:
        """Fill in the learning rate where it is not given: the recorded configuration has the number that was used."""
        field = cls.model_fields.get("learning_rate")
        if not isinstance(values, dict) or field is None or values.get("learning_rate") is not None:
            return values
        rank = values.get("lora_rank")
        adapted = (isinstance(rank, int | float) and rank > 0) or (isinstance(rank, str) and rank.strip("0 ") != "")
        return values | {"learning_rate": LORA_RATE * field.default} if adapted else values

    @field_validator("base_bits", mode="before")
    @classmethod
    def _bits_may_be_text(cls, value: object) -> object:
        return int(value) if isinstance(value, str) and value.strip().isdecimal() else value

    @model_validator(mode="after")
    def _only_a_frozen_base_is_quantised(self) -> Self:
        if self.base_bits is not None and self.lora_rank == 0:
            raise ValueError(
                f"base_bits={self.base_bits} is for the frozen base of an adapter; give --lora-rank as well, "
                "or drop --base-bits"
            )
        if self.base_bits is not None and getattr(self, "strategy", "auto") == "fsdp":
            raise ValueError(
                "strategy=fsdp divides weights over processes, base_bits keeps few bits of them on each; "
                "give strategy=ddp, or drop base_bits"
            )
        return self


class LoraOutputFields(LoraFields):
    """Low-rank adaptation, and the form of the output."""

    lora_output: Literal["merged", "adapter"] = Field(
        "merged", description="write a plain model, or only the LoRA adapter, which gemma2 merge reads with its base"
    )

    @model_validator(mode="after")
    def _adapter_output_needs_an_adapter(self) -> LoraOutputFields:
        if self.lora_output == "adapter" and self.lora_rank == 0:
            raise ValueError("lora_output=adapter needs an adapter; give lora_rank as well")
        return self


def check_address(url: str, option: str = "--base-url") -> None:
    """Raise ValueError for a server address with credentials, which outputs would record, or one that no server has."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:  # its text may repeat a password
        what = "a port that is not a number from 1 to 65535" if "port" in str(error).lower() else "a malformed host"
        raise ValueError(f"{option} has {what}; give an address like http://localhost:8000/v1") from error
    if "@" in parts.netloc or parts.query or parts.fragment or any(map(LIKE_A_KEY.match, parts.path.split("/"))):
        raise ValueError(f"{option} holds credentials, a query or a fragment; keep keys in the environment")
    if parts.scheme not in ("http", "https") or not parts.hostname or any(char.isspace() for char in url):
        raise ValueError(f"{option} is not an http address; begin it with http:// or https:// and a host")
    if port == 0:
        raise ValueError(f"{option} has the port 0; give the port that the server listens to")
