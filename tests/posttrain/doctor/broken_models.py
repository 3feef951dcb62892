"""A sound model directory, changed in one place each: the faults that `gemma2 doctor` has to find."""

import json
import os
import shutil

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from gemma2.posttrain.tiny.networks import random_model

SLOW = ("attention",)  # needs a second; it has other tests


def write_adapter(path, base):
    path.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{name}.lora_A.weight": np.ones((2, 16), np.float32),
        f"{name}.lora_B.weight": np.ones((16, 2), np.float32),
    }
    save_file(
        {key: value + np.arange(value.size).reshape(value.shape) for key, value in factors.items()},
        path / "adapter_model.safetensors",
    )


def copy(sound, kind, into):
    shutil.copytree(sound / kind, into / kind)
    return into / kind


def put(file, **keys):
    """Set keys of a JSON file; a key set to `...` is removed."""
    value = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


def config(**keys):
    return lambda path: put(path / "config.json", **keys)


def generation(**keys):
    return lambda path: put(path / "generation_config.json", **keys)


def tokenizer_settings(**keys):
    return lambda path: put(path / "tokenizer_config.json", **keys)


def adapter_settings(**keys):
    return lambda path: put(path / "adapter_config.json", **keys)


def weights(change):
    """Change the tensors of a model, as arrays by name."""

    def apply(path):
        file = next(path.glob("*.safetensors"))
        arrays = load_file(file)
        change(arrays)
        save_file(arrays, file, {"format": "pt"})

    return apply


def setting(name, place, value):
    def change(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][place] = value

    return weights(change)


def tokenizer(change):
    def apply(path):
        value = json.loads((path / "tokenizer.json").read_text())
        change(value)
        (path / "tokenizer.json").write_text(json.dumps(value))

    return apply


def template(old, new):
    return lambda path: (path / "chat_template.jinja").write_text(
        (path / "chat_template.jinja").read_text().replace(old, new)
    )


def exchanged_turn_tokens(value):
    for token in value["added_tokens"]:
        token["id"] = {106: 107, 107: 106}.get(token["id"], token["id"])
    vocabulary = value["model"]["vocab"]
    vocabulary["<start_of_turn>"], vocabulary["<end_of_turn>"] = 107, 106
    value["added_tokens"].sort(key=lambda token: token["id"])


def doubled_bos(value):
    parts = value["post_processor"]["single"]
    value["post_processor"]["single"] = [parts[0], *parts]


def without_post_processor(value):
    value["post_processor"] = None


def sharded(path, total=None, wrong=False, index=True, lost=False):
    file = path / "model.safetensors"
    arrays = load_file(file)
    names = sorted(arrays)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for part, held in parts.items():
        save_file({name: arrays[name] for name in held}, path / part, {"format": "pt"})
    file.unlink()
    places = {name: part for part, held in parts.items() for name in held}
    if wrong:
        places[names[0]] = "model-00002-of-00002.safetensors"
    size = sum(array.nbytes for array in arrays.values())
    document = {"metadata": {"total_size": size if total is None else total}, "weight_map": places}
    if index:
        (path / "model.safetensors.index.json").write_text(json.dumps(document))
    if lost:
        (path / "model-00002-of-00002.safetensors").unlink()


def as_gemma1(path):
    put(path / "config.json", model_type="gemma")


def pickled(path, keep):
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    if not keep:
        (path / "model.safetensors").unlink()


def remove(name):
    return lambda path: (path / name).unlink()


def lfs(path):
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def integers(arrays):
    name = "model.layers.0.mlp.up_proj.weight"
    arrays[name] = (arrays[name] * 100).astype(np.int8)


def extra_tensor(arrays):
    arrays["model.layers.0.self_attn.q_proj.bias"] = np.ones(16, np.float32)


def missing_tensor(arrays):
    del arrays["model.layers.1.mlp.up_proj.weight"]


def head_copy(arrays):
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()


def other_head(arrays):
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + 1


def no_format(path):
    file = path / "model.safetensors"
    save_file(load_file(file), file)


def fewer_rows(arrays):
    arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"][:500].copy()


EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"
A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{letter}.weight" for letter in "AB")


def manifest(status="complete", size=None, parents=(), digest=None):
    def apply(path):
        file = path / "model.safetensors"
        record = {"size": file.stat().st_size if size is None else size}
        record |= {} if digest is None else {"digest": digest}
        value = {"schema_version": 2, "command": "sft", "status": status, "parents": list(parents)}
        (path / "gemma2.json").write_text(json.dumps(value | {"files": {"model.safetensors": record}}))

    return apply


def in_bf16(path):
    random_model(0).to(torch.bfloat16).save_pretrained(path)
    put(path / "config.json", dtype="bfloat16")


