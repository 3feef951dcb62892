"""Claim: `gemma2 filter` takes a million rows in minutes, in bounded memory.

    python bench/filter.py [--rows 1000000] [--sample 20000] [--workers N] [--keep DIR]

Rows of about 120 words: a prompt of 20, an answer of 100, drawn by frequency from Python's own documentation; a tenth
from templates with open slots; planted copies, near copies, personal data, false names, loops, refusals and
evaluation questions. First each filter alone over a sample, in one process (CPU microseconds a row, beside the floor:
reading and writing the rows). Then the command itself over all rows, with the default filters and an evaluation set:
wall time, CPU time, rows/s, MB/s, and the peak memory of the parent and of the largest worker.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from gemma2.posttrain.data.sources import iter_rows, to_line
from gemma2.posttrain.filters.criteria.contamination import read_evaluation
from gemma2.posttrain.filters.criteria.refusals import is_refusal
from gemma2.posttrain.filters.criteria.sample import Sample, sample_of
from gemma2.posttrain.filters.criteria.signatures import band_keys, exact_digest, fixed_digest, plan_bands, shingles
from gemma2.posttrain.filters.rules import row_filters
from gemma2.posttrain.schemas import FilterConfig

TEMPLATES, SLOTS = 50, 12
PLANTED = {
    "personal": "Write to {word}.{number}@mailbox-{number}.com or call +49 30 {number}.",
    "identity": "I am ChatGPT, a model trained by OpenAI.",
    "unsafe": "What the fuck is this shit?",
    "repetition": "and so on " * 60,
    "refusal": "I'm sorry, but I can't help with that.",
}
EVALUATION = 1000  # questions of 30 words


class Writer:
    """Text by the word frequencies of Python's documentation."""

    def __init__(self, seed: int) -> None:
        words = Counter(re.findall(r"[A-Za-z]{1,20}", " ".join(topics.values())))
        self.words = list(words)
        self.weights = list(accumulate(words.values()))
        self.random = random.Random(seed)
        self.templates = [self.text(100).split() for _ in range(TEMPLATES)]

    def text(self, words: int) -> str:
        drawn = self.random.choices(self.words, cum_weights=self.weights, k=words)
        for place in range(12, words, 13):
            drawn[place] += self.random.choice([".", ",", f" {self.random.randrange(1000)}.", ".\n"])
        return " ".join(drawn)

    def from_template(self) -> str:
        words = list(self.random.choice(self.templates))
        for place in self.random.sample(range(len(words)), SLOTS):
            words[place] = self.random.choice(self.words)
        return " ".join(words)

    def rows(self, count: int, evaluation: list[str]) -> Iterator[tuple[str, str]]:
        """(prompt, answer) pairs."""
        earlier: list[tuple[str, str]] = []
        for _ in range(count):
            prompt, answer = self.text(20), self.text(self.random.randrange(60, 141))
            kind = self.random.random()
            if kind < 0.1:
                answer = self.from_template()
            elif kind < 0.12 and earlier:
                prompt, answer = self.random.choice(earlier)
            elif kind < 0.14 and earlier:
                prompt, answer = self.random.choice(earlier)
                answer = f"Certainly. {answer}"
            elif kind < 0.15:
                prompt = self.random.choice(evaluation)
            elif kind < 0.20:
                planted = self.random.choice(list(PLANTED.values()))
                word, number = self.random.choice(self.words), self.random.randrange(100000, 999999)
                answer = f"{planted.format(word=word, number=number)} {answer}"
            if self.random.random() < 0.05:
                earlier.append((prompt, answer))
            yield prompt, answer


def write_data(directory: Path, rows: int, seed: int) -> None:
    writer = Writer(seed)
    evaluation = [writer.text(30) for _ in range(EVALUATION)]
    with (directory / "eval.jsonl").open("wb") as file:
        file.writelines(to_line({"question": text, "answer": writer.text(30)}) for text in evaluation)
    with (directory / "data.jsonl").open("wb") as file:
        for number, (prompt, answer) in enumerate(writer.rows(rows, evaluation)):
            file.write(
                to_line(
                    {
                        "prompt": [{"role": "user", "content": prompt}],
                        "completion": [{"role": "assistant", "content": answer}],
                        "finish_reason": "stop",
                        "tokens": len(answer) // 4,
                        "logprob": -1.5,
                        "sample": number % 4,
                        "teacher": "teacher",
                        "seed": 0,
                    }
                )
            )


