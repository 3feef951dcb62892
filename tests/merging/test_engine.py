"""Whole merges on disk, read back with the safetensors library and compared with fp64 arithmetic written here."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import added, from_bytes, random_arrays, read_model, read_raw, stored, write_model

from gemma2.core.outputs.manifest import read_manifest
from gemma2.merging import MergeRequest, merge

ULPS = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}  # largest relative rounding error of one store


@pytest.fixture
def triple(tmp_path):
    """A base and two policies in bf16 whose task vectors are random, and so about 90 degrees apart."""
    base = random_arrays(0)
    write_model(tmp_path / "base", base, "BF16")
    for number in (1, 2):
        write_model(tmp_path / f"rl-{number}", added(base, random_arrays(number, 0.1)), "BF16")
    return tmp_path


def slerp_request(root, **options):
    models = (root / "rl-1", root / "rl-2")
    return MergeRequest(**{"method": "slerp", "models": models, "base": root / "base", **options})


def layer(name: str) -> str:
    """The group of each tensor of these tests: written out, not taken from the engine."""
    return name.split(".")[2] if ".layers." in name else name


def reference_slerp(base, policies):
    """WARP stage 2 and appendix B.3 in fp64, one angle per layer."""
    merged = {}
    for group in {layer(name) for name in base}:
        names = sorted(name for name in base if layer(name) == group)
        deltas = [np.concatenate([(policy[name] - base[name]).ravel() for name in names]) for policy in policies]
        total = deltas[0]
        for k, delta in enumerate(deltas[1:], start=2):
            omega = np.arccos(total @ delta / (np.linalg.norm(total) * np.linalg.norm(delta)))
            total = (np.sin((1 - 1 / k) * omega) * total + np.sin(omega / k) * delta) / np.sin(omega)
        start = 0
        for name in names:
            size = base[name].size
            merged[name] = base[name] + total[start : start + size].reshape(base[name].shape)
            start += size
    return merged


def assert_close(found, expected, dtype, inputs):
    """Equal within one rounding on store plus fp32 arithmetic on the operands."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        largest = np.max([np.abs(model[name]) for model in inputs], axis=0)
        bound = ULPS[dtype] * np.abs(values) * 1.001 + 4 * 2.0**-24 * largest + (2.0**-25 if dtype == "F16" else 0.0)
        assert (np.abs(found[name] - values) <= bound).all(), name


def orthogonal(tmp_path):
    """fp32 models whose two task vectors are exactly orthogonal, of norm 2 in every tensor."""
    base = random_arrays(0)
    deltas = []
    for number in (0, 1):
        delta = {name: np.zeros(array.shape) for name, array in base.items()}
        for array in delta.values():
            array.flat[number] = 2.0
        deltas.append(delta)
    write_model(tmp_path / "base", base)
    for number, delta in enumerate(deltas, start=1):
        write_model(tmp_path / f"rl-{number}", added(base, delta))
    return tmp_path


def delta_norms(root, name):
    base, merged = read_model(root / "base"), read_model(root / name)
    return [np.linalg.norm(merged[key] - base[key]) for key in base]


def test_slerp_keeps_the_norm_of_orthogonal_task_vectors_and_the_average_shrinks_it_to_0_7071(tmp_path):
    root = orthogonal(tmp_path)
    merge(slerp_request(root), out=root / "slerp")
    merge(MergeRequest(method="linear", models=(root / "rl-1", root / "rl-2")), out=root / "lerp")
    assert delta_norms(root, "slerp") == pytest.approx([2.0] * 6, rel=1e-5)
    assert delta_norms(root, "lerp") == pytest.approx([2.0 * 0.70711] * 6, rel=1e-5)


def test_the_manifest_reports_angle_norms_and_coefficients_of_every_group(tmp_path):
    root = orthogonal(tmp_path)
    result = merge(slerp_request(root), out=root / "slerp")
    rows = read_manifest(root / "slerp")["summary"]["groups"]
    assert [row["group"] for row in rows] == ["embed_tokens", "layers.0", "layers.1", "norm"]
    assert [row["angle"] for row in rows] == pytest.approx([90.0] * 4, abs=1e-4)
    assert rows[1]["norms"] == pytest.approx([2 * 2**0.5] * 2, rel=1e-6)  # two tensors of a layer count together
    assert rows[1]["coefficients"] == pytest.approx([1 - 2 * 0.70711, 0.70711, 0.70711], abs=1e-4)
    assert json.loads(json.dumps(result.summary["groups"])) == rows
    assert result.warnings == ()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("models", [2, 3, 5])
