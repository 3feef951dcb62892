"""Methods by elements against independent float64 references, over shapes, dtypes, cuts, threads and shards."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from model_files import from_bytes, read_model, read_raw, stored, to_bytes, write_model

from gemma2.core.errors import Gemma2Error, InputError, UsageError
from gemma2.merging import MergeRequest, merge
from gemma2.merging.methods.method import Piece, of_ranks
from gemma2.merging.streaming import feeder

SHAPES = {
    "model.embed_tokens.weight": (37, 24),
    "model.layers.0.mlp.up_proj.weight": (300, 512),  # several pieces
    "model.layers.0.mlp.wide.weight": (3, 70_001),  # a row longer than a piece
    "model.layers.0.self_attn.q_proj.weight": (1, 9),
    "model.layers.1.experts.weight": (2, 3, 20),
    "model.norm.weight": (25,),
}


def models(root, seed, dtypes, shards=1):
    """Model directories, and the values that their files hold, in fp64. What was made once is copied."""
    files, values = _made(seed, dtypes, shards)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text)
    return {name: dict(arrays) for name, arrays in values.items()}


@cache
def _made(seed, dtypes, shards):
    """The content of each file by its path, and the values."""
    generator = np.random.default_rng(seed)
    base = {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}
    found = {}
    with TemporaryDirectory() as folder:
        root = Path(folder)
        for number, name in enumerate(("base", "a", "b", "c")):
            kind = dtypes[number % len(dtypes)]
            sparse = {key: generator.random(shape) < 0.4 for key, shape in SHAPES.items()}  # RL changes few elements
            arrays = {
                key: own if name == "base" else own + 0.05 * generator.standard_normal(own.shape) * sparse[key]
                for key, own in base.items()
            }
            write_model(root / name, arrays, kind, shards=shards)
            found[name] = {key: stored(own, kind) for key, own in arrays.items()}
            for own in found[name].values():
                own.flags.writeable = False
        files = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return files, found


# --- the references: one tensor, written from the formulas ------------------------------------------------------------


def sce(base, vectors, select=1.0):
    kept = np.ones(base.shape, bool)
    if select < 1:
        variance = np.array(vectors).var(axis=0).astype(np.float32)
        count = int(select * base.size + 1e-6)
        kept = variance >= np.sort(variance.ravel())[::-1][count - 1] if count else np.zeros(base.shape, bool)
    chosen = [vector * kept for vector in vectors]
    energy = np.array([(vector**2).mean() for vector in chosen])
    shares = energy / energy.sum() if energy.sum() else energy
    sign = np.sign(sum(chosen))
    above, below = np.zeros(base.shape), np.zeros(base.shape)
    for share, vector in zip(shares, chosen, strict=True):
        same = (np.sign(vector) == sign) & (sign != 0)
        above += share * vector * same
        below += share * same
    return base + np.where(below > 0, above / np.where(below > 0, below, 1), 0)


def ram(base, vectors, threshold=1e-5, boost=None, cap=None):
    changed = np.array([np.abs(vector) > threshold for vector in vectors])
    count = changed.sum(axis=0)
    result = base.copy()
    for own, vector in zip(changed, vectors, strict=True):
        alone = own & (count == 1)
        overlap = (own & ~alone).sum() / alone.sum() if alone.any() else np.inf
        factor = 1.0 if boost is None else 1 + boost * min(overlap, cap)
        result += np.where(alone, factor * vector, np.where(own, vector / np.maximum(count, 1), 0))
    return result


def nearswap(base, vectors, limit):
    distance = np.abs(vectors[0])
    share = np.minimum(limit / np.where(distance > 0, distance, 1), 1)
    return base + share * vectors[0]


def importance(base, model):
    def log_softmax(x):
        return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)

    logs = log_softmax(model), log_softmax(base)
    divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1, keepdims=True)
    return np.abs(model - base) * divergence


def arcee(base, vectors):
    score = importance(base, base + vectors[0])
    first, median, third = np.quantile(score, [0.25, 0.5, 0.75], method="lower")
    return np.where(score > median + 1.5 * (third - first), base + vectors[0], base)


def rows(base, vectors, share, columns=False):
    axis = 0 if columns and base.ndim > 1 else -1
    if columns and base.ndim > 1:
        shape = base.shape
        base, vectors = base.reshape(-1, shape[-1]), [vector.reshape(-1, shape[-1]) for vector in vectors]
    one, two = vectors
    lengths = [np.linalg.norm(vector, axis=axis, keepdims=True) for vector in vectors]
    cosine = (one * two).sum(axis=axis, keepdims=True) / np.where(
        lengths[0] * lengths[1] > 0, lengths[0] * lengths[1], 1
    )
    angle = np.arccos(np.clip(np.where(lengths[0] * lengths[1] > 0, cosine, 1), -1, 1))
    lerp = (angle < 1e-3) | (angle > np.pi - 1e-3)
    sine = np.where(lerp, 1, np.sin(angle))
    left = np.where(lerp, 1 - share, np.sin((1 - share) * angle) / sine)
    right = np.where(lerp, share, np.sin(share * angle) / sine)
    return base + left * one + right * two


CASES = {
    "sce": ("abc", {}, sce),
    "sce selected": ("abc", {"select": 0.3}, lambda *given: sce(*given, 0.3)),
    "sce of two": ("ab", {}, sce),
    "sce of two selected": ("ab", {"select": 0.25}, lambda *given: sce(*given, 0.25)),
    "ram": ("abc", {}, ram),
    "ram of large changes": ("abc", {"threshold": 0.05}, lambda *given: ram(*given, 0.05)),
    "ram-plus": ("abc", {"threshold": 0.03}, lambda *given: ram(*given, 0.03, 0.1, 0.2)),
    "ram-plus scaled": ("ab", {"boost": 2.0, "cap": 0.7}, lambda *given: ram(*given, 1e-5, 2.0, 0.7)),
    "nearswap": ("a", {"reach": 0.02}, lambda *given: nearswap(*given, 0.02)),
    "arcee-fusion": ("a", {}, arcee),
    "nuslerp-rows": ("ab", {"weights": (1.0, 3.0)}, lambda *given: rows(*given, 0.75)),
    "nuslerp-rows columns": ("ab", {"columns": True}, lambda *given: rows(*given, 0.5, columns=True)),
}  # fmt: skip


def request(root, name, **more):
    names, options, _ = CASES[name]
    return MergeRequest(
        method=name.split()[0], models=tuple(root / model for model in names), base=root / "base", **options, **more
    )


@pytest.mark.parametrize("dtypes", [("F32",), ("BF16",), ("BF16", "F16", "F32", "F32")], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_method_agrees_with_its_float64_reference(tmp_path, name, dtypes):
    values = models(tmp_path, 3, dtypes)
    merge(request(tmp_path, name, dtype="float32"), out=tmp_path / "out")
    merged = read_model(tmp_path / "out")
    names, _, reference = CASES[name]
    for key, base in values["base"].items():
        vectors = [values[model][key] - base for model in names]
        expected = reference(base, vectors).reshape(base.shape)
        error = np.abs(merged[key] - expected)
        off = error > 1e-6 * np.maximum(1, np.abs(expected))  # results are fp32
        if name == "arcee-fusion":  # a score may round to the threshold in fp32, in which ranks are counted
            assert off.mean() < 1e-4
        else:
            assert not off.any(), (key, error.max())


@pytest.mark.parametrize("name", CASES)
def test_files_are_equal_for_any_cut_threads_and_shards(tmp_path, name):
    found = set()
    for shards, cut, threads in ((1, 128 * 1024, 2), (3, 4096, 1), (2, 12288, 4)):
        root = tmp_path / str(shards)
        models(root, 4, ("BF16",), shards=shards)
        merge(request(root, name, threads=threads), out=root / "out", cut=cut)
        raw = read_raw(root / "out")
        found.add(b"".join(raw[key][2] for key in sorted(raw)))
    assert len(found) == 1


@pytest.mark.parametrize("name", CASES)
def test_results_are_rounded_once_to_nearest_even(tmp_path, name):
    models(tmp_path, 5, ("BF16",))
    merge(request(tmp_path, name, dtype="float32"), out=tmp_path / "precise")
    merge(request(tmp_path, name), out=tmp_path / "stored")
    precise, rounded = read_model(tmp_path / "precise"), read_model(tmp_path / "stored")
    for key, own in precise.items():
        np.testing.assert_array_equal(rounded[key], from_bytes(to_bytes(own, "BF16"), "BF16", list(own.shape)))


@pytest.mark.parametrize("name", CASES)
def test_models_equal_to_the_base_give_the_base_bit_for_bit(tmp_path, name):
    zeros = {"w.weight": np.array([[-0.0, 1.0, 2.0]])}
    for model in ("base", "a", "b", "c"):
        write_model(tmp_path / model, zeros, "BF16")
    merge(request(tmp_path, name), out=tmp_path / "out")
    assert read_raw(tmp_path / "out") == read_raw(tmp_path / "base")


@pytest.mark.parametrize("name", CASES)
def test_a_weight_that_is_not_finite_is_named(tmp_path, name):
    values = models(tmp_path, 6, ("F32",))
    broken = dict(values["a"])
    broken["model.norm.weight"] = np.where(np.arange(25) == 7, np.nan, broken["model.norm.weight"])
    write_model(tmp_path / "a", broken, "F32")
    with pytest.raises(InputError, match=r"model\.norm\.weight holds nan at element 7"):
        merge(request(tmp_path, name), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_that_does_not_fit_the_dtype_is_named(tmp_path):
    for name, size in (("base", 1.0), ("a", 7e4)):
        write_model(tmp_path / name, {"w.weight": np.full((2, 2), size)}, "F32")
    with pytest.raises(Gemma2Error, match=r"the merge of w\.weight overflows F16"):
        merge(
            MergeRequest(
                method="nearswap", models=(tmp_path / "a",), base=tmp_path / "base", reach=1e5, dtype="float16"
            ),
            out=tmp_path / "out",
        )


def test_the_report_has_the_lengths_of_the_vectors(tmp_path):
    values = models(tmp_path, 7, ("F32",))
    result = merge(request(tmp_path, "ram"), out=tmp_path / "out")
    merged = read_model(tmp_path / "out")
    by_name = {group.group: group for group in result.groups}
    for key in SHAPES:
        group, base = by_name[key], values["base"][key]
        assert group.norms == pytest.approx([np.linalg.norm(values[name][key] - base) for name in "abc"], rel=1e-9)
        assert group.result_norms[0] == pytest.approx(np.linalg.norm(merged[key] - base), rel=1e-4)


def test_one_threshold_for_a_layer_counts_all_its_tensors(tmp_path):
    values = models(tmp_path, 8, ("F32",))
    merge(request(tmp_path, "sce selected", granularity="model"), out=tmp_path / "out")
    flat = {name: np.concatenate([own[key].ravel() for key in SHAPES]) for name, own in values.items()}
    expected = sce(flat["base"], [flat[name] - flat["base"] for name in "abc"], 0.3)
    merged = read_model(tmp_path / "out")
    assert np.abs(np.concatenate([merged[key].ravel() for key in SHAPES]) - expected).max() < 1e-6


def test_nearswap_moves_no_element_by_more_than_the_limit_and_reaches_near_ones(tmp_path):
    values = models(tmp_path, 9, ("BF16",))
    merge(request(tmp_path, "nearswap", dtype="float32"), out=tmp_path / "out")
    merged = read_model(tmp_path / "out")
    for key, base in values["base"].items():
        model = values["a"][key]
        near = np.abs(model - base) <= 0.02
        np.testing.assert_array_equal(merged[key][near], model[near])
        assert np.abs(merged[key] - base).max() <= 0.02 + 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nearswap"}, "needs --reach"),
        ({"method": "nuslerp-rows", "columns": True, "granularity": "layer"}, "does not go with --granularity layer"),
        ({"method": "sce", "select": 1.5}, "--select 1.5 is not between 0 and 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    names = "a" if options["method"] == "nearswap" else "ab"
    chosen = MergeRequest(models=tuple(tmp_path / name for name in names), base=tmp_path / "base", **options)
    with pytest.raises(UsageError, match=message):
        merge(chosen, out=tmp_path / "out")


@pytest.mark.parametrize("kind", ["normal", "equal", "zeros", "of all sizes", "one"])
def test_ranks_are_exact(kind):
    generator = np.random.default_rng(0)
    values = {
        "normal": np.abs(generator.standard_normal(5000)),
        "equal": np.full(5000, 0.3),
        "zeros": np.zeros(5000),
        "of all sizes": 2.0 ** generator.uniform(-140, 120, 5000),
        "one": np.array([0.5]),
    }[kind].astype(np.float32)
    pieces = [Piece(part[None].astype(np.float64), part.size, False) for part in np.array_split(values, 3)]
    ranks = [0, 1, 17, 2500, 4998, 4999, 5000]
    found = of_ranks(lambda piece: piece.values[0], lambda count: ranks, lambda look: sum(map(look, pieces)))
    ordered = np.append(np.sort(values).astype(np.float64), np.full(6000, np.inf))
    assert found == ordered[ranks].tolist()


def test_pieces_are_whole_rows():
    assert feeder.whole_rows(70_001, feeder.PIECE) == 70_001
    assert feeder.whole_rows(512, feeder.PIECE) % 512 == 0
