"""SFT tokens per second: plain TRL 1.16 in its best setting beside ours, in one run, on the same model and rows.

    python bench/sft.py [--size tiny|small|wide] [--model DIR] [--rows 64] [--rounds 3] [--trl-sweep]
    python bench/sft.py --model gemma-2-2b --gpu [--lora] [--attention eager|flex_attention|flash_attention_2|...]

Both train one epoch of the same tokenised rows of unequal length (prompt log-normal about 60 tokens, completion about
90, at most 512; the loss is on the completion), same optimizer and batch size, and so as many steps. TRL gets
`train_sampling_strategy=group_by_length`, its pre-tokenised path and its own head (`loss_type=nll`, which forms no full
logits); `--trl-sweep` tries smaller micro-batches as well (on a CPU they are faster) and compares with the fastest.
The contenders take turns and change the order every round, so that a busy machine slows all. Tokens are those of the
rows, padding is not counted. With `--gpu` the model is trained in bf16 autocast and MFU is reported: 6 N per token
(4 N under LoRA) over the GPU's dense bf16 rate as TRL has it.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from sizes import SIZES
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import get_peak_flops

from gemma2.posttrain.data.examples import Example, to_dataset
from gemma2.posttrain.models.loading import load_policy, quiet_libraries
from gemma2.posttrain.models.lora import lora_config
from gemma2.posttrain.runs.run_directory import Run, RunOptions
from gemma2.posttrain.schemas import SftConfig
from gemma2.posttrain.sft.sft_trainer import make_trainer
from gemma2.posttrain.tiny.networks import save_random

WINDOW = {"sliding_window": 256}
LONGEST = 512


class Stopwatch(TrainerCallback):
    """CPU and wall seconds from the end of the first step, which pays for set-up, to the end of the last."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.end = (time.process_time(), time.perf_counter())
        if state.global_step == 1:
            self.begin = self.end


