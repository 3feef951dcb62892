"""Merges against `cp` + fsync of one model: same machine, same files, alternating in one run.

    python bench/merge.py                       2B shape: three checkpoints of 5.2 GB are written first
    python bench/merge.py --layers 4            the 2B shape with 4 layers: 1.8 GB each

Every job is a process of its own. `merge` is the call (plan, read, compute, write, read back, digest, flush, publish),
`stream` the part without publication, `shell` the process with its imports. `anon` and `rss` are peaks of anonymous and
of all resident memory. The page cache is warm: the files were just read. "write + read back" is what the disk alone
takes for one model, past the page cache, without any arithmetic: the floor of a merge that reads its output back.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from shapes import layout, write_random

JOBS: dict[str, dict[str, object]] = {
    "slerp": {"method": "slerp", "base": True},
    "slerp, 1 thread": {"method": "slerp", "base": True, "threads": 1},
    "slerp, not read back": {"method": "slerp", "base": True, "verify": False},
    "slerp, known inputs": {"method": "slerp", "base": True, "known": True},
    "slerp, another t": {"method": "slerp", "base": True, "t": 0.3, "cached": True},
    "warp": {"method": "warp", "base": True},
    "liti": {"method": "liti", "base": True, "models": 1},
    "linear": {"method": "linear"},
    "linear, not read back": {"method": "linear", "verify": False},
    "linear, 1 thread": {"method": "linear", "threads": 1},
    "ties": {"method": "ties", "base": True},
    "dare": {"method": "dare", "base": True},
    "della": {"method": "della", "base": True},
}


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def job(root: Path, spec: dict[str, object]) -> None:
    """One merge in this process; prints its figures as JSON."""
    from gemma2.merging import MergeRequest, merge

    peak = {"RssAnon": 0, "VmRSS": 0}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            for field in peak:
                peak[field] = max(peak[field], memory(field))

    watcher = threading.Thread(target=sample)
    watcher.start()
    models = (root / "rl-1", root / "rl-2")[: int(str(spec.get("models", 2)))]
    fields = {name: spec[name] for name in ("t", "threads") if name in spec}
    base = {"base": root / "base"} if spec.get("base") else {}
    request = MergeRequest(method=str(spec["method"]), models=models, **base, **fields)  # type: ignore[arg-type]
    wall, cpu = time.perf_counter(), time.process_time()
    result = merge(request, out=root / "out", verify=bool(spec.get("verify", True)))
    figures = {"merge": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "stream": result.seconds}
    done.set()
    watcher.join()
    print(json.dumps(figures | {"anon": peak["RssAnon"] / 1e6, "rss": peak["VmRSS"] / 1e6}))


def run_job(root: Path, spec: dict[str, object]) -> dict[str, float]:
    """One job in a separate process, without what earlier ones left in the caches of inner products and of digests."""
    cache = root / "cache"
    if not spec.get("cached"):
        shutil.rmtree(cache / "gemma2" / "products", ignore_errors=True)
    if not spec.get("known"):
        shutil.rmtree(cache / "gemma2" / "digests", ignore_errors=True)
    begin = time.perf_counter()
    child = subprocess.run(
        [sys.executable, __file__, "--root", str(root), "--job", json.dumps(spec)],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        check=True,
    )
    figures = {"shell": time.perf_counter() - begin, **json.loads(child.stdout)}
    shutil.rmtree(root / "out")
    return figures


def copy(root: Path) -> dict[str, float]:
    """`cp` and fsync of one model."""
    begin = time.perf_counter()
    subprocess.run(["cp", root / "base/model.safetensors", root / "copy"], check=True)
    subprocess.run(["sync", root / "copy"], check=True)
    figures = {"merge": time.perf_counter() - begin}
    (root / "copy").unlink()
    return figures


def through(root: Path, step: int = 4 << 20) -> dict[str, float]:
    """The size of one model written past the page cache by three threads, and read back by one that follows them."""
    size = (root / "base/model.safetensors").stat().st_size // step * step
    path = root / "floor"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    os.posix_fallocate(descriptor, 0, size)
    places, done, news = iter(range(0, size, step)), set[int](), threading.Condition()

    def write() -> None:
        with mmap.mmap(-1, step) as buffer:
            for place in places:
                os.pwrite(descriptor, buffer, place)
                with news:
                    done.add(place)
                    news.notify_all()

    def read() -> None:
        with mmap.mmap(-1, step) as buffer:
            for place in range(0, size, step):
                with news:
                    news.wait_for(lambda: place in done)  # noqa: B023
                os.preadv(descriptor, [buffer], place)

    begin = time.perf_counter()
    threads = [threading.Thread(target=target) for target in (write, write, write, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.fsync(descriptor)
    figures = {"merge": time.perf_counter() - begin}
    os.close(descriptor)
    path.unlink()
    return figures


def accuracy(root: Path, tensors: int = 4) -> str:
    """SLERP against float64: the share of elements that are rounded right, and the worst error in units of bf16."""
    from gemma2.merging import MergeRequest, merge
    from gemma2.merging.inputs.checkpoint import Reader, open_checkpoint

    def values(path: Path, name: str) -> np.ndarray:
        model = open_checkpoint(path, "model")
        tensor = model.tensors[name]
        raw = np.empty(tensor.nbytes, np.uint8)
        with Reader.open([model]) as reader:
            reader.read(tensor, 0, tensor.count, raw)
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    request = MergeRequest(
        method="slerp", models=(root / "rl-1", root / "rl-2"), base=root / "base", granularity="tensor"
    )
    merge(request, out=root / "out")
    names = [f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")]
    right, count, worst = 0, 0, 0.0
    for name in ["model.norm.weight", *names][:tensors]:
        base, one, two = (values(root / model, name).astype(np.float64) for model in ("base", "rl-1", "rl-2"))
        u, v = one - base, two - base
        omega = np.arccos(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
        exact = base + np.sin(omega / 2) / np.sin(omega) * (u + v)
        found = values(root / "out", name).astype(np.float64)
        ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 1e-30))) - 7)
        error = np.abs(found - exact) / ulp
        right += int((error <= 0.5 + 1e-9).sum())
        count += error.size
        worst = max(worst, float(error.max()))
    shutil.rmtree(root / "out")
    return f"{count:,} elements against float64: {100 * right / count:.4f} % rounded right, worst {worst:.4f} ulp"


def measure(root: Path, jobs: dict[str, dict[str, object]], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Everything in turn, so that what the machine does besides touches all alike."""
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(repeats):
        steps: dict[str, Callable[[], dict[str, float]]] = {
            "cp + fsync": lambda: copy(root),
            "write + read back": lambda: through(root),
        }
        steps |= {label: lambda spec=spec: run_job(root, spec) for label, spec in jobs.items()}  # type: ignore[misc]
        for label, step in steps.items():
            runs.setdefault(label, []).append(step())
    return runs


