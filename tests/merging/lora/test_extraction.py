"""extract-lora: the adapter with its base is the model within the stated error, here and in peft."""

import json
from pathlib import Path

import numpy as np
import pytest
from faults import temporaries
from model_files import added, read_model, write_model

from gemma2.core.errors import Gemma2Error, InputError, OutputError, UsageError
from gemma2.core.outputs.manifest import read_manifest
from gemma2.merging import MergeRequest, merge
from gemma2.merging.inputs.adapter import open_adapter
from gemma2.merging.lora import extraction
from gemma2.merging.lora.extract_plan import ExtractRequest
from gemma2.merging.lora.extraction import extract_lora

SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    **{
        f"model.layers.{i}.{name}": shape
        for i in range(11)
        for name, shape in {
            "mlp.up_proj.weight": (24, 8),
            "mlp.down_proj.weight": (8, 24),
            "self_attn.q_proj.weight": (8, 8),
            "self_attn.q_proj.bias": (8,),
            "input_layernorm.weight": (8,),
        }.items()
    },
    "model.norm.weight": (8,),
    "lm_head.weight": (16, 8),
}
LINEAR = [name for name, shape in SHAPES.items() if len(shape) == 2 and "embed" not in name]
CONFIG = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": False}


def arrays(seed, scale=1.0, names=None):
    generator = np.random.default_rng(seed)
    made = {name: generator.standard_normal(shape) * scale for name, shape in SHAPES.items()}
    return {name: array * (names is None or name in names) for name, array in made.items()}


def models(root, changed=None, dtype="F32", **config):
    """base, and a model that differs from it in some tensors."""
    base = arrays(0)
    write_model(root / "base", base, dtype, config=CONFIG | config)
    write_model(root / "model", added(base, arrays(1, 0.1, changed)), dtype, config=CONFIG | config)
    return root


def extract(root, out="adapter", force=False, **options):
    request = ExtractRequest(model=root / "model", base=root / "base", **({"rank": 3} | options))
    return extract_lora(request, out=root / out, force=force).summary


def back(root, adapter="adapter"):
    """The tensors of base + adapter, merged by the engine."""
    request = MergeRequest(method="linear", models=(Path(f"{root / 'base'}+{root / adapter}"),), dtype="float32")
    merge(request, out=root / f"{adapter}-back", force=True)
    return read_model(root / f"{adapter}-back")


def group_of(name):
    return name.split(".")[2] if ".layers." in name else name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "options", [{"rank": 3}, {"rank": None, "explained": 0.8}, {"rank": 2, "explained": 0.8}], ids=str
)
def test_base_and_adapter_give_the_model_back_with_the_stated_error_in_every_layer(tmp_path, dtype, options):
    models(tmp_path)
    summary = extract(tmp_path, dtype=dtype, save_modules=("all",), **options)
    expected, found, base = read_model(tmp_path / "model"), back(tmp_path), read_model(tmp_path / "base")
    assert expected.keys() == found.keys()
    squares = {"error": {}, "norm": {}}
    for name, array in expected.items():
        for kind, other in (("error", found[name]), ("norm", base[name])):
            squares[kind][group_of(name)] = squares[kind].get(group_of(name), 0) + ((array - other) ** 2).sum()
    stated = {row["group"].removeprefix("layers."): row for row in summary["groups"]}
    for key, row in stated.items():
        group = (
            key
            if key.isdecimal()
            else {"embed_tokens": "model.embed_tokens.weight", "norm": "model.norm.weight"}.get(key, "lm_head.weight")
        )
        assert np.sqrt(squares["norm"][group]) == pytest.approx(row["norm"], rel=1e-6)
        error = np.sqrt(squares["error"][group] / squares["norm"][group])
        assert error == pytest.approx(row["error"], rel=1e-4, abs=3e-6)
    total = np.sqrt(sum(squares["error"].values()) / sum(squares["norm"].values()))
    assert summary["error"] == pytest.approx(total, rel=1e-4)
    assert summary["explained"] == pytest.approx(1 - total**2, rel=1e-4)


