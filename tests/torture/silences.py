"""Trainings on tiny models, and what goes wrong in them without an error: one change of the product each.

A silence is a function that breaks one thing with a monkeypatch; `observe` runs a job and says how it ended.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer
from transformers.models.gemma2 import modeling_gemma2

from gemma2.core.errors import Gemma2Error
from gemma2.core.progress import SILENT
from gemma2.posttrain.data import examples
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.examples import IGNORED, Example
from gemma2.posttrain.distillation import distill
from gemma2.posttrain.distillation.distill import run_distill
from gemma2.posttrain.models import causal_attention, cross_entropy, loading
from gemma2.posttrain.preferences import reward_trainer
from gemma2.posttrain.preferences.train import run_reward
from gemma2.posttrain.rewards.model import RewardModel
from gemma2.posttrain.rl import objective, rlhf, rollout
from gemma2.posttrain.rl.ema import EmaAnchor
from gemma2.posttrain.rl.rlhf import run_rlhf
from gemma2.posttrain.rl.rollout import Rollout
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import DistillConfig, RewardConfig, RlhfConfig, SftConfig
from gemma2.posttrain.sft import sft_trainer
from gemma2.posttrain.sft.sft import run_sft
from gemma2.posttrain.tiny.networks import random_model, save_random, tiny_tokenizer
from gemma2.posttrain.training import trainer
from gemma2.posttrain.training.heldout import HeldOut

END_OF_TURN = 107
WORDS = ("honey", "glass", "wool", "salt", "copper")
Patch = pytest.MonkeyPatch
Job = Callable[[Path, Path, object], object]


# --- the jobs -----------------------------------------------------------------------------------------------------


class Warnings:
    """A progress that keeps warnings, and interrupts a run once its bar has advanced by more than `after`."""

    def __init__(self, after: int = 10**9) -> None:
        self.said: list[str] = []
        self.left = after
        self.warn, self.note = self.said.append, SILENT.note

    @contextmanager
    def task(self, label, total, unit):
        yield self

    def advance(self, amount=1, **fields):
        self.left -= amount
        if self.left < 0:
            raise KeyboardInterrupt


def judge(prompts, completions, **columns):
    """A reward that varies with the text."""
    return [float(sum(map(ord, text)) % 17) / 17 for text in completions]


def write_inputs(root: Path) -> Path:
    """Models, prompts, conversations and pairs for every job."""
    for name, seed, more in (("model", 0, 8), ("teacher", 1, 8)):
        model = random_model(seed)
        with torch.no_grad():
            model.model.embed_tokens.weight[END_OF_TURN] *= more
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    save_random(root / "reward", seed=1, kind="reward")
    save_random(root / "other", seed=2, kind="reward")
    draw = random.Random(0)
    answers = [" ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 6))) for _ in range(24)]
    rows = {
        "prompts": [{"prompt": f"What is {i} plus 2?"} for i in range(12)],
        "rows": [{"prompt": f"What is {i}?", "completion": answer} for i, answer in enumerate(answers)],
        "pairs": [{"prompt": f"What is {i}?", "chosen": f"{a} please", "rejected": a} for i, a in enumerate(answers)],
    }
    for name, lines in rows.items():
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return root


STEPS = 2


def sft(root: Path, out: Path, progress: object, **fields: object) -> object:
    """Supervised fine-tuning; the last step is measured."""
    given = {"learning_rate": 3e-3, "batch_size": 8, "eval_fraction": 0.2, "max_steps": STEPS, "save_every": 1}
    config = SftConfig(model=root / "model", data=root / "rows.jsonl", **(given | fields))
    return run_sft(config, RunOptions(out), progress)


def reward(root: Path, out: Path, progress: object, **fields: object) -> object:
    """A reward model from pairs."""
    given = {"learning_rate": 1e-2, "batch_size": 8, "eval_fraction": 0.2, "max_steps": STEPS}
    config = RewardConfig(model=root / "model", data=root / "pairs.jsonl", **(given | fields))
    return run_reward(config, RunOptions(out), progress)


def distilled(root: Path, out: Path, progress: object, **fields: object) -> object:
    """On-policy distillation."""
    given = {"learning_rate": 1e-3, "batch_size": 4, "max_new_tokens": 8, "steps": STEPS, "eval_every": 1}
    config = DistillConfig(
        model=root / "model", teacher=root / "teacher", prompts=root / "prompts.jsonl", **(given | fields)
    )
    return run_distill(config, RunOptions(out), progress)


def rl(root: Path, out: Path, progress: object, **fields: object) -> object:
    """RL from a reward model, or from a function."""
    given = {"steps": STEPS, "prompts_per_step": 2, "n": 3, "max_new_tokens": 16, "temperature": 1.0, "mu": 0.3}
    given |= {"learning_rate": 1e-3, "warmup_steps": 0, "eval_every": 1, "eval_prompts": 12, "save_every": 100}
    given |= {"heldout": root / "prompts.jsonl"}
    given |= {} if {"reward", "reward_fn"} & fields.keys() else {"reward": root / "reward"}
    config = RlhfConfig(policy=root / "model", prompts=root / "prompts.jsonl", **(given | fields))
    return run_rlhf(config, RunOptions(out), progress)


def with_fields(job: Job, **fields: object) -> Job:
    """A job with other settings."""
    return lambda root, out, progress: job(root, out, progress, **fields)


def both_rewards(root: Path, out: Path, progress: object) -> object:
    """RL from two reward models and a function."""
    return rl(root, out, progress, reward=(root / "reward", root / "other"), reward_fn="silences:judge")


def resumed(root: Path, out: Path, progress: object) -> object:
    """SFT that was interrupted behind its first checkpoint, and goes on."""
    config = SftConfig(
        model=root / "model", data=root / "rows.jsonl", learning_rate=3e-3, batch_size=8, max_steps=4, save_every=1
    )
    with pytest.raises(KeyboardInterrupt):
        run_sft(config, RunOptions(out), Warnings(after=3))
    return run_sft(config, RunOptions(out, resume=True), progress)


CLEAN: dict[str, Job] = {
    "sft": sft,
    "sft, LoRA, micro-batches": with_fields(sft, lora_rank=2, lora_dropout=0.1, micro_batch_size=2),
    "sft, resumed": resumed,
    "distill": distilled,
    "reward": with_fields(reward, dropout=0.1),
    "reward, LoRA": with_fields(reward, lora_rank=2),
    "rlhf": rl,
    "rlhf, LoRA": with_fields(rl, lora_rank=2),
    "rlhf, LoRA, factors": with_fields(rl, lora_rank=2, lora_anchor="factors"),
    "rlhf, anchor in host memory": with_fields(rl, anchor_memory="cpu"),
    "rlhf, no anchor": with_fields(rl, anchor="none", micro_batch_size=3),
    "rlhf, anchor of SFT": with_fields(rl, anchor="sft"),
    "rlhf, three rewards": both_rewards,
    "rlhf, a paper's rate": with_fields(rl, learning_rate=1e-6, mu=0.01, warmup_steps=1),
}


@dataclass
class Outcome:
    """How a run ended: with an error of ours, or complete; and what it warned of."""

    error: Gemma2Error | None
    warnings: list[str]

    @property
    def text(self) -> str:
        """All that was said."""
        return "\n".join([str(self.error or ""), *self.warnings])


def observe(job: Job, root: Path, out: Path) -> Outcome:
    """Run a job to its end. Errors that are none of ours pass."""
    progress = Warnings()
    try:
        job(root, out, progress)
    except Gemma2Error as error:
        return Outcome(error, progress.said)
    return Outcome(None, progress.said)


# --- the silences ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Silence:
    """One change of the product, the job that meets it, and words of the line that names it."""

    name: str
    job: Job
    words: str
    inject: Callable[[Patch], object] = field(repr=False)


SILENCES: list[Silence] = []


def silence(name: str, job: Job, words: str) -> Callable[[Callable[[Patch], object]], Callable[[Patch], object]]:
    """Add a silence."""

    def add(inject: Callable[[Patch], object]) -> Callable[[Patch], object]:
        SILENCES.append(Silence(name, job, words, inject))
        return inject

    return add


def wrap(patch: Patch, place: object, name: str, change: Callable[..., object]) -> None:
    """Replace a function by `change(original, *arguments)`."""
    original = getattr(place, name)
    patch.setattr(place, name, lambda *arguments, **options: change(original, *arguments, **options))


def remade(patch: Patch, make: Callable[[Example], Example]) -> None:
    """Every row of SFT is another one than its text gives."""
    wrap(patch, examples, "example_of", lambda original, *arguments: make(original(*arguments)))


@silence("loss mask all zero", sft, "labels of a batch are not those of its row")
def mask_all_zero(patch: Patch) -> None:
    def blank(original, rows):
        table = original(rows)
        return table.map(lambda row: {"labels": [IGNORED] * len(row["labels"])})

    wrap(patch, sft_trainer, "to_dataset", blank)


@silence("loss mask shifted by one", sft, "not behind a model turn's header")
def mask_shifted(patch: Patch) -> None:
    remade(patch, lambda row: Example(row.ids, [False, *row.mask[:-1]]))


@silence("loss mask shifted by one, to the left", sft, "not behind a model turn's header")
def mask_shifted_left(patch: Patch) -> None:
    remade(patch, lambda row: Example(row.ids, [*row.mask[1:], False]))


@silence("loss mask includes the prompt", sft, "not behind a model turn's header")
def mask_of_everything(patch: Patch) -> None:
    remade(patch, lambda row: Example(row.ids, [True] * len(row.ids)))


@silence("states shifted against their targets", sft, "the loss of a row is")
def states_shifted(patch: Patch) -> None:
    wrap(patch, sft_trainer, "last_hidden_states", lambda original, *given: original(*given).roll(1, 1))


@silence("no <bos>", sft, "a row has 0 <bos>")
def no_bos(patch: Patch) -> None:
    remade(patch, lambda row: Example(row.ids[1:], row.mask[1:]))


@silence("doubled <bos>", sft, "2 <bos>")
def two_bos(patch: Patch) -> None:
    remade(patch, lambda row: Example([row.ids[0], *row.ids], [False, *row.mask]))


@silence("doubled <bos> in prompts", rl, "2 <bos>")
def two_bos_in_prompts(patch: Patch) -> None:
    def doubled(original, self, messages):
        ids = original(self, messages)
        return [ids[0], *ids] if messages[0]["content"].startswith("What is") else ids

    wrap(patch, ChatFormat, "prompt_ids", doubled)


@silence("divisor of the loss from another batch", with_fields(sft, micro_batch_size=4), "is divided by")
def other_divisor(patch: Patch) -> None:
    def halved(original, *given):
        count = original(*given)
        return None if count is None else count // 2

    wrap(patch, sft_trainer.SftTrainer, "_get_num_items_in_batch", halved)


@silence("accumulation not counted", with_fields(sft, micro_batch_size=4), "a step of the recipe has 8 rows")
def no_accumulation(patch: Patch) -> None:
    changed_arguments(patch, gradient_accumulation_steps=1)


@silence("config key dropped", with_fields(sft, max_grad_norm=0.3), "max_grad_norm is 0.3 in the recipe")
def key_dropped(patch: Patch) -> None:
    changed_arguments(patch, max_grad_norm=1.0)


@silence("seed ignored", with_fields(sft, seed=7), "seed is 7 in the recipe")
def seed_ignored(patch: Patch) -> None:
    changed_arguments(patch, seed=42)


def changed_arguments(patch: Patch, **values: object) -> None:
    """SFT's trainer gets other arguments than its recipe says."""
    wrap(patch, sft_trainer, "trainer_arguments", lambda original, *g, **o: original(*g, **o) | values)


