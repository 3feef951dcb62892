"""TRL's RewardTrainer on pairs that are already rendered.

    loss = mean over pairs of  -log sigmoid(r_c - r_r - m) + lambda (r_c + r_r)^2
                                          Bradley-Terry with a margin m (Llama 2, 2307.09288, eq. 2) and centring
                                          (2312.09244, section 2.2: rewards are free up to a constant per prompt)

Deviations from TRL 1.16 (tests/posttrain/preferences/test_trainer.py compares the loss to TRL's):
1. Rows are already rendered; the trainer templates and cuts nothing.
2. Batches consist of pairs of similar length in an order that a resume reproduces (`batching.py`).
3. The mean is over the pairs of the whole optimizer batch. TRL's is a mean of means, which differs if the last
   micro-batch is smaller.
4. The head reads the last token's state only, in fp32 also under bf16 autocast: differences of rewards are small
   compared to the rewards. On a CPU attention runs in blocks and the last layer at that token only (`states.py`), in
   one process on a part of the micro-batch at a time, with long and short rows separate.
5. Dropout follows `--dropout` and `--lora-dropout`; TRL switches it off.
6. A checkpoint has no model card; that of a divided model is `sharded_trainer.py`'s.
7. A tie counts half in `accuracy`, as in an evaluation; TRL counts it as wrong.
8. With several processes pairs of two identical sides, which no data has, complete the batches at the end of an epoch.
   They count nowhere.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trl import RewardConfig as TrlRewardConfig
from trl import RewardTrainer

from gemma2.posttrain.data.batching import GroupedByLength
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.models.causal_attention import can_be_blockwise
from gemma2.posttrain.models.head import wide_linear
from gemma2.posttrain.models.lora import check_targets, lora_config, plain_model
from gemma2.posttrain.models.protocols import RewardNetwork
from gemma2.posttrain.models.sampler import evaluating
from gemma2.posttrain.runs.run_directory import Run
from gemma2.posttrain.schemas import RewardConfig
from gemma2.posttrain.sharding.placement import WHOLE, Placement
from gemma2.posttrain.sharding.units import whole
from gemma2.posttrain.training.one_row import agree, same_tokens, shortest
from gemma2.posttrain.training.sharded_trainer import ShardedTrainer, hand_over
from gemma2.posttrain.training.trainer import configured, trainer_arguments
from gemma2.posttrain.training.trainer_options import REWARD
from gemma2.posttrain.training.warmup import check_warmup, total_steps

from .pair_examples import PairIds, to_dataset
from .states import all_positions, embed, last_position

__all__ = ["PairTrainer", "drop_block_outputs", "make_trainer", "pair_loss"]

PART_TOKENS = 2048  # of both sides, per forward pass on a CPU: activations fit in the caches (bench/reward.py)


def pair_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None, centring: float) -> Tensor:
    """Return the loss of every pair (B,), nats, from rewards (B,)."""
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -F.logsigmoid(difference) + centring * (chosen + rejected) ** 2


class PairTrainer(GroupedByLength, ShardedTrainer, RewardTrainer):  # type: ignore[misc]  # TRL is not typed
    """RewardTrainer with batches of similar pairs and the loss above."""

    loss_is_scaled_for_ga = True
    part_tokens: int | None = None

    def __init__(self, *arguments: object, centring: float = 0.0, dropout: float = 0.0, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.centring, self.dropout = centring, dropout
        drop_block_outputs(self.model, dropout)
        on_cpu = self.args.device.type == "cpu" and self.accelerator.mixed_precision == "no"
        # A layer that is recomputed in the backward pass would run with another attention than in the forward pass.
        fits = can_be_blockwise(plain_model(self.model)) and not self.args.gradient_checkpointing
        # A divided layer has its weights while it runs as a whole.
        self.attends_in_blocks = on_cpu and fits and not self.sharded
        # Gradients of several processes are averaged after one backward pass: with them a micro-batch stays whole.
        alone = self.accelerator.num_processes == 1
        self.part_tokens = PART_TOKENS if self.attends_in_blocks and alone else None
        self._rewards: list[Tensor] = []  # (2, B) each, since the last line of metrics

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> int:
        """Return the number of pairs of the optimizer batch, of all processes."""
        if self.accelerator.num_processes == 1:
            return sum(len(batch["input_ids"]) // 2 for batch in batch_samples)
        own = sum(int(_differ(batch["input_ids"]).sum()) for batch in batch_samples)
        return int(self.accelerator.reduce(torch.tensor(own, device=device)))

    def training_step(
        self, model: RewardNetwork, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of one micro-batch, in parts of at most `part_tokens` tokens, padding included."""
        if self.part_tokens is None:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        # The gradient of an embedding is as large as its table, so it is formed once for all parts.
        embedded = embed(model, inputs["input_ids"])
        if embedded is not None:
            inputs["embedded"] = embedded.detach().requires_grad_(embedded.requires_grad)
        losses = [
            super(PairTrainer, self).training_step(model, part, num_items_in_batch)
            for part in _parts(inputs, self.part_tokens)
        ]
        if embedded is not None and embedded.requires_grad:
            embedded.backward(inputs["embedded"].grad)
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: RewardNetwork,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the sum of the pairs' losses divided by the number of pairs of the optimizer batch, nats."""
        chosen, rejected = self.inside(model, self._pair_rewards, inputs)
        losses = pair_loss(chosen, rejected, inputs.get("margin"), self.centring)
        rewards, processes = torch.stack([chosen.detach(), rejected.detach()]), self.accelerator.num_processes
        if processes > 1:  # fillers count nowhere, and the gradients of all processes are averaged
            real = _differ(inputs["input_ids"])
            losses = losses * real * processes
            rewards = rewards.masked_fill(~real, math.nan)
        rewards = self.accelerator.gather(rewards.T).T
        self._rewards.append(rewards[:, ~rewards[0].isnan()] if processes > 1 else rewards)
        return losses.sum() / (num_items_in_batch or len(losses))

    def _pair_rewards(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return rewards (B,) fp32 of both sides; the first half of the rows are the chosen ones."""
        model = self.model
        lengths = inputs["attention_mask"].sum(1)
        rewards = []
        groups = _by_length(lengths) if self.attends_in_blocks else [torch.arange(len(lengths))]
        for rows in groups:
            width, length = int(lengths[rows].max()), lengths[rows]
            ids, embedded = inputs["input_ids"][rows, :width], inputs.get("embedded")
            states = (
                last_position(model, ids, length, self.dropout, None if embedded is None else embedded[rows, :width])
                if self.attends_in_blocks
                else all_positions(model, ids, length)
            )
            with torch.autocast(states.device.type, enabled=False):
                head = plain_model(model).score
                # The weights of a divided model are in the dtype of its products here.
                rewards.append((wide_linear(states, head.weight) if self.sharded else head(states)).squeeze(-1))
        chosen, rejected = torch.cat(rewards)[torch.cat(groups).argsort()].chunk(2)
        return chosen, rejected

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the rewards since the last line, all pairs weighted equally, under TRL's names."""
        if self._rewards:
            chosen, rejected = torch.cat(self._rewards, 1)
            both, metrics = torch.cat([chosen, rejected]), self._metrics["train"]
            for name, value in (("min", both.min()), ("mean", both.mean()), ("max", both.max())):
                metrics[f"{name}_reward"] = [value.item()]
            right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
            metrics["accuracy"] = [right.mean().item()]
            metrics["margin"] = [(chosen - rejected).mean().item()]
            self._rewards.clear()
        super().log(logs, start_time)

    @torch.no_grad()
    def check_one_pair(self, pairs: Sequence[PairIds]) -> None:
        """Raise GuardStop if batch or loss of the shortest pair are not those that the pair itself gives."""
        number = shortest(self.train_dataset["length"][:])
        pair, row = pairs[number], self.train_dataset[number]
        features = {name: row[name] for name in ("chosen_ids", "rejected_ids", "margin") if name in row}
        inputs = self._prepare_inputs(self.data_collator([features]))
        same_tokens("tokens of the chosen side", inputs["input_ids"][0], pair.chosen)
        same_tokens("tokens of the rejected side", inputs["input_ids"][1], pair.rejected)
        with whole(plain_model(self.model)), evaluating(self.model), self.compute_loss_context_manager():
            loss = self.compute_loss(self.model, inputs, num_items_in_batch=self.accelerator.num_processes)
            sides = [torch.tensor([ids], device=self.model.device) for ids in (pair.chosen, pair.rejected)]
            chosen, rejected = (float(plain_model(self.model)(input_ids=ids).logits) for ids in sides)
        self._rewards.clear()
        difference = chosen - rejected - (pair.margin or 0.0)
        expected = math.log1p(math.exp(-abs(difference))) + max(-difference, 0.0)
        agree("the loss of a pair", float(loss), expected + self.centring * (chosen + rejected) ** 2)


def _differ(ids: Tensor) -> Tensor:
    """Whether the sides of each pair differ, (B,), from rows (2B, T): those of a filler are the same."""
    chosen, rejected = ids.chunk(2)
    return (chosen != rejected).any(1)


def _parts(inputs: dict[str, Tensor], tokens: int) -> Iterator[dict[str, Tensor]]:
    """Split a batch of B pairs, rows (2B, T) padded on the right, into narrower ones; a pair stays together."""
    longest = inputs["attention_mask"].sum(1).view(2, -1).amax(0)  # (B,)
    order, pairs, start = longest.argsort(stable=True), len(longest), 0
    while start < pairs:
        end = start + 1
        while end < pairs and 2 * (end + 1 - start) * int(longest[order[end]]) <= tokens:
            end += 1
        chosen, width = order[start:end], int(longest[order[end - 1]])
        rows = torch.cat([chosen, chosen + pairs])
        yield {name: values[chosen] if name == "margin" else values[rows, :width] for name, values in inputs.items()}
        start = end


def _by_length(lengths: Tensor) -> list[Tensor]:
    """Return the rows (B,) in two groups, the long and the short ones, cut so that the least padding is left."""
    order = lengths.argsort(descending=True, stable=True)
    widths = lengths[order]
    first = torch.arange(1, len(order))
    cut = int(first[(first * widths[0] + (len(order) - first) * widths[1:]).argmin()])
    return [order[:cut], order[cut:]]


def drop_block_outputs(model: RewardNetwork, share: float) -> None:
    """Add dropout to the output of every attention and MLP block while training (T5's dropout, which WARM varies).

    Gemma 2 itself has no dropout. The weights and the saved files do not change.
    """

    def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if not module.training:
            return output
        first = F.dropout(output[0] if isinstance(output, tuple) else output, share)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    for layer in plain_model(model).base_model.layers if share else ():
        layer.self_attn.register_forward_hook(hook)
        layer.mlp.register_forward_hook(hook)


def make_trainer(
    model: RewardNetwork,
    tokenizer: Tokenizer,
    pairs: Sequence[PairIds],
    config: RewardConfig,
    run: Run,
    accumulation: int = 1,
    placement: Placement = WHOLE,
) -> PairTrainer:
    """Return the trainer on pairs that need no further preparation.

    accumulation: forward passes of each process per step. A model that `placement` divides gets its weights here.
    """
    check_targets(config, model)
    processes = placement.ranks.size
    arguments = trainer_arguments(
        TrlRewardConfig,
        config,
        run,
        REWARD.unused,
        per_device_train_batch_size=config.batch_size // accumulation // processes,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        max_length=None,
        center_rewards_coefficient=config.center_coefficient or None,
    )
    dataset = to_dataset(pairs)
    if processes > 1:
        row = dataset[shortest(dataset["length"][:])]
        dataset = dataset.add_item(row | {"rejected_ids": row["chosen_ids"]})
    adapters = lora_config(config, "SEQ_CLS")
    if placement.divides:
        model, adapters = placement.filled(model, config.model, adapters, config.seed), None
        arguments |= hand_over(model, config.trainer)
    with warnings.catch_warnings():
        # peft 0.21 asks the model for `is_gradient_checkpointing`, which transformers 5 renamed.
        warnings.simplefilter("ignore", FutureWarning)
        trainer = PairTrainer(
            model=model,
            args=configured(TrlRewardConfig, config, arguments | {"disable_dropout": False}),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=adapters,
            centring=config.center_coefficient,
            dropout=config.dropout,
        )
    check_warmup(config, total_steps(trainer, len(pairs)))
    placement.vary_dropout(config.seed, config.lora_dropout, config.dropout)
    return trainer
