"""RL from a reward with the KL anchored to an EMA of the policy: the first stage of WARP (2406.16768, section 3.1).

    y ~ pi;   r_beta = r - beta (log pi(y) - log anchor(y));   theta <- Adam(r_beta grad log pi);   anchor <- EMA

The output is the policy. The anchor is written next to it, under `ema/`, for inspection; nothing downstream reads it.
Every `eval_every` steps the policy is measured on held-out prompts (reward, KL to the SFT policy, length), always the
same prompts and random numbers; each measurement is a line of metrics.jsonl with `"kind": "eval"`, and together they
are the trajectory of the run in the KL-reward plane. With `heldout`, the values per prompt are in evaluations.jsonl,
from which a front takes the trajectory if it was measured as its points are (`evaluation/trajectory.py`).

Deviations from the paper: a leave-one-out baseline (the paper states none), and dropout is off, so that the policy that
is updated is the one that was sampled. The learning rate is constant after its warm-up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from trl import RLOOConfig

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.tokenizer_ids import tokenizer_difference
from gemma2.core.progress import SILENT, Progress
from gemma2.core.ranks import Ranks
from gemma2.posttrain.adapters.frozen_base import check_base
from gemma2.posttrain.adapters.merged_output import Products, is_rounded, products_of, write_merged
from gemma2.posttrain.adapters.output_difference import policy_difference
from gemma2.posttrain.attention.choice import settle_attention
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Prompt, split
from gemma2.posttrain.evaluation.evaluate import Measurement, MeasureSettings, measure
from gemma2.posttrain.evaluation.trajectory import procedure
from gemma2.posttrain.models.loading import default_device, quiet_libraries, save_model
from gemma2.posttrain.models.lora import lora_config, merged_copy, plain_model, save_adapter
from gemma2.posttrain.models.precision import as_loaded, free_cached, frozen_dtype, trained_weights, widening
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.sampler import SamplingParams
from gemma2.posttrain.runs.run_directory import Run, RunOptions, RunResult, open_run
from gemma2.posttrain.schemas import RlhfConfig
from gemma2.posttrain.sharding.placement import placed
from gemma2.posttrain.training.sharded_trainer import hand_over
from gemma2.posttrain.training.trainer import (
    PeriodicEvaluation,
    RunCallback,
    configured,
    evaluations,
    train,
    trainer_arguments,
)
from gemma2.posttrain.training.trainer_options import RL
from gemma2.posttrain.training.witness import measuring

from .first_rollouts import FirstAnchors
from .guards import Guards
from .rloo import AnchoredRlooTrainer
from .setup import RlSetup, make_anchor, prepare
from .sharded_output import save_shards
from .vllm import VllmSampler, check_usable, compare_attention

__all__ = ["run_rlhf"]

DIFFERENCE_PROMPTS = 4
HELDOUT_SHARE = 0.1  # of the prompts, where no file of held-out prompts is given
# KL per token at the first step, nats: rounding only. bf16 keeps 8 bits of a logit.
TOLERANCE_FP32, TOLERANCE_BF16 = 1e-4, 2e-2
SHOWN = {"reward": "reward", "kl_anchor": "KL", "length": "length", "truncated": "cut"}


def run_rlhf(config: RlhfConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Train `config.policy` on `config.prompts` and write the result to `options.out`.

    Raises InputError for unusable data or models, UsageError for options that do not fit, GuardStop when a guard fires.
    """
    quiet_libraries()
    placement, progress = placed("rlhf", config, progress)
    ranks = placement.ranks
    if placement.divides and config.anchor_memory == "cpu":
        raise UsageError(
            "--anchor-memory cpu is for an anchor that each process holds as a whole; --strategy fsdp divides it",
            "leave --anchor-memory out, or give --strategy ddp",
        )
    rows, micro = local_rows(config, ranks)
    if config.engine == "vllm":
        check_usable(config, default_device(), ranks)
        compare_attention(config, ranks, progress)
    check_base(config)
    with open_run("rlhf", config, options, ranks=ranks, strategy=placement.strategy) as run:
        reading = Reading(config)
        prompts, heldout = read_data(config, reading)
        run.origin["attention"] = settle_attention(
            config.attention,
            [config.policy, *config.reward],
            progress,
            device=default_device(),
            learns=True,
            wide=widening(config.trainer, config.dtype),
        )
        setup = prepare(config, prompts, micro, placement, progress)
        setup.rollout.prompts = reading.renderable(prompts, setup.rollout.chat)
        heldout = reading.renderable(heldout, setup.rollout.chat)
        unread = reading.report(progress, run.path if ranks.is_main else None)
        warn_of_other_tokens(config, progress)
        handed = {} if setup.sharded is None else hand_over(setup.trained)
        arguments = configured(RLOOConfig, config, rloo_arguments(config, run, rows, micro) | handed)
        rounded = arguments.bf16 or arguments.fp16 or config.anchor_memory == "cpu" or computes_in_half(setup)
        tolerance = TOLERANCE_BF16 if rounded else TOLERANCE_FP32
        starts_at_anchor = tolerance if setup.starts_at_anchor else None
        guards = Guards(progress, config.max_kl, config.max_dead_steps, starts_at_anchor)
        transformers.set_seed(config.seed)  # of the adapters' first values
        trainer = make_trainer(config, setup, arguments, guards)
        callback = RunCallback(run, progress, "RL", SHOWN)
        trainer.add_callback(callback)
        if config.anchor == "ema":
            trainer.follow(make_anchor(config, setup), config.mu, config.ema_every)
        rate = config.mu, config.ema_every
        trainer.add_callback(FirstAnchors(trainer.trained, setup.reference, trainer.anchor, setup.rollout.anchor, rate))
        evaluation = PolicyEvaluation(run, config, setup, heldout, guards, trainer, alike_of(config))
        trainer.add_callback(evaluation)
        run.memory.holds = {
            "anchor": lambda: trainer.anchor,
            "reference": lambda: setup.reference,
            "reward models": lambda: setup.rollout.score,
        }
        with drawing(config, trainer, ranks):
            train(trainer, run, callback, lambda: trainer.has_signal)
        figures = callback.summary(trainer.model)
        if setup.sharded is not None:
            save_shards(trainer, setup, config, run)
        elif ranks.is_main:
            save(trainer, setup, config, run)
            figures |= difference(trainer, setup, config, run, progress)
        return run.finish({"steps": trainer.state.global_step, **figures, **unread, **evaluation.summary()})


