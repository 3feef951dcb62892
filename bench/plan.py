"""Memory as `gemma2 plan` predicts it, next to the peak that a real run has, without the libraries.

    python bench/plan.py [--models embedded 70m wide] [--commands sft distill reward rlhf] [--lora 0 8] [--micro ...]

Every run is a fork of a process that has run the same command on a model of a few thousand weights: what it adds is the
peak of the fork (VmHWM of /proc), less what it began with. A busy machine does not change it. Weights are random, so
lengths are set by the rows and by --max-new-tokens. Two steps: at the second the moments of Adam are there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import os
import tempfile
import traceback
from pathlib import Path
from typing import Any

from gemma2.core.progress import SILENT
from gemma2.posttrain.planning.memory import Lengths, MemoryPlace, MemoryPlan, memory_of
from gemma2.posttrain.planning.shapes import shape_of
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import DistillConfig, RewardConfig, RlhfConfig, SftConfig

GIB = 2.0**30
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def size(hidden: int, inner: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "head_dim": hidden // 4,
        "vocab_size": vocabulary,
        "sliding_window": 64,
        **HEADS,
    }


MODELS = {
    "nothing": size(8, 8, 1, 512),
    "student": size(96, 256, 4, 512),  # shapes of the embedded models
    "teacher": size(192, 512, 6, 512),
    "70m": size(640, 2560, 9, 24_000),
    "wide": size(256, 1024, 6, 256_000),
}
# Tokens of every row, of every prompt, of every completion; micro-batches of a batch of eight.
ROW, PROMPT, NEW, BATCH = 256, 32, 64, 8
SCHEMAS = {"sft": SftConfig, "distill": DistillConfig, "reward": RewardConfig, "rlhf": RlhfConfig}


def configuration(command: str, root: Path, model: str, rank: int, micro: int) -> Any:
    """The configuration of one run; lengths are exact for sft and reward."""
    place = root / model
    small = model == "nothing"
    common: dict[str, Any] = {"lora_rank": rank, "micro_batch_size": micro, "save_every": 100}
    new = 4 if small else NEW
    rows = root / ("short" if small else "long")
    if command == "sft":
        return SftConfig(model=place, data=rows / "rows.jsonl", max_steps=2, batch_size=BATCH, **common)
    if command == "reward":
        return RewardConfig(model=place, data=rows / "pairs.jsonl", max_steps=2, batch_size=BATCH, **common)
    prompts = {"prompts": rows / "prompts.jsonl", "max_new_tokens": new, "eval_prompts": 2, **common}
    if command == "distill":
        teacher = root / ("teacher" if model == "student" else model)
        return DistillConfig(model=place, teacher=teacher, steps=2, batch_size=BATCH, **prompts)
    reward = root / f"{model}-reward"
    return RlhfConfig(policy=place, reward=(reward,), steps=2, prompts_per_step=BATCH // 2, n=2, **prompts)


def prepare(root: Path, models: list[str]) -> None:
    """Models and rows."""
    from gemma2.posttrain.tiny.networks import save_random

    for model in models:
        save_random(root / model, **MODELS[model])
        save_random(root / f"{model}-reward", kind="reward", **MODELS[model])
    for name, tokens, prompt in (("long", ROW, PROMPT), ("short", 16, 12)):
        write_rows(root / name, tokens, prompt)


def write_rows(place: Path, tokens: int, prompt: int) -> None:
    """Rows whose rendered length is `tokens`, and prompts of `prompt` tokens, template included."""
    place.mkdir()
    filler, asked = "x " * ((tokens - 12) // 2), "y " * max(1, (prompt - 9) // 2)
    rows = [{"prompt": f"{i}", "completion": filler + "z"} for i in range(40)]
    pairs = [{"prompt": f"{i}", "chosen": filler + "z", "rejected": filler + "u"} for i in range(40)]
    prompts = [{"prompt": f"{asked}{i}"} for i in range(20)]
    for name, content in (("rows", rows), ("pairs", pairs), ("prompts", prompts)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def lengths_of(command: str, config: Any) -> Lengths:
    """Tokens of the longest rows and prompts, as a plan reads them."""
    from gemma2.posttrain.checks.of_command import CommandChecks

    checks = CommandChecks()
    rows = checks.contents(config, checks.inputs(config))
    longest = {found.flag: max(found.lengths) for found in rows if found.lengths}
    return Lengths(longest.get("data"), longest.get("prompts"))


def run(command: str, config: Any) -> None:
    """Run a command in this process; random weights seldom end a completion, which the guards of RL would refuse."""
    from gemma2.posttrain.rl.guards import Guards
    from gemma2.posttrain.runs.commands import COMMANDS

    Guards.measured = lambda *_: None  # type: ignore[method-assign]
    Guards.observe = lambda *_: None  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as name:
        COMMANDS[command].run(config, RunOptions(Path(name) / "out"), SILENT)


def warm(command: str, root: Path, rank: int) -> None:
    """Load the libraries that a command uses, by running it on a model of nothing; give back what that left."""
    import torch

    torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
    run(command, configuration(command, root, "nothing", rank, 1))
    gc.collect()
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def measured(command: str, config: Any) -> float | None:
    """Bytes that a run adds to a process that has the libraries: the peak of a fork, less what it began with.

    None if it failed: a guard ends RL where random weights give no gradient, all logits being at the soft cap.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            before = status("RssAnon")
            run(command, config)
            # A fork has its parent's memory, but maps the files of the libraries anew, as it touches them.
            os.write(writing, str(status("VmHWM") - before - library_pages()).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as result:
        text = result.read()
    os.waitpid(child, 0)
    return float(text) if text else None


def library_pages() -> float:
    """Bytes of mapped files that are resident, weights apart: those of a model may be mapped, and belong to it."""
    total, counts = 0.0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # the head of a mapping: addresses, modes, offset, device, inode, path
            counts = len(words) > 5 and words[5].startswith("/") and not words[5].endswith(".safetensors")
        elif counts and words[0] in ("Rss:", "Anonymous:"):
            total += int(words[1]) * 1024 * (1 if words[0] == "Rss:" else -1)
    return total


def status(name: str) -> float:
    """A figure of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith(name))


def predicted(command: str, root: Path, model: str, rank: int, micro: int) -> MemoryPlan:
    config = configuration(command, root, model, rank, micro)
    plan = memory_of(config, shape_of, MemoryPlace(baseline=0.0), lengths_of(command, config))
    assert plan is not None
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["student", "teacher", "70m", "wide"])
    parser.add_argument("--commands", nargs="*", default=list(SCHEMAS))
    parser.add_argument("--lora", nargs="*", type=int, default=[0, 8])
    parser.add_argument("--micro", nargs="*", type=int, default=[2, BATCH])
    parser.add_argument("--root", type=Path, default=None, help="keep models and rows here")
    parser.add_argument("--parts", action="store_true", help="also show the parts of the peak")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        root = options.root or Path(name)
        if not (root / "long").exists():
            root.mkdir(exist_ok=True)
            prepare(root, list(MODELS))
        print("| command | model | LoRA rank | micro-batch | predicted GiB | measured GiB | difference | peak phase |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for command, rank in itertools.product(options.commands, options.lora):
            warm(command, root, rank)
            for model, micro in itertools.product(options.models, options.micro):
                row(command, root, model, rank, micro, options.parts)
            print(f"with the libraries of {command}: {status('VmRSS') / GIB:.3f} GiB", flush=True)


def row(command: str, root: Path, model: str, rank: int, micro: int, parts: bool) -> None:
    """Measure one run and print it next to its plan."""
    peak = measured(command, configuration(command, root, model, rank, micro))
    if peak is None:
        print(f"| {command} | {model} | {rank} | {micro} | - | not measured: the run failed | - | - |", flush=True)
        return
    plan = predicted(command, root, model, rank, micro).peak
    figures = f"{plan.bytes / GIB:.3f} | {peak / GIB:.3f} | {plan.bytes / peak - 1:+.0%}"
    print(f"| {command} | {model} | {rank} | {micro} | {figures} | {plan.name} |", flush=True)
    if parts:
        print("   ", {part.name: round(part.bytes / 2**20) for part in plan.parts}, flush=True)


if __name__ == "__main__":
    main()
