"""Distillation on the student's own distribution (GKD, 2306.13649; Gemma 2 report, section 4).

    y ~ S(. | x);   theta <- Adam(grad mean_t D(T(. | x, y_<t), S(. | x, y_<t)))         D over the full vocabulary

`gkd.py` has the objective and how batches are made, `divergence.py` the loss, `teacher_cache.py` teachers on disk.
At the start, every `eval_every` steps and at the end the same divergence is measured on the student's answers to
held-out prompts, with the same random numbers each time; on held-out fixed data also -log S of its tokens. Each is a
line of metrics.jsonl with `"kind": "eval"`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from trl import DistillationConfig as TrlConfig

from gemma2.core.errors import GuardStop, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.progress import SILENT, Progress
from gemma2.core.ranks import ALONE, Ranks
from gemma2.posttrain.adapters.frozen_base import check_base, load_trained
from gemma2.posttrain.adapters.merged_output import is_rounded, products_of, write_merged
from gemma2.posttrain.adapters.output_difference import policy_difference
from gemma2.posttrain.attention.choice import settle_attention
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.examples import Example
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Prompt, located, split
from gemma2.posttrain.launch.agreement import check_shares
from gemma2.posttrain.models.loading import default_device, load_tokenizer, quiet_libraries
from gemma2.posttrain.models.lora import check_targets, lora_config, plain_model
from gemma2.posttrain.models.precision import widening
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.sampler import Completions, SamplingParams, evaluating, length_batches
from gemma2.posttrain.runs.run_directory import Run, RunOptions, RunResult, open_run
from gemma2.posttrain.schemas.distill import DistillConfig
from gemma2.posttrain.sharding.lockstep import in_step
from gemma2.posttrain.sharding.placement import WHOLE, Placement, placed
from gemma2.posttrain.sharding.trained_outputs import save_result
from gemma2.posttrain.sharding.units import is_sharded, whole_head
from gemma2.posttrain.training.heldout import heldout_loss
from gemma2.posttrain.training.sharded_trainer import hand_over
from gemma2.posttrain.training.trainer import (
    PeriodicEvaluation,
    RunCallback,
    configured,
    evaluations,
    train,
    trainer_arguments,
)
from gemma2.posttrain.training.trainer_options import DISTILL
from gemma2.posttrain.training.witness import measuring

from .divergence import Divergence, divergence_loss, head_of
from .gkd import GkdTrainer, Loss, Material, draw, schedule
from .responses import as_examples, collate, fixed_examples, response_states
from .teacher import LiveTeacher, check_head, check_same_tokenizer, common_vocabulary, load_teacher
from .teacher_cache import CachedTeacher, TeacherCache

__all__ = ["run_distill"]

HELDOUT_SHARE = 0.1  # of the prompts, where no file of held-out prompts is given
SHOWN = {"loss": "divergence", "length": "length", "truncated": "cut"}


def run_distill(config: DistillConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Train `config.model` towards a teacher and write the result to `options.out`.

    Raises InputError for unusable data or models, UsageError for options that do not fit, GuardStop when a guard fires.
    """
    quiet_libraries()
    placement, progress = placed("distill", config, progress)
    ranks = placement.ranks
    micro = micro_batch(config, ranks)
    cache = TeacherCache.open(config.teacher_cache) if config.teacher_cache else None
    check_base(config)
    with open_run("distill", config, options, ranks=ranks, strategy=placement.strategy) as run:
        reading = Reading(config)
        named = [config.model] if config.teacher is None else [config.model, config.teacher]
        run.origin["attention"] = settle_attention(
            config.attention,
            named,
            progress,
            device=default_device(),
            learns=True,
            wide=widening(config.trainer, config.teacher_dtype if placement.divides else "bfloat16", "--teacher-dtype"),
        )
        setup = prepare(config, cache, reading, progress, placement)
        unread = reading.report(progress, run.path if ranks.is_main else None)
        given = distillation_arguments(config, run, micro, ranks.size)
        arguments = configured(
            TrlConfig, config, given | (hand_over(setup.student, config.trainer) if placement.divides else {})
        )
        rows = schedule(config.steps, config.batch_size, config.n, setup.material, config.fraction, config.seed)
        adapter = None if placement.divides else lora_config(config, "CAUSAL_LM")
        trainer = GkdTrainer(setup.student, setup.loss, setup.material, rows, arguments, progress, adapter, ranks)
        callback = RunCallback(run, progress, "distill", SHOWN)
        evaluation = StudentEvaluation(run, config, setup, trainer)
        trainer.add_callback(callback)
        trainer.add_callback(evaluation)
        run.memory.holds = {"teacher": lambda: setup.loss}
        train(trainer, run, callback, lambda: trainer.teaches)
        figures = callback.summary(trainer.model)
        figures |= write_student(trainer, setup, config, run, progress)
        return run.finish({"steps": trainer.state.global_step, **figures, **unread, **evaluation.summary()})


