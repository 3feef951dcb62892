"""Supervised fine-tuning: behaviour cloning on conversations, for example those that a teacher wrote (Gemma 2 report,
section 4).

    loss = - 1/N sum_t m_t log pi(y_t | y_<t)        m_t: 1 on model turns and their ends, N: targets of the whole batch

Built on TRL's SFTTrainer (`sft_trainer.py`), which gets rows that `chat.py` rendered and masked; it templates and
truncates nothing. Deviations from its defaults:
1. The last target is explicit (`<end_of_turn><eos>`, the end of a conversation in Gemma's format).
2. Rows over `max_length` are counted and listed.
3. Data sets are mixed by weight (`mixture.py`).
4. Batches consist of rows of similar length in an order that a resume reproduces.
5. The held-out loss is a mean over target tokens, not over batches (`heldout.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.progress import SILENT, Progress
from gemma2.core.ranks import ALONE, Ranks
from gemma2.posttrain.adapters.frozen_base import check_base, load_trained
from gemma2.posttrain.adapters.merged_output import is_rounded, products_of, write_merged
from gemma2.posttrain.adapters.output_difference import policy_difference
from gemma2.posttrain.attention.choice import settle_attention
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.examples import Example, Overlong, example_of, report_overlong, tokenise
from gemma2.posttrain.data.mixture import Mixture
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Conversation, located, split
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.launch.agreement import check_shares
from gemma2.posttrain.models.loading import default_device, load_tokenizer, quiet_libraries
from gemma2.posttrain.models.lora import plain_model
from gemma2.posttrain.models.precision import widening
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.runs.run_directory import Run, RunOptions, RunResult, open_run
from gemma2.posttrain.schemas import RewardConfig, SftConfig
from gemma2.posttrain.sharding.placement import placed
from gemma2.posttrain.sharding.trained_outputs import save_result, save_trained_adapter
from gemma2.posttrain.training.heldout import HeldOut, heldout_loss
from gemma2.posttrain.training.one_row import check_targets
from gemma2.posttrain.training.tracking import check_tracking
from gemma2.posttrain.training.trainer import RunCallback, train

from .sft_trainer import make_trainer

__all__ = ["Example", "heldout_loss", "report_overlong", "run_sft", "show_tokens", "tokenise"]

OVERLONG_FILE = "overlong.jsonl"


@dataclass(frozen=True)
class Rows:
    """Tokenised rows of all data sets, one set after the other, and the held-out rows."""

    examples: list[Example]
    sizes: list[int]
    heldout: list[Example]
    overlong: Overlong
    heldout_overlong: Overlong


def run_sft(config: SftConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Fine-tune `config.model` on `config.data` and write the result to `options.out`.

    Raises InputError for unusable data or models, UsageError for options that do not fit, GuardStop on NaN.
    """
    quiet_libraries()
    placement, progress = placed("sft", config, progress)
    ranks = placement.ranks
    accumulation = accumulation_steps(config, ranks)
    check_tracking(config.report_to)
    check_base(config)
    with open_run("sft", config, options, ranks=ranks, strategy=placement.strategy) as run:
        run.origin["attention"] = settle_attention(
            config.attention,
            [config.model],
            progress,
            device=default_device(),
            learns=True,
            packed=config.packing,
            wide=widening(config.trainer),
        )
        if placement.divides:
            model, tokenizer = placement.policy(config.model, attention=config.attention)
        else:
            model, tokenizer = load_trained(config.model, config, progress, config.attention)
        chat = ChatFormat(tokenizer, model.generation_config)
        reading = Reading(config)
        rows = read_rows(config, chat, reading, progress)
        unread = reading.report(progress, run.path if ranks.is_main else None)
        if ranks.is_main:
            (rows.overlong + rows.heldout_overlong).write(run.path / OVERLONG_FILE)
        mixture = Mixture.of(rows.sizes, config.weights, config.seed)
        trainer = make_trainer(model, tokenizer, rows.examples, config, run, accumulation, mixture, placement)
        if not rows.heldout and (config.keep == "best" or config.patience is not None):
            raise UsageError(
                "no rows are held out for --keep best or --patience", "give --eval-fraction or --eval-data"
            )
        check_targets(chat, rows.examples)
        trainer.check_one_row(rows.examples)
        evaluation = HeldOut(run, rows.heldout, config)
        evaluation.before(trainer.model)
        callback = RunCallback(run, progress, "SFT", {"loss": "loss"})
        trainer.add_callback(evaluation)
        trainer.add_callback(callback)
        train(trainer, run, callback)
        evaluation.keep_best(trainer.model)
        figures = {"steps": trainer.state.global_step} | callback.summary(trainer.model)
        write_model(trainer.model, tokenizer, chat, config, run)
        if config.lora_output == "merged" and config.base_bits and ranks.is_main:
            some = [example.ids for example in rows.heldout or rows.examples]
            figures |= policy_difference(trainer.model, run.path, some, progress, trainer.args.bf16)
        return run.finish(figures | counts(rows, mixture, config) | unread | evaluation.summary(progress))


