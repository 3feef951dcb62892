"""Files in mergekit's keys: our engine against what mergekit 0.1.5 made of the same files, and what is refused."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from model_files import read_raw, stored, write_model

from gemma2.core.errors import UsageError
from gemma2.merging.methods.request import TokenSource, VocabularyChoice, settings_at
from gemma2.merging.recipes.mergekit import NAMES
from gemma2.merging.recipes.recipe import read_recipe
from gemma2.merging.recipes.run_recipe import merge_recipe

GOLDEN = Path(__file__).parent / "golden"
SPEC = importlib.util.spec_from_file_location("golden_cases", GOLDEN / "cases.py")
cases = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cases)


# --- agreement --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The inputs of the recordings, by dtype."""
    found = {}
    for dtype, kind in (("float32", "F32"), ("bfloat16", "BF16")):
        found[dtype] = tmp_path_factory.mktemp(dtype)
        for name in cases.SEEDS:
            config = {**cases.CONFIG, "dtype": dtype}
            write_model(found[dtype] / name, cases.arrays(name), kind, config=config)
    return found


@pytest.fixture(scope="module")
def recorded():
    return {dtype: dict(np.load(GOLDEN / f"{dtype}.npz")) for dtype in ("float32", "bfloat16")}


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def ours(place: Path, out: Path, text: str, dtype: str, monkeypatch) -> np.ndarray:
    """All tensors that our engine makes of a file, in the order of their names; bf16 as its bits."""
    monkeypatch.chdir(place)
    file = out.with_suffix(".yaml")
    file.write_text(text)
    merge_recipe(read_recipe(file), out=out)
    raw = read_raw(out)
    kind = np.float32 if dtype == "float32" else np.uint16
    return np.concatenate([np.frombuffer(raw[name][2], kind) for name in sorted(raw)])


def test_the_inputs_are_those_of_the_recordings(recorded):
    for found in recorded.values():
        assert str(found["inputs"]) == cases.digest()
        assert found.keys() == {"inputs", *cases.CASES}


def tensors_of(flat: np.ndarray) -> dict[str, np.ndarray]:
    """A recording by tensor."""
    shapes = {name: shape for name, shape in sorted(cases.shapes().items())}
    ends = np.cumsum([np.prod(shape) for shape in shapes.values()])
    return dict(zip(shapes, np.split(flat, ends[:-1]), strict=True))


def base_of(dtype: str) -> dict[str, np.ndarray]:
    return {name: stored(array, dtype).ravel() for name, array in cases.arrays("base").items()}


def deltas_of(dtype: str, key: str) -> list[np.ndarray]:
    """The task vectors of a tensor."""
    base = base_of(dtype)[key]
    return [stored(cases.arrays(model)[key], dtype).ravel() - base for model in "abc"]


def mean_cosine(dtype: str, key: str) -> float:
    units = np.array([delta / np.linalg.norm(delta) for delta in deltas_of(dtype, key)])
    return (units @ units.T)[np.triu_indices(3, 1)].mean()


def is_tied(dtype: str, key: str, weights: tuple[float, ...], densities: tuple[float, ...], gamma: float) -> bool:
    """Whether elements of one magnitude lie on both sides of a threshold (there some of them stay, here all), or
    positive and negative terms weigh the same (there positive wins, here none)."""
    total = np.zeros(np.prod(cases.shapes()[key]))
    for delta, weight, density in zip(deltas_of(dtype, key), weights, densities, strict=True):
        order = np.argsort(-np.abs(delta), kind="stable")
        sizes = np.abs(delta)[order]
        largest = int(gamma * len(sizes))
        end = largest + max(1, int(density * len(sizes)))
        if any(0 < rank < len(sizes) and sizes[rank - 1] == sizes[rank] for rank in (largest, end)):
            return True
        kept = order[largest:end]
        total[kept] += weight * delta[kept]
        total[np.setdiff1d(kept, np.flatnonzero(total))] = np.nan  # terms that cancel
    return bool(np.isnan(total).any())


