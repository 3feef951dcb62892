"""Checkpoints in the shapes of Gemma 2, written for the benchmarks of merging: random, or sparse files of zeros."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from gemma2.core.outputs.manifest import write_manifest
from gemma2.core.outputs.safetensors_header import ITEM_BYTES, encode_header

__all__ = ["SIZES", "layout", "write_random", "write_sparse"]

# width, layers, feed-forward width, heads, key-value heads, width of a head
SIZES = {
    "2b": (2304, 26, 9216, 8, 4, 256),
    "9b": (3584, 42, 14336, 16, 8, 256),
    "27b": (4608, 46, 36864, 32, 16, 128),
}
VOCABULARY = 256_000
CHUNK = 1 << 22  # elements written at a time
MAX_FILE = 5_000_000_000
Layout = dict[str, tuple[str, tuple[int, ...]]]


def layout(size: str = "2b", layers: int | None = None, vocabulary: int = VOCABULARY) -> Layout:
    """Names, dtypes and shapes; `layers` and `vocabulary` for a smaller one of the same width."""
    width, depth, ffn, heads, kv_heads, head = SIZES[size]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(depth if layers is None else layers):
        here = f"model.layers.{i}"
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        shapes |= {f"{here}.{norm}_layernorm.weight": (width,) for norm in norms}
        shapes |= {
            f"{here}.mlp.down_proj.weight": (width, ffn),
            f"{here}.mlp.gate_proj.weight": (ffn, width),
            f"{here}.mlp.up_proj.weight": (ffn, width),
            f"{here}.self_attn.k_proj.weight": (kv_heads * head, width),
            f"{here}.self_attn.o_proj.weight": (width, heads * head),
            f"{here}.self_attn.q_proj.weight": (heads * head, width),
            f"{here}.self_attn.v_proj.weight": (kv_heads * head, width),
        }
    shapes["model.norm.weight"] = (width,)
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def _configure(path: Path, shapes: Layout) -> None:
    layers = len({name.split(".")[2] for name in shapes if ".layers." in name})
    config = {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "tie_word_embeddings": True,
        "hidden_size": shapes["model.norm.weight"][1][0],
        "num_hidden_layers": layers,
        "vocab_size": shapes["model.embed_tokens.weight"][1][0],
        "dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))


def write_random(path: Path, shapes: Layout, seed: int) -> None:
    """Random bf16 weights: a base that all seeds share, and for seed > 0 a task vector of a hundredth of it."""
    path.mkdir()
    _configure(path, shapes)
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


def write_sparse(path: Path, shapes: Layout) -> None:
    """Zeros that take no room on the disk, in files of at most 5 GB."""
    path.mkdir()
    _configure(path, shapes)
    files: list[Layout] = [{}]
    for name, entry in shapes.items():
        held = sum(int(np.prod(shape)) * ITEM_BYTES[dtype] for dtype, shape in files[-1].values())
        if files[-1] and held + int(np.prod(entry[1])) * ITEM_BYTES[entry[0]] > MAX_FILE:
            files.append({})
        files[-1][name] = entry
    weight_map = {}
    for number, part in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        header, starts = encode_header(part)
        last = list(part)[-1]
        with (path / file).open("wb") as out:
            out.write(header)
            out.truncate(starts[last] + int(np.prod(part[last][1])) * ITEM_BYTES[part[last][0]])
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    # Digests of 54 GB of zeros are not what is measured.
    digests = {file: "blake3:0" for file in set(weight_map.values())}
    write_manifest(path, {"status": "complete"}, digests)
