"""Supervised fine-tuning: behaviour cloning on conversations, for instance those that a teacher wrote (Gemma 2 report,
section 4).

    loss = - 1/N sum_t m_t log pi(y_t | y_<t)        m_t: 1 on model turns and their ends, N: targets of the whole batch

On TRL's SFTTrainer, which sees rows that `chat.py` rendered and masked; it templates and truncates nothing.
Deviations from its defaults: the last target is explicit (`<end_of_turn><eos>`, science of the Gemma format), rows over
`max_length` are counted and reported, batches hold rows of similar length in an order that a resume reproduces, and
the held-out loss is a mean over target tokens, not over batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from gemma2.merging.errors import InputError, UsageError
from gemma2.merging.progress import SILENT, Progress

from .batching import GroupedByLength
from .chat import ChatFormat
from .data import Conversation, located, read_conversations, split
from .lora import lora_config, merged
from .models import load_policy, save_model
from .rundir import Parent, Run, RunOptions, RunResult, open_run
from .sampler import evaluating
from .schemas import SftConfig
from .scorer import head_logps, hidden_states
from .sources import data_files
from .training import RunCallback, quiet_libraries, train, trainer_arguments

__all__ = ["Example", "heldout_loss", "run_sft", "tokenise"]

IGNORED = -100  # label of a position without loss


@dataclass(frozen=True)
class Example:
    """One tokenised row: ids and, equally long, which of them are learned."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True)
class Overlong:
    """What became of rows over the length limit."""

    dropped: int = 0
    truncated: int = 0


