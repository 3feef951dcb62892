"""Ours against mergekit 0.1.5 on the same machine and files: wall seconds and peak memory of the whole commands.

    python bench/mergekit.py --layers 4             2B shape with 4 layers; mergekit goes into an environment of its own
    python bench/mergekit.py --layers 26 --cases nuslerp

mergekit (LGPL) is installed by pip into DIR/mergekit and run as a program. Each merge reads the same YAML file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from shapes import layout, write_random

PINNED = ("mergekit==0.1.5", "torch==2.13.0")
MODELS = """models:
- {{model: {root}/rl-1, parameters: {{weight: 0.5{more}}}}}
- {{model: {root}/rl-2, parameters: {{weight: 0.5{more}}}}}
"""
BASE = "base_model: {root}/base\n"
CASES = {
    "nuslerp": "merge_method: nuslerp\n" + BASE + MODELS,
    "linear": "merge_method: linear\n" + MODELS,
    "ties": "merge_method: ties\n" + BASE + MODELS,
    "dare_ties": "merge_method: dare_ties\n" + BASE + MODELS,
    "della": "merge_method: della\n" + BASE + MODELS,
    "karcher": "merge_method: karcher\n" + MODELS,
    "model_stock": "merge_method: model_stock\n" + BASE + MODELS,
    "sce": "merge_method: sce\n" + BASE + MODELS + "parameters: {{select_topk: 0.2}}\n",
}
MORE = {"ties": ", density: 0.2", "dare_ties": ", density: 0.2", "della": ", density: 0.2, epsilon: 0.1"}


def environment(place: Path) -> Path:
    """The program of mergekit, installed if it is not there."""
    program = place / "bin/mergekit-yaml"
    if not program.exists():
        venv.create(place, with_pip=True)
        subprocess.run([place / "bin/pip", "install", "--quiet", *PINNED], check=True)
    return program


def timed(command: list[str]) -> tuple[float, float, float]:
    """Wall and CPU seconds and peak resident GB of a command."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = child.stderr.read() if child.stderr else b""
    _, status, used = os.wait4(child.pid, 0)
    wall = time.perf_counter() - begin
    if status:
        sys.exit(f"{command[0]} failed:\n{error.decode()[-2000:]}")
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6


def tokenizer(path: Path) -> None:
    """What mergekit wants beside the weights."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    (path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def compare(root: Path, program: Path, case: str, repeats: int) -> None:
    """One merge by both, in turns."""
    file = root / f"{case}.yaml"
    file.write_text(CASES[case].format(root=root, more=MORE.get(case, "")) + "dtype: bfloat16\n")
    ours = [str(Path(sys.executable).with_name("gemma2")), "merge", "--config", str(file), "--out", str(root / "out")]
    theirs = [str(program), str(file), str(root / "out"), "--allow-crimes"]
    runs: dict[str, list[tuple[float, float, float]]] = {"gemma2": [], "mergekit": []}
    for _ in range(repeats):
        for name, command in (("gemma2", ours), ("mergekit", theirs)):
            runs[name].append(timed(command))
            shutil.rmtree(root / "out")
    medians = {name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in runs.items()}
    for name, (wall, cpu, peak) in medians.items():
        print(f"{case:12}{name:10}{wall:9.1f} s{cpu:9.1f} CPU s{peak:8.2f} GB")
    wall, peak = (medians["mergekit"][i] / medians["gemma2"][i] for i in (0, 2))
    print(f"{case:12}{'ratio':10}{wall:9.1f} x in time{peak:8.1f} x in memory", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=256_000)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: the system's temporary place)")
    parser.add_argument("--mergekit", type=Path, default=Path("build/mergekit"), help="its environment")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    program = environment(options.mergekit.absolute())
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        root = Path(name)
        for seed, model in enumerate(("base", "rl-1", "rl-2")):
            write_random(root / model, layout("2b", options.layers, options.vocabulary), seed)
            tokenizer(root / model)
        for case in options.cases:
            compare(root, program, case, options.repeats)


if __name__ == "__main__":
    main()
