"""Memory as `gemma2 plan` predicts it, next to the peak that a real run has, without the libraries.

    python bench/plan.py [--models embedded 70m wide] [--commands sft distill reward rlhf] [--lora 0 8] [--micro ...]

Every run is a process of its own; its peak is VmHWM of /proc, so a busy machine does not change it. The baseline is the
peak of the same command on a model of a few thousand weights and rows of a few tokens. Weights are random, so lengths
are set by the rows and by --max-new-tokens. Two steps: at the second the moments of Adam are there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gemma2.core.progress import SILENT
from gemma2.posttrain.planning.memory import Lengths, MemoryPlan, Place, memory_of
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
ROW, PROMPT, NEW, BATCH = 256, 32, 160, 8
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


def run(command: str, config: Any, out: Path) -> None:
    """Run a command in this process and print its peak."""
    import torch
    from stopwatch import peak_mib

    from gemma2.posttrain.runs.commands import COMMANDS

    torch.set_num_threads(2)
    COMMANDS[command].run(config, RunOptions(out), SILENT)
    print(json.dumps({"peak": peak_mib() * 2**20}))


def measured(command: str, root: Path, model: str, rank: int, micro: int) -> float:
    """Peak of a process of its own, bytes."""
    with tempfile.TemporaryDirectory(dir=root) as name:
        words = [sys.executable, __file__, "--child", command, str(root), model, str(rank), str(micro), name]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return float(json.loads(done.stdout.splitlines()[-1])["peak"])


def predicted(command: str, root: Path, model: str, rank: int, micro: int) -> MemoryPlan:
    config = configuration(command, root, model, rank, micro)
    plan = memory_of(config, shape_of, Place(baseline=0.0), lengths_of(command, config))
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
    parser.add_argument("--child", nargs=6, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        command, root, model, rank, micro, out = options.child
        run(command, configuration(command, Path(root), model, int(rank), int(micro)), Path(out) / "out")
        return
    with tempfile.TemporaryDirectory() as name:
        root = options.root or Path(name)
        if not (root / "long").exists():
            root.mkdir(exist_ok=True)
            prepare(root, list(MODELS))
        print("| command | model | LoRA rank | micro-batch | predicted GiB | measured GiB | difference | peak phase |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for command in options.commands:
            baseline = measured(command, root, "nothing", 0, 1)
            for model in options.models:
                for rank in options.lora:
                    for micro in options.micro:
                        peak = measured(command, root, model, rank, micro) - baseline
                        plan = predicted(command, root, model, rank, micro).peak
                        off = plan.bytes / peak - 1
                        print(
                            f"| {command} | {model} | {rank} | {micro} | {plan.bytes / GIB:.3f} | {peak / GIB:.3f} | "
                            f"{off:+.0%} | {plan.name} |",
                            flush=True,
                        )
                        if options.parts:
                            print("   ", {part.name: round(part.bytes / 2**20) for part in plan.parts}, flush=True)
            print(f"baseline of {command}: {baseline / GIB:.3f} GiB", flush=True)


if __name__ == "__main__":
    main()
