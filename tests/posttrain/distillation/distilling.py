"""Students, teachers and trainers for the tests of distillation."""

from __future__ import annotations

from pathlib import Path

import torch
from trl import DistillationConfig as TrlConfig

from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.distillation.divergence import Divergence
from gemma2.posttrain.distillation.gkd import GkdTrainer, Loss, Material, schedule
from gemma2.posttrain.distillation.teacher import LiveTeacher
from gemma2.posttrain.models.sampler import SamplingParams
from gemma2.posttrain.tiny.networks import random_model, tiny_tokenizer

END_OF_TURN = 107
QUESTIONS = [f"What is {a} plus {b}?" for a in range(4) for b in range(3)]


def ending_model(seed=0, **overrides):
    """An untrained model that ends its turns often enough to be sampled from."""
    model = random_model(seed, **overrides)
    with torch.no_grad():
        model.model.embed_tokens.weight[END_OF_TURN] *= 12
    return model


def near(model, seed):
    """A teacher for it: the same weights, a little moved, so that a student keeps ending its turns."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def save(model, path: Path) -> Path:
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def arguments(tmp_path, **fields):
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "shuffle_dataset": False,
        "disable_dropout": True,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "save_strategy": "no",
    }
    return TrlConfig(**(defaults | fields))


def material(student, examples=(), n=1):
    chat = ChatFormat(tiny_tokenizer(), student.generation_config)
    prompts = [Prompt("", [{"role": "user", "content": question}]) for question in QUESTIONS]
    return Material(chat, SamplingParams(8, 1.0, n), prompts, examples, [-1] * len(examples))


def make(tmp_path, student=None, teacher=None, divergence=None, n=1, **fields):
    student = student or ending_model(0)
    teacher = (teacher or ending_model(1)).requires_grad_(False)
    args = arguments(tmp_path, **fields)
    rows = material(student, n=n)
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    plan = schedule(args.max_steps, size, n, rows, 1.0, args.seed)
    loss = Loss(LiveTeacher(teacher, divergence or Divergence("reverse-kl"), 1.0, None), 1.0, None)
    return GkdTrainer(student, loss, rows, plan, args)
