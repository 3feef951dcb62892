"""What goes wrong in a training without an error: one change of the product each, by a monkeypatch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from training_jobs import Job, distilled, resumed, reward, rl, sft, with_fields
from transformers import Trainer
from transformers.models.gemma2 import modeling_gemma2

from gemma2.posttrain.data import examples
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.examples import IGNORED, Example
from gemma2.posttrain.distillation import distill
from gemma2.posttrain.models import causal_attention, cross_entropy, loading
from gemma2.posttrain.preferences import reward_trainer
from gemma2.posttrain.rl import rlhf
from gemma2.posttrain.sft import sft_trainer
from gemma2.posttrain.training import trainer
from gemma2.posttrain.training.heldout import HeldOut

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Silence:
    """One change of the product, the job that meets it, and words of the line that names it (alternatives: `|`)."""

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
    def student(original, path, *options):
        return original(path.with_name("model"), *options)

    wrap(patch, distill, "load_teacher", student)
