"""What `gemma2 watch` costs while a pipeline of many stages runs: CPU time over wall time, as a share of one core.

    python bench/watch.py [--stages 200] [--lines 100000] [--seconds 30]

A folder as a pipeline leaves it while two of its stages train: `pipeline.json` of 200 stages, two runs with 100,000
lines of metrics, to which this process adds five lines a second each. Watched on a terminal of 60 lines, into a pipe,
as lines of JSON, and as a page that a browser asks every 1.5 s. The first seconds, in which the lines from before are
read, are shown by themselves. The limit is 2 % of a core.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import urllib.request
from pathlib import Path

import psutil

from gemma2.core.json_files import write_json
from gemma2.core.outputs.manifest import now
from gemma2.core.outputs.staging import locked, partial_path
from gemma2.posttrain.runs.live import LiveRecord

LIMIT = 0.02  # of a core
SETTLING = 12.0  # seconds: start-up, and the lines from before
NAMES = (
    "loss",
    "gradient_norm",
    "learning_rate",
    "reward_std",
    "reward_std_in_group",
    "kl_anchor",
    "length",
    "truncated",
)
NAMES += ("distinct_2", "reward_length_correlation", "entropy", "clipped", "epoch")


def line(step: int) -> str:
    """A line of metrics as `rlhf` writes it."""
    figures = {name: math.sin(step / 50 + number) for number, name in enumerate(NAMES)}
    return json.dumps({"step": step, **figures, "reward": math.tanh(step / 5e4)}) + "\n"


def evaluation(step: int) -> str:
    """A line of an evaluation."""
    return (
        json.dumps({"step": step, "kind": "eval", "reward": 0.5, "kl": step / 1e4, "length": 20.0, "truncated": 0.1})
        + "\n"
    )


def make(root: Path, stages: int, lines: int) -> list[Path]:
    """The folder; returns the directories of the runs that are at work."""
    records = {}
    for number in range(stages):
        status = "complete" if number < stages // 2 else "running" if number < stages // 2 + 2 else "waiting"
        records[f"rl/seed-{number}"] = {
            "command": "rlhf",
            "needs": [],
            "status": status,
            "started": now(),
            "seconds": 9.5,
        }
    root.mkdir()
    write_json(root / "pipeline.json", {"schema_version": 1, "name": "run", "status": "running", "stages": records})
    runs = [partial_path(root / name) for name, one in records.items() if one["status"] == "running"]
    for run in runs:
        run.mkdir(parents=True)
        config = {"max_kl": 200.0, "max_dead_steps": 50, "eval_every": 100}
        write_json(run / "run.json", {"command": "rlhf", "config": config, "started": now()})
        with (run / "metrics.jsonl").open("w") as file:
            for step in range(1, lines + 1):
                file.write(line(step) + (evaluation(step) if step % 100 == 0 else ""))
        (run / "samples.jsonl").write_text(
            json.dumps({"step": 0, "prompt": "Why?", "completion": "So.", "reward": 0.1}) + "\n"
        )
    return runs


def work(runs: list[Path], first: int, ended: threading.Event) -> None:
    """Add lines as two trainings would."""
    records = [LiveRecord(run, "RL") for run in runs]
    for record in records:
        record.begin(first, 10 * first)
    step = first
    while not ended.wait(0.2):
        step += 1
        for run, record in zip(runs, records, strict=True):
            with (run / "metrics.jsonl").open("a") as file:
                file.write(line(step))
            record.advance(step)


def measured(root: Path, words: list[str], seconds: float, terminal: bool) -> tuple[float, float, float]:
    """(CPU seconds until it has settled, share of a core afterwards, peak memory in MB) of one watcher."""
    command = [sys.executable, "-m", "gemma2.cli.main", "watch", str(root), *words]
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 160, 0, 0))
    process = subprocess.Popen(command, stdout=writer, stderr=writer if terminal else subprocess.DEVNULL)
    os.close(writer)
    first: list[bytes] = []
    threading.Thread(target=drain, args=(reader, first), daemon=True).start()
    watched = psutil.Process(process.pid)
    until(time.monotonic() + SETTLING, first, "--page" in words)
    before, began = sum(watched.cpu_times()[:2]), time.monotonic()
    until(began + seconds, first, "--page" in words)
    after, ended = sum(watched.cpu_times()[:2]), time.monotonic()
    memory = watched.memory_info().rss / 1e6
    process.terminate()
    process.wait()
    return before, (after - before) / (ended - began), memory


def until(end: float, first: list[bytes], page: bool) -> None:
    """Wait, and ask for the page's data meanwhile, as the page does."""
    while time.monotonic() < end:
        time.sleep(1.5)
        if page and first and first[0].startswith(b"http"):
            url = first[0].split()[0].decode()
            for path in ("view.json", "stage.json?name=rl/seed-100"):
                with urllib.request.urlopen(url + path) as answer:
                    answer.read()


def drain(reader: int, first: list[bytes]) -> None:
    """Read what the watcher writes, as a terminal does; keep its beginning."""
    try:
        while chunk := os.read(reader, 1 << 16):
            if not first:
                first.append(chunk)
    except OSError:  # a terminal whose last writer has gone
        return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=200)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        runs = make(root, options.stages, options.lines)
        ended = threading.Event()
        with locked(root):
            threading.Thread(target=work, args=(runs, options.lines, ended), daemon=True).start()
            print(
                f"{options.stages} stages, 2 running with {options.lines:,} lines of metrics and 5 more a second each"
            )
            print(f"{'watched':<16}{'CPU s, start':>14}{'share of a core':>18}{'memory, MB':>12}")
            kinds = {
                "terminal": ([], True),
                "pipe": ([], False),
                "lines of JSON": (["--json"], False),
                "page": (["--page"], False),
            }
            for name, (words, terminal) in kinds.items():
                start, share, memory = measured(root, words, options.seconds, terminal)
                shares.append(share)
                print(f"{name:<16}{start:>14.2f}{share:>18.2%}{memory:>12.0f}", flush=True)
            ended.set()
    return int(max(shares) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
