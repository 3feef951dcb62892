"""TRL's SFTTrainer on rendered rows: batches of similar rows, and on a CPU a head that sees targets only.

Deviations from TRL 1.16 (tests/posttrain/rl/test_trl_contract.py and test_sft_trainer.py guard the hooks):
1. Rows are already rendered and masked; the trainer templates and truncates nothing.
2. Batches consist of rows of similar length in an order that a resume reproduces (`batching.py`); mixtures by weight.
3. On a CPU with eager attention, `compute_loss` computes the loss from last hidden states at target positions, gradient
   included (`cross_entropy.py`), with attention in blocks (`causal_attention.py`), in one process on a part of the
   micro-batch at a time. TRL also scores the prompt and the padding, and forms its logits twice. The mean is the same:
   over the targets of the whole optimizer batch. The metric `entropy`, which needs another pass over the logits, is
   left out in this case. A model that is divided over processes takes this way on an accelerator too, with its head in
   fp32 (`head.py`); there `mean_token_accuracy` is left out as well.
4. A checkpoint has no model card; that of a divided model is `sharded_trainer.py`'s.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gemma2.core.errors import GuardStop, UsageError
from gemma2.posttrain.data.batching import Epochs, GroupedByLength
from gemma2.posttrain.data.examples import IGNORED, Example, to_dataset
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.models.cross_entropy import summed_cross_entropy
from gemma2.posttrain.models.head import plain_head
from gemma2.posttrain.models.lora import check_targets, lora_config, plain_model
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.sampler import evaluating
from gemma2.posttrain.models.scorer import head_in_one_pass, head_logps, last_hidden_states
from gemma2.posttrain.runs.run_directory import Run
from gemma2.posttrain.schemas import SftConfig
from gemma2.posttrain.sharding.placement import WHOLE, Placement
from gemma2.posttrain.sharding.units import whole
from gemma2.posttrain.training.heldout import heldout_loss
from gemma2.posttrain.training.one_row import agree, same_tokens, shortest
from gemma2.posttrain.training.sharded_trainer import ShardedTrainer, hand_over
from gemma2.posttrain.training.trainer import configured, trainer_arguments
from gemma2.posttrain.training.trainer_options import SFT
from gemma2.posttrain.training.warmup import check_warmup, total_steps

__all__ = ["SftTrainer", "make_trainer", "pack", "parts"]

PART_TOKENS = 2048  # per forward pass on a CPU: a layer's activations fit in the caches, measured (bench/sft.py)


class SftTrainer(GroupedByLength, ShardedTrainer, SFTTrainer):  # type: ignore[misc]  # TRL is not typed
    """SFTTrainer with batches of similar rows, and on a CPU a loss that scores targets only."""

    epochs: Epochs | None = None
    part_tokens: int | None = None
    targets: int = 0  # of the micro-batches since the last optimizer step

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        model: CausalLM = plain_model(self.model)
        self.scores_targets_only = (
            (self.args.device.type == "cpu" or self.sharded)
            and self.accelerator.mixed_precision == "no"
            and model.config._attn_implementation == "eager"
            and self.args.loss_type == "nll"
            and self.label_smoother is None
            and not self.aux_loss_enabled
            and plain_head(model)
        )

    def training_step(
        self, model: CausalLM, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of one micro-batch, in parts of at most `part_tokens` tokens, padding included."""
        self._count_targets(inputs["labels"], num_items_in_batch)
        if self.part_tokens is None or num_items_in_batch is None or "attention_mask" not in inputs:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        losses = [
            super(SftTrainer, self).training_step(model, part, num_items_in_batch)
            for part in parts(inputs, self.part_tokens)
        ]
        return torch.stack(losses).sum()

    def _count_targets(self, labels: Tensor, divisor: Tensor | int | None) -> None:
        """Raise GuardStop unless the loss is divided by the targets of all micro-batches of the step."""
        self.targets += int((labels[:, 1:] != IGNORED).sum())
        if not self.accelerator.sync_gradients or divisor is None:
            return
        targets, self.targets = self.targets, 0
        if self.accelerator.num_processes > 1:
            targets = int(self.accelerator.reduce(torch.tensor(targets, device=labels.device)))
        if targets != int(divisor):
            raise GuardStop(
                f"step {self.state.global_step + 1}: the loss of {targets} targets is divided by {int(divisor)}",
                "report it, with the versions of trl and transformers; --micro-batch-size changes the batches",
            )

    def compute_loss(
        self,
        model: CausalLM,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, object]:
        """Return the mean of -log pi over the targets of the optimizer batch, nats; with TRL's outputs on request."""
        if not self.scores_targets_only or return_outputs:
            computed: Tensor | tuple[Tensor, object] = super().compute_loss(
                model, inputs, return_outputs, num_items_in_batch
            )
            return computed
        labels = inputs["labels"][:, 1:]  # the state at position t predicts token t + 1
        target = labels != IGNORED
        count = target.sum() if num_items_in_batch is None else num_items_in_batch
        # The gradients of all processes are averaged, and the divisor counts the targets of all.
        scale = self.accelerator.num_processes / max(int(count), 1)
        loss, hits = self.inside(model, self._targets_loss, inputs["input_ids"], labels, scale)
        if hits is not None:
            right = self.accelerator.gather(torch.stack([hits.sum(), target.sum()])).view(-1, 2).sum(0)
            accuracy = (right[0] / right[1]).item() if right[1] else 0.0
            self._metrics["train" if self.model.training else "eval"]["mean_token_accuracy"].append(accuracy)
        return loss

    def _targets_loss(self, ids: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """Return (scale * sum of -log pi over the targets, with gradient; whether each target is the mode).

        ids: (B, T); labels: (B, T - 1), what follows each token.
        """
        model, target = plain_model(self.model), labels != IGNORED
        states = last_hidden_states(model, ids)
        hidden = states[:, :-1][target]  # (N, d)
        if not len(hidden):  # rows that fill the last batch of an epoch: a gradient of 0 for all weights
            return states.sum() * 0.0, hidden.new_zeros(0, dtype=torch.bool)
        if head_in_one_pass(model, hidden):
            loss, _, hits = summed_cross_entropy(model, hidden, labels[target], scale)
            return loss, hits
        return -head_logps(model, hidden, labels[target], 1.0)[0].sum() * scale, None

    @torch.no_grad()
    def check_one_row(self, examples: Sequence[Example]) -> None:
        """Raise GuardStop if batch or loss of the shortest row are not those that the row itself gives."""
        if "seq_lengths" in self.train_dataset.column_names or self.padding_free:
            return  # rows are joined: no row is a batch
        number = shortest(self.train_dataset["length"][:])
        example, row = examples[number], self.train_dataset[number]
        features = {name: row[name] for name in ("input_ids", "labels")}
        inputs = self._prepare_inputs(self.data_collator([features]))
        same_tokens("tokens", inputs["input_ids"], example.ids)
        labels = [i if learned else IGNORED for i, learned in zip(example.ids, example.mask, strict=True)]
        same_tokens("labels", inputs["labels"], labels)
        if self.args.loss_type != "nll" or self.label_smoother is not None:
            return  # asked for: another loss
        # Each process sees the row, and the loss is made for gradients that are averaged over them.
        targets = torch.tensor(sum(example.mask[1:]) * self.accelerator.num_processes)
        with whole(plain_model(self.model)), evaluating(self.model), self.compute_loss_context_manager():
            loss = self.compute_loss(self.model, inputs, num_items_in_batch=targets)
            agree("the loss of a row", float(cast(Tensor, loss)), heldout_loss(self.model, [example], 1))
        self._metrics["eval"].clear()  # what the loss noted; ours are measured elsewhere


def parts(inputs: dict[str, Tensor], tokens: int) -> Iterator[dict[str, Tensor]]:
    """Split a batch (B, T), padded on the right, into narrower ones of at most `tokens` tokens; no row is cut."""
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
    model: CausalLM,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    config: SftConfig,
    run: Run,
    accumulation: int,
    epochs: Epochs | None = None,
    placement: Placement = WHOLE,
) -> SftTrainer:
    """Return the trainer on rows that need no further preparation. `epochs`: the rows of each epoch, default all.

    accumulation: forward passes of each process per step. A model that `placement` divides gets its weights here.
    """
    check_targets(config, model)
    processes = placement.ranks.size
    if processes > 1 and config.micro_batch_tokens is not None:
        raise UsageError(
            f"--micro-batch-tokens is for one process, there are {processes}", "give --micro-batch-size instead"
        )
    arguments = trainer_arguments(
        TrlSftConfig,
        config,
        run,
        SFT.unused,
        per_device_train_batch_size=config.batch_size // accumulation // processes,
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
    rows_of_epoch = len(epochs if epochs is not None else dataset)
    if processes > 1:
        dataset = with_filler(dataset)
    adapters = lora_config(config, "CAUSAL_LM")
    if placement.divides:
        model, adapters = placement.filled(model, config.model, adapters, config.seed), None
        arguments |= hand_over(model, config.trainer)
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
            peft_config=adapters,
        )
    trainer.epochs = epochs
    check_warmup(config, total_steps(trainer, rows_of_epoch))
    # Position ids separate rows without padding between them; only TRL's loss passes them to the model.
    trainer.scores_targets_only &= not (config.packing or trainer.padding_free)
    trainer.part_tokens = config.micro_batch_tokens
    # Gradients of several processes are averaged after one backward pass: with them a micro-batch stays whole.
    if trainer.part_tokens is None and trainer.scores_targets_only and processes == 1 and not placement.divides:
        trainer.part_tokens = PART_TOKENS
    placement.vary_dropout(config.seed, config.lora_dropout)
    return trainer


def with_filler(dataset: Dataset) -> Dataset:
    """Append a row without targets, which completes the batches of several processes at the end of an epoch."""
    row = dataset[shortest(dataset["length"][:])]
    return dataset.add_item(row | {"labels": [IGNORED] * len(row["labels"])})


def pack(examples: Sequence[Example], max_length: int) -> Dataset:
    """Concatenate rows up to `max_length` tokens, best fit first, none cut; `seq_lengths` has the length of each.

    With the collator's position ids, flash attention keeps the rows separate.
    """
    packed = pack_dataset(to_dataset(examples).remove_columns("length"), max_length, "bfd", {"batch_size": None})
    return packed.add_column("length", [sum(lengths) for lengths in packed["seq_lengths"]])