def write_student(
    trainer: GkdTrainer, setup: DistillSetup, config: DistillConfig, run: Run, progress: Progress
) -> JsonObject:
    """Write the student as a plain model, and return how far it is from one that was trained on a quantised base."""
    chat = setup.material.chat
    plain_model(trainer.model).generation_config.eos_token_id = chat.stop_ids
    if not is_rounded(trainer.model):
        save_result(trainer.model, chat.tokenizer, run.path, run.ranks.is_main)
    if not is_rounded(trainer.model) or not run.ranks.is_main:
        return {}
    write_merged(trainer.model, products_of(trainer.model), config.model, chat.tokenizer, run.path)
    if config.base_bits is None:
        return {}
    rows = [example.ids for example in setup.heldout or setup.material.examples]
    rows = rows or [chat.prompt_ids(prompt.messages) for prompt in setup.heldout_prompts]
    return policy_difference(trainer.model, run.path, rows, progress, trainer.args.bf16)


@dataclass(frozen=True)
class DistillSetup:
    """The models and the data of a run. `heldout`: rows that are not trained on, with their numbers in the cache."""

    student: CausalLM
    loss: Loss
    material: Material
    heldout_prompts: Sequence[Prompt]
    heldout: Sequence[Example]
    heldout_numbers: Sequence[int]


def micro_batch(config: DistillConfig, ranks: Ranks) -> int:
    """Sequences of a process per forward pass. Raises UsageError if the processes cannot share a step evenly."""
    check_shares(config, ranks.size)
    rows = config.batch_size // ranks.size
    micro = config.micro_batch_size or rows
    if rows % micro:
        raise UsageError(
            f"{rows} sequences of a step for each of {ranks.size} processes are not a multiple of --micro-batch-size "
            f"{micro}",
            "change one",
        )
    return micro


def prepare(
    config: DistillConfig,
    cache: TeacherCache | None,
    reading: Reading,
    progress: Progress,
    placement: Placement = WHOLE,
) -> DistillSetup:
    """Check tokenizers, load the models, read and tokenise the data. A student that is divided has its adapters."""
    divergence = Divergence(config.divergence, 0.5 if config.beta is None else config.beta)
    tokenizer = load_tokenizer(config.model)
    if config.teacher is not None:  # before gigabytes are read
        check_same_tokenizer(load_tokenizer(config.teacher), tokenizer, str(config.teacher), str(config.model))
    if placement.divides:
        student, tokenizer = placement.policy(config.model, attention=config.attention)
    else:
        student, tokenizer = load_trained(config.model, config, progress, config.attention)
    check_targets(config, student)
    student = placement.filled(student, config.model, lora_config(config, "CAUSAL_LM"), config.seed)
    plain = plain_model(student)
    check_head(plain, f"--model {config.model}")
    chat = ChatFormat(tokenizer, plain.generation_config)
    size = int(plain.get_output_embeddings().weight.shape[0])
    params = SamplingParams(config.max_new_tokens, config.temperature, config.n)
    if cache is not None:
        cache.check(tokenizer, size, config)
        ours, others = cache.split(config.eval_fraction, config.seed)
        teacher = CachedTeacher(cache, divergence)
        material = Material(chat, params, [], [cache.examples[i] for i in ours], ours)
        loss = Loss(teacher, config.distill_temperature, None)
        return DistillSetup(student, loss, material, [], [cache.examples[i] for i in others], others)
    assert config.teacher is not None
    model, _ = load_teacher(config.teacher, config.teacher_dtype, config.attention, placement)
    rows = common_vocabulary(
        int(model.get_output_embeddings().weight.shape[0]), size, max(tokenizer.get_vocab().values()) + 1
    )
    loss = Loss(LiveTeacher(model, divergence, config.distill_temperature, rows), config.distill_temperature, rows)
    prompts, heldout_prompts = read_prompt_sides(config, reading, chat)
    examples, heldout = read_fixed(config, chat, reading, progress)
    material = Material(chat, params, prompts, examples, [-1] * len(examples))
    return DistillSetup(student, loss, material, heldout_prompts, heldout, [-1] * len(heldout))