def make_trainer(config: RlhfConfig, setup: RlSetup, arguments: RLOOConfig, guards: Guards) -> AnchoredRlooTrainer:
    """The trainer of the policy. A sharded one has its adapters already, another gets them here."""
    if setup.sharded is not None:
        return AnchoredRlooTrainer(setup.rollout, None, arguments, guards, None, setup.trained)
    return AnchoredRlooTrainer(setup.rollout, None, arguments, guards, lora_config(config, "CAUSAL_LM"))


def computes_in_half(setup: RlSetup) -> bool:
    """Whether the products of a sharded policy are in half precision."""
    return setup.sharded is not None and setup.sharded.compute != torch.float32


def warn_of_other_tokens(config: RlhfConfig, progress: Progress) -> None:
    """Say that a reward model cannot read the policy's tokens: of one family, its tokenizer is not the one it had."""
    for path in config.reward:
        difference = tokenizer_difference(config.policy, path)
        if difference:
            progress.warn(
                f"--reward {path} has other tokens than --policy {config.policy} ({difference}): completions are "
                "encoded again for it; if both are of one family, restore the tokenizer that it was trained with"
            )


@contextmanager
def drawing(config: RlhfConfig, trainer: AnchoredRlooTrainer, ranks: Ranks) -> Iterator[None]:
    """With `--engine vllm`: vLLM draws from the trained policy instead of our sampler while the block runs."""
    if config.engine != "vllm":
        yield
        return
    rollout = trainer.rollout
    rollout.vllm = VllmSampler.start(
        config, rollout.policy, trainer.accelerator, rollout.chat, rollout.generator, rollout.batch_size, ranks
    )
    try:
        yield
    finally:
        rollout.vllm.close()
        rollout.vllm = None


