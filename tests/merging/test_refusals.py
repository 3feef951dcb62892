"""Refusals of a merge before any work: each with its message, and with nothing left behind."""

import json
import os
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from model_files import added, random_arrays, read_model, safetensors_bytes, write_model

from gemma2.core.errors import Gemma2Error, InputError, OutputError, UsageError
from gemma2.merging import MergeRequest, merge


@pytest.fixture
def root(tmp_path):
    base = random_arrays(0)
    write_model(tmp_path / "base", base, "BF16")
    for number in (1, 2):
        write_model(tmp_path / f"rl-{number}", added(base, random_arrays(number, 0.1)), "BF16")
    return tmp_path


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def refused(root: Path, kind: type[Gemma2Error], message: str, out: str = "out", force: bool = False, **options):
    """Runs a merge that must fail with `message`, and checks that it left nothing."""
    before = tree(root)
    request = {"method": "slerp", "models": (root / "rl-1", root / "rl-2"), "base": root / "base"} | options
    with pytest.raises(kind) as caught:
        merge(MergeRequest(**request), out=root / out, force=force)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(root) == before


def change_config(directory: Path, **values):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


def rewrite(directory: Path, dtype="BF16", **replaced):
    """Change tensors of a model; None removes one."""
    arrays = read_model(directory) | {name.replace("__", "."): value for name, value in replaced.items()}
    write_model(directory, {name: array for name, array in arrays.items() if array is not None}, dtype)


# --- models that do not fit ---


def test_different_architectures(root):
    change_config(root / "rl-2", architectures=["LlamaForCausalLM"], model_type="llama")
    refused(root, InputError, f"architectures differs: Gemma2ForCausalLM in model 1 {root / 'rl-1'}, LlamaForCausalLM")


def test_different_configuration(root):
    change_config(root / "base", final_logit_softcapping=None, rope_parameters={"rope_theta": 10000.0})
    change_config(root / "rl-1", final_logit_softcapping=30.0, rope_theta=5000.0)
    refused(root, InputError, "rope_parameters.rope_theta differs: 5000.0 in model 1")


def test_a_difference_that_is_allowed_is_recorded_and_others_are_still_refused(root):
    change_config(root / "rl-2", hidden_activation="gelu", rope_scaling={"type": "linear", "factor": 8.0})
    both = "--allow-config hidden_activation --allow-config rope_parameters.factor --allow-config rope_parameters.rope"
    refused(root, InputError, "hidden_activation differs: gelu_pytorch_tanh in model 1")
    refused(root, InputError, both)
    refused(root, InputError, "rope_parameters.factor differs: (absent) in", allow_config=("hidden_activation",))
    allowed = ("hidden_activation", "rope_parameters")
    models = (root / "rl-1", root / "rl-2")
    result = merge(MergeRequest(method="linear", models=models, allow_config=allowed), out=root / "out")
    assert "hidden_activation differs: gelu_pytorch_tanh in model 1, gelu in model 2; allowed" in result.plan.notes[0]
    manifest = json.loads((root / "out/gemma2.json").read_text())
    assert manifest["config"]["allow_config"] == list(allowed)
    assert manifest["summary"]["notes"] == list(result.plan.notes)


def test_a_difference_that_decides_shapes_cannot_be_allowed(root):
    change_config(root / "rl-1", num_attention_heads=8)
    change_config(root / "rl-2", num_attention_heads=4)
    message = "num_attention_heads differs: 8 in model 1"
    refused(root, InputError, message, allow_config=("num_attention_heads",))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": 16}, "hidden_size is 16, but model.embed_tokens.weight is [16, 8]"),
        ({"vocab_size": 15}, "vocab_size is 15, but model.embed_tokens.weight is [16, 8]"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but the tensors have 2 layers"),
        ({"intermediate_size": 24}, "intermediate_size is 24, but model.layers.0.mlp.up_proj.weight is [12, 8]"),
        (
            {"num_attention_heads": 3, "head_dim": 4},
            "num_attention_heads is 3, but model.layers.0.self_attn.q_proj.weight is [8, 8]",
        ),
        ({"model_type": "gemma3_text"}, "architecture Gemma2ForCausalLM and model_type gemma3_text differ"),
    ],
)
def test_a_configuration_that_its_own_tensors_contradict(root, keys, message):
    for name in ("rl-1", "rl-2"):
        change_config(root / name, **keys)
    refused(root, InputError, message)