def test_whole_tensors_are_the_models_own_bytes(tmp_path):
    models(tmp_path, dtype="BF16")
    extract(tmp_path, save_modules=("all",))
    adapter = open_adapter(tmp_path / "adapter", "adapter")
    model, found = read_model(tmp_path / "model"), back(tmp_path)
    assert set(adapter.replaced) == set(SHAPES) - set(LINEAR)
    assert all((found[name] == model[name]).all() for name in adapter.replaced)


def test_full_rank_is_the_model_to_rounding(tmp_path):
    models(tmp_path)
    summary = extract(tmp_path, rank=64, save_modules=("all",))
    assert summary["error"] < 1e-6
    assert {row["rank"] for row in summary["tensors"]} == {8}
    for name, array in read_model(tmp_path / "model").items():
        np.testing.assert_allclose(back(tmp_path)[name] if name == LINEAR[0] else array, array, atol=1e-6)


def test_only_what_differs_is_adapted_and_named_so_that_peft_adapts_no_other_module(tmp_path):
    changed = ["model.layers.1.mlp.up_proj.weight", "model.layers.10.mlp.up_proj.weight", "model.norm.weight"]
    models(tmp_path, changed)
    extract(tmp_path, save_modules=("norm",))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj"]
    assert config["modules_to_save"] == ["model.norm"]  # "norm" would mean every layer norm to peft
    assert open_adapter(tmp_path / "adapter", "a").updates.keys() == set(changed[:2])


def test_a_module_can_be_stored_whole_instead_of_as_factors(tmp_path):
    models(tmp_path, ["lm_head.weight", LINEAR[0]])
    summary = extract(tmp_path, save_modules=("lm_head",))
    assert summary["whole"] == ["lm_head.weight"]
    assert [row["tensor"] for row in summary["tensors"]] == LINEAR[:1]


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.3.self_attn.q_proj.bias"]
)
def test_what_no_factors_can_hold_is_refused_with_its_share_or_left_out_with_a_warning(tmp_path, name):
    models(tmp_path, [name, LINEAR[0]])
    with pytest.raises(InputError) as caught:
        extract(tmp_path)
    module = name.rsplit(".", 2)[1]
    delta = arrays(1, 0.1)
    share = (delta[name] ** 2).sum() / ((delta[name] ** 2).sum() + (delta[LINEAR[0]] ** 2).sum())
    assert f"{name} differ" in str(caught.value)
    assert f"{share:.2g} of the squared difference" in str(caught.value)
    assert f"--save-modules {module}" in caught.value.hint
    assert not (tmp_path / "adapter").exists()
    assert extract(tmp_path, save_modules=(module,))["left_out"] == 0  # the fix that the error names
    summary = extract(tmp_path, "lacking", leave_out=True)
    assert [row["tensor"] for row in summary["missing"]] == [name]
    assert "1 tensors that differ are left out" in summary["warnings"][0]
    assert (back(tmp_path, "lacking")[name] == read_model(tmp_path / "base")[name]).all()


def test_linear_layers_outside_the_targets_are_not_dropped_in_silence(tmp_path):
    models(tmp_path, LINEAR)
    with pytest.raises(InputError, match=r"lm_head\.weight and \d+ more differ from the base"):
        extract(tmp_path, target_modules=("q_proj",))
    summary = extract(tmp_path, target_modules=("q_proj",), leave_out=True)
    assert {row["tensor"].split(".")[-2] for row in summary["tensors"]} == {"q_proj"}


def test_the_same_extraction_gives_the_same_bytes_and_a_complete_manifest(tmp_path):
    models(tmp_path)
    for out in ("one", "two"):
        extract(tmp_path, out, save_modules=("all",))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors", "gemma2.json"]
    for name in names[1:3]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    manifest = read_manifest(tmp_path / "one")
    assert manifest["command"] == "merge extract-lora"
    assert manifest["config"] == {"rank": 3, "save_modules": ["all"], "dtype": "float32"}
    assert [(one["role"], one["path"]) for one in manifest["parents"]] == [("base", "../base"), ("input", "../model")]
    assert set(manifest["files"]) == set(names) - {"gemma2.json"}