def local_rows(config: RlhfConfig, ranks: Ranks) -> tuple[int, int]:
    """Samples of this process (per step, per forward pass). Raises UsageError if the processes do not divide them."""
    if config.prompts_per_step % ranks.size:
        raise UsageError(
            f"--prompts-per-step {config.prompts_per_step} is not a multiple of the {ranks.size} processes",
            "change one",
        )
    rows = config.prompts_per_step // ranks.size * config.n
    micro = config.micro_batch_size or rows
    if rows % micro:
        of_each = " of each process" if ranks.size > 1 else ""
        raise UsageError(
            f"{rows} samples per step{of_each} are not a multiple of --micro-batch-size {micro}", "change one"
        )
    return rows, micro


def read_data(config: RlhfConfig, reading: Reading) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts; without a separate file, a tenth is held out."""
    prompts = reading.prompts(config.prompts)
    if config.heldout is not None:
        return prompts, reading.prompts(config.heldout, config.eval_prompts)
    prompts, heldout = split(prompts, HELDOUT_SHARE, config.seed)
    if not heldout:
        raise UsageError(f"{config.prompts} has one prompt, none can be held out", "add prompts, or give --heldout")
    return prompts, heldout[: config.eval_prompts]


def rloo_arguments(config: RlhfConfig, run: Run, rows: int, micro: int) -> JsonObject:
    """Options of TRL's RLOOConfig: on-policy, Adam without weight decay, constant learning rate after the warm-up."""
    if config.trainer.get("use_transformers_continuous_batching"):
        raise UsageError(
            "'trainer.use_transformers_continuous_batching' is not taken: it drops the soft cap of Gemma 2's attention",
            "leave it out; --engine vllm batches continuously",
        )
    return trainer_arguments(
        RLOOConfig,
        config,
        run,
        RL.without_effect(),
        max_steps=config.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro,
        steps_per_generation=rows // micro,
        num_iterations=1,
        num_generations=config.n,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        beta=0.0,
        disable_dropout=True,
        shuffle_dataset=False,
        lr_scheduler_type="constant_with_warmup",
        weight_decay=0.0,
        ddp_find_unused_parameters=False,
    )


def seed_of(config: RlhfConfig) -> int:
    """The seed of the random numbers of the evaluations."""
    return config.seed if config.eval_seed is None else config.eval_seed


def alike_of(config: RlhfConfig) -> str | None:
    """The procedure of the evaluations; None where no other command measures the same.

    That is so on a part of the training prompts, and for a policy on a quantised base, which is not its output.
    """
    if config.heldout is None or config.base_bits is not None:
        return None
    return procedure(
        config, config.sft or config.policy, config.heldout, 1, seed_of(config), frozen_dtype(config.dtype)
    )