def test_keys_that_versions_and_fine_tuning_change_are_not_compared(root):
    change_config(root / "rl-2", transformers_version="4.42.1", eos_token_id=[1, 107], use_cache=True)
    merge(MergeRequest(method="linear", models=(root / "rl-1", root / "rl-2")), out=root / "out")


def test_a_missing_tensor(root):
    rewrite(root / "rl-2", model__norm__weight=None)
    refused(root, InputError, f"model 1 {root / 'rl-1'} has model.norm.weight, model 2 {root / 'rl-2'} does not")


def test_an_extra_tensor(root):
    rewrite(root / "base", extra__weight=np.zeros(3))
    refused(root, InputError, f"base {root / 'base'} has extra.weight, model 1 {root / 'rl-1'} does not")


def test_another_shape(root):
    rewrite(root / "rl-2", model__norm__weight=np.zeros(9))
    refused(root, InputError, "model.norm.weight is [8] in model 1")


def test_a_stored_head_that_is_not_the_embedding_it_is_tied_to(root):
    for name in ("base", "rl-1", "rl-2"):
        rewrite(root / name, lm_head__weight=np.ones((16, 8)))
    refused(root, InputError, "lm_head.weight differs from model.embed_tokens.weight, though config.json ties them")


def tokenizer(vocab, merges=(), added=()):
    model = {"type": "BPE", "vocab": vocab, "merges": list(merges)}
    return json.dumps({"model": model, "added_tokens": [{"content": text, "id": i} for text, i in added]})


def test_different_vocabularies(root):
    (root / "rl-1/tokenizer.json").write_text(tokenizer({"a": 0, "b": 1}))
    (root / "rl-2/tokenizer.json").write_text(tokenizer({"a": 0, "c": 1}))
    refused(root, InputError, "differ: ")


def test_different_added_tokens(root):
    (root / "rl-1/tokenizer.json").write_text(tokenizer({"a": 0}, added=[("<eos>", 1)]))
    (root / "base/tokenizer.json").write_text(tokenizer({"a": 0}, added=[("<eos>", 2)]))
    refused(root, InputError, "'<eos>' is 1 and 2")


def test_different_merges(root):
    (root / "rl-1/tokenizer.json").write_text(tokenizer({"a": 0}, merges=["a b"]))
    (root / "rl-2/tokenizer.json").write_text(tokenizer({"a": 0}, merges=["b a"]))
    refused(root, InputError, "differ: 'merge ")


def test_the_same_tokenizer_in_another_spelling_is_accepted(root):
    (root / "rl-1/tokenizer.json").write_text(tokenizer({"a": 0, "b": 1}, merges=["a b"]))
    (root / "rl-2/tokenizer.json").write_text(tokenizer({"b": 1, "a": 0}, merges=[["a", "b"]]))
    merge(MergeRequest(method="linear", models=(root / "rl-1", root / "rl-2")), out=root / "out")


# --- directories that are not usable models ---


def test_a_companion_that_links_out_of_its_model(root, tmp_path_factory):
    """The output would take in a private file, under a name that people upload."""
    private = tmp_path_factory.mktemp("private") / "keys.json"
    private.write_text('{"secret": "s3cret"}')
    for name in ("generation_config.json", "special_tokens_map.json", "chat_template.jinja"):
        link = root / "base" / name
        link.unlink(missing_ok=True)
        link.symlink_to(private)
        refused(root, InputError, f"base/{name} is a link to a file elsewhere")
        link.unlink()