def test_slerp_agrees_with_fp64(tmp_path, dtype, models):
    base = random_arrays(0)
    write_model(tmp_path / "base", base, dtype)
    for number in range(1, models + 1):
        write_model(tmp_path / f"rl-{number}", added(base, random_arrays(number, 0.1)), dtype)
    paths = [tmp_path / f"rl-{number}" for number in range(1, models + 1)]
    merge(MergeRequest(method="slerp", models=tuple(paths), base=tmp_path / "base"), out=tmp_path / "out")
    inputs = [read_model(tmp_path / "base"), *map(read_model, paths)]
    assert_close(read_model(tmp_path / "out"), reference_slerp(inputs[0], inputs[1:]), dtype, inputs)


@pytest.mark.parametrize(("t", "expected"), [(0.0, "rl-1"), (1.0, "rl-2")])
@pytest.mark.parametrize("based", [True, False])
def test_slerp_at_an_end_is_that_input_bit_for_bit(triple, t, expected, based):
    merge(slerp_request(triple, t=t, **({} if based else {"base": None})), out=triple / "out")
    assert read_raw(triple / "out") == read_raw(triple / expected)


def test_liti_at_0_is_the_base_and_at_1_the_model_bit_for_bit(triple):
    request = MergeRequest(method="liti", models=(triple / "rl-1",), base=triple / "base", etas=(0.0, 0.25, 1.0))
    result = merge(request, out=triple / "front")
    assert [path.name for path in result.outputs] == ["eta-0.00", "eta-0.25", "eta-1.00"]
    assert read_raw(triple / "front/eta-0.00") == read_raw(triple / "base")
    assert read_raw(triple / "front/eta-1.00") == read_raw(triple / "rl-1")
    base, policy = read_model(triple / "base"), read_model(triple / "rl-1")
    between = {name: 0.75 * base[name] + 0.25 * policy[name] for name in base}
    assert_close(read_model(triple / "front/eta-0.25"), between, "BF16", [base, policy])


def test_liti_moves_towards_the_named_base_and_does_not_change_it(triple):
    before = read_raw(triple / "base")
    merge(MergeRequest(method="liti", models=(triple / "rl-1",), base=triple / "base", etas=(0.3,)), out=triple / "out")
    assert read_raw(triple / "base") == before
    assert read_raw(triple / "out") not in (before, read_raw(triple / "rl-1"))


def test_several_etas_from_one_read_equal_single_merges(triple):
    for etas, out in (((0.3, 0.7), "both"), ((0.7,), "one")):
        merge(MergeRequest(method="liti", models=(triple / "rl-1",), base=triple / "base", etas=etas), out=triple / out)
    assert read_raw(triple / "both/eta-0.70") == read_raw(triple / "one")
    assert read_manifest(triple / "both/eta-0.70")["config"]["etas"] == [0.7]


def test_fused_warp_is_slerp_then_liti_within_one_rounding(triple):
    merge(slerp_request(triple, dtype="float32"), out=triple / "slerp")
    liti = MergeRequest(method="liti", models=(triple / "slerp",), base=triple / "base", etas=(0.3,), dtype="bfloat16")
    merge(liti, out=triple / "liti")
    merge(slerp_request(triple, method="warp", etas=(0.3,)), out=triple / "warp")
    steps, fused = read_model(triple / "liti"), read_model(triple / "warp")
    for name, values in steps.items():
        spacing = np.exp2(np.floor(np.log2(np.maximum(np.abs(values), 1e-30))) - 7)
        assert (np.abs(values - fused[name]) <= spacing).all()
    assert np.mean([np.mean(values == fused[name]) for name, values in steps.items()]) > 0.99


@pytest.mark.parametrize("decay", [0.9, None])
def test_ema_of_checkpoints_is_the_recursion(tmp_path, decay):
    checkpoints = []
    for number in range(4):
        write_model(tmp_path / f"step-{number}", random_arrays(number), "F32")
        checkpoints.append(read_model(tmp_path / f"step-{number}"))
    paths = tuple(tmp_path / f"step-{number}" for number in range(4))
    merge(MergeRequest(method="ema", models=paths, decay=decay), out=tmp_path / "out")
    average = checkpoints[0]
    for k, checkpoint in enumerate(checkpoints[1:], start=2):
        kept = (k - 1) / k if decay is None else decay  # uniform: the running mean
        average = {name: kept * average[name] + (1 - kept) * checkpoint[name] for name in average}
    assert_close(read_model(tmp_path / "out"), average, "F32", checkpoints)


def test_linear_weights_are_those_of_the_models_in_order(tmp_path):
    for number, value in enumerate((1.0, 10.0, 100.0)):
        write_model(tmp_path / str(number), {"model.norm.weight": np.full(4, value)})
    models = tuple(tmp_path / str(number) for number in range(3))
    merge(MergeRequest(method="linear", models=models, weights=(0.5, 0.25, 0.25)), out=tmp_path / "out")
    assert read_model(tmp_path / "out")["model.norm.weight"].tolist() == [28.0] * 4
    merge(MergeRequest(method="linear", models=models), out=tmp_path / "mean")
    assert read_model(tmp_path / "mean")["model.norm.weight"] == pytest.approx([37.0] * 4, rel=1e-7)


