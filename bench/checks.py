"""The first seconds of a command: a plan of a million rows, a fault until it is named, the first output on a terminal.

    python bench/checks.py                    a million rows, five rounds
    python bench/checks.py --rows 100000

Floors in the same run: Python reading the same file line by line, and the imports that a fault had to wait for before
(torch, transformers, TRL). Every measurement is a process of its own; figures are the fastest and the median.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import random
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from light_model import light_model  # noqa: E402

GEMMA2 = [sys.executable, "-c", "from gemma2.cli.main import main; main()"]
WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "on", "with", "as", "was", "at", "by", "an", "be", "this")
READ = "import sys\nfor line in open(sys.argv[1], 'rb'): pass"
IMPORTS = "import torch, transformers, trl; from trl import SFTTrainer"
FAULTS = {
    "a wrong row": "sft --model model --data prompts.jsonl --out o",
    "a wrong kind": "rlhf --policy model --reward model --prompts prompts.jsonl --out o",
    "a wrong key": "sft --model model --data rows.jsonl --set trainer.optm=sgd --out o",
    "a wrong tokenizer": "distill --model model --teacher other --prompts prompts.jsonl --out o",
    "a wrong function": "rlhf --policy model --reward-fn math:no --prompts prompts.jsonl --out o",
}
FIRST_OUTPUT = {
    "sft": "--model model --data rows.jsonl --out o",
    "distill": "--model model --teacher model --prompts prompts.jsonl --out o",
    "generate": "--teacher model --prompts prompts.jsonl --out o",
    "filter": "rows.jsonl --out o",
    "reward": "--model model --data pairs.jsonl --out o",
    "rlhf": "--policy model --reward rm --prompts prompts.jsonl --out o",
    "warp": "--sft model --reward rm --prompts prompts.jsonl --heldout prompts.jsonl --out o",
    "pareto": "--sft model --policies model --reward rm --prompts prompts.jsonl --out o",
    "eval": "--model model --sft model --reward rm --prompts prompts.jsonl",
    "merge slerp": "model model --out o",
    "pipeline run": "quickstart --out q",
    "quickstart": "--out q",
    "diff": "model model",
    "inspect": "model",
    "report": "model",
}


def write_rows(path: Path, count: int) -> None:
    """Rows of about 350 bytes."""
    chosen = random.Random(0).choices
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {"prompt": f"{number} {' '.join(chosen(WORDS, k=20))}", "completion": " ".join(chosen(WORDS, k=60))}
            file.write(json.dumps(row) + "\n")


def run(command: Sequence[str]) -> tuple[float, float, int]:
    """(seconds, most memory in MB, exit code) of one process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    scale = 1024 if sys.platform != "darwin" else 1024**2
    return time.perf_counter() - started, used.ru_maxrss / scale, process.returncode


def first_output(command: Sequence[str]) -> float:
    """Seconds until a command writes anything to its terminal; it is ended then."""
    main, other = pty.openpty()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, start_new_session=True)
    os.close(other)
    select.select([main], [], [], 60.0)
    seconds = time.perf_counter() - started
    process.kill()
    process.wait()
    os.close(main)
    return seconds


def rounds(measure: Callable[[], float], count: int) -> tuple[float, float]:
    """(fastest, median) of several rounds."""
    found = [measure() for _ in range(count)]
    return min(found), statistics.median(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, options in {"model": {}, "other": {"swapped": ("a", "b")}}.items():
            light_model(Path(name), **options)
        light_model(Path("rm"), kind="Gemma2ForSequenceClassification")
        write_rows(Path("big.jsonl"), arguments.rows)
        write_rows(Path("rows.jsonl"), 100)
        Path("prompts.jsonl").write_text('{"prompt": "Why?"}\n' * 100, encoding="utf-8")
        Path("pairs.jsonl").write_text('{"prompt": "Why?", "chosen": "a", "rejected": "b"}\n' * 100, encoding="utf-8")

        print(f"load {os.getloadavg()[0]:.1f}, {arguments.rounds} rounds\n\nseconds: fastest, median\n")
        floor = rounds(lambda: run([sys.executable, "-c", READ, "big.jsonl"])[0], arguments.rounds)
        print(f"{'Python reads the file':<40}{floor[0]:8.2f}{floor[1]:8.2f}")
        plan = [*GEMMA2, *["sft", "--model", "model", "--data", "big.jsonl", "--out", "o", "--dry-run"]]
        found = [run(plan) for _ in range(arguments.rounds)]
        assert all(code == 0 for _, _, code in found)
        seconds = [one[0] for one in found]
        print(
            f"{f'sft --dry-run of {arguments.rows:,} rows':<40}{min(seconds):8.2f}{statistics.median(seconds):8.2f}"
            f"   {min(seconds) / floor[0]:.1f} times the floor, {max(one[1] for one in found):.0f} MB"
        )
        before = rounds(lambda: run([sys.executable, "-c", IMPORTS])[0], arguments.rounds)
        print(f"{'the imports of torch and TRL':<40}{before[0]:8.2f}{before[1]:8.2f}")
        for name, words in FAULTS.items():
            codes: set[int] = set()

            def measured(words: str = words, codes: set[int] = codes) -> float:
                seconds, _, code = run([*GEMMA2, *words.split()])
                codes.add(code)
                return seconds

            fastest, median = rounds(measured, arguments.rounds)
            assert codes <= {1, 2}, codes
            print(f"{name + ' is named':<40}{fastest:8.2f}{median:8.2f}   {fastest / before[0]:.2f} of the imports")
        print("\nfirst output on a terminal\n")
        for name, words in FIRST_OUTPUT.items():
            fastest, median = rounds(
                lambda name=name, words=words: first_output([*GEMMA2, *name.split(), *words.split()]), arguments.rounds
            )
            print(f"{name:<40}{fastest:8.2f}{median:8.2f}")
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