def defined_otherwise(name: str, dtype: str) -> set[str]:
    """Tensors where mergekit's definition is another one, or none."""
    keys = cases.shapes().keys()
    if name == "model_stock":  # task vectors over 90 degrees apart on average: there t is negative, here 0
        return {key for key in keys if mean_cosine(dtype, key) <= 0}
    if name in cases.CHOICES:
        return {key for key in keys if is_tied(dtype, key, *cases.CHOICES[name])}
    return set()


def compared(name: str, found: np.ndarray, expected: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """What can be compared; where model_stock is defined otherwise, ours is the base."""
    other = defined_otherwise(name, dtype)
    ours, theirs = tensors_of(found), tensors_of(expected)
    if name == "model_stock":
        for key in other:
            np.testing.assert_array_equal(ours[key], base_of(dtype)[key])
    same = sorted(ours.keys() - other)
    assert len(same) > len(ours) / 3
    return np.concatenate([ours[key] for key in same]), np.concatenate([theirs[key] for key in same])


@pytest.mark.parametrize("name", cases.CASES)
def test_fp32_agrees_with_mergekit(places, recorded, tmp_path, monkeypatch, name):
    found = ours(places["float32"], tmp_path / "out", cases.CASES[name], "float32", monkeypatch)
    expected = recorded["float32"][name]
    assert found.shape == expected.shape
    found, expected = compared(name, found, expected, "F32")
    # Weights are of size 1 to 10, and mergekit sums in fp32. The Karcher mean ends at a step of 1e-5 radians: here that
    # step is still taken.
    assert np.abs(found - expected).max() < (3e-5 if name.startswith("karcher") else 4e-6)


@pytest.mark.parametrize("name", cases.CASES)
def test_bf16_agrees_with_mergekit_within_one_rounding(places, recorded, tmp_path, monkeypatch, name):
    text = cases.CASES[name] + cases.PRECISE
    found = widened(ours(places["bfloat16"], tmp_path / "out", text, "bfloat16", monkeypatch))
    left, right = compared(name, found, widened(recorded["bfloat16"][name]), "BF16")
    assert (left == right).mean() > 0.99
    assert (np.abs(left - right) <= 2.0**-7 * np.maximum(np.abs(left), np.abs(right)) + 1e-6).all()


def test_every_method_with_a_fixed_result_is_recorded():
    recorded = {text.split()[1] for text in cases.CASES.values()}
    random = {"dare_linear", "dare_ties", "della", "della_linear"}
    assert set(NAMES) - recorded == random


# --- what the keys become ---------------------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def steps(text: str):
        Path("merge.yaml").write_text(text)
        return read_recipe(Path("merge.yaml")).steps

    return steps


@pytest.fixture
def request_of(read):
    return lambda text: read(text)[0].request


BASED = "base_model: o\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 0.5}}\n"
TWO = "models:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 0.5}}\n"


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("linear", {"method": "linear", "weights": (1.0, 0.5), "normalize": True, "scale": None}),
        ("task_arithmetic", {"method": "task-arithmetic", "normalize": False, "scale": 1.0}),
        ("ties", {"method": "ties", "density": (1.0, 1.0), "normalize": True, "scale": 1.0}),
        ("dare_linear", {"method": "dare", "normalize": False, "rescale": True, "density": (1.0, 1.0)}),
        ("dare_ties", {"method": "dare-ties", "normalize": False, "rescale": True}),
        ("della", {"method": "della", "normalize": True, "epsilon": (0.0, 0.0)}),
        ("della_linear", {"method": "della-linear", "normalize": False}),
        ("breadcrumbs", {"method": "breadcrumbs", "normalize": False, "gamma": (0.01, 0.01)}),
        ("breadcrumbs_ties", {"method": "breadcrumbs-ties", "normalize": False}),
        ("multislerp", {"method": "karcher", "iterations": 0, "weights": (1.0, 0.5)}),
        ("sce", {"method": "sce", "select": 1.0}),
        ("ram", {"method": "ram", "threshold": 1e-5}),
        ("ramplus_tl", {"method": "ram-plus", "boost": 0.1, "cap": 0.2}),
        ("nuslerp", {"method": "nuslerp", "weights": (1.0, 0.5), "normalize": None}),
    ],
)
def test_the_defaults_are_those_of_mergekit(request_of, method, fields):
    request = request_of(f"merge_method: {method}\n{TWO if method == 'linear' else BASED}")
    assert {name: getattr(request, name) for name in fields} == fields
    assert request.granularity == "tensor"
    assert request.base == (None if method == "linear" else Path("o"))