@pytest.mark.parametrize("method", ["slerp", "linear", "ema"])
def test_identical_models_merge_to_themselves(tmp_path, method):
    arrays = random_arrays(0)
    arrays["model.norm.weight"][0] = -0.0
    for name in "abc":
        write_model(tmp_path / name, arrays, "F32")
    models = tuple(tmp_path / name for name in "abc")
    merge(MergeRequest(method=method, models=models, decay=0.3 if method == "ema" else None), out=tmp_path / "out")
    assert read_raw(tmp_path / "out") == read_raw(tmp_path / "a")


def test_the_norm_of_a_long_tensor_is_right_to_1e_6(tmp_path):
    shapes = {"model.embed_tokens.weight": (1 << 23,)}
    for name, values in (("a", 0.1), ("b", 0.3)):
        write_model(tmp_path / name, {key: np.full(shape, values) for key, shape in shapes.items()}, "F32")
    result = merge(MergeRequest(method="linear", models=(tmp_path / "a", tmp_path / "b")), out=tmp_path / "out")
    exact = [float(np.float32(value)) * 2**11.5 for value in (0.1, 0.3)]
    assert result.groups[0].norms == pytest.approx(exact, rel=1e-6)


def test_a_frozen_layer_falls_back_to_lerp_in_that_group_only(triple):
    base = read_model(triple / "base")
    policy = read_model(triple / "rl-1")
    policy["model.norm.weight"] = base["model.norm.weight"]
    write_model(triple / "rl-1", policy, "BF16")
    result = merge(slerp_request(triple), out=triple / "out")
    assert {group.group: group.fallback for group in result.groups if group.fallback} == {"norm": "zero task vector"}
    assert result.groups[3].coefficients == ((0.0, 0.5, 0.5),)
    assert any("zero task vector: SLERP fell back to LERP in norm" in line for line in result.warnings)


def test_a_reward_model_with_its_score_head_is_averaged(tmp_path):
    config = {"architectures": ["Gemma2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    shapes = {"model.norm.weight": (8,), "score.weight": (1, 8)}
    for number in (1, 2):
        write_model(tmp_path / f"rm-{number}", random_arrays(number, shapes=shapes), config=config)
    first, second = tmp_path / "rm-1", tmp_path / "rm-2"
    result = merge(MergeRequest(method="linear", models=(first, second)), out=tmp_path / "out")
    mean = (read_model(first)["score.weight"] + read_model(second)["score.weight"]) / 2
    assert read_model(tmp_path / "out")["score.weight"] == pytest.approx(mean, rel=1e-6)
    assert [group.group for group in result.groups] == ["norm", "score"]


def with_head(arrays):
    return arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]}


def test_a_tied_embedding_that_is_stored_twice_is_merged_and_written_once(triple):
    merge(slerp_request(triple, granularity="model"), out=triple / "plain")
    for name in ("base", "rl-1", "rl-2"):
        write_model(triple / name, with_head(read_model(triple / name)), "BF16")
    result = merge(slerp_request(triple, granularity="model"), out=triple / "out")
    assert "lm_head.weight" not in read_raw(triple / "out")
    assert read_raw(triple / "out") == read_raw(triple / "plain")  # counted once in the angle too
    assert result.plan.notes == (
        "lm_head.weight repeats model.embed_tokens.weight in base, model 1, model 2: merged and written once",
    )


def test_an_untied_head_is_a_separate_group(triple):
    for name in ("base", "rl-1", "rl-2"):
        write_model(triple / name, with_head(read_model(triple / name)), "BF16", config={"tie_word_embeddings": False})
    result = merge(slerp_request(triple), out=triple / "out")
    assert "lm_head.weight" in read_raw(triple / "out")
    assert "lm_head" in [group.group for group in result.groups]


@pytest.mark.parametrize(("granularity", "groups"), [("tensor", 6), ("layer", 4), ("model", 1)])
def test_granularity_decides_what_shares_coefficients(triple, granularity, groups):
    result = merge(slerp_request(triple, granularity=granularity), out=triple / "out")
    assert len({group.coefficients for group in result.groups}) == groups


