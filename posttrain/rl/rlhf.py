"""RL from a reward with the KL anchored to an EMA of the policy: the first stage of WARP (2406.16768, section 3.1).

    y ~ pi;   r_beta = r - beta (log pi(y) - log anchor(y));   theta <- Adam(r_beta grad log pi);   anchor <- EMA

The output is the policy. The anchor is written beside it, under `ema/`, for inspection; nothing downstream reads it.
Every `eval_every` steps the policy is measured on held-out prompts (reward, KL to the SFT policy, length), always the
same prompts and random numbers; each measurement is a line of metrics.jsonl with `"kind": "eval"`, and together they
are the trajectory of the run in the KL-reward plane.

Deviations from the paper: a leave-one-out baseline (the paper states none), and dropout is off, so that the policy that
is updated is the one that was sampled. The learning rate is constant after its warm-up.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import RLOOConfig

from gemma2.merging.errors import UsageError
from gemma2.merging.progress import SILENT, Progress
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt, read_prompts, split
from gemma2.posttrain.data.sources import data_files
from gemma2.posttrain.evaluation.evaluate import Settings, check_same_vocabulary, measure
from gemma2.posttrain.models.loading import load_policy, save_model
from gemma2.posttrain.models.sampler import SamplingParams
from gemma2.posttrain.rewards.terms import reward_score
from gemma2.posttrain.rundir import Parent, Run, RunOptions, RunResult, open_run
from gemma2.posttrain.schemas import RlhfConfig
from gemma2.posttrain.training.trainer import PeriodicEvaluation, RunCallback, quiet_libraries, train, trainer_arguments

from .ema import EmaAnchor
from .guards import Guards
from .rloo import AnchoredRlooTrainer
from .rollout import Rollout

__all__ = ["run_rlhf"]

HELDOUT_SHARE = 0.1  # of the prompts, where no file of held-out prompts is given
# KL per token at the first step, nats: rounding only. bf16 keeps 8 bits of a logit.
TOLERANCE_FP32, TOLERANCE_BF16 = 1e-4, 2e-2
SHOWN = {"reward": "reward", "kl_anchor": "KL", "length": "length", "truncated": "cut"}


def run_rlhf(config: RlhfConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Train `config.policy` on `config.prompts` and write the result to `options.out`.

    Raises InputError for unusable data or models, UsageError for options that do not fit, GuardStop when a guard fires.
    """
    quiet_libraries()
    check_process_count()
    rows = config.prompts_per_step * config.n
    micro = config.micro_batch_size or rows
    if rows % micro:
        raise UsageError(f"{rows} samples per step are not a multiple of --micro-batch-size {micro}", "change one")
    models = {"policy": config.policy, "reward": config.reward, "sft": config.sft}
    parents = [Parent(role, path) for role, path in models.items() if path is not None]
    data = [file for path in (config.prompts, config.heldout) if path is not None for file in data_files(path)]
    with open_run("rlhf", config, options, parents=parents, data=data) as run:
        prompts, heldout = read_data(config)
        setup = prepare(config, prompts, micro)
        guards = Guards(progress, config.max_kl, config.max_dead_steps, setup.tolerance)
        arguments = RLOOConfig(**rloo_arguments(config, run, rows, micro))
        trainer = AnchoredRlooTrainer(setup.rollout, setup.ema, arguments, guards)
        callback = RunCallback(run, progress, "RL", SHOWN)
        evaluation = Evaluation(run, config, setup, heldout, guards, trainer)
        trainer.add_callback(callback)
        if setup.ema is not None:
            trainer.add_callback(AnchorUpdate(setup.ema, config.mu))
        trainer.add_callback(evaluation)
        train(trainer, run, callback)
        save(setup, run)
        return run.finish({"steps": trainer.state.global_step, **evaluation.summary()})


def check_process_count() -> None:
    """One process only: groups, metrics and the sampler's state are not gathered across ranks."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world > 1:
        raise UsageError(f"rlhf was started with {world} processes", "start it with one")


def read_data(config: RlhfConfig) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts; without a file of its own, a tenth is held out."""
    prompts = read_prompts(config.prompts)
    if config.heldout is not None:
        return prompts, read_prompts(config.heldout)[: config.eval_prompts]
    prompts, heldout = split(prompts, HELDOUT_SHARE, config.seed)
    if not heldout:
        raise UsageError(f"{config.prompts} has one prompt, none can be held out", "add prompts, or give --heldout")
    return prompts, heldout[: config.eval_prompts]


