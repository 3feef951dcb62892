"""SIGTERM and SIGINT at random moments of small merges and training runs: exit codes, what is left, how long it takes.

    python bench/signals.py               500 signals
    python bench/signals.py --count 20    a short run

Commands run in processes forked from one that has imported the libraries, so that a case takes as long as its work.
In two of five cases a callback of the garbage collector takes up to half of the time: a signal that comes while it
runs is raised where Python drops exceptions. Ends with an error at the first broken promise:

    the process ends, with 143 or 130; or with 0, its output complete; or by the signal's default action, before the
    handler is there or after the end
    OUT is absent, or holds the bytes of a run left alone
    a merge that was interrupted leaves nothing; a training run leaves nothing or what `--resume` completes to the
    same bytes
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

from gemma2.core import interrupts
from gemma2.core.outputs.hashing import digest_file

HUNG = 120.0  # seconds
PRELOAD = ["gemma2.posttrain.sft.sft", "gemma2.merging.engine", "gemma2.cli.stages.merge", "gemma2.cli.stages.sft"]
NOISE = 0.02  # seconds at most in one callback


class Reporting(interrupts.Signals):
    """Says which way an interrupt went: F raised, A raised again."""

    pipe: Connection

    def _first(self, number: int, frame: FrameType | None) -> None:
        if self.caught is None and not self.ended:
            os.write(self.pipe.fileno(), b"F")
        super()._first(number, frame)

    def _again(self, number: int, frame: FrameType | None) -> None:
        try:
            super()._again(number, frame)
        except interrupts.Interrupted:
            os.write(self.pipe.fileno(), b"A")
            raise


def make_noise() -> None:
    """Callbacks of the garbage collector that take as long as there was since the last one."""
    last = [time.perf_counter()]

    def noise(phase: str, info: dict[str, int]) -> None:
        until = time.perf_counter() + min(time.perf_counter() - last[0], NOISE)
        while time.perf_counter() < until:
            pass
        last[0] = time.perf_counter()

    gc.set_threshold(100, 5, 5)
    gc.callbacks.append(noise)


def work(words: list[str], noisy: bool, log: str, pipe: Connection) -> None:
    """One `gemma2` command line; what a forked process does."""
    import torch

    from gemma2.cli import main

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    Reporting.pipe = pipe
    main.Signals = Reporting  # type: ignore[misc]
    sys.argv[1:] = words
    if noisy:
        make_noise()
    os.write(pipe.fileno(), b"B")
    main.main()


def write_inputs(root: str) -> None:
    """Three random models and a file of rows. Runs in a process of its own: torch's threads do not survive a fork."""
    from gemma2.posttrain.models.loading import quiet_libraries
    from gemma2.posttrain.tiny.networks import save_random

    quiet_libraries()
    for seed, name in enumerate(("base", "rl-1", "rl-2")):
        save_random(Path(root) / name, seed)
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
    (Path(root) / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Bench:
    """The commands, their outputs when nothing disturbs them, and what happened to them when something did."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.out = root / "out"
        self.partial = root / ".out.partial"
        self.log = root / "log"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["__main__", *PRELOAD])
        first: Any = self.context.Process(target=write_inputs, args=(str(root),))
        first.start()
        first.join()
        models = [str(root / name) for name in ("rl-1", "rl-2")]
        out = ["--out", str(self.out), "--quiet"]
        train = ["--model", str(root / "base"), "--data", str(root / "data.jsonl"), "--learning-rate", "3e-3"]
        train += ["--max-steps", "12", "--batch-size", "4", "--save-every", "2", "--eval-fraction", "0.1"]
        self.words = {
            "merge slerp": ["merge", "slerp", *models, "--base", str(root / "base"), *out],
            "sft": ["sft", *train, *out],
        }
        self.dice = random.Random(0)
        self.case = "a run left alone"
        self.whole: dict[str, dict[str, str]] = {}
        self.seconds: dict[tuple[str, bool], float] = {}
        for kind in self.words:
            for noisy in (False, True):
                self.seconds[kind, noisy] = statistics.median(self.undisturbed(kind, noisy) for _ in range(3))

    def check(self, fine: bool, what: str) -> None:
        """Stop at the first broken promise."""
        if not fine:
            raise SystemExit(f"broken, {self.case}: {what}\n{self.log.read_text()}")

    def start(self, words: list[str], noisy: bool) -> tuple[Any, Connection]:
        """A process that has begun."""
        receiver, sender = self.context.Pipe(duplex=False)
        process: Any = self.context.Process(target=work, args=(words, noisy, str(self.log), sender))
        process.start()
        sender.close()
        self.check(os.read(receiver.fileno(), 1) == b"B", "a process did not begin")
        return process, receiver

    def digests(self) -> dict[str, str]:
        """Digest of each weight file of the output, which must be complete."""
        status = json.loads((self.out / "gemma2.json").read_text())["status"]
        self.check(status == "complete", f"the output is {status}")
        return {path.name: digest_file(path) for path in sorted(self.out.glob("*.safetensors"))}

    def undisturbed(self, kind: str, noisy: bool = False, *more: str) -> float:
        """A run that must succeed, with the bytes of all others of its kind; its seconds."""
        begin = time.perf_counter()
        process, receiver = self.start([*self.words[kind], *more], noisy)
        process.join()
        seconds = time.perf_counter() - begin
        receiver.close()
        self.check(process.exitcode == 0, f"{kind} {more} ended with {process.exitcode}")
        found = self.digests()
        self.check(bool(found) and found == self.whole.setdefault(kind, found), f"{kind} {more} made other bytes")
        self.check(not self.hidden(), f"{kind} {more} left {self.hidden()}")
        shutil.rmtree(self.out)
        return seconds

    def hidden(self) -> list[str]:
        """What lies beside the output."""
        return sorted(path.name for path in self.root.glob(".*"))

    def strike(self, kind: str, number: int, noisy: bool) -> tuple[Counter[str], float]:
        """One signal at a random moment of a run; what happened, and the seconds until the process had ended."""
        process, receiver = self.start(self.words[kind], noisy)
        time.sleep(self.dice.uniform(0, 1.05 * self.seconds[kind, noisy]))
        alive = process.is_alive()
        begin = time.perf_counter()
        if alive:
            os.kill(process.pid, number)
        ended = bool(wait([process.sentinel], HUNG))
        seconds = time.perf_counter() - begin
        if not ended:
            process.kill()
        self.check(ended, f"{kind} hung after signal {number}")
        process.join()
        ways = b""
        while found := os.read(receiver.fileno(), 100):
            ways += found
        receiver.close()
        code = process.exitcode
        counts = Counter({"cases": 1, "raised again": int(b"A" in ways)})
        if code == -number:
            by = "watchdog" if seconds > interrupts.GRACE / 2 else "default action"
            self.check(by == "watchdog" or b"F" not in ways or "interrupted" in self.log.read_text(), "no line")
        else:
            self.check(code in (0, 128 + number), f"{kind} ended with {code}")
            by = "handler" if code else "done before"
        counts[by] += 1
        self.check("Traceback" not in self.log.read_text(), "a traceback")
        counts += self.judge(kind, by)
        return counts, seconds if alive else 0.0

    def judge(self, kind: str, by: str) -> Counter[str]:
        """What is left after a signal: nothing, something whole, or something to go on from."""
        counts: Counter[str] = Counter()
        if self.out.exists():
            self.check(self.digests() == self.whole[kind], "the output has other bytes")
            counts["complete"] += 1
            shutil.rmtree(self.out)
        else:
            self.check(by != "done before", "exit 0 and no output")
        kept = kind == "sft" and any(self.partial.glob("checkpoints/*"))
        if by in ("handler", "done before"):
            left = [self.partial.name] if kept else []
            self.check(self.hidden() == left, f"left {self.hidden()}")
        if kept:
            self.undisturbed(kind, False, "--resume")
            counts["resumed"] += 1
        elif self.hidden():
            self.undisturbed(kind)  # sweeps what a process left that was ended by the signal itself
            counts["swept"] += 1
        return counts


COLUMNS = ("cases", "handler", "raised again", "watchdog", "default action", "done before", "complete", "resumed")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="signals in all, a fourth of them SIGINT")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        bench.dice.seed(options.seed)
        totals: dict[tuple[str, bool], Counter[str]] = {key: Counter() for key in bench.seconds}
        worst = dict.fromkeys(bench.seconds, 0.0)
        for turn in range(options.count):
            key = ("merge slerp", "sft")[turn % 2], turn // 2 % 5 in (1, 3)
            number = signal.SIGINT if turn // 2 % 4 == 0 else signal.SIGTERM
            bench.case = f"case {turn}, {key[0]}{' noisy' * key[1]}, {number.name}"
            counts, seconds = bench.strike(key[0], number, key[1])
            totals[key] += counts
            worst[key] = max(worst[key], seconds)
            if turn % 50 == 49:
                print(f"{turn + 1} of {options.count}", file=sys.stderr)
        print(f"load {os.getloadavg()[0]:.1f}, seconds of a run left alone:", end=" ")
        print(", ".join(f"{kind}{' noisy' * noisy} {one:.2f}" for (kind, noisy), one in bench.seconds.items()))
        print(" | ".join(["run", *COLUMNS, "worst s"]))
        for key, counts in totals.items():
            row = [f"{key[0]}{' noisy' * key[1]}", *(str(counts[column]) for column in COLUMNS), f"{worst[key]:.2f}"]
            print(" | ".join(row))


if __name__ == "__main__":
    main()