def test_an_adapter_can_be_made_of_an_adapter(tmp_path):
    """Of rank 3 again: the same product to rounding."""
    models(tmp_path, LINEAR)
    extract(tmp_path)
    request = ExtractRequest(model=Path(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"), base=tmp_path / "base", rank=3)
    assert extract_lora(request, out=tmp_path / "again").summary["error"] < 1e-5
    for name, array in back(tmp_path).items():
        np.testing.assert_allclose(back(tmp_path, "again")[name] if name == LINEAR[3] else array, array, atol=1e-5)


def test_the_recorded_init_is_the_base_where_none_is_named(tmp_path):
    models(tmp_path, LINEAR)
    request = ExtractRequest(model=tmp_path / "model", rank=2)
    with pytest.raises(UsageError, match="records no init"):
        extract_lora(request, out=tmp_path / "adapter")
    merge(MergeRequest(method="linear", models=(tmp_path / "base",)), out=tmp_path / "init")
    digest = read_manifest(tmp_path / "init")["files"]["model.safetensors"]["digest"]
    from gemma2.core.outputs.digests import digest_weights

    parent = {"role": "model", "path": "../init", "weights": digest_weights(tmp_path / "init")}
    assert digest
    (tmp_path / "model/gemma2.json").write_text(json.dumps({"parents": [parent], "status": "complete", "files": {}}))
    plan = extract_lora(request, out=tmp_path / "adapter").plan
    assert plan.base.path == tmp_path / "init"


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": None}, "needs a rank"),
        ({"rank": 0}, "--rank 0 is not a rank"),
        ({"explained": 0.0}, "--explained 0 is not a share"),
        ({"explained": 1.5}, "--explained 1.5 is not a share"),
        ({"target_modules": ("q_prok",)}, "did you mean 'q_proj'"),
        ({"target_modules": ("embed_tokens",)}, "no such module 'embed_tokens'"),
        ({"save_modules": ("norn",)}, "no such module 'norn'; did you mean 'norm'"),
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_refused_before_any_work(tmp_path, options, message):
    models(tmp_path)
    with pytest.raises(UsageError, match=message):
        extract(tmp_path, **options)


def test_models_that_do_not_fit_and_experts_are_refused(tmp_path):
    models(tmp_path)
    write_model(tmp_path / "model", arrays(0), config=CONFIG)
    with pytest.raises(InputError, match="does not differ from base"):
        extract(tmp_path)
    write_model(tmp_path / "model", {**arrays(0), "model.norm.weight": np.ones(9)}, config=CONFIG)
    with pytest.raises(InputError, match=r"model\.norm\.weight is \[8\] in base"):
        extract(tmp_path)
    write_model(tmp_path / "model", {**arrays(0), "model.norm.weight": np.full(8, np.nan)}, config=CONFIG)
    with pytest.raises(InputError, match=r"model .*model\.norm\.weight holds NaN or Inf"):
        extract(tmp_path)
    for name in ("base", "model"):
        expert = {"model.layers.0.mlp.experts.0.up_proj.weight": np.ones((8, 8))}
        write_model(tmp_path / name, arrays(0) | expert, config=CONFIG)
    with pytest.raises(InputError, match="mixture of experts"):
        extract(tmp_path)


def test_an_output_that_exists_or_overlaps_is_refused_and_force_replaces_it(tmp_path):
    models(tmp_path, LINEAR)
    extract(tmp_path)
    with pytest.raises(OutputError, match="exists"):
        extract(tmp_path)
    assert extract(tmp_path, force=True, rank=1)["largest_rank"] == 1
    with pytest.raises(OutputError, match="overlap"):
        extract(tmp_path, "model/adapter")


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
def test_an_interrupt_or_a_full_disk_leaves_nothing(tmp_path, monkeypatch, failure):
    models(tmp_path, LINEAR)
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise failure
        return real(*arguments)

    real = extraction.factorise
    monkeypatch.setattr(extraction, "factorise", fail)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((KeyboardInterrupt, Gemma2Error)):
        extract(tmp_path, "new/folder/adapter")
    assert sorted(tmp_path.rglob("*")) == before
    assert temporaries(tmp_path) == []