def test_della_has_an_epsilon_where_something_is_dropped(request_of):
    request = request_of(f"merge_method: della\n{BASED}parameters: {{density: 0.5}}\n")
    assert request.epsilon == (0.15, 0.15)


def test_karcher_and_passthrough_and_dtypes(request_of):
    request = request_of(
        "merge_method: karcher\nmodels: [{model: a}, {model: b}]\ndtype: float32\nout_dtype: bfloat16\n"
    )
    assert (request.iterations, request.tolerance, request.dtype) == (10, 1e-5, "bfloat16")
    request = request_of("merge_method: passthrough\nmodels: [{model: a+lora}]\ndtype: float16\n")
    assert (request.models, request.scale, request.dtype) == ((Path("a+lora"),), 1.0, "float16")


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [
        ("tokenizer_source: base", "base"),
        ("tokenizer_source: union", "union"),
        ("tokenizer_source: x", "x"),
        ("tokenizer_source: model:x", "x"),
        ("tokenizer: {source: x, tokens: {}}", "x"),
        ("tokenizer: {}", "union"),
    ],
)
def test_tokenizer_source(request_of, text, tokenizer):
    assert request_of(f"merge_method: linear\n{TWO}{text}\n").tokenizer == tokenizer


def test_a_gradient_leaves_the_final_norm_at_its_first_point(request_of):
    request = request_of(f"merge_method: ties\n{BASED}parameters: {{density: [0.2, 1]}}\n")
    at = {name: settings_at(request, name, depth).density[0] for name, depth in {
        "model.embed_tokens.weight": 0.0,
        "model.layers.0.mlp.up_proj.weight": 0.0,
        "model.layers.2.mlp.up_proj.weight": 0.5,
        "model.layers.4.mlp.up_proj.weight": 1.0,
        "model.norm.weight": 1.0,
        "lm_head.weight": 1.0,
    }.items()}  # fmt: skip
    assert list(at.values()) == pytest.approx([0.2, 0.2, 0.6, 1.0, 0.2, 0.2])


def test_a_filter_is_a_part_of_the_name_and_not_a_pattern(request_of):
    def weight(text):
        values = f"[{{filter: '{text}', value: 3}}, {{value: 1}}]"
        request = request_of(f"merge_method: linear\nmodels: [{{model: a, parameters: {{weight: {values}}}}}]\n")
        return settings_at(request, "model.layers.1.mlp.up_proj.weight", 0.5).weights

    assert weight("mlp.up") == (3.0,)
    assert weight("m.p") == (1.0,)
    assert weight("*") == (3.0,)


def test_parameters_without_effect_are_noted(read):
    (step,) = read(f"merge_method: linear\n{TWO}parameters: {{density: 0.5, int8_mask: true}}\n")
    assert step.notes == (
        "parameters.density has no effect on linear",
        "parameters.int8_mask has no effect on linear",
    )