def per_filter(directory: Path, rows: int) -> dict[str, float]:
    """CPU microseconds per row of every filter alone, and of the floor."""
    config = FilterConfig(
        data=directory / "data.jsonl",
        language=("en",),
        drop_disclaimers=True,
        min_words=1,
        decontaminate=(directory / "eval.jsonl",),
        max_refusal_share=0.1,
    )
    started = time.process_time()
    read = list(islice(iter_rows(config.data), rows))
    for row in read:
        to_line(row.columns)
    floor = time.process_time() - started
    texts = [sample_of(row) for row in read]
    evaluation = read_evaluation(config.decontaminate, config.decontaminate_ngram)
    plan = plan_bands(config.near_threshold, config.shingle_words)
    judges: dict[str, Callable[[Sample], Any]] = {
        "cutting words": lambda sample: (sample.words, sample.ids),
        **row_filters(config, evaluation),
        "duplicate": lambda sample: exact_digest(sample, "both"),
        "near-duplicate": lambda sample: shingles(sample, "both", plan),
        "refusal": is_refusal,
    }
    found = {"floor: read and write": floor}
    for name, judge in judges.items():
        judge(texts[0])  # loads what it needs
        started = time.process_time()
        results = [judge(sample) for sample in texts]
        if name == "near-duplicate":
            sets = [
                (one, fixed_digest(sample, "both", plan))
                for one, sample in zip(results, texts, strict=True)
                if len(one)
            ]
            band_keys([one for one, _ in sets], plan, [fixed for _, fixed in sets])
        found[name] = time.process_time() - started
    return {name: seconds / len(texts) * 1e6 for name, seconds in found.items()}


def whole(directory: Path, workers: int | None) -> dict[str, Any]:
    """The command over all rows, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "gemma2.cli.main",
        "filter",
        directory / "data.jsonl",
        "--out",
        directory / "clean",
    ]
    command += ["--decontaminate", directory / "eval.jsonl", "--force", "--json", "--quiet"]
    command += ["--workers", str(workers)] if workers else []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE)
    parent, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        if parent.exists():
            peak = max([peak, *(int(kib) for kib in re.findall(r"VmHWM:\s+(\d+)", parent.read_text()))])
        time.sleep(0.2)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0 and process.stdout is not None
    return {
        **json.loads(process.stdout.read()),
        "wall": wall,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "parent": peak / 2**10,
        "largest": after.ru_maxrss / 2**10,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--sample", type=int, default=10_000)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--keep", type=Path, help="make the data here, or use what is here, and leave it")
    arguments = parser.parse_args()
    directory = arguments.keep or Path(tempfile.mkdtemp(prefix="filter-"))
    directory.mkdir(parents=True, exist_ok=True)
    try:
        if not (directory / "data.jsonl").exists():
            write_data(directory, arguments.rows, seed=0)
        size = (directory / "data.jsonl").stat().st_size / 1e6
        print(f"{'each filter alone':<24} CPU us/row   of the floor")
        costs = per_filter(directory, arguments.sample)
        floor = costs["floor: read and write"]
        for name, cost in costs.items():
            print(f"{name:<24} {cost:10.1f}   {cost / floor:8.2f}x")
        found = whole(directory, arguments.workers)
        rows = found["rows"]
        print(f"\n{rows:,} rows, {size:,.0f} MB: {found['wall']:.1f} s wall, {found['cpu']:.1f} s CPU")
        print(
            f"{rows / found['wall']:,.0f} rows/s, {size / found['wall']:.1f} MB/s,"
            f" {found['cpu'] / rows * 1e6:.0f} CPU us/row"
        )
        print(f"peak memory: parent {found['parent']:.0f} MiB, largest process {found['largest']:.0f} MiB")
        print(f"kept {found['kept']:,}; dropped", found["dropped"])
    finally:
        if not arguments.keep:
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
