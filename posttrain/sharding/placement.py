"""Where the weights of a training are: whole in each process, or divided over all of them.

    placement, progress = placed("sft", config, progress)
    model, tokenizer = placement.policy(path)          whole, or without memory for its weights
    model = placement.filled(model, path, adapters)    adapters drawn as in one process, weights read into shards

One process that was not asked to divide anything takes neither step: its model is the one of `models/loading.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import transformers
from transformers import AutoModelForCausalLM

from gemma2.core.errors import InputError, UsageError
from gemma2.core.progress import SILENT, Progress
from gemma2.core.ranks import ALONE, Ranks, announced_here, join
from gemma2.merging.inputs.architecture import classifies
from gemma2.posttrain.attention.choice import chosen_kernel
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.launch.strategy import Strategy, needed_on, strategy_of
from gemma2.posttrain.models.loading import default_device, load_policy, load_tokenizer, read_config
from gemma2.posttrain.models.protocols import CausalLM, Network
from gemma2.posttrain.planning.memory import SPARE
from gemma2.posttrain.runs.machine import free_memory
from gemma2.posttrain.schemas import LoraFields, StrategyFields
from gemma2.posttrain.schemas.fields import Attention

from .into_shards import Factory, divide, skeleton
from .units import ShardLayout, layout_of

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["WHOLE", "Placement", "placed"]

N = TypeVar("N", bound=Network)


@dataclass(frozen=True)
class Placement:
    """The processes of a command, and over which of them weights are divided (`layout`; None: each holds all)."""

    ranks: Ranks = ALONE
    strategy: Strategy = "one"
    layout: ShardLayout | None = None

    def policy(
        self, path: Path, dtype: torch.dtype = torch.float32, attention: Attention = "eager"
    ) -> tuple[CausalLM, Tokenizer]:
        """Load a causal LM as `load_policy` does; a divided one has no weights before `filled`."""
        if self.layout is None:
            return load_policy(path, dtype, attention=attention)
        if classifies(read_config(path)):
            raise InputError(f"{path} is a reward model, not a language model", "give a causal LM")
        return cast(CausalLM, self.skeleton(AutoModelForCausalLM, path, attention, dtype)), load_tokenizer(path)

    def skeleton(
        self,
        factory: Factory,
        path: Path,
        attention: Attention,
        dtype: torch.dtype = torch.float32,
        **options: object,
    ) -> transformers.PreTrainedModel:
        """Return a model without weights, with the attention kernel that a whole one would be loaded with."""
        kernel = chosen_kernel(attention, path, dtype, default_device())
        return skeleton(factory, path, dtype, kernel, **options)

    def frozen_policy(
        self, path: Path, dtype: torch.dtype, attention: Attention = "eager"
    ) -> tuple[CausalLM, Tokenizer]:
        """Load a causal LM that is not trained, and whose products are in the dtype of its weights. A collective."""
        model, tokenizer = self.policy(path, dtype, attention)
        if self.layout is not None:
            divide(model.requires_grad_(False), path, self.layout)
        return model.requires_grad_(False), tokenizer

    def filled(
        self,
        model: N,
        path: Path,
        adapters: LoraConfig | None = None,
        seed: int = 0,
        unread: Collection[str] = (),
    ) -> N:
        """Give a divided model its adapters and its weights; a whole one is returned as it is. A collective.

        adapters: drawn from `seed`, on every process alike, as TRL's trainers draw them. unread: as in `divide`.
        Products are in bf16 on an accelerator, sums of gradients in fp32.
        """
        if self.layout is None:
            return model
        if adapters is not None:
            from peft import get_peft_model

            transformers.set_seed(seed)
            with warnings.catch_warnings():
                # peft 0.21 asks the model for `is_gradient_checkpointing`, which transformers 5 renamed.
                warnings.simplefilter("ignore", FutureWarning)
                model = cast(N, get_peft_model(cast(transformers.PreTrainedModel, model), adapters))
        compute = None if self.layout.device.type == "cpu" else torch.bfloat16
        divide(model, path, self.layout, compute, unread)
        return model

    @property
    def divides(self) -> bool:
        """Whether weights are divided over the processes."""
        return self.layout is not None

    def vary_dropout(self, seed: int, *shares: float) -> None:
        """Give each of several processes other random numbers, if any share of something is dropped at random."""
        if self.ranks.size > 1 and any(shares):
            transformers.set_seed(seed + self.ranks.rank)


WHOLE = Placement()


def placed(command: str, config: StrategyFields, progress: Progress = SILENT) -> tuple[Placement, Progress]:
    """Connect to the other processes and decide, the same on each, how they hold what they train.

    Also return what shows the progress: nothing does on other ranks than 0.
    """
    ranks = join(command)
    progress = progress if ranks.is_main else SILENT
    strategy = strategy_of(config, ranks, progress)
    if strategy == "fsdp" and isinstance(config, LoraFields) and config.base_bits is not None:
        raise UsageError(
            "--base-bits is for a base that each process holds as a whole; --strategy fsdp divides it",
            "leave --base-bits out, or give --strategy ddp",
        )
    layout = layout_of(ranks, default_device(), copies(config, ranks)) if strategy == "fsdp" else None
    return Placement(ranks, strategy, layout), progress


def copies(config: StrategyFields, ranks: Ranks) -> int:
    """The number of copies that divided weights are held in, the same on every process: one on each of the machines.

    Gathers then stay inside a machine. One copy over all of them where a machine has no room for one, or where they
    have unlike numbers of processes.
    """
    here = announced_here()
    if here == ranks.size or any(other != here for other in ranks.gather(here)):
        return 1
    return ranks.on_main(lambda: ranks.size // here if _one_machine_has_room(config, here) else 1)


def _one_machine_has_room(config: StrategyFields, processes: int) -> bool:
    if default_device().type == "cpu":
        return True
    capacity = free_memory().free
    needed = needed_on(config, processes, capacity, sharded=True)
    return needed <= (1 - SPARE) * capacity  # not where the size of a model is unknown: NaN
