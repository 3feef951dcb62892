"""Distillation: peak memory of the loss at a 256k vocabulary, and CPU seconds per step beside TRL 1.16.

    python bench/distill.py memory [--positions 256] [--width 256] [--divergence reverse-kl]
    python bench/distill.py speed  [--size tiny|small|wide] [--steps 5] [--rounds 3]

memory: loss and gradients of hidden states and LM head, fp32, soft cap 30, for one batch of response positions; each
way in a process of its own, whose peak resident memory counts above what it had with models' heads and states in place.
    direct   log_softmax of both models' whole logits, then the sums of the definition: what a loop by hand does
    kl_div   the same with torch.nn.functional.kl_div (forward KL only; JSD and reverse KL have no such call)
    trl      TRL's chunked loss          gemma2   ours
speed: whole optimizer steps (sample, score with the teacher, backward, Adam) of TRL's DistillationTrainer and of ours
on the same random models, prompts and lengths, in turns, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from sizes import SIZES
from stopwatch import Stopwatch
from transformers import PrinterCallback
from trl import DistillationConfig, DistillationTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.distillation.divergence import Divergence, FullTarget, Head, divergence_loss
from gemma2.posttrain.distillation.gkd import GkdTrainer, Loss, Material, schedule
from gemma2.posttrain.distillation.teacher import LiveTeacher
from gemma2.posttrain.models.loading import load_policy, quiet_libraries
from gemma2.posttrain.models.sampler import SamplingParams
from gemma2.posttrain.tiny.networks import random_model, tiny_tokenizer
from gemma2.posttrain.tiny.tasks import questions

VOCABULARY, CAP = 256_000, 30.0
TRL_BETA = {"forward-kl": 0.0, "reverse-kl": 1.0, "jsd": 0.5}
WAYS = ("direct", "kl_div", "trl", "gemma2")
WINDOW = {"sliding_window": 64}
BATCH, LIMIT = 16, 24


# --- memory -----------------------------------------------------------------------------------------------------------


def capped(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Whole logits, as the model's forward makes them."""
    return torch.tanh(hidden @ weight.t() / CAP) * CAP


