"""Low-rank adaptation by peft: W + (alpha / rank) B A, with B = 0 at the start (Hu et al., 2106.09685).

Adapts every linear layer of the backbone, without dropout. The output is the plain model, products added to weights.
"""

from __future__ import annotations

from typing import Any, Literal

from .schemas import LoraFields

__all__ = ["lora_config", "merged"]


def lora_config(config: LoraFields, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> Any:
    """peft's configuration, or None when `lora_rank` is 0. The head of a classifier is trained in full."""
    if config.lora_rank == 0:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def merged(model: Any) -> Any:
    """The plain model: LoRA products added to their weights, in the dtype of the weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
