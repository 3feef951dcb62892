"""`gemma2 merge --stream` against fetching the models first: the same hub, on this machine, with a line of fixed speed.

    python bench/stream.py                          two models of 0.5 GB over a line of 200 MB/s
    python bench/stream.py --layers 8 --rate 100    larger models, a slower line

Every job is one command with an empty cache of the hub: `fetch, then merge` without --stream, and `merge --stream`, in
turn. The floor is the time that the line needs for the bytes of both models. The bytes of the outputs are compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shapes import layout, write_random

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "merging"))

from fake_hub import FakeHub  # noqa: E402


class SlowHub(FakeHub):
    """A hub behind a line of `rate` bytes per second for all connections together."""

    def __init__(self, models: dict[str, Path], rate: float) -> None:
        super().__init__(models)
        self.rate = rate
        self.free = 0.0  # when the line is free again

    def take(self, count: int) -> None:
        super().take(count)
        with self.lock:
            self.free = max(self.free, time.monotonic()) + count / self.rate
            pause = self.free - time.monotonic()
        time.sleep(max(pause, 0))


def command(hub: FakeHub, root: Path, method: list[str], stream: bool) -> float:
    """Seconds of one merge with an empty cache."""
    shutil.rmtree(root / "home", ignore_errors=True)
    shutil.rmtree(root / f"out-{stream}", ignore_errors=True)
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(root / "home"), "XDG_CACHE_HOME": str(root / "home" / "cache")}
    env = {**os.environ, **places, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    words = ["merge", *method, "--out", str(root / f"out-{stream}"), "--quiet", *(["--stream"] if stream else [])]
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "gemma2.cli.main", *words], check=True, env=env, cwd=root, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2, help="layers of the models, in the shape of 2B")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rate", type=float, default=200, help="MB per second of the line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where the files are written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        root = Path(folder)
        (root / "served").mkdir()
        models = {}
        for number, name in enumerate(("a", "b")):
            models[f"org/{name}"] = root / "served" / name
            write_random(models[f"org/{name}"], layout("2b", options.layers, options.vocabulary), number)
            (models[f"org/{name}"] / "gemma2.json").unlink()  # models of the hub have none
        size = sum(file.stat().st_size for model in models.values() for file in model.glob("*.safetensors"))
        with SlowHub(models, options.rate * 1e6).serving() as hub:
            floor = size / options.rate / 1e6
            print(f"two models, {size / 1e9:.2f} GB together, {options.rate:g} MB/s: the line needs {floor:.1f} s")
            for method in (["linear", "org/a", "org/b"], ["slerp", "org/a", "org/b"]):
                seconds: dict[bool, list[float]] = {False: [], True: []}
                command(hub, root, method, True)  # not counted: compiled kernels, digests of the hub
                for _ in range(options.rounds):
                    for stream in (False, True):
                        seconds[stream].append(command(hub, root, method, stream))
                outputs = [
                    next((root / f"out-{stream}").glob("*.safetensors")).read_bytes() for stream in (False, True)
                ]
                assert outputs[0] == outputs[1], "the outputs differ"
                whole, stream = (statistics.median(seconds[key]) for key in (False, True))
                print(
                    f"{method[0]:8} fetch, then merge {whole:6.2f} s ({whole / floor:.2f} of the line), "
                    f"--stream {stream:6.2f} s ({stream / floor:.2f}), ratio {stream / whole:.2f}"
                )


if __name__ == "__main__":
    main()
