"""TRL's SFTTrainer on rows that are ready: batches of similar rows, and on a CPU a head that sees targets only.

Deviations from TRL 1.16 (tests/posttrain/rl/test_trl_contract.py and test_sft_trainer.py guard the hooks):
1. Rows come rendered and masked; it templates and truncates nothing.
2. Batches hold rows of similar length in an order that a resume reproduces (`batching.py`), of a mixture by weight.
3. In one process on a CPU with eager attention, `compute_loss` forms the loss from last hidden states at target
   positions, gradient included (`cross_entropy.py`), and attends in blocks (`causal_attention.py`), a part of the
   micro-batch at a time. TRL's scores the prompt and the padding as well, and forms its logits twice. The mean is the
   same: over the targets of the whole optimizer batch. The metric `entropy`, which needs another pass over the logits,
   is left out there.
4. A checkpoint holds no model card.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gemma2.core.json_files import JsonObject
from gemma2.posttrain.data.batching import Epochs, GroupedByLength
from gemma2.posttrain.data.examples import IGNORED, Example, to_dataset
from gemma2.posttrain.models.cross_entropy import plain_head, summed_cross_entropy
from gemma2.posttrain.models.lora import check_targets, lora_config, plain_model
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.scorer import last_hidden_states
from gemma2.posttrain.runs.run_directory import Run
from gemma2.posttrain.schemas import SftConfig
from gemma2.posttrain.training.trainer import configured, trainer_arguments

__all__ = ["SftTrainer", "make_trainer", "pack", "parts"]

# Options of TRL about what is done here: rendering, masking, cutting, packing, order.
UNUSED = (
    *("assistant_only_loss", "completion_only_loss", "chat_template_path", "dataset_num_proc", "dataset_text_field"),
    *("eos_token", "pad_token", "packing_strategy", "shuffle_dataset", "truncation_mode", "trust_remote_code"),
    "train_sampling_strategy",
)
PART_TOKENS = 2048  # per forward pass on a CPU: what its caches hold of a layer's activations, measured (bench/sft.py)


class SftTrainer(GroupedByLength, SFTTrainer):  # type: ignore[misc]  # the library is not typed
    """SFTTrainer with batches of similar rows, and on a CPU a loss that scores targets only."""

    epochs: Epochs | None = None
    part_tokens: int | None = None

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        model = plain_model(self.model)
        self.scores_targets_only = (
            self.args.device.type == "cpu"
            and self.accelerator.num_processes == 1
            and self.accelerator.mixed_precision == "no"
            and model.config._attn_implementation == "eager"
            and self.args.loss_type == "nll"
            and self.label_smoother is None
            and not self.aux_loss_enabled
            and plain_head(model)
        )

    def training_step(
        self, model: CausalLM, inputs: JsonObject, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch, in parts of at most `part_tokens` tokens, padding counted."""
        if self.part_tokens is None or num_items_in_batch is None or "attention_mask" not in inputs:
            result: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return result
        losses = [
            super(SftTrainer, self).training_step(model, part, num_items_in_batch)
            for part in parts(inputs, self.part_tokens)
        ]
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: CausalLM,
        inputs: JsonObject,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401
        """Mean of -log pi over the targets of the optimizer batch, nats."""
        if not self.scores_targets_only or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]  # the state at position t predicts token t + 1
        target = labels != IGNORED
        hidden = last_hidden_states(plain_model(model), inputs["input_ids"])[:, :-1][target]  # (N, d)
        count = target.sum() if num_items_in_batch is None else num_items_in_batch
        loss, _, hits = summed_cross_entropy(plain_model(model), hidden, labels[target], 1.0 / max(int(count), 1))
        accuracy = hits.float().mean().item() if len(hits) else 0.0
        self._metrics["train" if model.training else "eval"]["mean_token_accuracy"].append(accuracy)
        return loss

    def _save_checkpoint(self, model: CausalLM, trial: object) -> None:
        Trainer._save_checkpoint(self, model, trial)


def parts(inputs: dict[str, Tensor], tokens: int) -> Iterator[dict[str, Tensor]]:
    """A batch (B, T) that is padded on the right, as narrower ones of at most `tokens` tokens; a row is never cut."""
    lengths = inputs["attention_mask"].sum(1)
    order = lengths.argsort(stable=True)
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * int(lengths[order[end]]) <= tokens:
            end += 1
        rows, width = order[start:end], int(lengths[order[end - 1]])
        yield {name: values[rows, :width] for name, values in inputs.items()}
        start = end


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: SftConfig,
    run: Run,
    accumulation: int,
    epochs: Epochs | None = None,
) -> SftTrainer:
    """The trainer over rows that need no further preparation. `epochs`: which of them an epoch holds, default all."""
    check_targets(config, model)
    arguments = trainer_arguments(
        TrlSftConfig,
        config,
        run,
        UNUSED,
        per_device_train_batch_size=config.batch_size // accumulation,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    if config.packing:
        rows = range(len(examples)) if epochs is None else epochs.rows(0)
        dataset, epochs = pack([examples[row] for row in rows], config.max_length), None
    else:
        dataset = to_dataset(examples)
    collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True) if config.packing else None
    with warnings.catch_warnings():
        # peft 0.21 asks the model for `is_gradient_checkpointing`, which transformers 5 renamed.
        warnings.simplefilter("ignore", FutureWarning)
        trainer = SftTrainer(
            model=model,
            args=configured(TrlSftConfig, config, arguments),
            data_collator=collator,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=lora_config(config, "CAUSAL_LM"),
        )
    trainer.epochs = epochs
    # Position ids keep rows without padding apart; TRL's loss hands them on.
    trainer.scores_targets_only &= not (config.packing or trainer.padding_free)
    trainer.part_tokens = config.micro_batch_tokens
    if trainer.part_tokens is None and trainer.scores_targets_only:
        trainer.part_tokens = PART_TOKENS
    return trainer


def pack(examples: Sequence[Example], max_length: int) -> Dataset:
    """Rows put end to end up to `max_length` tokens, best fit first, none cut; `seq_lengths` says where each begins.

    With the collator's position ids, flash attention keeps them apart.
    """
    packed = pack_dataset(to_dataset(examples).remove_columns("length"), max_length, "bfd", {"batch_size": None})
    return packed.add_column("length", [sum(lengths) for lengths in packed["seq_lengths"]])