def test_what_it_reads_at_another_level_is_noted_at_the_top(read):
    (step,) = read(f"merge_method: linear\n{TWO}normalize: false\ninput_model_parameters: {{}}\n")
    assert step.request.normalize is True
    assert step.notes == (
        "normalize has no effect at the top of the file: mergekit reads it below parameters",
        "input_model_parameters has no effect at the top of the file: mergekit reads it below parameters",
    )


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("{model: {path: a}}", "a"),
        ("{model: {path: x/y, revision: v1}}", "x/y@v1"),
        ("{model: {path: x/y}, lora: {path: l/m, revision: r}}", "x/y+l/m@r"),
        ("x/y@v1", "x/y@v1"),
    ],
)
def test_a_model_with_a_revision(request_of, model, path):
    request = request_of(f"merge_method: karcher\nmodels: [{{model: {model}}}, {{model: b}}]\n")
    assert request.models == (Path(path), Path("b"))


def test_rows_of_tokens_and_padding(request_of):
    tokens = """
  tokens:
    <a>: {source: m, force: true}
    <b>: {source: {kind: zero}}
    <c>: {source: {kind: model_token, model: n, token: <d>}}
    <e>: {source: {kind: model_token, model: n, token_id: 7}}
"""
    choice = request_of(f"merge_method: linear\n{TWO}tokenizer:\n  pad_to_multiple_of: 64{tokens}").vocabulary
    assert choice == VocabularyChoice(
        (
            TokenSource("<a>", "m", force=True),
            TokenSource("<b>", None),
            TokenSource("<c>", "n", other="<d>"),
            TokenSource("<e>", "n", index=7),
        ),
        64,
    )


def test_several_documents_are_steps(read):
    text = "name: last\nmerge_method: slerp\nbase_model: one\nmodels: [{model: b}]\nparameters: {t: 0.5}\n"
    steps = read(f"{text}---\nname: one\nmerge_method: linear\n{TWO}---\nmerge_method: linear\n{TWO}")
    assert {step.name: step.needs for step in steps} == {"one": (), "last": ("one",), "final": ()}
    assert [step.name for step in steps].index("one") < [step.name for step in steps].index("last")


# --- what is refused --------------------------------------------------------------------------------------------------

