"""What sameness costs: a pipeline with nothing to do, of many stages and of large models.

    python bench/provenance.py [--stages 200] [--size 9b] [--rounds 5] [--dir DIR]

    check, skip   seconds of `pipeline run --dry-run` and of `pipeline run` of STAGES complete merges, start-up included
    first, again  seconds of `pipeline status` of a lineage of six models of SIZE (base, SFT, two RL policies, SLERP,
                  LITI; sparse files of zeros, in full size, on no disk), before and after their digests are known

Medians over the rounds; the state of the machine is printed. The files of zeros are made here with the manifests that
the commands would write, since training a 9B takes more than this machine.
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
from typing import Any

import numpy as np
import yaml
from shapes import SIZES, layout, write_sparse

GEMMA2 = str(Path(sys.executable).with_name("gemma2"))


def seconds(words: list[str], cache: Path) -> float:
    """Wall time of one command line with its own cache."""
    started = time.perf_counter()
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    subprocess.run([GEMMA2, *words], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - started


def many_stages(place: Path, count: int, rounds: int) -> None:
    """A chain of merges of a small model, ten side by side."""
    from gemma2.core.outputs.safetensors_header import encode_header

    (place / "model").mkdir()
    header, _ = encode_header({"model.embed_tokens.weight": ("F32", (8, 4)), "model.norm.weight": ("F32", (4,))})
    (place / "model" / "model.safetensors").write_bytes(header + np.linspace(-1, 1, 36, dtype=np.float32).tobytes())
    config = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "vocab_size": 8, "hidden_size": 4}
    (place / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stages: dict[str, Any] = {}
    for i in range(count):
        model = str(place / "model") if i < 10 else f"${{s{i - 10}.out}}"
        stages[f"s{i}"] = {"command": "merge passthrough", "options": {"models": [model]}}
    file = place / "many.yaml"
    file.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False), encoding="utf-8")
    run = ["pipeline", "run", str(file), "--out", str(place / "many"), "--quiet"]
    seconds([*run, "--jobs", "2"], place / "cache")
    check = statistics.median(seconds([*run, "--dry-run"], place / "cache") for _ in range(rounds))
    skip = statistics.median(seconds(run, place / "cache") for _ in range(rounds))
    print(f"{count} stages: check {check:.2f} s, skipped rerun {skip:.2f} s (asked: 1.0 each)", flush=True)


def large_models(place: Path, size: str, rounds: int) -> None:
    """Base -> SFT -> two RL policies -> SLERP -> LITI, every one in full size."""
    base, rows = place / "base", place / "rows.jsonl"
    write_sparse(base, layout(size))
    (base / "tokenizer.json").write_text("{}", encoding="utf-8")
    rows.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    (place / "rewards_of_bench.py").write_text("def score(prompts, completions):\n    return [0.0]\n", encoding="utf-8")
    rl = {"policy": "${sft.out}", "prompts": str(rows), "reward_fn": ["rewards_of_bench:score"], "steps": 1}
    stages: dict[str, Any] = {
        "sft": {"command": "sft", "options": {"model": str(base), "data": [str(rows)]}},
        "rl-1": {"command": "rlhf", "options": {**rl, "seed": 1}},
        "rl-2": {"command": "rlhf", "options": {**rl, "seed": 2}},
        "slerp": {
            "command": "merge slerp",
            "options": {"models": ["${rl-1.out}", "${rl-2.out}"], "base": "${sft.out}"},
        },
        "liti": {"command": "merge liti", "options": {"models": ["${slerp.out}"], "base": "${sft.out}", "eta": 0.5}},
    }
    file = place / "large.yaml"
    file.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False), encoding="utf-8")
    sys.path.insert(0, str(place))
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    for stage in compiled(file, place / "large"):
        fabricate(stage, size)
    weights = sum(path.stat().st_size for path in place.rglob("*.safetensors"))
    status = ["pipeline", "status", str(place / "large"), "--quiet"]
    os.environ["PYTHONPATH"] = str(place)
    first = seconds(status, place / "other-cache")
    again = statistics.median(seconds(status, place / "other-cache") for _ in range(rounds))
    rerun = statistics.median(
        seconds(["pipeline", "run", str(file), "--out", str(place / "large"), "--from", "liti", "--quiet"],
                place / "other-cache") for _ in range(rounds)
    )  # fmt: skip
    print(f"{size} lineage, {weights / 1e9:.0f} GB: first {first:.1f} s, again {again:.2f} s, rerun {rerun:.2f} s "
          f"(asked: 2.0)")  # fmt: skip


def compiled(file: Path, root: Path) -> Any:
    from gemma2.posttrain.pipelines.compile import compile_pipeline, read_pipeline

    root.mkdir()
    (root / "pipeline.yaml").write_bytes(file.read_bytes())
    return compile_pipeline(read_pipeline(file, ()), root).stages.values()


def fabricate(stage: Any, size: str) -> None:
    """The output of a stage as its command would leave it, of zeros."""
    from gemma2.core.outputs.manifest import now, versions, write_manifest
    from gemma2.posttrain.provenance.origin import origin_of

    write_sparse(stage.out, layout(size))
    (stage.out / "tokenizer.json").write_text("{}", encoding="utf-8")
    origin = origin_of(stage.command, stage.config(), stage.out, os.cpu_count() or 1)
    write_manifest(
        stage.out, {**origin, "versions": versions(), "started": now(), "ended": now(), "status": "complete"}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=200)
    parser.add_argument("--size", choices=[*SIZES, "none"], default="9b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: the system's temporary place)")
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        if options.stages:
            many_stages(Path(folder), options.stages, options.rounds)
        if options.size != "none":
            large_models(Path(folder), options.size, options.rounds)


if __name__ == "__main__":
    main()