def run_sft(config: SftConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Fine-tune `config.model` on `config.data` and write the result to `options.out`.

    Raises InputError for unusable data or models, UsageError for options that do not fit, GuardStop on NaN.
    """
    quiet_libraries()
    accumulation = accumulation_steps(config.batch_size, config.micro_batch_size)
    with open_run("sft", config, options, parents=[Parent("model", config.model)], data=data_files(config.data)) as run:
        model, tokenizer = load_policy(config.model)
        chat = ChatFormat(tokenizer, model.generation_config)
        training, heldout = split(read_conversations(config.data), config.eval_fraction, config.seed)
        examples, overlong = tokenise(training, chat, config)
        heldout_examples, _ = tokenise(heldout, chat, config)
        report_overlong(overlong, len(training), config, progress)
        callback = RunCallback(run, progress, "SFT", {"loss": "loss"})
        trainer = make_trainer(model, tokenizer, examples, config, run, accumulation)
        evaluation = HeldOut(run, heldout_examples, config.micro_batch_size or config.batch_size)
        evaluation.before(trainer.model)
        trainer.add_callback(callback)
        trainer.add_callback(evaluation)
        train(trainer, run, callback)
        model = merged(trainer.model)
        model.generation_config.eos_token_id = chat.stop_ids
        save_model(model, tokenizer, run.path)
        return run.finish(
            {
                "steps": trainer.state.global_step,
                "rows": len(examples),
                "heldout_rows": len(heldout_examples),
                "overlong_dropped": overlong.dropped,
                "overlong_truncated": overlong.truncated,
                "target_tokens": sum(sum(example.mask) for example in examples),
                "heldout_loss_before": evaluation.losses[0],
                "heldout_loss": evaluation.losses[-1],
            }
        )


def accumulation_steps(batch_size: int, micro_batch_size: int | None) -> int:
    """Forward passes per optimizer step."""
    if micro_batch_size is None:
        return 1
    if batch_size % micro_batch_size:
        raise UsageError(
            f"--batch-size {batch_size} is not a multiple of --micro-batch-size {micro_batch_size}", "change one"
        )
    return batch_size // micro_batch_size


def tokenise(rows: Sequence[Conversation], chat: ChatFormat, config: SftConfig) -> tuple[list[Example], Overlong]:
    """Render and mask every row; rows over `config.max_length` are handled as `config.on_overlong` says.

    Raises InputError with file and line for a row that the chat template refuses, or that is too long under `error`.
    """
    examples: list[Example] = []
    dropped = truncated = 0
    for row in rows:
        with located(row.where):
            example = _example(row, chat, config)
            if len(example.ids) > config.max_length:
                if config.on_overlong == "error":
                    what = f"{len(example.ids)} tokens, more than --max-length {config.max_length}"
                    raise InputError(what, "raise --max-length, or choose --on-overlong drop")
                example = Example(example.ids[: config.max_length], example.mask[: config.max_length])
                if config.on_overlong == "drop" or not any(example.mask):
                    dropped += 1
                    continue
                truncated += 1
            examples.append(example)
    if rows and not examples:
        what = f"all {len(rows)} rows are longer than --max-length {config.max_length}"
        raise InputError(what, "raise --max-length")
    return examples, Overlong(dropped, truncated)


def _example(row: Conversation, chat: ChatFormat, config: SftConfig) -> Example:
    ids, mask = chat.example(row.messages, config.end_of_turn, row.truncated)
    given = row.messages[: row.learn_from]
    if any(message["role"] in ("assistant", "model") for message in given):
        prompt = len(chat.prompt_ids(given))
        mask = [False] * prompt + mask[prompt:]
    return Example(ids, mask)


def report_overlong(overlong: Overlong, total: int, config: SftConfig, progress: Progress) -> None:
    """Nothing is cut or dropped in silence."""
    for count, verb in ((overlong.dropped, "dropped"), (overlong.truncated, "truncated")):
        if count:
            progress.warn(f"{count} of {total} rows are longer than --max-length {config.max_length} and were {verb}")


class _Trainer(GroupedByLength, SFTTrainer):
    """SFTTrainer with batches of similar rows."""


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: SftConfig,
    run: Run,
    accumulation: int,
) -> SFTTrainer:
    """TRL's trainer over rows that need no further preparation."""
    arguments = trainer_arguments(
        TrlSftConfig,
        config,
        run,
        per_device_train_batch_size=config.batch_size // accumulation,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    with warnings.catch_warnings():
        # peft 0.21 asks the model for `is_gradient_checkpointing`, which transformers 5 renamed.
        warnings.simplefilter("ignore", FutureWarning)
        return _Trainer(
            model=model,
            args=TrlSftConfig(**arguments),
            train_dataset=_dataset(examples),
            processing_class=tokenizer,
            peft_config=lora_config(config, "CAUSAL_LM"),
        )


def _dataset(examples: Sequence[Example]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [example.ids for example in examples],
            "labels": [
                [i if learned else IGNORED for i, learned in zip(example.ids, example.mask, strict=True)]
                for example in examples
            ],
            "length": [len(example.ids) for example in examples],
        }
    )


class HeldOut(TrainerCallback):
    """Held-out loss before the first and after the last step, in metrics.jsonl as `heldout_loss`."""

    def __init__(self, run: Run, examples: Sequence[Example], batch_size: int) -> None:
        self.run = run
        self.examples = examples
        self.batch_size = batch_size
        self.losses: list[float | None] = [None]

    def before(self, model: Any) -> None:
        """Measure the model as it came. Apart from `on_train_begin`, which on a resume sees a trained one."""
        if self.examples:
            self.losses = [heldout_loss(model, self.examples, self.batch_size)]

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.examples and state.global_step == 0:
            self.run.log(0, heldout_loss=self.losses[0])

    def on_train_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.examples:
            self.losses.append(heldout_loss(kwargs["model"], self.examples, self.batch_size))
            self.run.log(state.global_step, heldout_loss=self.losses[-1])


@torch.no_grad()
def heldout_loss(model: Any, examples: Sequence[Example], batch_size: int) -> float:
    """Mean of -log pi over all target tokens of all examples, nats per token."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    with evaluating(model):
        for batch, hidden in hidden_states(
            model, [example.ids for example in examples], [[]] * len(examples), batch_size
        ):
            for row, example in zip(hidden, (examples[i] for i in batch), strict=True):
                positions = [t for t, learned in enumerate(example.mask) if learned]
                targets = torch.tensor([example.ids[t] for t in positions], device=row.device)
                # The state at position t - 1 predicts token t; the first token, <bos>, is never a target.
                logps, _ = head_logps(model, row[[t - 1 for t in positions]], targets, temperature=1.0)
                total += logps.double().sum().cpu()
                count += len(positions)
    return -total.item() / max(count, 1)
