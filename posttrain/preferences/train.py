"""A reward model from preference pairs: the policy's backbone with one output, read at the last token.

    loss = -log sigmoid(r(x, y_chosen) - r(x, y_rejected))       Bradley-Terry (WARM 2401.12187, section 2)

On TRL's RewardTrainer, which sees pairs that `chat.py` rendered. Deviations from its defaults: a completion ends with
its `<end_of_turn>`, as a policy writes it, and one that ran into the length limit ends without, so that truncation
shows; what is too long, or the same on both sides, is dropped, counted and reported; batches hold pairs of similar
length in an order that a resume reproduces.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig as TrlRewardConfig
from trl import RewardTrainer

from gemma2.merging.errors import InputError
from gemma2.merging.progress import SILENT, Progress
from gemma2.posttrain.data.batching import GroupedByLength
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Pair, located, read_pairs, split
from gemma2.posttrain.data.sources import data_files
from gemma2.posttrain.models.loading import init_reward_model, save_model
from gemma2.posttrain.models.lora import lora_config, merged
from gemma2.posttrain.rewards.model import RewardModel
from gemma2.posttrain.rundir import Parent, Run, RunOptions, RunResult, open_run
from gemma2.posttrain.schemas import RewardConfig
from gemma2.posttrain.training.trainer import RunCallback, quiet_libraries, train, trainer_arguments

from .metrics import preference_metrics

__all__ = ["PairIds", "run_reward", "tokenise_pairs"]


@dataclass(frozen=True)
class PairIds:
    """One pair as token ids of whole conversations; `prompt` is how many of them both share as the prompt."""

    chosen: list[int]
    rejected: list[int]
    prompt: int
    margin: float | None = None


def run_reward(config: RewardConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Train a reward model on the backbone of `config.model` and write it to `options.out`.

    Raises InputError for unusable data or models, UsageError for options that do not fit, GuardStop on NaN.
    """
    quiet_libraries()
    with open_run(
        "reward", config, options, parents=[Parent("model", config.model)], data=data_files(config.data)
    ) as run:
        model, tokenizer = init_reward_model(config.model, config.seed)
        chat = ChatFormat(tokenizer)
        training, heldout = split(read_pairs(config.data), config.eval_fraction, config.seed)
        pairs, dropped = tokenise_pairs(training, chat, config.max_length)
        heldout_pairs, _ = tokenise_pairs(heldout, chat, config.max_length)
        report_dropped(dropped, len(training), config, progress)
        callback = RunCallback(run, progress, "reward model", {"loss": "loss", "accuracy": "accuracy"})
        trainer = make_trainer(model, tokenizer, pairs, config, run)
        trainer.add_callback(callback)
        train(trainer, run, callback)
        reward_model = RewardModel(merged(trainer.model), tokenizer)
        save_model(reward_model.model, tokenizer, run.path)
        counts = {"steps": trainer.state.global_step, "pairs": len(pairs), "heldout_pairs": len(heldout_pairs)}
        measured = measure(reward_model, heldout_pairs, config.batch_size)
        if measured:
            run.log(trainer.state.global_step, **{f"heldout_{name}": value for name, value in measured.items()})
        return run.finish(counts | dropped | measured)


def tokenise_pairs(pairs: Sequence[Pair], chat: ChatFormat, max_length: int) -> tuple[list[PairIds], dict[str, int]]:
    """Render both sides of every pair. Returns the usable pairs and how many were dropped, by reason.

    Raises InputError with file and line for a pair that the chat template refuses, or when none is left.
    """
    kept: list[PairIds] = []
    dropped = {"overlong_dropped": 0, "identical_dropped": 0}
    for pair in pairs:
        with located(pair.where):
            ids = _pair_ids(pair, chat)
        if max(len(ids.chosen), len(ids.rejected)) > max_length:
            dropped["overlong_dropped"] += 1
        elif ids.chosen == ids.rejected:
            dropped["identical_dropped"] += 1
        else:
            kept.append(ids)
    if pairs and not kept:
        what = f"none of {len(pairs)} pairs is usable: {dropped['overlong_dropped']} over --max-length {max_length}"
        raise InputError(f"{what}, {dropped['identical_dropped']} the same on both sides", "check the data")
    return kept, dropped


def _pair_ids(pair: Pair, chat: ChatFormat) -> PairIds:
    chosen, _ = chat.example([*pair.prompt, *pair.chosen], "eot", pair.chosen_truncated)
    rejected, _ = chat.example([*pair.prompt, *pair.rejected], "eot", pair.rejected_truncated)
    return PairIds(chosen, rejected, len(chat.prompt_ids(pair.prompt)), pair.margin)


def report_dropped(dropped: dict[str, int], total: int, config: RewardConfig, progress: Progress) -> None:
    """Nothing is dropped in silence."""
    if dropped["overlong_dropped"]:
        what = f"are longer than --max-length {config.max_length}"
        progress.warn(f"{dropped['overlong_dropped']} of {total} pairs {what} and were dropped")
    if dropped["identical_dropped"]:
        progress.warn(f"{dropped['identical_dropped']} of {total} pairs are the same on both sides and were dropped")


class _Trainer(GroupedByLength, RewardTrainer):
    """RewardTrainer with batches of similar pairs."""


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PairIds],
    config: RewardConfig,
    run: Run,
) -> RewardTrainer:
    """TRL's trainer over pairs that need no further preparation."""
    arguments = trainer_arguments(
        TrlRewardConfig,
        config,
        run,
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        max_length=None,
    )
    with warnings.catch_warnings():
        # peft 0.21 asks the model for `is_gradient_checkpointing`, which transformers 5 renamed.
        warnings.simplefilter("ignore", FutureWarning)
        return _Trainer(
            model=model,
            args=TrlRewardConfig(**arguments),
            train_dataset=_dataset(pairs),
            processing_class=tokenizer,
            peft_config=lora_config(config, "SEQ_CLS"),
        )


def _dataset(pairs: Sequence[PairIds]) -> Dataset:
    columns: dict[str, list[Any]] = {
        "chosen_ids": [pair.chosen for pair in pairs],
        "rejected_ids": [pair.rejected for pair in pairs],
        "length": [max(len(pair.chosen), len(pair.rejected)) for pair in pairs],
    }
    if any(pair.margin is not None for pair in pairs):
        columns["margin"] = [pair.margin or 0.0 for pair in pairs]
    return Dataset.from_dict(columns)


def measure(model: RewardModel, pairs: Sequence[PairIds], batch_size: int) -> dict[str, float | None]:
    """Scores of held-out pairs, as `preference_metrics` sums them up; empty without pairs."""
    if not pairs:
        return {}
    ids = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    scores = model.score(ids, [[]] * len(ids), batch_size)
    lengths = torch.tensor([len(row) - pair.prompt for row, pair in zip(ids, [*pairs, *pairs], strict=True)])
    return preference_metrics(scores[: len(pairs)], scores[len(pairs) :], lengths)