def accumulation_steps(config: SftConfig | RewardConfig, ranks: Ranks = ALONE) -> int:
    """Return the number of forward passes per optimizer step in each process.

    Raises UsageError if the processes cannot have equal shares of a batch, or a share is not a multiple of a pass.
    """
    check_shares(config, ranks.size)
    rows = config.batch_size // ranks.size
    micro = config.micro_batch_size or rows
    if rows % micro:
        share = f"--batch-size {config.batch_size}" + (
            f" is {rows} for each of {ranks.size} processes," if ranks.size > 1 else " is"
        )
        raise UsageError(f"{share} not a multiple of --micro-batch-size {micro}", "change one")
    return rows // micro


def read_rows(config: SftConfig, chat: ChatFormat, reading: Reading, progress: Progress) -> Rows:
    """Read, split and tokenise every data set. A prompt is on the same side of the split in all of them.

    Raises InputError with file and line for an unusable row, and for a data set without a training row.
    """
    sets = [reading.conversations(path) for path in config.data]
    everything = [row for rows in sets for row in rows]
    if config.eval_data is not None:
        training, heldout = everything, reading.conversations(config.eval_data)
        report_overlap(training, heldout, config, progress)
    else:
        training, heldout = split(everything, config.eval_fraction, config.seed)
    kept = {id(row) for row in training}
    examples: list[Example] = []
    sizes: list[int] = []
    overlong = Overlong()
    for path, rows in zip(config.data, sets, strict=True):
        tokenised, long = tokenise([row for row in rows if id(row) in kept], chat, config, reading, "training rows")
        if not tokenised:
            raise InputError(f"{path} has no training row, all are held out", "lower --eval-fraction")
        examples += tokenised
        sizes.append(len(tokenised))
        overlong += long
    report_overlong(overlong, len(training), config, progress)
    heldout_examples, long = tokenise(heldout, chat, config, reading, "held-out rows")
    report_overlong(long, len(heldout), config, progress, "held-out rows")
    return Rows(examples, sizes, heldout_examples, overlong, long)


def report_overlap(
    training: list[Conversation], heldout: list[Conversation], config: SftConfig, progress: Progress
) -> None:
    """Warn of held-out prompts that are also trained on: their loss says little about new prompts."""
    trained = {row.key for row in training}
    both = sum(row.key in trained for row in heldout)
    if both:
        progress.warn(f"{both} of {len(heldout)} prompts of {config.eval_data} are also in the training data")


def counts(rows: Rows, mixture: Mixture, config: SftConfig) -> JsonObject:
    """Return numbers of rows and targets; for a mixture also the rows of each data set, in total and per epoch."""
    found: JsonObject = {"rows": len(rows.examples)}
    if len(config.data) > 1:
        names = [str(path) for path in config.data]
        found["rows_by_source"] = dict(zip(names, mixture.sizes, strict=True))
        found["rows_per_epoch"] = dict(zip(names, mixture.quotas, strict=True))
    return found | {
        "heldout_rows": len(rows.heldout),
        "overlong_dropped": rows.overlong.dropped,
        "overlong_truncated": rows.overlong.truncated,
        "target_tokens": sum(sum(example.mask) for example in rows.examples),
    }


def write_model(model: CausalLM, tokenizer: Tokenizer, chat: ChatFormat, config: SftConfig, run: Run) -> None:
    """Write the output: a plain model, or the adapter alone."""
    if config.lora_output == "adapter":
        save_trained_adapter(model, tokenizer, run.path, run.ranks.is_main)
        return
    plain_model(model).generation_config.eos_token_id = chat.stop_ids
    if not is_rounded(model):
        save_result(model, tokenizer, run.path, run.ranks.is_main)
    elif run.ranks.is_main:
        write_merged(model, products_of(model), config.model, tokenizer, run.path)


def show_tokens(config: SftConfig, count: int) -> list[JsonObject]:
    """Return the first `count` rows of each data set as training sees them: id, text, target, control of every token.

    A row over the limit is shown whole, with the number of tokens that are `kept`. Reads no weights, writes nothing.
    """
    quiet_libraries()
    chat = ChatFormat(load_tokenizer(config.model))
    reading = Reading(config)
    rows = [row for path in config.data for row in reading.conversations(path, count)]
    return [_shown(row, chat, config) for row in rows]


def _shown(row: Conversation, chat: ChatFormat, config: SftConfig) -> JsonObject:
    with located(row.where):
        example = example_of(row, chat, config)
    kept = min(len(example.ids), config.max_length)
    fits = kept == len(example.ids) or (config.on_overlong == "truncate" and any(example.mask[:kept]))
    tokens = [
        {"id": i, "text": chat.token_text(i), "target": learned, "control": chat.is_control(i)}
        for i, learned in zip(example.ids, example.mask, strict=True)
    ]
    return {"where": row.where, "tokens": tokens, "kept": kept if fits else 0}