def show(runs: dict[str, list[dict[str, float]]]) -> None:
    """A table of medians."""
    columns = ("merge", "cpu", "stream", "shell", "anon", "rss")

    def median(label: str, name: str) -> float:
        found = [run[name] for run in runs[label] if name in run]
        return statistics.median(found) if found else float("nan")

    floor = median("cp + fsync", "merge")
    linear = median("linear", "merge") if "linear" in runs else float("nan")
    widths = {
        "merge s": 9,
        "CPU s": 8,
        "/ cp": 7,
        "/ linear": 10,
        "stream s": 10,
        "shell s": 9,
        "anon MB": 9,
        "rss MB": 8,
    }
    print(" " * 22 + "".join(f"{head:>{width}}" for head, width in widths.items()))
    for label in runs:
        merge, cpu, stream, shell, anon, rss = (median(label, name) for name in columns)
        ratios = f"{merge / floor:7.2f}{merge / linear:10.2f}"
        print(f"{label:22}{merge:9.2f}{cpu:8.2f}{ratios}{stream:10.2f}{shell:9.2f}{anon:9.0f}{rss:8.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--vocabulary", type=int, default=256_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", default="", help="only these, separated by semicolons")
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: the system's temporary place)")
    parser.add_argument("--root", type=Path, help="models that are there already: base, rl-1, rl-2")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job(options.root, json.loads(options.job))
        return
    wanted = [name.strip() for name in options.jobs.split(";") if name.strip()] or list(JOBS)
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        root = options.root or Path(name)
        if options.root is None:
            for seed, model in enumerate(("base", "rl-1", "rl-2")):
                write_random(root / model, layout("2b", options.layers, options.vocabulary), seed)
        size = (root / "base/model.safetensors").stat().st_size
        print(f"one model: {size / 1e9:.2f} GB, medians of {options.repeats}")
        print(accuracy(root))
        show(measure(root, {name: JOBS[name] for name in wanted}, options.repeats))


if __name__ == "__main__":
    main()
