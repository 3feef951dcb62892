"""`gemma2 doctor` against a plain read of the same bytes, and its whole commands next to an empty interpreter.

    python bench/doctor.py [--gigabytes 1] [--runs 5]

Rows: the scan for NaN as a share of the speed of a plain read in the same run (medians; the file is in the page cache);
wall time and peak memory of `doctor --quick` on the shapes of a 27B, of `doctor` on the embedded student, of
`python -c pass`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gemma2.core.outputs.safetensors_header import encode_header, read_header
from gemma2.posttrain.doctor.checks.config_checks import SIZES
from gemma2.posttrain.doctor.checks.weight_file_checks import gemma2_shapes
from gemma2.posttrain.doctor.checks.weight_value_checks import values_of

CHILD = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3)
"""


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def scan(folder: Path, gigabytes: float, runs: int) -> None:
    """One bf16 tensor of random values."""
    count = int(gigabytes * 5e8)
    path = folder / "weights.safetensors"
    header, _ = encode_header({"weights": ("BF16", (count,))})
    dice = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(header)
        for start in range(0, count, 1 << 24):
            values = dice.standard_normal(min(1 << 24, count - start), dtype=np.float32)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    tensor = read_header(path)["weights"]
    buffer = bytearray(1 << 22)

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    read()
    pairs = [(seconds(read), seconds(lambda: values_of(tensor))) for _ in range(runs)]
    plain, scanned = (statistics.median(times) for times in zip(*pairs, strict=True))
    size = tensor.nbytes / 1e9
    sys.stdout.write(
        f"scan for NaN: {size / scanned:.2f} GB/s, plain read {size / plain:.2f} GB/s, share {plain / scanned:.2f}\n"
    )


def sparse_27b(path: Path) -> Path:
    """The shapes of a 27B; its zeros use no disk space."""
    path.mkdir()
    settings = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 256000}
    settings |= vars(SIZES["27B"])
    (path / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 107]}))
    shapes = gemma2_shapes(settings, classifier=False) or {}
    header, _ = encode_header({name: ("BF16", shape) for name, shape in shapes.items()})
    with (path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(2 * int(np.prod(shape)) for shape in shapes.values()))
    return path


def commands(folder: Path, runs: int) -> None:
    gemma2 = [sys.executable, "-m", "gemma2.cli.main"]
    student = folder / "tiny"
    subprocess.run([*gemma2, "tiny", "--out", str(student), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    lines = {
        "doctor --quick, shapes of a 27B": [*gemma2, "doctor", str(sparse_27b(folder / "27b")), "--quick"],
        "doctor, the embedded student": [*gemma2, "doctor", str(student / "student")],
        "doctor --deep, the embedded student": [*gemma2, "doctor", str(student / "student"), "--deep"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    for name, line in lines.items():
        times = []
        for _ in range(runs):
            begin = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", CHILD, *line], capture_output=True, text=True, check=True)
            times.append(time.perf_counter() - begin)
        sys.stdout.write(f"{name}: {statistics.median(times):.2f} s, {float(done.stdout):.0f} MB\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scan(Path(name), options.gigabytes, options.runs)
        commands(Path(name), options.runs)


if __name__ == "__main__":
    main()
