"""What the settings of a training are called in each tool, and what it does where a file does not say.

Facts from trl 1.16, axolotl 0.19 and llamafactory 0.9.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["DIALECTS", "FORMATS", "Dialect", "Format", "Kind"]

Format = Literal["trl", "axolotl", "llamafactory"]
FORMATS: tuple[Format, ...] = ("trl", "axolotl", "llamafactory")
# What a file trains; dpo is read as the reward model of its pairs, ppo as rlhf.
Kind = Literal["sft", "reward", "dpo", "rlhf"]


@dataclass(frozen=True)
class Dialect:
    """One tool: its names of the settings that the import computes with, and its defaults.

    own    keys that no other tool has: a file with them is of this one
    names  canonical name -> theirs; the ones that are absent have no name there
    rates  learning rate by what is trained, where there is a default
    """

    title: str
    own: frozenset[str]
    names: Mapping[str, tuple[str, ...]]
    rates: Mapping[Kind, float] = field(default_factory=dict)
    per_device: int = 8
    epochs: float = 3.0
    length: int = 1024
    schedule: str = "linear"
    warmup: float = 0.0
    rank: int | None = None
    alpha: float | None = None  # None: twice the rank
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    overlong: str = "truncate"
    seed: int = 42


# The same in all three, or in TRL and LLaMA-Factory, which both have the arguments of transformers' Trainer.
HUGGING_FACE = {
    "per_device": ("per_device_train_batch_size",),
    "accumulation": ("gradient_accumulation_steps",),
    "epochs": ("num_train_epochs",),
    "max_steps": ("max_steps",),
    "rate": ("learning_rate",),
    "schedule": ("lr_scheduler_type",),
    "warmup_ratio": ("warmup_ratio",),
    "warmup_steps": ("warmup_steps",),
    "seed": ("seed",),
    "model": ("model_name_or_path",),
}


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


DIALECTS: dict[Format, Dialect] = {
    "trl": Dialect(
        "TRL",
        _keys(
            "dataset_name dataset_config dataset_train_split dataset_test_split dataset_text_field use_peft lora_r "
            "load_in_4bit assistant_only_loss completion_only_loss center_rewards_coefficient truncation_mode dtype "
            "torch_dtype max_seq_length dataset_num_proc eos_token test_split_size max_length loss_type beta"
        ),
        {
            **HUGGING_FACE,
            "length": ("max_length", "max_seq_length"),
            "rank": ("lora_r",),
            "targets": ("lora_target_modules",),
            "share": ("test_split_size",),
            "packing": ("packing",),
            "attention": ("attn_implementation",),
        },
        rates={"sft": 2e-5, "reward": 1e-4},
        rank=16,
        alpha=32.0,
        dropout=0.05,
        targets=("q_proj", "v_proj"),  # peft's own choice for Gemma 2, which TRL leaves to it
    ),
    "axolotl": Dialect(
        "axolotl",
        _keys(
            "base_model sequence_len micro_batch_size num_epochs val_set_size adapter sample_packing "
            "lora_target_linear dataset_prepared_path tokenizer_type model_type train_on_inputs wandb_project "
            "pad_to_sequence_len reward_model rl chat_template optimizer lr_scheduler"
        ),
        {
            **HUGGING_FACE,
            "model": ("base_model",),
            "per_device": ("micro_batch_size",),
            "epochs": ("num_epochs",),
            "schedule": ("lr_scheduler",),
            "length": ("sequence_len",),
            "rank": ("lora_r",),
            "targets": ("lora_target_modules",),
            "share": ("val_set_size",),
            "packing": ("sample_packing",),
            "attention": ("attn_implementation", "flash_attention", "sdp_attention", "flex_attention"),
        },
        per_device=1,
        epochs=1.0,
        length=512,
        schedule="cosine",
        warmup=0.03,
        overlong="drop",
    ),
    "llamafactory": Dialect(
        "LLaMA-Factory",
        _keys(
            "stage finetuning_type dataset dataset_dir template cutoff_len lora_rank lora_target val_size "
            "max_samples preprocessing_num_workers overwrite_cache plot_loss quantization_bit flash_attn pref_beta "
            "pref_loss neat_packing overwrite_output_dir"
        ),
        {
            **HUGGING_FACE,
            "length": ("cutoff_len",),
            "rank": ("lora_rank",),
            "targets": ("lora_target",),
            "share": ("val_size",),
            "packing": ("packing", "neat_packing"),
            "attention": ("flash_attn",),
        },
        rates=dict.fromkeys(("sft", "reward", "dpo", "rlhf"), 5e-5),
        length=2048,
        rank=8,
    ),
}