@silence("learning rate 0", sft, "the learning rate is 0")
def rate_of_zero(patch: Patch) -> None:
    def stays(scheduler, warmup):
        scheduler.lr_lambdas = [lambda step: 0.0 for _ in scheduler.lr_lambdas]
        for group in scheduler.optimizer.param_groups:
            group["lr"] = 0.0

    patch.setattr(trainer, "start_above_zero", stays)


def stepping(patch: Patch, after: Callable[[torch.nn.Module], object]) -> None:
    """Something happens to the model with every optimizer step."""

    def created(original, self, *given, **options):
        optimizer = original(self, *given, **options)
        optimizer.register_step_post_hook(lambda *_: after(self.model))
        return optimizer

    wrap(patch, Trainer, "create_optimizer", created)


def parameter_of(model: torch.nn.Module, part: str) -> torch.Tensor:
    return next(p.data for name, p in model.named_parameters() if part in name)


@silence("optimizer without the parameters", sft, "the optimizer does not hold")
def other_parameters(patch: Patch) -> None:
    def created(original, self, *given, **options):
        optimizer = original(self, *given, **options)
        for group in optimizer.param_groups:
            group["params"] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
        return optimizer

    wrap(patch, Trainer, "create_optimizer", created)


@silence("steps undone", sft, "no weight changed")
def steps_undone(patch: Patch) -> None:
    saved: dict[str, torch.Tensor] = {}

    def undo(model):
        for name, p in model.named_parameters():
            p.data.copy_(saved[name])

    def keep(original, self, *given, **options):
        saved.update({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return original(self, *given, **options)

    stepping(patch, undo)
    wrap(patch, Trainer, "create_optimizer", keep)


@silence("LoRA B stays zero", with_fields(reward, lora_rank=2), "no adapter changed")
def b_stays_zero(patch: Patch) -> None:
    def zero(model):
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.zero_()

    stepping(patch, zero)


@silence("base weights move under LoRA", with_fields(sft, lora_rank=2), "frozen weights changed")
def base_moves(patch: Patch) -> None:
    stepping(patch, lambda model: parameter_of(model, "base_layer").add_(1e-3))


@silence("adapter not attached", with_fields(reward, lora_rank=2), "no gradient reaches the adapters")
def adapter_off(patch: Patch) -> None:
    for name in ("last_position", "all_positions"):
        wrap(patch, reward_trainer, name, lambda original, *given: original(*given).detach())


@silence("dead resume flag", resumed, "goes on at step 0, its checkpoint is of step")
def dead_resume(patch: Patch) -> None:
    patch.setattr(trainer, "latest_checkpoint", lambda run: None)


@silence("evaluation without the adapter", with_fields(sft, lora_rank=2), "measured without its adapters")
def base_is_evaluated(patch: Patch) -> None:
    def without(original, self, model):
        with model.disable_adapter():
            return original(self, model)

    wrap(patch, HeldOut, "figures", without)


@silence("evaluation of a copy", with_fields(sft, eval_every=1), "measured on another model")
def copy_is_evaluated(patch: Patch) -> None:
    copies: list[torch.nn.Module] = []

    def other(original, self, model):
        copies.append(copy.deepcopy(model))
        return original(self, copies[0])

    wrap(patch, HeldOut, "figures", other)


@silence("evaluation of the base in place of the policy", rl, "measured on another model")
def reference_is_evaluated(patch: Patch) -> None:
    wrap(patch, rlhf, "measure", lambda original, model, reference, *given: original(reference, reference, *given))


@silence("another dtype than asked", sft, "was loaded as torch.bfloat16")
def other_dtype(patch: Patch) -> None:
    def half(original, *given, **options):
        return original(*given, **(options | {"dtype": torch.bfloat16}))

    wrap(patch, loading.AutoModelForCausalLM, "from_pretrained", half)


@silence("soft cap lost with config.json", sft, "final_logit_softcapping is 30.0 in config.json")
def cap_lost(patch: Patch) -> None:
    def without(original, *given, **options):
        config = original(*given, **options)
        config.final_logit_softcapping = None
        return config

    wrap(patch, loading.AutoConfig, "from_pretrained", without)


def other_attention(patch: Patch, **settings: object) -> None:
    """Attention in blocks with other settings."""

    def changed(original, query, key, value, scale, cap=None, window=None):
        return original(query, key, value, scale, **({"cap": cap, "window": window} | settings))

    wrap(patch, causal_attention, "causal_attention", changed)


@silence("soft cap of attention dropped", sft, "the attention that training uses computes another model")
def attention_cap_dropped(patch: Patch) -> None:
    other_attention(patch, cap=None)


@silence("window ignored", rl, "the attention that training uses computes another model")
def window_ignored(patch: Patch) -> None:
    other_attention(patch, window=None)


@silence("soft cap dropped by the library", rl, "ignores the soft cap")
def library_drops_cap(patch: Patch) -> None:
    def without(original, *given, **options):
        return original(*given, **(options | {"softcap": None}))

    wrap(patch, modeling_gemma2, "eager_attention_forward", without)


@silence("final soft cap dropped", sft, "the scorer computes another model")
def final_cap_dropped(patch: Patch) -> None:
    wrap(patch, cross_entropy, "_Form", lambda original, cap, *given: original(None, *given))


@silence("chosen and rejected exchanged", reward, "tokens of the chosen side")
def sides_exchanged(patch: Patch) -> None:
    def exchanged(original, pairs):
        return original([dataclasses.replace(p, chosen=p.rejected, rejected=p.chosen) for p in pairs])

    wrap(patch, reward_trainer, "to_dataset", exchanged)


@silence("sign of the preference exchanged", reward, "the loss of a pair is")
def sign_exchanged(patch: Patch) -> None:
    wrap(patch, reward_trainer, "pair_loss", lambda original, a, b, *given: original(b, a, *given))


@silence("reward model with a fresh head", rl, "score.weight is not the one in")
def fresh_head(patch: Patch) -> None:
    def drawn_again(original, *given, **options):
        model, report = original(*given, **options)
        torch.nn.init.normal_(model.score.weight)
        return model, report

    wrap(patch, loading.AutoModelForSequenceClassification, "from_pretrained", drawn_again)


@silence("teacher is the student", distilled, "the teacher gives the distributions of the student")
def teacher_is_student(patch: Patch) -> None:
    def student(original, path, dtype):
        return original(path.with_name("model"), dtype)

    wrap(patch, distill, "load_teacher", student)


@silence("sampler with stale weights", rl, "the samples are of another policy")
def stale_sampler(patch: Patch) -> None:
    copies: list[torch.nn.Module] = []

    def stale(original, policy, *given):
        copies.append(copy.deepcopy(policy))
        return original(copies[0], *given)

    wrap(patch, rollout, "sample", stale)


@silence("another temperature in the sampler", rl, "the samples are of another policy")
def other_temperature(patch: Patch) -> None:
    wrap(patch, rollout, "SamplingParams", lambda original, limit, heat, n: original(limit, 2 * heat, n))


@silence("dropout in the loss", rl, "the policy that is updated is not the one that was sampled")
def dropout_in_the_loss(patch: Patch) -> None:
    wrap(patch, objective, "last_hidden_states", lambda original, *given: F.dropout(original(*given), 0.2))


@silence("prompt in the loss of RL", rl, "not its completion")
def prompt_in_the_loss(patch: Patch) -> None:
    def everything(original, *given):
        batch = original(*given)
        return dataclasses.replace(batch, mask=batch.ids != 0)

    wrap(patch, rollout, "padded", everything)


@silence("shuffled rewards", rl, "in its batch, and")
def shuffled_rewards(patch: Patch) -> None:
    wrap(patch, RewardModel, "score", lambda original, *given: original(*given).flip(0))


@silence("shuffled rewards, penalties included", with_fields(rl, length_penalty=0.1), "in its batch, and")
def shuffled_totals(patch: Patch) -> None:
    def turned(original, *given):
        return {name: list(column)[::-1] for name, column in original(*given).items()}

    wrap(patch, Rollout, "scores", turned)


@silence("advantages all zero", rl, "advantages are not reward - beta KL")
def no_advantages(patch: Patch) -> None:
    patch.setattr(rollout, "leave_one_out", lambda rewards, n: torch.zeros_like(rewards))


@silence("KL with the wrong sign", with_fields(rl, beta=1.0), "advantages are not reward - beta KL")
def wrong_sign(patch: Patch) -> None:
    wrap(patch, rollout, "anchored_rewards", lambda original, rewards, ratios, beta: original(rewards, ratios, -beta))


@silence("log-ratio with the wrong sign", rl, "log pi - log anchor of a completion is")
def wrong_ratio(patch: Patch) -> None:
    wrap(patch, Rollout, "log_ratios", lambda original, *given: -original(*given))


@silence("anchor is never updated", rl, "the anchor did not move by mu")
def frozen_anchor(patch: Patch) -> None:
    patch.setattr(EmaAnchor, "update", lambda self, policy, mu: None)


@silence("anchor follows the policy at once", rl, "the anchor did not move by mu")
def anchor_is_policy(patch: Patch) -> None:
    wrap(patch, EmaAnchor, "update", lambda original, self, policy, mu: original(self, policy, 1.0))


@silence("anchor rounded to bf16 in place", with_fields(rl, lora_rank=2), "the anchor did not move by mu")
def rounded_anchor(patch: Patch) -> None:
    def rounded(original, self, policy, mu):
        original(self, policy, mu)
        for tensor in self.shadow.values():
            tensor.copy_(tensor.bfloat16())

    wrap(patch, EmaAnchor, "update", rounded)


@silence("anchor kept in bf16", with_fields(rl, anchor_memory="cpu"), "the anchor is kept in torch.bfloat16")
def anchor_in_bf16(patch: Patch) -> None:
    def halved(original, self, *given):
        original(self, *given)
        self.shadow = {name: tensor.bfloat16() for name, tensor in self.shadow.items()}

    wrap(patch, EmaAnchor, "_begin", halved)


@silence("the copy that scores is not refreshed", with_fields(rl, anchor_memory="cpu"), "is not its average")
def stale_copy(patch: Patch) -> None:
    patch.setattr(EmaAnchor, "_refresh", lambda self: None)


@silence("SFT policy that moves with the policy", rl, "the SFT policy changed")
def moving_reference(patch: Patch) -> None:
    def shared(original, *given):
        setup = original(*given)
        for own, other in zip(setup.reference.parameters(), setup.rollout.policy.parameters(), strict=True):
            own.data = other.data
        return setup

    wrap(patch, rlhf, "prepare", shared)


@silence("tokenizer of a sibling", rl, "has other tokens than --policy")
def sibling_tokenizer(patch: Patch) -> None:
    def sibling(original, config, progress):
        other = config.reward[0].with_name("sibling")
        if not other.is_dir():
            write_sibling(config.reward[0], other)
        original(config.model_copy(update={"reward": (other,)}), progress)

    wrap(patch, rlhf, "warn_of_other_tokens", sibling)


def write_sibling(reward: Path, other: Path) -> None:
    """The same reward model with a tokenizer in which two pieces exchanged their ids."""
    other.mkdir()
    tokenizer = json.loads((reward / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