def draw_rows(count: int, vocabulary: int, seed: int = 0) -> list[Example]:
    """Rows of random ids; lengths log-normal."""
    generator = torch.Generator().manual_seed(seed)

    def length(mean: float) -> int:
        return int(math.exp(math.log(mean) + 0.7 * torch.randn((), generator=generator).item())) + 4

    rows = []
    for _ in range(count):
        prompt = min(length(60), LONGEST // 2)
        completion = min(length(90), LONGEST - prompt)
        ids = torch.randint(200, vocabulary, (prompt + completion,), generator=generator).tolist()
        rows.append(Example(ids, [False] * prompt + [True] * completion))
    return rows


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """A fresh copy of the model."""
    return load_policy(options.model, attention=options.attention)


def plain(options: argparse.Namespace, rows: list[Example], **settings: Any) -> Any:
    """TRL's trainer on tokenised rows."""
    model, tokenizer = load(options)
    arguments = SFTConfig(
        output_dir=str(options.root / "trl"),
        num_train_epochs=1,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not options.gpu,
        bf16=options.gpu,
        activation_checkpointing=options.gpu,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        length_column_name="length",
        **({"per_device_train_batch_size": options.batch, "train_sampling_strategy": "group_by_length"} | settings),
    )
    peft_config = lora_config(configuration(options), "CAUSAL_LM")
    return SFTTrainer(
        model=model, args=arguments, train_dataset=to_dataset(rows), processing_class=tokenizer, peft_config=peft_config
    )


def configuration(options: argparse.Namespace) -> SftConfig:
    """Ours, with its defaults."""
    return SftConfig(
        model=options.model,
        data=options.root,
        batch_size=options.batch,
        micro_batch_size=options.micro_batch,
        save_every=10**6,
        lora_rank=16 if options.lora else 0,
        attention=options.attention,
    )


def ours(options: argparse.Namespace, rows: list[Example]) -> Any:
    """The trainer of `gemma2 sft`, without its run directory."""
    model, tokenizer = load(options)
    config = configuration(options)
    run = Run("sft", options.root, RunOptions(options.root / "out"), {"config": {}}, resumed=False)
    accumulation = options.batch // (options.micro_batch or options.batch)
    return make_trainer(model, tokenizer, rows, config, run, accumulation)


def timed(trainer: Any, rows: list[Example], batch: int) -> dict[str, float]:
    """Tokens per CPU second and per wall second; the first batch, not timed, counts as an average one."""
    watch = Stopwatch()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    steps = trainer.state.global_step
    tokens = sum(len(row.ids) for row in rows) * (steps - 1) / steps
    cpu, wall = (end - begin for begin, end in zip(watch.begin, watch.end, strict=True))
    return {"cpu": tokens / cpu, "wall": tokens / wall}


def trl_settings(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Settings of TRL to choose the fastest from."""
    if not options.trl_sweep:
        return {"grouped": {}}
    found: dict[str, dict[str, Any]] = {"grouped": {}}
    for micro in {max(1, options.batch // 4), 1}:
        found[f"grouped, micro-batch {micro}"] = {
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": options.batch // micro,
        }
    return found


def mfu(options: argparse.Namespace, tokens_per_second: float) -> float | None:
    """Share of the GPU's dense bf16 rate."""
    peak = get_peak_flops(torch.cuda.get_device_name(), "bfloat16") if options.gpu else None
    if peak is None:
        return None
    parameters = sum(parameter.numel() for parameter in load(options)[0].parameters())
    return (4 if options.lora else 6) * parameters * tokens_per_second / peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--model", type=Path, help="a model directory instead of a random Gemma 2 of --size")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl-sweep", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--attention", default="eager")
    options = parser.parse_args()
    quiet_libraries()
    if not options.gpu:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        options.root = Path(folder)
        if options.model is None:
            options.model = options.root / "model"
            save_random(options.model, **WINDOW, **SIZES[options.size])
        rows = draw_rows(options.rows, load(options)[0].config.vocab_size)
        report(options, rows, measure(options, rows))


def measure(options: argparse.Namespace, rows: list[Example]) -> dict[str, list[dict[str, float]]]:
    """Every contender once a round, in turns."""
    contenders: dict[str, Any] = {
        f"trl {name}": lambda settings=settings: plain(options, rows, **settings)
        for name, settings in trl_settings(options).items()
    }
    contenders["gemma2"] = lambda: ours(options, rows)
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for turn in range(options.rounds):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            rates[name].append(timed(contenders[name](), rows, options.batch))
            print(f"round {turn + 1} {name}: {rates[name][-1]['cpu']:.0f} tokens per CPU s", file=sys.stderr)
    return rates


def report(options: argparse.Namespace, rows: list[Example], rates: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and the ratio to the fastest setting of TRL."""
    medians = {
        name: {clock: statistics.median(one[clock] for one in found) for clock in ("cpu", "wall")}
        for name, found in rates.items()
    }
    best = {clock: max(medians[name][clock] for name in medians if name != "gemma2") for clock in ("cpu", "wall")}
    document = {
        "model": str(options.model.name) if options.model.parent != options.root else options.size,
        "rows": len(rows),
        "tokens": sum(len(row.ids) for row in rows),
        "target_share": sum(sum(row.mask) for row in rows) / sum(len(row.ids) for row in rows),
        "tokens_per_second": medians,
        "speed_up_cpu": medians["gemma2"]["cpu"] / best["cpu"],
        "speed_up_wall": medians["gemma2"]["wall"] / best["wall"],
        "speed_up_by_round": [
            ours["cpu"] / max(found[turn]["cpu"] for name, found in rates.items() if name != "gemma2")
            for turn, ours in enumerate(rates["gemma2"])
        ],
        "mfu": {name: mfu(options, rate["wall"]) for name, rate in medians.items()} if options.gpu else None,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