SLICE = "{model: a, layer_range: [0, 2]}"
WRONG = {
    "base_model: a": "has no 'merge_method'",
    "merge_method: liner\nmodels: [{model: a}]": "merge_method is 'liner' in merge.yaml:1:15; did you mean 'linear'?",
    f"merge_method: linear\n{TWO}modles: 1": "unknown key 'modles' in merge.yaml:5:1; did you mean 'models'?",
    f"merge_method: linear\n{TWO}chat_template: [auto]": "chat_template is ['auto'], not a name",
    f"merge_method: linear\n{TWO}modules: {{}}": "modules is {}",
    "merge_method: linear\nmodules: {text: {}, vision: {}}": "modules has 2 modules (text, vision)",
    f"merge_method: linear\n{TWO}modules: {{text: {{models: []}}}}": "has 'models' next to 'modules'",
    "merge_method: linear\nmodules: {text: {model: a}}": "unknown key 'modules.text.model'",
    "merge_method: linear\nmodules: {text: {models: [a]}}": "modules.text.models[0] is 'a'",
    f"merge_method: linear\n{TWO}parameters: {{normalize: 2}}": "parameters.normalize is 2, not true or false",
    f"merge_method: linear\n{TWO}tokenizer: {{tokens: {{x: 1}}}}": "tokenizer.tokens.x is 1",
    f"merge_method: linear\n{TWO}tokenizer: {{tokens: {{x: {{force: true}}}}}}": "tokenizer.tokens.x.source is missing",
    f"merge_method: linear\n{TWO}tokenizer: {{tokens: {{x: {{source: {{kind: one}}}}}}}}": "source.kind is 'one'",
    f"merge_method: linear\n{TWO}tokenizer: {{pad_to_multiple_of: 0}}": "tokenizer.pad_to_multiple_of is 0",
    f"base_model: o\nmerge_method: linear\nslices: [{{sources: [{SLICE}], base_model: b}}]": "another base is 'o'",
    "merge_method: linear\nmodels: [{model: {path: a}}]": "unknown key 'models[0].model.path'",
    f"merge_method: linear\n{TWO}parameters: {{wight: 1}}": "unknown key 'parameters.wight' in merge.yaml:5:14;",
    f"merge_method: linear\n{TWO}parameters: 3": "parameters is 3",
    f"merge_method: linear\n{TWO}parameters: {{normalize: [true, false]}}": "parameters.normalize differs between",
    f"merge_method: linear\n{TWO}dtype: float64": "dtype is 'float64' in merge.yaml:5:8; choose one of bfloat16",
    f"merge_method: linear\n{TWO}slices: []": "needs 'models' or 'slices', and not both",
    f"merge_method: linear\n{TWO}tokenizer: {{sorce: x}}": "unknown key 'tokenizer.sorce'",
    f"merge_method: linear\n{TWO}tokenizer: {{}}\ntokenizer_source: base": "has 'tokenizer' and 'tokenizer_source'",
    "merge_method: linear\nmodels: [{model: a}, {model: b}]": "models[0] has no 'weight' for every tensor",
    "merge_method: linear\nmodels: [a, b]": "models[0] is 'a'",
    "merge_method: linear\nmodels: [{model: a, weight: 1}]": "unknown key 'models[0].weight'",
    "merge_method: linear\nmodels: [{model: a, parameters: {weight: big}}]": "models[0].parameters.weight is 'big'",
    "merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: mlp, value: 1}]}}]": "for every tensor",
    "merge_method: linear\nmodels: [{model: a, parameters: {weight: [{fliter: mlp, value: 1}]}}]": "weight[0].fliter",
    f"merge_method: ties\n{TWO}": "has no 'base_model' (ties needs one)",
    f"merge_method: slerp\n{BASED}parameters: {{t: 0.5}}": "has 3 models, slerp takes two",
    "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]": "has no 't' for every tensor",
    f"merge_method: model_stock\n{BASED}parameters: {{filter_wise: true}}": "sets filter_wise to True",
    f"merge_method: multislerp\n{TWO}parameters: {{eps: 0.1}}": "sets eps to 0.1",
    f"merge_method: linear\n{TWO}parameters: {{normalize: [{{filter: mlp, value: true}}]}}": "or slices with one",
    f"merge_method: passthrough\n{TWO}": "has 2 models, passthrough takes one",
    "merge_method: passthrough\nslices: [{sources: [{model: a}]}]": "slices[0].sources[0].layer_range is None",
    "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [2, 2]}]}]": "layer_range is [2, 2]",
    f"merge_method: linear\nslices: [{{sources: [{SLICE}, {{model: b, layer_range: [0, 1]}}]}}]": "1 and 2 layers",
    f"merge_method: ties\nbase_model: o\nslices: [{{sources: [{SLICE}]}}]": "lacks the base_model o",
    f"name: a\nmerge_method: linear\n{TWO}---\nname: a\nmerge_method: linear\n{TWO}": "two merges named 'a'",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_not_done_is_refused_by_its_key(read, text):
    with pytest.raises(UsageError) as caught:
        read(text)
    assert WRONG[text] in str(caught.value)
    assert "merge.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gradient_of_a_switch_between_equal_values_is_that_value(read):
    one = read(f"merge_method: linear\n{TWO}parameters: {{normalize: [false, false]}}")[0]
    assert one.request.normalize is False


def test_a_small_eps_is_noted_and_changes_nothing(read):
    texts = [f"merge_method: multislerp\n{TWO}parameters: {{eps: {eps}}}" for eps in ("1e-8", "1e-6")]
    usual, other = (read(text)[0] for text in texts)
    assert usual.request == other.request
    assert [note for note in other.notes if note.startswith("eps 1e-06 has no effect")]
    assert not usual.notes
