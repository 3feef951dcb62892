"""Command lines of all commands over tiny untrained models, and a process that runs them one after another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROWS = [(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in range(4) for b in range(3)]
JUDGE = """def judge(completions, **columns):
    return [float(sum(map(ord, text)) % 17) / 17 for text in completions]
"""
PIPELINE = """stages:
  one: {command: merge linear, options: {models: [a, b]}}
  two: {command: sft, options: {model: "${one.out}", data: [rows.jsonl], max_steps: 1, batch_size: 2, max_length: 64}}
"""
SHORT = "--max-new-tokens 6"
TRAINING = "--batch-size 4 --learning-rate 1e-4"
EVERY = [
    "--version",
    "recipes list",
    "recipes show align",
    "recipes plan sft-2b-24gb",
    "config check align",
    "config schema pipeline",
    "inspect a --tensors",
    "diff a b",
    "data inspect rows.jsonl --model a",
    "data convert rows.jsonl --out out/rows.jsonl",
    "filter rows.jsonl --workers 1 --out out/filtered",
    f"generate --teacher a --prompts rows.jsonl --limit 3 {SHORT} --out out/generated",
    f"sft --model a --data rows.jsonl --max-steps 2 --max-length 64 {TRAINING} --out out/sft",
    "sft --model a --data rows.jsonl --max-steps 2 --dry-run --out out/plan",
    f"distill --model a --teacher b --prompts rows.jsonl --steps 1 --eval-prompts 2 {SHORT} {TRAINING}"
    " --out out/distill",
    f"reward pairs --model a --prompts rows.jsonl --limit 4 {SHORT} --judge judge:judge --select all --out out/pairs",
    f"reward --model a --data pairs.jsonl --max-steps 1 --max-length 64 {TRAINING} --out out/reward",
    "reward eval reward --data pairs.jsonl",
    "reward score --model reward --data rows.jsonl --out out/scores",
    f"rlhf --policy a --reward reward --prompts rows.jsonl --steps 2 --prompts-per-step 2 --n 2 {SHORT} --seed 1"
    " --max-dead-steps 9 --out out/rlhf",
    f"eval --model b --sft a --reward reward --prompts rows.jsonl --limit 2 {SHORT}",
    f"pareto --sft a --policies b --reward reward --prompts rows.jsonl --limit 2 {SHORT} --out out/front",
    "merge plan slerp a b --base a",
    "merge slerp a b --base a --out out/slerp",
    "merge extract-lora b --base a --rank 2 --leave-out --out out/lora",
    "merge replace-tokenizer a --tokenizer b --out out/tokenizer",
    "pipeline run pipeline.yaml --out out/pipeline",
    "pipeline status out/pipeline",
    "pipeline graph out/pipeline",
    "lineage out/slerp",
    "report out/pipeline --out out/report.html",
    "report out/front --out out/front.html",
    "verify out/slerp",
    "watch out/pipeline --once",
]
DRIVER = """
import json, os, sys
sys.argv[0] = "gemma2"
from gemma2.cli import main
from gemma2.posttrain.generation.engines import retry
retry.FIRST = 0.01  # seconds
main._environment()
codes = []
for words in json.load(open(sys.argv[1])):
    sys.stderr.write("\\n$ gemma2 " + words[0] + "\\n")
    sys.stderr.flush()
    try:
        code = main.run(words)
    except SystemExit as error:
        code = error.code or 0
    except Exception:
        import traceback
        traceback.print_exc()
        code = "traceback"
    codes.append(code)
    sys.stdout.flush()
json.dump(codes, open(sys.argv[2], "w"))
"""


def write_inputs(folder: Path) -> Path:
    """Fill a folder with two policies, a reward model, rows, pairs, a judge and a pipeline; return it."""
    from teachers import save_stopping

    from gemma2.posttrain.tiny.networks import save_random

    folder.mkdir(parents=True, exist_ok=True)
    save_stopping(folder / "a")
    save_random(folder / "b", seed=1)
    save_random(folder / "reward", seed=2, kind="reward")
    lines = [json.dumps({"prompt": asked, "completion": said}) for asked, said in ROWS]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pairs = [json.dumps({"prompt": asked, "chosen": said, "rejected": "No."}) for asked, said in ROWS]
    (folder / "pairs.jsonl").write_text("\n".join(pairs) + "\n", encoding="utf-8")
    (folder / "judge.py").write_text(JUDGE, encoding="utf-8")
    (folder / "pipeline.yaml").write_text(PIPELINE, encoding="utf-8")
    return folder


def split(lines: list[str]) -> list[list[str]]:
    return [line.split() for line in lines]


def run_all(
    commands: list[list[str]], folder: Path, home: Path, more: Mapping[str, str], limit: float = 600
) -> tuple[list[object], str]:
    """Run command lines in one process whose home and working folder these are: (exit codes, all that was printed)."""
    home.mkdir(parents=True, exist_ok=True)
    words, codes = home.parent / "words.json", home.parent / "codes.json"
    words.write_text(json.dumps(commands))
    plain = {name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPYCACHEPREFIX") if name in os.environ}
    own = {"HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    own |= {"HF_HUB_OFFLINE": "1", "NUMBA_CACHE_DIR": str(home.parent / "numba"), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", DRIVER, str(words), str(codes)],
        cwd=folder,
        env=plain | own | more,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=limit,
        check=False,
    )
    printed = (done.stdout + done.stderr).decode(errors="replace")
    assert codes.is_file(), printed[-3000:]
    return json.loads(codes.read_text()), printed


def git_with_remote(folder: Path, address: str) -> None:
    """Make a folder a git repository whose remote has this address."""
    if shutil.which("git"):
        for words in (["init", "-q"], ["remote", "add", "origin", address]):
            subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)