def test_the_output_does_not_depend_on_threads_cuts_or_shards(tmp_path):
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (70, 331 + i) for i in range(12)}
    shapes["model.embed_tokens.weight"] = (16, 1024)
    base = random_arrays(0, shapes=shapes)
    for root, shards in ((tmp_path / "one", 1), (tmp_path / "three", 3)):
        write_model(root / "base", base, "BF16", shards=shards)
        for number in (1, 2):
            delta = random_arrays(number, 0.01, shapes=shapes)
            write_model(root / f"rl-{number}", added(base, delta), "F32", shards=shards)
    files = set()
    for root, threads, cut in (("one", 1, 4096), ("one", 3, 4096), ("one", 2, 1 << 18), ("three", 2, 8192)):
        out = tmp_path / f"{root}-{threads}-{cut}"
        merge(slerp_request(tmp_path / root, threads=threads), out=out, cut=cut)
        files.add((out / "model.safetensors").read_bytes())
    assert len(files) == 1


def test_the_output_takes_the_dtype_of_the_first_model_or_the_one_asked_for(triple):
    merge(slerp_request(triple, dtype="float16"), out=triple / "half")
    assert {dtype for dtype, _, _ in read_raw(triple / "half").values()} == {"F16"}
    assert json.loads((triple / "half/config.json").read_text())["dtype"] == "float16"
    merge(slerp_request(triple), out=triple / "same")
    assert {dtype for dtype, _, _ in read_raw(triple / "same").values()} == {"BF16"}
    assert (triple / "same/config.json").read_bytes() == (triple / "rl-1/config.json").read_bytes()


def test_only_tokenizer_and_generation_config_of_the_first_model_are_copied(triple):
    for name in ("generation_config.json", "tokenizer_config.json", "optimizer.pt", "metrics.jsonl"):
        (triple / "rl-1" / name).write_text('{"eos_token_id": [1, 107]}')
    merge(slerp_request(triple), out=triple / "out")
    names = {path.name for path in (triple / "out").iterdir()}
    companions = {"config.json", "generation_config.json", "tokenizer_config.json"}
    assert names == companions | {"model.safetensors", "README.md", "gemma2.json", "merge.yaml"}


def test_a_large_output_is_written_in_shards_with_an_index(triple, monkeypatch):
    monkeypatch.setattr("gemma2.merging.streaming.writer.MAX_SHARD_BYTES", 600)
    merge(slerp_request(triple), out=triple / "sharded")
    monkeypatch.undo()
    merge(slerp_request(triple), out=triple / "whole")
    index = json.loads((triple / "sharded/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (triple / "sharded").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 1
    assert read_raw(triple / "sharded") == read_raw(triple / "whole")
    merge(slerp_request(triple, models=(triple / "sharded", triple / "rl-2")), out=triple / "again")


DTYPES = st.sampled_from(["BF16", "F16", "F32"])
SHAPE = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_checkpoints_agree_with_fp64(tmp_path_factory, data):
    """Random shapes (scalars and empty tensors too), key orders, mixed dtypes, shard splits."""
    root = tmp_path_factory.mktemp("random")
    shapes = {f"model.layers.{i}.w.weight": data.draw(SHAPE) for i in range(data.draw(st.integers(1, 4)))}
    shapes["model.norm.weight"] = (data.draw(st.integers(1, 9000)),)
    weights = data.draw(st.sampled_from([(0.5, 0.5), (0.2, 0.3, 0.5), (1.5, -0.5)]))
    inputs, paths = [], []
    for number in range(len(weights)):
        arrays = random_arrays(number, shapes=shapes)
        kinds = {name: data.draw(DTYPES) for name in shapes}
        order = data.draw(st.permutations(list(arrays)))
        path = root / str(number)
        shards = data.draw(st.integers(1, min(3, len(shapes))))
        write_model(path, {name: arrays[name] for name in order}, kinds, shards=shards)
        inputs.append({name: stored(arrays[name], kinds[name]) for name in arrays})
        paths.append(path)
    dtype = data.draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    merge(MergeRequest(method="linear", models=tuple(paths), weights=weights, dtype=dtype), out=root / "out")
    expected = {name: sum(w * model[name] for w, model in zip(weights, inputs, strict=True)) for name in shapes}
    found = {name: from_bytes(raw, kind, shape) for name, (kind, shape, raw) in read_raw(root / "out").items()}
    stored_as = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    assert_close(found, expected, stored_as, inputs)


def test_the_result_is_correctly_rounded_nearly_always(tmp_path):
    shapes = {"model.norm.weight": (200_000,)}
    base = random_arrays(0, shapes=shapes)
    write_model(tmp_path / "base", base, "BF16")
    for number in (1, 2):
        write_model(tmp_path / f"rl-{number}", added(base, random_arrays(number, 0.01, shapes=shapes)), "BF16")
    merge(slerp_request(tmp_path), out=tmp_path / "out")
    inputs = [read_model(tmp_path / name) for name in ("base", "rl-1", "rl-2")]
    expected = stored(reference_slerp(inputs[0], inputs[1:])["model.norm.weight"], "BF16")
    assert np.mean(read_model(tmp_path / "out")["model.norm.weight"] == expected) > 0.9999