def direct(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> torch.Tensor:
    """The definition over whole logits (N, V), mean over positions."""
    s, t = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    if kind == "forward-kl":
        return (t.exp() * (t - s)).sum(-1).mean()
    if kind == "reverse-kl":
        return (s.exp() * (s - t)).sum(-1).mean()
    m = torch.log(0.5 * t.exp() + 0.5 * s.exp())
    return (0.5 * (t.exp() * (t - m)).sum(-1) + 0.5 * (s.exp() * (s - m)).sum(-1)).mean()


def loss_of(way: str, kind: str, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The loss of one batch with its graph. inputs: states and head of the student, of the teacher."""
    hidden, weight, states, head = inputs
    if way == "gemma2":
        target = FullTarget(states, Head(head, CAP), Divergence(kind))  # type: ignore[arg-type]
        return divergence_loss(hidden, Head(weight, CAP), target, 1 / len(hidden)).loss
    if way == "trl":
        loss: torch.Tensor = _chunked_divergence_loss(
            hidden[None],
            states[None],
            weight,
            head,
            torch.ones(1, len(hidden)),
            TRL_BETA[kind],
            student_final_logit_softcapping=CAP,
            teacher_final_logit_softcapping=CAP,
        )[0]
        return loss
    with torch.no_grad():
        teacher = capped(states, head)
    student = capped(hidden, weight)
    if way == "direct":
        return direct(student, teacher, kind)
    return F.kl_div(
        torch.log_softmax(student, -1), torch.log_softmax(teacher, -1), reduction="batchmean", log_target=True
    )


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_one(way: str, kind: str, positions: int, width: int) -> None:
    """Print peak memory above the inputs, CPU seconds and the gradient's norm of one way, as JSON."""
    torch.manual_seed(0)
    # In place: a temporary would raise the peak that the loss is measured from.
    weight = torch.empty(VOCABULARY, width).normal_(0, 0.05)
    head = torch.empty(VOCABULARY, width).normal_(0, 0.01).add_(weight)
    weight.requires_grad_()
    hidden, states = torch.randn(positions, width, requires_grad=True), torch.randn(positions, width)
    # Pages of the libraries that the first call would bring in.
    small = tuple(part[:64].detach() for part in (hidden, weight, states, head))
    loss_of(way, kind, (small[0].requires_grad_(), small[1].requires_grad_(), *small[2:])).backward()
    before, started = peak(), time.process_time()
    loss = loss_of(way, kind, (hidden, weight, states, head))
    loss.backward()
    seconds = time.process_time() - started
    assert hidden.grad is not None and weight.grad is not None
    found = {"mib": peak() - before, "seconds": seconds, "loss": loss.item(), "norm": weight.grad.norm().item()}
    print(json.dumps(found))


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Every way in its own process."""
    found: dict[str, Any] = {}
    for way in WAYS:
        if way == "kl_div" and options.divergence != "forward-kl":
            continue
        command = [sys.executable, __file__, "one", "--way", way, "--divergence", options.divergence]
        command += ["--positions", str(options.positions), "--width", str(options.width)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = json.loads(done.stdout)
        print(way, found[way], file=sys.stderr)
    ours = found["gemma2"]["mib"]
    return {
        "divergence": options.divergence,
        "positions": options.positions,
        "width": options.width,
        "vocabulary": VOCABULARY,
        "ways": found,
        "memory_ratio": {way: round(ours / found[way]["mib"], 3) for way in found},
    }


# --- speed ------------------------------------------------------------------------------------------------------------


def arguments(root: Path, steps: int, **fields: Any) -> DistillationConfig:
    """What both trainers share: reverse KL on the student's own completions."""
    return DistillationConfig(
        output_dir=str(root / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        max_completion_length=LIMIT,
        beta=1.0,
        learning_rate=1e-5,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        **fields,
    )


def timed(trainer: Any) -> list[float]:
    """CPU seconds per step."""
    watch = Stopwatch()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return watch.seconds


def plain(root: Path, rows: list[dict[str, str]], steps: int) -> list[float]:
    """TRL as its documentation has it."""
    student, tokenizer = load_policy(root / "student")
    teacher, _ = load_policy(root / "teacher")
    data = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    return timed(
        DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments(root, steps),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )
    )


def ours(root: Path, rows: list[dict[str, str]], steps: int) -> list[float]:
    """The trainer of `gemma2 distill`, without its run directory."""
    student, tokenizer = load_policy(root / "student")
    teacher = load_policy(root / "teacher")[0].requires_grad_(False)
    prompts = [Prompt("", [{"role": "user", "content": row["prompt"]}]) for row in rows]
    chat = ChatFormat(tokenizer, student.generation_config)
    material = Material(chat, SamplingParams(LIMIT), prompts, [], [])
    loss = Loss(LiveTeacher(teacher, Divergence("reverse-kl"), 1.0, None), 1.0, None)
    plan = schedule(steps, BATCH, 1, material, 1.0, 0)
    return timed(GkdTrainer(student, loss, material, plan, arguments(root, steps, shuffle_dataset=False)))


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Both in turns."""
    quiet_libraries()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"trl": [], "gemma2": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for seed, name in enumerate(("student", "teacher")):
            random_model(seed, **WINDOW, **SIZES[options.size]).save_pretrained(root / name)
            tiny_tokenizer().save_pretrained(root / name)
        rows = questions("train", 64)
        for turn in range(options.rounds):
            for name, run in (("trl", plain), ("gemma2", ours)):
                seconds[name] += run(root, rows, options.steps)
                print(f"round {turn + 1} {name}: {statistics.median(seconds[name]):.3f} s per step", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "size": options.size,
        "completions": BATCH,
        "tokens": LIMIT,
        "cpu_seconds_per_step": medians,
        "speed_up": medians["trl"] / medians["gemma2"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "speed", "one"))
    parser.add_argument("--way", choices=WAYS, default="gemma2")
    parser.add_argument("--divergence", choices=TRL_BETA, default="reverse-kl")
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.what == "one":
        measure_one(options.way, options.divergence, options.positions, options.width)
        return
    print(json.dumps(memory(options) if options.what == "memory" else speed(options), indent=2))


if __name__ == "__main__":
    main()
