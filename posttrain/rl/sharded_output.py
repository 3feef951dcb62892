"""The outputs of an RL run whose models are divided over processes: plain safetensors, tensor by tensor.

What LoRA leaves as it is comes from the policy's files again: the frozen shards may be rounded to bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from gemma2.posttrain.models.loading import open_to_readers, save_tokenizer
from gemma2.posttrain.models.lora import save_adapter
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.runs.run_directory import Run
from gemma2.posttrain.schemas import RlhfConfig
from gemma2.posttrain.sharding.adapter_shards import adapter_state, changed_values, product_shards
from gemma2.posttrain.sharding.divided_models import empty_policy
from gemma2.posttrain.sharding.units import gathered
from gemma2.posttrain.sharding.whole_files import planned_of, save_sharded

from .ema import EmaAnchor
from .rloo import AnchoredRlooTrainer
from .setup import RlSetup
from .sharded_anchor import ShardedFactorAnchor

__all__ = ["save_shards"]


def save_shards(trainer: AnchoredRlooTrainer, setup: RlSetup, config: RlhfConfig, run: Run) -> None:
    """Write what `rlhf.save` writes of an undivided policy. A collective: rank 0 writes."""
    assert setup.sharded is not None
    policy, is_main = setup.trained, run.ranks.is_main
    shell = empty_policy(config.policy)
    if not config.lora_rank:  # as the trainer has left them
        shell.config, shell.generation_config = policy.config, policy.generation_config
    shell.generation_config.eos_token_id = setup.rollout.chat.stop_ids
    if config.lora_output == "adapter":
        state = adapter_state(policy)
        assert setup.sharded.adapters is not None
        if is_main:
            save_adapter(setup.sharded.adapters, setup.rollout.chat.tokenizer, run.path, state)
    elif config.lora_rank:
        values = changed_values(config.policy, planned_of(shell), is_main, dict(product_shards(policy)))
        _save(shell, setup, run.path, is_main, values)
    else:
        _save(shell, setup, run.path, is_main, gathered(policy))
    if trainer.anchor is not None:
        values = _average(trainer.anchor, shell, config, policy, is_main)
        _save(shell, setup, run.path / "ema", is_main, values)


def _average(
    anchor: EmaAnchor, shell: CausalLM, config: RlhfConfig, policy: CausalLM, is_main: bool
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the anchor in fp32, in the order of the shell's."""
    if isinstance(anchor, ShardedFactorAnchor):
        added = dict(product_shards(policy, anchor.shadow))
        return changed_values(config.policy, planned_of(shell), is_main, added)
    return changed_values(config.policy, planned_of(shell), is_main, {}, anchor.shadow)


def _save(
    shell: CausalLM, setup: RlSetup, directory: Path, is_main: bool, values: Iterator[tuple[str, Tensor]]
) -> None:
    if is_main:
        directory.mkdir(exist_ok=True)
    save_sharded(shell, directory, is_main, values)
    if is_main:
        save_tokenizer(setup.rollout.chat.tokenizer, directory)
        open_to_readers(directory)
