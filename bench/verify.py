"""The speed of `gemma2 verify` next to plain reading of the same files from the disk, in turns, in the same run.

    python bench/verify.py [--gigabytes 2] [--rounds 3] [--folder FOLDER]

An output with weights in shards of 256 MB is written to FOLDER (a temporary one by default), and flushed. Before every
reading the page cache drops the files. Medians over the rounds:

    one reader   a loop as that of dd: 8 MiB at a time, one file after the other
    N readers    the same loop, with as many files at once as verify reads
    verify       `verify` of the output: every file hashed, and its tensors too

Both ratios are printed; asked is 0.80 of the first loop. Hashing needs a third of a core per GB/s: on a machine with
other work the second loop, which needs half of that, shows the load more than the program.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gemma2.core.outputs.manifest import write_manifest
from gemma2.core.outputs.safetensors_header import encode_header
from gemma2.posttrain.audit.disk_reading import DEFAULT_THREADS
from gemma2.posttrain.audit.verification import verify

SHARD = 256 << 20
TENSORS = 16  # of a shard
PIECE = 8 << 20


def write_output(folder: Path, count: int) -> list[Path]:
    """Write an output with random weights; return its files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for number in range(count):
        names = [f"layers.{number}.{i}" for i in range(TENSORS)]
        header, _ = encode_header({name: ("U8", (SHARD // TENSORS,)) for name in names})
        with (folder / f"model-{number:05}-of-{count:05}.safetensors").open("wb") as file:
            file.write(header)
            for _ in names:
                file.write(os.urandom(SHARD // TENSORS))
    write_manifest(folder, {"command": "bench", "config": {}, "parents": [], "data": [], "status": "complete"})
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return files


def drop(files: list[Path]) -> None:
    """Have the page cache drop files."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(path: Path) -> None:
    """The loop of dd."""
    buffer = bytearray(PIECE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def plain(files: list[Path], readers: int) -> None:
    """Read files, several at once."""
    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(read, files))


def rate(files: list[Path], work: Callable[[], object]) -> float:
    """MB/s of one reading from the disk."""
    drop(files)
    started = time.perf_counter()
    work()
    return sum(path.stat().st_size for path in files) / (time.perf_counter() - started) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        out = Path(place) / "out"
        files = write_output(out, max(1, round(given.gigabytes * 1e9 / SHARD)))
        ways: dict[str, Callable[[], object]] = {
            "one reader": lambda: plain(files, 1),
            f"{DEFAULT_THREADS} readers": lambda: plain(files, DEFAULT_THREADS),
            "verify": lambda: verify([out]),
        }
        assert verify([out]).faults == ()
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(given.rounds):
            for name, work in ways.items():
                found[name].append(rate(files, work))
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    for name, rates in found.items():
        print(f"{name:<12} {medians[name]:8.0f} MB/s   {min(rates):.0f} - {max(rates):.0f}")
    for name in [name for name in ways if name != "verify"]:
        asked = "   asked 0.80" if name == "one reader" else ""
        print(f"verify / {name:<12} {medians['verify'] / medians[name]:.2f}{asked}")
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