def read_prompt_sides(config: DistillConfig, reading: Reading, chat: ChatFormat) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts; without a separate file, a tenth is held out."""
    assert config.prompts is not None
    prompts = reading.renderable(reading.prompts(config.prompts), chat)
    if config.heldout is not None:
        return prompts, reading.renderable(reading.prompts(config.heldout, config.eval_prompts), chat)
    prompts, heldout = split(prompts, HELDOUT_SHARE, config.seed)
    if not heldout:
        raise UsageError(f"{config.prompts} has one prompt, none can be held out", "add prompts, or give --heldout")
    return prompts, heldout[: config.eval_prompts]


def read_fixed(
    config: DistillConfig, chat: ChatFormat, reading: Reading, progress: Progress
) -> tuple[list[Example], list[Example]]:
    """(training, held-out) rows of `config.data`, as gemma2 sft would learn them."""
    if config.data is None:
        return [], []
    rows, heldout = split(reading.conversations(config.data), config.eval_fraction, config.seed)
    examples = fixed_examples(rows, chat, config, reading, progress)
    return examples, fixed_examples(heldout, chat, config, reading, progress, "held-out rows")


def distillation_arguments(config: DistillConfig, run: Run, micro: int, processes: int = 1) -> JsonObject:
    """Options of TRL's DistillationConfig: dropout off, Adam without weight decay."""
    return trainer_arguments(
        TrlConfig,
        config,
        run,
        DISTILL.unused,
        max_steps=config.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // processes // micro,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        disable_dropout=True,
        shuffle_dataset=False,
        weight_decay=0.0,
    )


