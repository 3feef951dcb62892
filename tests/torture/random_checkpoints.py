"""Random valid checkpoints for hypothesis, and merges of them in float64: independent of the engine's arithmetic."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
from model_files import CONFIG, added, safetensors_bytes, sizes_of, stored, to_bytes

from gemma2.merging import MergeRequest

DTYPES = ("BF16", "F16", "F32")
# Half a step of each, relative and absolute (the smallest numbers of F16 and BF16 have fewer digits).
HALF_STEP = {"BF16": (2.0**-8, 0.0), "F16": (2.0**-11, 2.0**-25), "F32": (2.0**-24, 0.0)}
PARTS = st.one_of(
    st.sampled_from(["mlp.up_proj", "self_attn.q_proj", "norm", "bias", "0", "007", "x.y.z"]),
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12),
)
DIMENSIONS = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@dataclass(frozen=True)
class Checkpoint:
    """One random merge: shapes of the tensors; dtypes, shards and padding of each model; method and options."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: list[list[str]]
    shards: list[int]
    padding: list[int]
    method: str
    share: float
    seed: int

    @property
    def models(self) -> int:
        """The number of models besides the base."""
        return len(self.dtypes) - 1


@st.composite
def checkpoints(draw: st.DrawFn) -> Checkpoint:
    """Names of any text, in layers or not; scalars, empty and large tensors; all orders, shards and blanks."""
    names = draw(st.lists(st.tuples(st.integers(-1, 12), PARTS), min_size=1, max_size=8, unique=True))
    shapes = {"model.embed_tokens.weight": (draw(st.integers(1, 40)), draw(st.integers(1, 40)))}
    for layer, part in names:
        name = part if layer < 0 else f"model.layers.{layer}.{part}"
        if name != "__metadata__" and not name.endswith(("lm_head.weight", "embed_tokens.weight")):
            shapes[name] = draw(DIMENSIONS)
    shapes = dict(draw(st.permutations(list(shapes.items()))))
    method = draw(st.sampled_from(["linear", "task-arithmetic", "ema", "liti", "slerp", "nearswap"]))
    count = {"liti": 1, "slerp": 2, "nearswap": 1}.get(method) or draw(st.integers(2, 4))
    one = st.sampled_from(DTYPES)
    kinds = st.one_of(
        one.map(lambda kind: [kind] * len(shapes)), st.lists(one, min_size=len(shapes), max_size=len(shapes))
    )
    return Checkpoint(
        shapes,
        draw(st.lists(kinds, min_size=count + 1, max_size=count + 1)),
        draw(st.lists(st.integers(1, 3), min_size=count + 1, max_size=count + 1)),
        draw(st.lists(st.integers(0, 20), min_size=count + 1, max_size=count + 1)),
        method,
        draw(st.integers(1, 9)) / 10,
        draw(st.integers(0, 2**32 - 1)),
    )


def write(one: Checkpoint, root: Path) -> list[dict[str, np.ndarray]]:
    """Write base and models; what their files hold, as float64."""
    generator = np.random.default_rng(one.seed)
    base = {name: generator.standard_normal(shape) for name, shape in one.shapes.items()}
    held = []
    for number, kinds in enumerate(one.dtypes):
        change = {name: 0.3 * generator.standard_normal(shape) for name, shape in one.shapes.items()}
        arrays = base if number == 0 else added(base, change)
        dtypes = dict(zip(arrays, kinds, strict=True))
        _write_model(root / f"m{number}", arrays, dtypes, one.shards[number], one.padding[number])
        held.append({name: stored(array, dtypes[name]) for name, array in arrays.items()})
    return held


def _write_model(path: Path, arrays: dict[str, np.ndarray], dtypes: dict[str, str], shards: int, padding: int) -> None:
    path.mkdir()
    config = {
        **CONFIG,
        **sizes_of({name: array for name, array in arrays.items() if name.endswith("embed_tokens.weight")}),
    }
    layers = [int(name.split(".")[2]) for name in arrays if name.startswith("model.layers.")]
    config["num_hidden_layers"] = max(layers, default=0) + 1
    (path / "config.json").write_text(json.dumps(config))
    items = {name: (dtypes[name], list(array.shape), to_bytes(array, dtypes[name])) for name, array in arrays.items()}
    weight_map = {}
    for number in range(min(shards, len(items))):
        file = "model.safetensors" if shards == 1 else f"model-{number}.safetensors"
        part = {name: entry for index, (name, entry) in enumerate(items.items()) if index % shards == number}
        data = safetensors_bytes(part)
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length] + b" " * padding
        (path / file).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(len(data) for _, _, data in items.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))


def request(one: Checkpoint, root: Path) -> MergeRequest:
    """The merge of the models that `write` wrote."""
    models = tuple(root / f"m{number}" for number in range(1, one.models + 1))
    options = {
        "linear": {"weights": _weights(one), "normalize": True},
        "task-arithmetic": {"weights": _weights(one), "base": root / "m0"},
        "ema": {"decay": one.share},
        "liti": {"base": root / "m0", "etas": (one.share,)},
        "slerp": {"base": root / "m0", "t": one.share, "granularity": "tensor"},
        "nearswap": {"base": root / "m0", "reach": one.share},
    }[one.method]
    return MergeRequest(method=one.method, models=models, threads=1, **options)


def _weights(one: Checkpoint) -> tuple[float, ...]:
    return tuple(one.share + number for number in range(one.models))


def reference(one: Checkpoint, held: list[dict[str, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> (merge in float64, sum of the sizes of its terms, of which rounding is a share)."""
    return {name: _merged(one, held[0][name], [model[name] for model in held[1:]]) for name in one.shapes}


def _merged(one: Checkpoint, base: np.ndarray, values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    size = sum((abs(value) for value in (base, *values)), np.zeros_like(base)) * (1 + sum(_weights(one)))
    if one.method == "linear":
        weights = np.array(_weights(one)) / sum(_weights(one))
        return sum(w * value for w, value in zip(weights, values, strict=True)), size
    if one.method == "task-arithmetic":
        return base + sum(w * (value - base) for w, value in zip(_weights(one), values, strict=True)), size
    if one.method == "ema":
        mean = values[0]
        for value in values[1:]:
            mean = one.share * mean + (1 - one.share) * value
        return mean, size
    if one.method == "liti":
        return base + one.share * (values[0] - base), size
    if one.method == "nearswap":
        difference = values[0] - base
        return base + np.clip(difference, -one.share, one.share), size
    left, right = values[0] - base, values[1] - base
    return base + _slerp(one.share, left, right), size * _condition(left, right)


def _condition(left: np.ndarray, right: np.ndarray) -> float:
    """By how much slerp enlarges rounding: its coefficients divide by the sine of the angle."""
    norms = float(np.linalg.norm(left)), float(np.linalg.norm(right))
    if 0.0 in norms or left.size == 0:
        return 1.0
    cosine = float((left / norms[0]).ravel() @ (right / norms[1]).ravel())
    return 1.0 / max(float(np.sqrt(max(1.0 - cosine**2, 0.0))), 1e-3) ** 2


def _slerp(t: float, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(left), np.linalg.norm(right)
    if 0.0 in norms or left.size == 0:
        return (1 - t) * left + t * right
    angle = np.arccos(np.clip((left * right).sum() / (norms[0] * norms[1]), -1, 1))
    if angle < 1e-4:
        return (1 - t) * left + t * right
    if angle > np.pi - 1e-2:  # no way to choose between the arcs
        return np.full_like(left, np.nan)
    return (np.sin((1 - t) * angle) * left + np.sin(t * angle) * right) / np.sin(angle)
