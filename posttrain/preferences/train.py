"""A reward model from preference pairs: the policy's backbone with one output, read at the last token.

    loss = -log sigmoid(r(x, y_chosen) - r(x, y_rejected))       Bradley-Terry (WARM 2401.12187, section 2)

Built on TRL's RewardTrainer (`reward_trainer.py`), which gets pairs that `chat.py` rendered. Deviations from its
defaults:
1. A completion ends with its `<end_of_turn>`, as a policy writes it; a truncated one does not: truncation is visible.
2. Pairs that are too long, or have two identical sides, are dropped, counted and reported.
3. Batches consist of pairs of similar length in an order that a resume reproduces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from gemma2.core.errors import GuardStop, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.progress import SILENT, Progress
from gemma2.core.ranks import ALONE, Ranks
from gemma2.posttrain.adapters.frozen_base import check_base
from gemma2.posttrain.adapters.merged_output import is_rounded, products_of, write_merged
from gemma2.posttrain.adapters.output_difference import score_difference
from gemma2.posttrain.attention.choice import settle_attention
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import split
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.models.loading import default_device, quiet_libraries
from gemma2.posttrain.models.lora import plain_model
from gemma2.posttrain.models.precision import widening
from gemma2.posttrain.models.protocols import Network, RewardNetwork
from gemma2.posttrain.rewards.model import RewardModel
from gemma2.posttrain.runs.run_directory import Run, RunOptions, RunResult, open_run
from gemma2.posttrain.schemas import RewardConfig
from gemma2.posttrain.sft.sft import accumulation_steps
from gemma2.posttrain.sharding.lockstep import pace_of
from gemma2.posttrain.sharding.placement import placed
from gemma2.posttrain.sharding.trained_outputs import save_result
from gemma2.posttrain.sharding.units import whole_head
from gemma2.posttrain.training.heldout import HeldOut
from gemma2.posttrain.training.one_row import ROWS, check_bos
from gemma2.posttrain.training.trainer import RunCallback, train

from .heads import is_classifier, starting_model
from .pair_examples import PairIds, tokenise_split
from .ranking_metrics import preference_metrics
from .reward_trainer import make_trainer

__all__ = ["measure", "measure_rewards", "run_reward"]


def run_reward(config: RewardConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Train a reward model on the backbone of `config.model` and write it to `options.out`.

    Raises InputError for unusable data or models, UsageError for options that do not fit, GuardStop on NaN.
    """
    quiet_libraries()
    placement, progress = placed("reward", config, progress)
    ranks = placement.ranks
    accumulation = accumulation_steps(config, ranks)
    check_base(config)
    with open_run("reward", config, options, ranks=ranks, strategy=placement.strategy) as run:
        if config.from_head is None and is_classifier(config.model):
            progress.note(f"{config.model} is a reward model: its head is kept and trained further")
        run.origin["attention"] = settle_attention(
            config.attention,
            [config.model],
            progress,
            device=default_device(),
            learns=True,
            wide=widening(config.trainer),
        )
        model, tokenizer = starting_model(
            config.model, config.seed, config.from_head, progress, config.attention, config, placement
        )
        reading = Reading(config)
        training, heldout = split(reading.pairs(config.data), config.eval_fraction, config.seed)
        chat = ChatFormat(tokenizer)
        pairs, heldout_pairs, dropped = tokenise_split(training, heldout, chat, config.max_length, reading, progress)
        unread = reading.report(progress, run.path if ranks.is_main else None)
        if not heldout_pairs and (config.keep == "best" or config.patience is not None):
            raise UsageError("no pairs are held out for --keep best or --patience", "give --eval-fraction")
        trainer = make_trainer(model, tokenizer, pairs, config, run, accumulation, placement)
        for pair in pairs[:: max(1, len(pairs) // ROWS)]:
            check_bos(chat, pair.chosen)
            check_bos(chat, pair.rejected)
        trainer.check_one_pair(pairs)
        evaluation = HeldOutPairs(run, heldout_pairs, config, tokenizer)
        evaluation.before(trainer.model)
        callback = RunCallback(run, progress, "reward model", {"loss": "loss", "accuracy": "accuracy"})
        trainer.add_callback(evaluation)
        trainer.add_callback(callback)
        train(trainer, run, callback)
        evaluation.keep_best(trainer.model)
        figures = {"steps": trainer.state.global_step} | callback.summary(trainer.model)
        if not is_rounded(trainer.model):
            save_result(trainer.model, tokenizer, run.path, ranks.is_main)
        elif ranks.is_main:
            plain = plain_model(trainer.model)
            write_merged(trainer.model, products_of(trainer.model), config.model, tokenizer, run.path)
            if config.base_bits:
                figures |= compared(plain, tokenizer, run, heldout_pairs or pairs, progress)
        counts = figures | {"pairs": len(pairs), "heldout_pairs": len(heldout_pairs)}
        result = RewardModel(plain_model(trainer.model), tokenizer)  # with its adapters, or merged with them
        found = measure(result, heldout_pairs, config.micro_batch_size or config.batch_size, ranks)
        return run.finish(counts | dropped | unread | found | evaluation.summary(progress))


def compared(
    trained: RewardNetwork, tokenizer: Tokenizer, run: Run, pairs: Sequence[PairIds], progress: Progress
) -> JsonObject:
    """Compare the scores of the output, whose base is not quantised, with those of the model that was trained."""

    def score(model: RewardNetwork, rows: Sequence[Sequence[int]]) -> Tensor:
        return RewardModel(model, tokenizer).score(rows, [[]] * len(rows), len(rows))

    rows = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    return score_difference(score, trained, run.path, rows, progress)


class HeldOutPairs(HeldOut):
    """Held-out loss and accuracy of a reward model during training."""

    def __init__(self, run: Run, pairs: Sequence[PairIds], config: RewardConfig, tokenizer: Tokenizer) -> None:
        super().__init__(run, pairs, config)
        self.pairs = pairs
        self.tokenizer = tokenizer

    def figures(self, model: Network) -> JsonObject:
        """Return `preference_metrics` of the held-out pairs; --keep best and --patience compare the loss."""
        batch_size = self.config.micro_batch_size or self.config.batch_size
        network = cast(RewardNetwork, plain_model(model))
        found = measure(RewardModel(network, self.tokenizer), self.pairs, batch_size, self.run.ranks)
        return {f"heldout_{name}": value for name, value in found.items()}


def measure(
    model: RewardModel, pairs: Sequence[PairIds], batch_size: int, ranks: Ranks = ALONE
) -> dict[str, float | None]:
    """Return `preference_metrics` of a model's scores of held-out pairs; empty without pairs. A collective of `ranks`.

    Raises GuardStop for a score that is NaN or infinite.
    """
    if not pairs:
        return {}
    chosen, rejected = _sides(pairs)
    ids = chosen + rejected
    own = ids[ranks.share(len(ids))]
    with whole_head(model.model):
        scores = model.score(own, [[]] * len(own), batch_size, pace_of(model.model, ranks))
    rewards = torch.cat(ranks.gather(scores))
    if not rewards.isfinite().all():
        raise GuardStop(
            "the reward model gives a held-out pair a score that is NaN or infinite",
            "lower --learning-rate, or check the weights of --model",
        )
    return measure_rewards(rewards.view(2, -1), pairs)


def measure_rewards(rewards: Tensor, pairs: Sequence[PairIds]) -> dict[str, float | None]:
    """Return `preference_metrics` of the rewards (2, N), chosen first, of pairs."""
    lengths = [[len(side) - pair.prompt for pair, side in zip(pairs, sides, strict=True)] for sides in _sides(pairs)]
    prompts = [pair.source.key if pair.source else number for number, pair in enumerate(pairs)]
    return preference_metrics(rewards, lengths, prompts)


def _sides(pairs: Sequence[PairIds]) -> tuple[list[list[int]], list[list[int]]]:
    return [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
