"""What a stage costs on a Ray cluster of this machine, next to the same stage of the local executor, in the same run.

    python bench/ray_overhead.py [--stages 5] [--rounds 2]        needs the ray extra

A chain of small `sft` stages (torch, transformers and trl; two steps each), one after the other. The first stage pays
for the imports. Seconds of a stage are those that the pipeline records, from handing it over to the end of its process;
the rest is the command's own start, and Ray's. Prints medians, and the difference and ratio to the local executor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gemma2.posttrain.tiny.networks import save_random

LIMIT = 2.0  # seconds per stage after the first, beyond the local executor's
TRAIN = "{model: m, data: rows.jsonl, max_steps: 2, batch_size: 2, max_length: 64}"


def chain(place: Path, count: int, executor: str, out: str) -> list[float]:
    """Seconds of each stage of a run from nothing, and what the run took besides."""
    stages = [
        f"  s{i}: {{command: sft, options: {TRAIN}, after: [{f's{i - 1}' if i else ''}], resources: {{cpus: 1}}}}"
        for i in range(count)
    ]
    (place / "p.yaml").write_text("stages:\n" + "\n".join(stages) + "\n", encoding="utf-8")
    words = ["pipeline", "run", "p.yaml", "--out", out, "--executor", executor, "--quiet"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    code = "from gemma2.cli.main import main; main()"
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code, *words], cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL
    )
    total = time.perf_counter() - began
    state = json.loads((place / out / "pipeline.json").read_text(encoding="utf-8"))["stages"]
    found = [float(state[f"s{i}"]["seconds"]) for i in range(count)]
    return [*found, total - sum(found)]


def main() -> None:
    """Measure both executors in turn."""
    parser = argparse.ArgumentParser(description="overhead of a stage on Ray")
    parser.add_argument("--stages", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    runs: dict[str, list[list[float]]] = {"local": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_random(place / "m", seed=0)
        rows = [json.dumps({"prompt": f"What is two plus {i}?", "completion": "Count."}) for i in range(8)]
        (place / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
        for number in range(options.rounds):
            for executor, found in runs.items():
                found.append(chain(place, options.stages, executor, f"{executor}-{number}"))
    print(f"{'executor':<10}{'first stage, s':>16}{'each later, s':>16}{'the rest, s':>16}")
    medians = {}
    for executor, found in runs.items():
        first = statistics.median(one[0] for one in found)
        later = medians[executor] = statistics.median(seconds for one in found for seconds in one[1:-1])
        print(f"{executor:<10}{first:>16.2f}{later:>16.2f}{statistics.median(one[-1] for one in found):>16.2f}")
    local, ray = medians["local"], medians["ray"]
    print(f"a later stage on Ray: {ray - local:+.2f} s, {ray / local:.2f} x of the local one (limit {LIMIT:+.1f} s)")


if __name__ == "__main__":
    main()
