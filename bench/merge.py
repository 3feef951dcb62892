"""Task-vector SLERP of two policies against `cp` + fsync of one model: same machine, same files, same run.

    python bench/merge.py                     2B shape: three checkpoints of 5.2 GB are written first
    python bench/merge.py --layers 4          the 2B shape with 4 layers: 1.8 GB each

Prints medians and ratios. `stream` is reading, merging and writing; the wall time adds the digest of the output,
flushing to disk and publication. The page cache is warm: the files were just written.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gemma2.merging import MergeRequest, merge
from gemma2.merging.header import encode_header
from gemma2.merging.outputs import write_manifest

WIDTH, FFN, HEADS, KV_HEADS, HEAD = 2304, 9216, 8, 4, 256  # Gemma 2 2B
CHUNK = 1 << 22  # elements written at a time


def layout(layers: int, vocabulary: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Gemma 2 2B with another number of layers and another vocabulary."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, WIDTH)}
    for i in range(layers):
        here = f"model.layers.{i}"
        shapes |= {
            f"{here}.input_layernorm.weight": (WIDTH,),
            f"{here}.mlp.down_proj.weight": (WIDTH, FFN),
            f"{here}.mlp.gate_proj.weight": (FFN, WIDTH),
            f"{here}.mlp.up_proj.weight": (FFN, WIDTH),
            f"{here}.post_attention_layernorm.weight": (WIDTH,),
            f"{here}.post_feedforward_layernorm.weight": (WIDTH,),
            f"{here}.pre_feedforward_layernorm.weight": (WIDTH,),
            f"{here}.self_attn.k_proj.weight": (KV_HEADS * HEAD, WIDTH),
            f"{here}.self_attn.o_proj.weight": (WIDTH, HEADS * HEAD),
            f"{here}.self_attn.q_proj.weight": (HEADS * HEAD, WIDTH),
            f"{here}.self_attn.v_proj.weight": (KV_HEADS * HEAD, WIDTH),
        }
    shapes["model.norm.weight"] = (WIDTH,)
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def write_model(path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]], seed: int) -> None:
    """Random bf16 weights: a base that all seeds share, and for seed > 0 a task vector of a hundredth of it."""
    path.mkdir()
    config = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    base = np.random.default_rng(0).standard_normal(CHUNK, np.float32)
    values = base if seed == 0 else base + 0.01 * np.random.default_rng(seed).standard_normal(CHUNK, np.float32)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    with (path / "model.safetensors").open("wb") as file:
        file.write(encode_header(shapes)[0])
        for _, shape in shapes.values():
            left = int(np.prod(shape))
            while left:
                file.write(halves[: min(left, CHUNK)])
                left -= min(left, CHUNK)
        os.fsync(file.fileno())
    write_manifest(path, {"status": "complete"})  # as every output of gemma2 has: its digests are not taken again


def copy(source: Path, target: Path) -> None:
    """`cp` and fsync of one file."""
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def measure(run: Callable[[], object], clean: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds of one run."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    clean()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--vocabulary", type=int, default=256_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: the system's temporary place)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        root = Path(name)
        shapes = layout(options.layers, options.vocabulary)
        for seed, model in enumerate(("base", "rl-1", "rl-2")):
            write_model(root / model, shapes, seed)
        compare(root, options)


def compare(root: Path, options: argparse.Namespace) -> None:
    """Run everything in turn, so that what the machine does besides touches all alike."""
    single = root / "base" / "model.safetensors"
    policies = (root / "rl-1", root / "rl-2")
    requests = {
        "slerp": MergeRequest(method="slerp", models=policies, base=root / "base", threads=options.threads),
        "slerp, 1 thread": MergeRequest(method="slerp", models=policies, base=root / "base", threads=1),
        "liti": MergeRequest(method="liti", models=policies[:1], base=root / "base", threads=options.threads),
        "linear": MergeRequest(method="linear", models=policies, threads=options.threads),
    }
    times: dict[str, list[tuple[float, float]]] = {}
    streams: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        target = root / "copy"
        times.setdefault("cp + fsync", []).append(measure(lambda: copy(single, target), target.unlink))  # noqa: B023
        for label, request in requests.items():

            def run(label: str = label, request: MergeRequest = request) -> None:
                streams.setdefault(label, []).append(merge(request, out=root / "out").seconds)

            times.setdefault(label, []).append(measure(run, lambda: shutil.rmtree(root / "out")))
    floor = statistics.median(wall for wall, _ in times["cp + fsync"])
    print(f"one model: {single.stat().st_size / 1e9:.2f} GB, medians of {options.repeats}")
    print(f"{'':18}{'wall s':>9}{'CPU s':>9}{'/ cp':>8}{'stream s':>10}{'/ cp':>8}")
    for label, runs in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*runs, strict=True))
        stream = statistics.median(streams[label]) if label in streams else None
        tail = f"{stream:10.2f}{stream / floor:8.2f}" if stream is not None else ""
        print(f"{label:18}{wall:9.2f}{cpu:9.2f}{wall / floor:8.2f}{tail}")
    print(f"peak resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