@dataclass(eq=False)
class PolicyEvaluation(PeriodicEvaluation):
    """Measures the policy on the held-out prompts at step 0, every `eval_every` steps and at the end."""

    run: Run
    config: RlhfConfig
    setup: RlSetup
    rows: Sequence[Prompt]
    guards: Guards
    trainer: AnchoredRlooTrainer
    alike: str | None  # the procedure, if other measurements can be compared with it

    def measure(self, step: int) -> None:
        """Log one point of the trajectory and let the guards judge it."""
        measured = self.measured(step)
        free_cached()
        found = measured.columns()
        kl, truncated = float(found["kl"] or 0.0), float(found["truncated"] or 0.0)
        if step == 0 and self.setup.starts_at_sft and abs(kl) > TOLERANCE_FP32:
            raise RuntimeError(f"KL to the SFT policy is {kl:.3g} nats before the first step, not 0")
        self.run.log(step, kind="eval", **found, n=measured.n)
        if self.alike is not None:
            values = {name: measured.per_prompt[name] for name in ("reward", "kl")}
            self.run.evaluated(step, procedure=self.alike, values=values)
        for row in measured.samples:
            self.run.sample(step, **row)
        self.guards.measured(step, kl, truncated)

    def measured(self, step: int) -> Measurement:
        """Measure the policy as `eval` and `pareto` would load it; rounded copies of the models end with this call."""
        rollout, config = self.setup.rollout, self.config
        params = SamplingParams(config.max_new_tokens, config.temperature)
        settings = MeasureSettings(params, self.at_once(), seed_of(config), keep=4, ranks=self.run.ranks)
        seen = f"step {step}: the policy on held-out prompts"
        if (parts := self.setup.sharded) is not None:  # lent the weights in this form
            with measuring(parts.measured, seen):
                return measure(parts.measured, self.setup.reference, rollout.chat, self.rows, [rollout.score], settings)
        dtype = frozen_dtype(config.dtype)
        with (
            trained_weights(rollout.policy, self.setup.base, dtype) as policy,
            as_loaded(self.setup.reference, dtype) as reference,
            measuring(self.watched(policy), seen),
        ):
            return measure(policy, reference, rollout.chat, self.rows, [rollout.score], settings)

    def at_once(self) -> int:
        """Sequences of a forward pass: those of a training step, but on a CPU no fewer than an `eval` has.

        An accelerator's memory is planned for the sequences of a step; --micro-batch-size is the user's word on it.
        """
        size = self.setup.rollout.batch_size
        free = self.config.micro_batch_size is None and self.setup.rollout.policy.device.type == "cpu"
        return max(size, MeasureSettings.batch_size) if free else size

    def watched(self, policy: CausalLM) -> CausalLM:
        """The network that must run in a measurement: `policy`, the trained one or a rounded copy of it."""
        trained = plain_model(self.trainer.model)
        return policy if self.setup.rollout.policy is trained else trained

    def summary(self) -> dict[str, float | None]:
        """The last measurement, which may be of the part of the run before a resume."""
        last = evaluations(self.run)[-1]
        return {name: last.get(name) for name in ("reward", "reward_se", "kl", "kl_se", "length", "truncated")}


def save(trainer: AnchoredRlooTrainer, setup: RlSetup, config: RlhfConfig, run: Run) -> None:
    """The policy as the result, or its adapter alone, and the anchor as a separate model directory under `ema/`."""
    chat, policy = setup.rollout.chat, setup.rollout.policy
    if config.lora_output == "adapter":
        save_adapter(trainer.model, chat.tokenizer, run.path)
    elif is_rounded(policy):
        save_on_base(products_of(policy), setup, config, run.path)
    else:
        save_plain(policy if setup.base is None else merged_copy(setup.base, policy), setup, run.path)
    if trainer.anchor is not None and is_rounded(policy):
        save_on_base(trainer.anchor.products(), setup, config, run.path / "ema")
    elif trainer.anchor is not None:
        save_plain(trainer.anchor.plain(), setup, run.path / "ema")


def save_on_base(products: Products, setup: RlSetup, config: RlhfConfig, directory: Path) -> None:
    """Save products on the weights of `config.policy` as they are on the disk; turns end as the policy's."""
    policy, chat = setup.rollout.policy, setup.rollout.chat
    policy.generation_config.eos_token_id = chat.stop_ids
    directory.mkdir(exist_ok=True)
    write_merged(policy, products, config.policy, chat.tokenizer, directory)


def difference(
    trainer: AnchoredRlooTrainer, setup: RlSetup, config: RlhfConfig, run: Run, progress: Progress
) -> JsonObject:
    """How far the output is from the policy that was trained, on prompts, if that has a quantised base."""
    policy, rollout = setup.rollout.policy, setup.rollout
    if config.lora_output == "adapter" or config.base_bits is None:
        return {}
    prompts = [rollout.encode(prompt) for prompt in rollout.prompts[:DIFFERENCE_PROMPTS]]
    return policy_difference(policy, run.path, prompts, progress, trainer.args.bf16)


def save_plain(model: CausalLM, setup: RlSetup, directory: Path) -> None:
    """A model directory that ends its turns where the policy does."""
    model.generation_config.eos_token_id = setup.rollout.chat.stop_ids
    save_model(model, setup.rollout.chat.tokenizer, directory)