def test_companions_of_the_hub_cache_are_links_to_its_blobs(root):
    cache = root / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    (root / "rl-1").rename(cache / "snapshots" / "0a1b")
    for path in list((cache / "snapshots" / "0a1b").iterdir()):
        path.rename(cache / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    merge(MergeRequest(method="linear", models=(cache / "snapshots" / "0a1b", root / "rl-2")), out=root / "out")


def test_a_missing_directory(root):
    refused(root, InputError, f"base {root / 'nowhere'} is not a directory", base=root / "nowhere")


def test_a_directory_without_configuration(root):
    (root / "rl-2/config.json").unlink()
    refused(root, InputError, f"model 2 {root / 'rl-2'} holds no config.json")


def test_an_unreadable_configuration(root):
    (root / "rl-2/config.json").write_text("{")
    refused(root, InputError, "rl-2/config.json is not readable JSON")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", "holds pickled weights only (pytorch_model.bin)"),
        ("model.gguf", "holds GGUF weights only"),
        ("notes.txt", "holds neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_a_directory_without_safetensors_weights(root, file, message):
    (root / "rl-2/model.safetensors").rename(root / "rl-2" / file)
    refused(root, InputError, f"model 2 {root / 'rl-2'} {message}")


def test_an_adapter_without_its_model(root):
    (root / "rl-2/model.safetensors").unlink()
    (root / "rl-2/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    tensors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": ("F32", shape, bytes(64))
        for part, shape in (("A", [2, 8]), ("B", [8, 2]))
    }
    (root / "rl-2/adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    message = f"model 2 {root / 'rl-2'} is an adapter, and its model (not recorded) was not found; name it: MODEL+"
    refused(root, InputError, message, method="linear", base=None)


def test_code_of_the_model(root):
    change_config(root / "rl-2", auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    refused(root, InputError, "rl-2/config.json requires its own code (auto_map)")


def test_code_of_the_tokenizer(root):
    (root / "base/tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.T", null]}}')
    refused(root, InputError, "base/tokenizer_config.json requires its own code (auto_map)")


def test_an_unknown_architecture(root):
    change_config(root / "rl-1", architectures=["MyModel"])
    refused(root, InputError, "architecture MyModel is not supported by merges")


def test_quantised_weights(root):
    change_config(root / "rl-1", quantization_config={"quant_method": "gptq"})
    refused(root, InputError, "rl-1/config.json has quantised weights (quantization_config)")


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "F64"])
def test_weights_of_a_dtype_that_cannot_be_merged(root, dtype):
    data = (root / "rl-2/model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    size = {"I8": 1, "F8_E4M3": 1, "F64": 8}[dtype]
    last = header["model.norm.weight"]
    last |= {"dtype": dtype, "shape": [16 // size]}
    text = json.dumps(header).encode()
    (root / "rl-2/model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(root, InputError, f"model.norm.weight is {dtype}; only BF16, F16 and F32 can be merged")


def test_an_unfinished_output_of_ours(root):
    (root / "rl-2/gemma2.json").write_text('{"status": "running"}')
    refused(root, InputError, f"model 2 {root / 'rl-2'} is an unfinished output (status 'running')")


def test_a_file_and_an_index_side_by_side(root):
    (root / "rl-1/model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    refused(root, InputError, "holds both model.safetensors and model.safetensors.index.json")


def sharded(root):
    write_model(root / "sharded", read_model(root / "rl-1"), "BF16", shards=2)
    index = root / "sharded/model.safetensors.index.json"
    return index, json.loads(index.read_text())


@pytest.mark.parametrize("place", ["../base/model.safetensors", "/etc/passwd", "..", ""])
def test_an_index_that_leads_out_of_its_directory(root, place):
    index, content = sharded(root)
    content["weight_map"]["model.norm.weight"] = place
    index.write_text(json.dumps(content))
    refused(root, InputError, "not a file name", models=(root / "sharded", root / "rl-2"))


def test_an_index_that_names_a_tensor_its_shard_does_not_hold(root):
    index, content = sharded(root)
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    message = "ghost is in the index but not in model-00001-of-00002.safetensors"
    refused(root, InputError, message, models=(root / "sharded", root / "rl-2"))


def test_a_shard_that_holds_a_tensor_the_index_does_not_name(root):
    index, content = sharded(root)
    file = content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    message = f"model.norm.weight is in {file} but not in the index"
    refused(root, InputError, message, models=(root / "sharded", root / "rl-2"))


def test_a_missing_shard(root):
    sharded(root)
    (root / "sharded/model-00002-of-00002.safetensors").unlink()
    message = "model-00002-of-00002.safetensors cannot be read"
    refused(root, InputError, message, models=(root / "sharded", root / "rl-2"))


def test_links_of_the_hub_cache_are_followed(root):
    (root / "blobs").mkdir()
    (root / "rl-1/model.safetensors").rename(root / "blobs/abc")
    os.symlink("../blobs/abc", root / "rl-1/model.safetensors")
    merge(MergeRequest(method="linear", models=(root / "rl-1", root / "rl-2")), out=root / "out")


# --- values ---


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["slerp", "liti", "linear"])
@pytest.mark.parametrize("culprit", ["rl-1", "base"])
def test_a_weight_that_is_not_finite(root, value, method, culprit):
    arrays = read_model(root / culprit)
    arrays["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    write_model(root / culprit, arrays, "F32")
    options = {
        "slerp": {},
        "liti": {
            "models": (root / "rl-1",),
            "etas": (0.0,),
        },  # at 0 its weight is 0, and the value is noticed nevertheless
        "linear": {"models": (root / "rl-1", root / "base"), "base": None},
    }[method]
    message = f"{root / culprit}: model.layers.1.mlp.up_proj.weight holds {value} at element 26"
    refused(root, InputError, message, method=method, **options)


def test_folders_above_an_output_that_failed_are_removed(root):
    write_model(root / "rl-1", {name: array * np.nan for name, array in read_model(root / "rl-1").items()}, "BF16")
    options = {"method": "liti", "models": (root / "rl-1",), "etas": (0.3, 0.5)}
    refused(root, InputError, "holds nan at element 0", out="new/deep/front", **options)


def test_a_result_that_the_output_dtype_cannot_hold(root):
    write_model(root / "rl-1", {name: array * 1e6 for name, array in read_model(root / "rl-1").items()}, "BF16")
    refused(root, InputError, "overflows F16; give --dtype float32", dtype="float16")


def test_antiparallel_task_vectors(root):
    base, first = read_model(root / "base"), read_model(root / "rl-1")
    write_model(root / "rl-1", first, "F32")
    write_model(root / "rl-2", {name: 2 * base[name] - first[name] for name in base}, "F32")
    refused(root, InputError, "embed_tokens: task vector 2 points opposite to what it is merged with (180.00 degrees)")


# --- outputs ---


@pytest.mark.parametrize("out", ["rl-1", "rl-1/merged", "."])
def test_an_output_that_is_in_or_around_an_input(root, out):
    refused(root, OutputError, "overlap", out=out, force=True)


def test_an_output_that_is_an_input_through_a_link(root):
    os.symlink(root / "base", root / "alias")
    refused(root, OutputError, "overlap", out="alias", force=True)


def test_an_existing_output(root):
    (root / "out").mkdir()
    (root / "out/gemma2.json").write_text("{}")
    refused(root, OutputError, "exists; choose another --out, or replace it with --force")


def test_force_replaces_an_existing_output(root):
    (root / "out").mkdir()
    (root / "out/old.txt").write_text("old")
    (root / "out/gemma2.json").write_text('{"files": {"old.txt": {}}}')
    request = MergeRequest(method="linear", models=(root / "rl-1", root / "rl-2"))
    merge(request, out=root / "out", force=True)
    assert not (root / "out/old.txt").exists()
    assert (root / "out/gemma2.json").exists()


def test_one_existing_output_of_several_etas(root):
    (root / "out/eta-0.50").mkdir(parents=True)
    (root / "out/eta-0.50/kept.txt").write_text("mine")
    refused(root, OutputError, "eta-0.50 exists", method="liti", models=(root / "rl-1",), etas=(0.3, 0.5))


def test_too_little_room_on_the_disk(root, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("gemma2.merging.plan.merge_plan.shutil.disk_usage", lambda path: usage(0, 0, 100))
    refused(root, OutputError, "B free; free some space, or choose another --out")


def test_a_full_disk_while_writing(root, monkeypatch):
    def full(descriptor, data, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemma2.merging.streaming.writer.os.pwrite", full)
    refused(root, OutputError, "writing the output failed (No space left on device)")


def test_an_input_that_shrinks_while_it_is_read(root, monkeypatch):
    from gemma2.merging import engine

    begin = engine._groups

    def shrink(*arguments):
        path = root / "rl-2/model.safetensors"
        os.truncate(path, path.stat().st_size - 600)
        yield from begin(*arguments)

    monkeypatch.setattr(engine, "_groups", shrink)
    refused(root, InputError, "ended while model.")


def test_an_interrupt_leaves_nothing(root, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("gemma2.merging.streaming.dense_stream.Stream._write", interrupt)
    before = tree(root)
    with pytest.raises(KeyboardInterrupt):
        merge(MergeRequest(method="slerp", models=(root / "rl-1", root / "rl-2"), base=root / "base"), out=root / "out")
    assert tree(root) == before


# --- requests ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lerp"}, "unknown merge method 'lerp'; did you mean 'slerp'?"),
        ({"models": ()}, "merge slerp takes 2 to 64 models, 0 given"),
        ({"method": "liti"}, "merge liti takes 1 model, 2 given"),
        ({"etas": (0.3,)}, "merge slerp does not take --eta"),
        ({"weights": (0.5, 0.5)}, "merge slerp does not take --weights"),
        ({"decay": 0.9}, "merge slerp does not take --decay"),
        ({"method": "linear", "weights": (0.5, 0.5)}, "merge linear does not take --base"),
        ({"method": "ema", "base": None, "t": 0.5}, "merge ema does not take --t"),
        ({"t": 1.5}, "--t 1.5 is not between 0 and 1"),
        ({"t": float("nan")}, "--t nan is not between 0 and 1"),
        ({"method": "warp", "etas": (-0.1,)}, "--eta -0.1 is not between 0 and 1"),
        ({"method": "warp", "etas": (0.3, 0.3)}, "--eta names a value twice"),
        ({"method": "linear", "base": None, "weights": (0.5, 0.6)}, "--weights sum to 1.1, not 1"),
        ({"method": "linear", "base": None, "weights": (1.0,)}, "1 weights for 2 models"),
        ({"granularity": "block"}, "unknown --granularity 'block'"),
        ({"dtype": "int8"}, "unknown --dtype 'int8'"),
        ({"threads": 0}, "--threads 0 is less than 1"),
    ],
)
def test_a_request_that_makes_no_sense(root, options, message):
    refused(root, UsageError, message, **options)


def test_t_with_three_models(root):
    models = (root / "rl-1", root / "rl-2", root / "base")
    refused(root, UsageError, "--t is for two models, 3 given", models=models, t=0.5, base=None)


def test_liti_without_a_base(root):
    refused(root, UsageError, "merge liti needs --base", method="liti", models=(root / "rl-1",), base=None)


def test_warp_without_a_base_or_a_recorded_parent(root):
    refused(root, UsageError, "they record no common parent; name it: --base", method="warp", base=None)