@dataclass(frozen=True)
class Setup:
    """The models of a run. `reference` is the SFT policy that the measured KL refers to."""

    rollout: Rollout
    reference: Any
    ema: EmaAnchor | None
    starts_at_sft: bool
    tolerance: float | None  # of the KL to the anchor at the first step; None: the anchor starts elsewhere


def prepare(config: RlhfConfig, prompts: Sequence[Prompt], micro: int) -> Setup:
    """Load policy, SFT policy and reward, and make the anchor."""
    policy, tokenizer = load_policy(config.policy)
    chat = ChatFormat(tokenizer, policy.generation_config)
    starts_at_sft = config.sft is None or config.sft.resolve() == config.policy.resolve()
    if starts_at_sft:
        reference = copy.deepcopy(policy).requires_grad_(False)
    else:
        assert config.sft is not None
        reference = load_policy(config.sft)[0].requires_grad_(False)
        check_same_vocabulary(policy, reference, str(config.policy), str(config.sft))
    ema = EmaAnchor(policy) if config.anchor == "ema" else None
    anchors = {"ema": ema.model if ema is not None else None, "sft": reference, "none": None}
    generator = torch.Generator().manual_seed(config.seed)
    score = reward_score(config, chat, micro)
    rollout = Rollout(policy, anchors[config.anchor], chat, score, config, prompts, generator, micro)
    zero = config.anchor == "ema" or (config.anchor == "sft" and starts_at_sft)
    tolerance = TOLERANCE_BF16 if torch.cuda.is_available() else TOLERANCE_FP32
    return Setup(rollout, reference, ema, starts_at_sft, tolerance if zero else None)


def rloo_arguments(config: RlhfConfig, run: Run, rows: int, micro: int) -> dict[str, Any]:
    """Options of TRL's RLOOConfig: on-policy, Adam without weight decay, constant learning rate after the warm-up."""
    return trainer_arguments(
        RLOOConfig,
        config,
        run,
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
    )


class AnchorUpdate(TrainerCallback):
    """ema <- (1 - mu) ema + mu theta, after every optimizer step (WARP, Algorithm 1, line 8)."""

    def __init__(self, anchor: EmaAnchor, mu: float) -> None:
        self.anchor = anchor
        self.mu = mu

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.anchor.update(kwargs["model"], self.mu)


@dataclass(eq=False)
class Evaluation(PeriodicEvaluation):
    """Measures the policy on the held-out prompts at step 0, every `eval_every` steps and at the end."""

    run: Run
    config: RlhfConfig
    setup: Setup
    rows: Sequence[Prompt]
    guards: Guards
    trainer: AnchoredRlooTrainer
    last: dict[str, float | None] = field(default_factory=dict)

    def measure(self, step: int) -> None:
        """Log one point of the trajectory and let the guards judge it."""
        rollout, config = self.setup.rollout, self.config
        settings = Settings(
            SamplingParams(config.max_new_tokens, config.temperature), rollout.batch_size, config.seed, keep=4
        )
        with self.trainer.accelerator.autocast():
            measured = measure(rollout.policy, self.setup.reference, rollout.chat, self.rows, [rollout.score], settings)
        self.last = measured.columns()
        kl, truncated = float(self.last["kl"] or 0.0), float(self.last["truncated"] or 0.0)
        if step == 0 and self.setup.starts_at_sft and abs(kl) > TOLERANCE_FP32:
            raise RuntimeError(f"KL to the SFT policy is {kl:.3g} nats before the first step, not 0")
        self.run.log(step, kind="eval", **self.last)
        for row in measured.samples:
            self.run.sample(step, **row)
        self.guards.measured(step, kl, truncated)

    def summary(self) -> dict[str, float | None]:
        """The last measurement."""
        return {name: self.last.get(name) for name in ("reward", "reward_se", "kl", "kl_se", "length", "truncated")}


def save(setup: Setup, run: Run) -> None:
    """The policy as the result, the anchor as a model directory of its own under `ema/`."""
    rollout = setup.rollout
    for model, directory in ((rollout.policy, run.path), (setup.ema.model if setup.ema else None, run.path / "ema")):
        if model is not None:
            model.generation_config.eos_token_id = rollout.chat.stop_ids
            save_model(model, rollout.chat.tokenizer, directory)