# name of the check -> (kind of model, status, change, a part of the message); several changes for one check.
BROKEN = [
    ("config", "policy", "problem", lambda path: (path / "config.json").write_text("{"), "config.json"),
    ("config", "policy", "problem", config(architectures=[]), "not one name"),
    ("config", "policy", "problem", config(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM"),
    ("config", "policy", "problem", as_gemma1, "model_type gemma"),
    ("code", "policy", "problem", config(auto_map={"AutoModel": "m.M"}), "auto_map"),
    ("code", "policy", "problem", config(_attn_implementation="some/kernel"), "some/kernel"),
    ("size", "policy", "problem", config(hidden_size=32), "hidden_size 32 (tensors: 16)"),
    ("size", "policy", "problem", config(num_hidden_layers=26), "num_hidden_layers 26 (tensors: 2)"),
    ("size", "policy", "problem", config(intermediate_size=64), "intermediate_size 64 (tensors: 32)"),
    ("size", "policy", "problem", config(num_key_value_heads=2), "num_key_value_heads 2 (tensors: 1)"),
    ("size", "policy", "problem", config(vocab_size=500), "vocab_size 500"),
    ("soft-caps", "policy", "problem", config(attn_logit_softcapping=None), "attn_logit_softcapping is not set"),
    ("soft-caps", "policy", "problem", config(final_logit_softcapping=None), "final_logit_softcapping is not set"),
    ("soft-caps", "policy", "problem", config(attn_logit_softcapping=30.0, final_logit_softcapping=50.0), "exchanged"),
    ("soft-caps", "policy", "warning", config(attn_logit_softcapping=20.0), "attn_logit_softcapping 20"),
    ("window", "policy", "problem", config(sliding_window=None), "sliding_window is None"),
    ("window", "policy", "warning", config(sliding_window=10000), "longer than the context"),
    ("layer-types", "policy", "problem", config(layer_types=["full_attention", "sliding_attention"]), "layer 0"),
    ("layer-types", "policy", "problem", config(layer_types=["sliding_attention"]), "1 entries for 2 layers"),
    ("query-scale", "policy", "warning", config(query_pre_attn_scalar=224), "224"),
    ("query-scale", "policy", "problem", config(query_pre_attn_scalar=None), "None instead of 8"),
    ("rope", "policy", "problem", config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), "rope_theta"),
    (
        "rope",
        "policy",
        "warning",
        config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        "linear",
    ),
    ("details", "policy", "problem", config(hidden_activation="silu"), "silu"),
    ("details", "policy", "problem", config(rms_norm_eps=1e-5), "rms_norm_eps"),
    ("details", "policy", "problem", config(use_bidirectional_attention=True), "bidirectional"),
    ("details", "policy", "problem", config(tie_word_embeddings=False), "tie_word_embeddings"),
    ("details", "policy", "problem", config(attention_bias=True), "attention_bias"),
    ("details", "policy", "warning", config(max_position_embeddings=4096), "4096"),
    ("dtype", "policy", "warning", config(dtype="bfloat16"), "bfloat16"),
    ("dtype", "policy", "warning", weights(lambda arrays: arrays.update({UP: arrays[UP].astype(np.float16)})), "fp16"),
    ("quantisation", "policy", "problem", config(quantization_config={"bits": 4}), "quantization_config"),
    ("headers", "policy", "problem", lfs, "git lfs"),
    ("headers", "policy", "problem", lambda path: pickled(path, keep=False), "pickles only"),
    ("headers", "policy", "problem", remove("model.safetensors"), "any safetensors"),
    (
        "headers",
        "policy",
        "problem",
        lambda path: os.truncate(path / "model.safetensors", 9000),
        "truncated",
    ),
    ("index", "policy", "problem", lambda path: sharded(path, index=False), "without model.safetensors.index.json"),
    ("index", "policy", "problem", lambda path: sharded(path, wrong=True), "disagree"),
    ("index", "policy", "warning", lambda path: sharded(path, total=7), "says 7 bytes"),
    (
        "index",
        "policy",
        "problem",
        lambda path: (sharded(path), next(path.glob("model-2*"), path / "model-00002-of-00002.safetensors").unlink()),
        "not there",
    ),
    (
        "index",
        "policy",
        "problem",
        lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        "both",
    ),
    ("names", "policy", "problem", weights(missing_tensor), "model.layers.1.mlp.up_proj.weight"),
    ("names", "policy", "problem", weights(extra_tensor), "q_proj.bias"),
    ("names", "policy", "problem", weights(lambda arrays: arrays.update({NORM: np.ones(17, np.float32)})), "[17]"),
    ("integers", "policy", "problem", weights(integers), "I8"),
    ("format", "policy", "warning", no_format, "format pt"),
    ("pickles", "policy", "warning", lambda path: pickled(path, keep=True), "pytorch_model.bin"),
    ("tied-head", "policy", "warning", weights(head_copy), "copy of the tied embedding"),
    ("tied-head", "policy", "problem", weights(other_head), "differs"),
    (
        "values",
        "policy",
        "problem",
        setting(UP, (3, 5), np.nan),
        "NaN or infinity, first at [3, 5]",
    ),
    ("values", "policy", "problem", setting(UP, (0, 0), -np.inf), "first at [0, 0]"),
    ("values", "policy", "problem", setting(UP, slice(None), 0), "zeros only"),
    ("values", "policy", "warning", setting(UP, slice(None), 0.5), "one value"),
    ("values", "adapter", "problem", setting(B, (1, 1), np.nan), "first at [1, 1]"),
    ("tokenizer", "policy", "problem", remove("tokenizer.json"), "tokenizer files"),
    ("tokenizer", "policy", "problem", lambda path: (path / "tokenizer.json").write_text("{}"), "tokenizer"),
    ("token-ids", "policy", "problem", tokenizer(exchanged_turn_tokens), "<start_of_turn> is 107 instead of 106"),
    ("token-ids", "policy", "problem", config(bos_token_id=5), "bos_token_id is 2 in the tokenizer, 5 in config.json"),
    ("token-ids", "policy", "problem", generation(pad_token_id=3), "3 in generation_config.json"),
    (
        "pad",
        "policy",
        "warning",
        tokenizer_settings(pad_token=...),
        "no token for padding",
    ),
    ("pad", "policy", "warning", tokenizer_settings(pad_token="<eos>"), "end token"),
    ("token-rows", "policy", "problem", weights(fewer_rows), "token 511 has no row"),
    ("bos", "policy", "problem", tokenizer(without_post_processor), "0 <bos>"),
    ("bos", "policy", "problem", tokenizer(doubled_bos), "2 <bos>"),
    ("bos", "policy", "problem", template("{{ bos_token }}", ""), "0 <bos>"),
    ("bos", "policy", "problem", template("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"), "2 <bos>"),
    ("template", "policy", "problem", template("<end_of_turn>\n", "<end_of_turn>"), "1 turns"),
    ("template", "policy", "problem", template(" | trim", ""), "come out as"),
    ("template", "policy", "problem", template("'model' if", "'assistant' if"), "come out as"),
    ("template", "policy", "problem", template("<start_of_turn>model\n", ""), "come out as"),
    ("template", "policy", "problem", template("{% if role == 'system' %}", "{% if true %}"), "refuses 1 turns"),
    (
        "system",
        "policy",
        "problem",
        lambda path: (path / "chat_template.jinja").write_text(
            "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
        ),
        "drops a system text",
    ),
    ("max-length", "policy", "warning", tokenizer_settings(model_max_length=512), "512"),
    ("stops", "policy", "warning", remove("generation_config.json"), "generation_config.json"),
    ("stops", "policy", "problem", generation(eos_token_id=1), "<end_of_turn> (107)"),
    ("stops", "policy", "problem", generation(eos_token_id=[1, 107, 512]), "stop id 512"),
    ("stops", "policy", "warning", generation(max_length=20), "max_length 20"),
    ("head", "reward", "problem", config(id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}), "2 outputs"),
    ("head", "reward", "problem", weights(lambda arrays: arrays.pop("score.weight")), "score.weight"),
    ("head", "reward", "problem", setting("score.weight", slice(None), 0), "is zero"),
    ("head", "reward", "warning", config(pad_token_id=...), "pad_token_id"),
    ("adapter", "adapter", "problem", adapter_settings(peft_type="IA3"), "IA3"),
    (
        "adapter",
        "adapter",
        "warning",
        adapter_settings(task_type="TOKEN_CLS"),
        "TOKEN_CLS",
    ),
    (
        "base",
        "adapter",
        "warning",
        adapter_settings(base_model_name_or_path="o/m"),
        "o/m",
    ),
    ("base", "adapter", "problem", weights(lambda arrays: arrays.pop(B)), "lora_A without lora_B"),
    ("base", "adapter", "problem", weights(lambda arrays: arrays.update({A: np.ones((2, 8), np.float32)})), "[2, 8]"),
    ("manifest", "policy", "problem", manifest(status="running"), "not complete"),
    ("manifest", "policy", "problem", manifest(size=3), "another size"),
    ("digests", "policy", "problem", manifest(digest="blake3:00"), "changed after it was made"),
    ("parents", "policy", "warning", manifest(parents=[{"role": "model", "path": "../gone"}]), "gone"),
]
