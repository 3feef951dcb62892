"""Model directories made from numpy arrays, and read back with the safetensors library: independent of the engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors

BYTES = {"BF16": 2, "F16": 2, "F32": 4}
CONFIG = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.mlp.up_proj.weight": (12, 8),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.norm.weight": (8,),
}


def to_bytes(array: np.ndarray, dtype: str) -> bytes:
    """Round fp64 or fp32 values to a stored dtype; bf16 by integer arithmetic on exact fp32 values."""
    if dtype == "F16":
        return array.astype(np.float16).tobytes()
    if dtype == "F32":
        return array.astype(np.float32).tobytes()
    bits = array.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def from_bytes(data: bytes, dtype: str, shape: list[int]) -> np.ndarray:
    """The stored values as fp64."""
    if dtype == "BF16":
        values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(data, {"F16": np.float16, "F32": np.float32}[dtype])
    return values.astype(np.float64).reshape(shape)


def stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """Values after storage in a file of this dtype, as fp64."""
    return from_bytes(to_bytes(array, dtype), dtype, list(array.shape))


def safetensors_bytes(entries: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """The file format, written here by hand: 8 bytes length, JSON, data."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entries(arrays: dict[str, np.ndarray], dtype: str | dict[str, str]) -> dict[str, tuple[str, list[int], bytes]]:
    kinds = {name: dtype if isinstance(dtype, str) else dtype[name] for name in arrays}
    return {name: (kinds[name], list(a.shape), to_bytes(a, kinds[name])) for name, a in arrays.items()}


def sizes_of(arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """What a config.json says of the sizes of these tensors."""
    found = {}
    for name, array in arrays.items():
        if name.endswith("embed_tokens.weight") and array.ndim == 2:
            found |= {"vocab_size": len(array), "hidden_size": array.shape[1]}
    layers = {int(name.split(".")[2]) for name in arrays if name.startswith("model.layers.")}
    return found | ({"num_hidden_layers": max(layers) + 1} if layers else {})


def write_model(
    path: Path,
    arrays: dict[str, np.ndarray],
    dtype: str | dict[str, str] = "F32",
    *,
    config: dict | None = None,
    shards: int = 1,
) -> Path:
    """A model directory of one file, or of several with an index, to which tensors are assigned in turn."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **sizes_of(arrays), **(config or {})}))
    items = entries(arrays, dtype)
    if shards == 1:
        (path / "model.safetensors").write_bytes(safetensors_bytes(items))
        return path
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: items[name] for index, name in enumerate(items) if index % shards == number}
        (path / file).write_bytes(safetensors_bytes(part))
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def read_raw(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """All tensors of a directory as (dtype, shape, bytes), by the safetensors library."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            found[name] = (entry["dtype"], entry["shape"], bytes(entry["data"]))
    return found


def read_model(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory as fp64."""
    return {name: from_bytes(data, dtype, shape) for name, (dtype, shape, data) in read_raw(path).items()}


def random_arrays(seed: int, scale: float = 1.0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape) * scale for name, shape in shapes.items()}


def added(base: dict[str, np.ndarray], delta: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: base[name] + delta[name] for name in base}