@dataclass(eq=False)
class StudentEvaluation(PeriodicEvaluation):
    """Measures the student at step 0, every `eval_every` steps and at the end."""

    run: Run
    config: DistillConfig
    setup: DistillSetup
    trainer: GkdTrainer

    def measure(self, step: int) -> None:
        """Log one evaluation and stop a run that has gone wrong."""
        found: dict[str, float | None] = {}
        model = self.trainer.model
        something = self.setup.heldout or self.setup.heldout_prompts
        seen = measuring(model, f"step {step}: the divergence", self.run.ranks) if something else nullcontext()
        with seen, evaluating(model), self.trainer.accelerator.autocast():
            if self.setup.heldout_prompts:
                found |= self.on_prompts(step)
            if self.setup.heldout:
                found |= self.on_rows()
        self.run.log(step, kind="eval", **found)
        for name, value in found.items():
            if name in ("divergence", "heldout_loss") and value is not None and not math.isfinite(value):
                raise GuardStop(f"step {step}: the held-out {name} is {value}", "lower --learning-rate")

    def on_prompts(self, step: int) -> dict[str, float | None]:
        """Divergence on the student's answers to the held-out prompts, drawn with the same numbers each time."""
        chat, rows, ranks = self.setup.material.chat, self.setup.heldout_prompts, self.run.ranks
        share = ranks.share(len(rows))
        prompts = []
        for row in rows[share]:
            with located(row.where):
                prompts.append(chat.prompt_ids(row.messages))
        params = SamplingParams(self.config.max_new_tokens, self.config.temperature)
        student = plain_model(self.trainer.model)
        own = draw(student, chat, prompts, params, self.config.seed, self.batch_size, (share.start, len(rows)))
        examples = as_examples(prompts, own)
        sums = self.divergences(examples, [-1] * len(examples))
        drawn = Completions(
            ids=[ids for part in ranks.gather(own.ids) for ids in part],
            truncated=[cut for part in ranks.gather(own.truncated) for cut in part],
        )
        for row, ids, total in list(zip(rows, drawn.ids, sums.tolist(), strict=True))[:4]:
            text = chat.decode(ids)
            self.run.sample(step, prompt=row.messages, completion=text, divergence=round(total / len(ids), 6))
        lengths = torch.tensor([float(len(ids)) for ids in drawn.ids], dtype=torch.float64)
        mean, error = ratio(sums, lengths)
        return {
            "divergence": mean,
            "divergence_se": error,
            "length": lengths.mean().item(),
            "truncated": sum(drawn.truncated) / len(drawn.truncated),
        }

    def on_rows(self) -> dict[str, float | None]:
        """-log S per target token of the held-out rows; from a cache, where no prompt is answered, the divergence."""
        rows, model = self.setup.heldout, self.trainer.model
        found: dict[str, float | None] = {"heldout_loss": heldout_loss(model, rows, self.batch_size, self.run.ranks)}
        if not self.setup.heldout_prompts:
            share = self.run.ranks.share(len(rows))
            sums = self.divergences(rows[share], self.setup.heldout_numbers[share])
            counts = torch.tensor([float(sum(row.mask)) for row in rows], dtype=torch.float64)
            found["divergence"], found["divergence_se"] = ratio(sums, counts)
        return found

    def divergences(self, examples: Sequence[Example], numbers: Sequence[int]) -> Tensor:
        """Return the sums of `divergence_sums` of the shares of all processes, (N,) float64 nats. A collective."""
        ranks, loss, model = self.run.ranks, self.setup.loss, self.trainer.model
        return torch.cat(ranks.gather(divergence_sums(model, loss, examples, numbers, self.batch_size, ranks)))

    @property
    def batch_size(self) -> int:
        """Sequences per forward pass."""
        return self.config.micro_batch_size or self.config.batch_size

    def summary(self) -> dict[str, float | None]:
        """The last measurement next to the first one, which a resumed run finds in its own metrics."""
        found = evaluations(self.run)
        first, last = (found[0], found[-1]) if found else ({}, {})
        before = {f"{name}_before": first[name] for name in ("divergence", "heldout_loss") if name in first}
        return before | {name: value for name, value in last.items() if name not in ("step", "kind")}


@torch.no_grad()
def divergence_sums(
    model: CausalLM,
    loss: Loss,
    examples: Sequence[Example],
    numbers: Sequence[int],
    batch_size: int,
    ranks: Ranks = ALONE,
) -> Tensor:
    """The divergence summed over the response tokens of each row, (N,) float64 nats. In step with `ranks`."""
    model = plain_model(model)
    sums = torch.zeros(len(examples), dtype=torch.float64)
    batches: Sequence[list[int]] = list(length_batches([len(example.ids) for example in examples], batch_size))
    in_turn = in_step(batches, ranks) if loss.teacher.divided or is_sharded(model) else iter(batches)
    with whole_head(model), loss.teacher.ready():
        head = head_of(model, loss.temperature, loss.vocabulary)
        for batch in in_turn:
            if batch is None:
                _run_along(model, loss)
                continue
            ids, mask = collate([examples[i] for i in batch], model.device)
            rows = torch.tensor([numbers[i] for i in batch], device=ids.device)
            target = loss.teacher.target(ids, mask, rows)
            values = divergence_loss(response_states(model, ids, mask), head, target).values
            parts = values.double().cpu().split([sum(examples[i].mask) for i in batch])
            sums[batch] = torch.stack([part.sum() for part in parts])
    return sums


def _run_along(model: CausalLM, loss: Loss) -> None:
    """Run student and teacher once, for the other processes that gather their weights now."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if loss.teacher.divided:
        loss.teacher.target(ids, mask, torch.tensor([-1], device=ids.device))
    response_states(model, ids, mask)


def ratio(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """sum / count over all rows, and its standard error clustered by row (Cochran 1977, section 6.4)."""
    mean = (sums.sum() / counts.sum()).item()
    if len(sums) < 2:
        return mean, None
    spread = ((sums - mean * counts) ** 2).sum().item() * len(sums) / (len(sums) - 1)
    return mean, math.sqrt(spread) / counts.sum().item()
