"""Import: GGUF and directories to plain models whose logits, stop ids, pad token and lineage are right."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from row_reading import read_prompts
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError
from gemma2.posttrain.conversion import convert
from gemma2.posttrain.conversion.convert import find_gguf, gemma2_settings, run_convert
from gemma2.posttrain.conversion.gguf import read_header
from gemma2.posttrain.models.loading import load_policy, load_reward_model, save_model
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import ConvertConfig
from gemma2.posttrain.tiny.networks import random_model, random_reward_model, save_random, tiny_tokenizer

PROMPTS = Path(convert.__file__).parents[1] / "data" / "prompts.jsonl"


def run(source, out, dtype="float32", **options):
    return run_convert(ConvertConfig(source=source, dtype=dtype), RunOptions(out, **options))


def write_gguf(path, model, tokenizer, **header):
    """An fp32 GGUF file of a Gemma 2 as llama.cpp spells it: norms as 1 + w, caps in the header, no query scale."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_scores([-float(index) for _, index in pieces])
    writer.add_token_types([3 if piece in special else 1 for piece, _ in pieces])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            values = tensor.numpy() + 1 if "norm" in name else tensor.numpy()
            stem, _, suffix = name.rpartition(".")
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def capped():
    """A Gemma 2 whose soft caps have an effect and differ from the defaults of transformers."""
    return random_model(attn_logit_softcapping=0.5, final_logit_softcapping=2.0)


@pytest.fixture(scope="module")
def from_gguf(tmp_path_factory, capped):
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", capped, tiny_tokenizer())
    return run(folder, folder / "out")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("directory")
    save_random(folder / "model")
    return folder / "model"


def test_a_gguf_gemma_2_has_the_logits_of_its_source(from_gguf, capped):
    model, _ = load_policy(from_gguf.out)
    ids = torch.randint(4, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, capped(ids).logits, rtol=1e-5, atol=1e-6)


def test_a_gguf_import_leaves_no_trace_of_quantisation(from_gguf):
    config = json.loads((from_gguf.out / "config.json").read_text())
    assert "quantization_config" not in config
    tensors = load_file(from_gguf.out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert "lm_head.weight" not in tensors


def test_a_gguf_import_stops_at_both_ends_and_keeps_the_template(from_gguf):
    _, tokenizer = load_policy(from_gguf.out)
    assert from_gguf.summary["stop_ids"] == [1, 107]
    assert AutoModelForCausalLM.from_pretrained(from_gguf.out).generation_config.eos_token_id == [1, 107]
    assert tokenizer.pad_token == "<pad>" and tokenizer.chat_template == tiny_tokenizer().chat_template
    text = [{"role": "user", "content": "Sort 3, 1 and 2."}]
    theirs = tiny_tokenizer().apply_chat_template(text, return_dict=True, add_generation_prompt=True)["input_ids"]
    ours = tokenizer.apply_chat_template(text, return_dict=True, add_generation_prompt=True)["input_ids"]
    assert [i for i in ours if i in (2, 106, 107)] == [i for i in theirs if i in (2, 106, 107)]


def test_the_manifest_names_the_gguf_file_by_its_content(from_gguf):
    manifest = json.loads((from_gguf.out / "gemma2.json").read_text())
    assert manifest["status"] == "complete" and manifest["command"] == "convert"
    assert [entry["path"] for entry in manifest["data"]] == ["../tiny.gguf"]


def test_the_readers_own_bar_stays_off_the_terminal(tmp_path, capped, capfd):
    write_gguf(tmp_path / "tiny.gguf", capped, tiny_tokenizer())
    capfd.readouterr()
    run(tmp_path / "tiny.gguf", tmp_path / "out")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("layers", "width", "heads", "head", "scale"),
    [(26, 2304, 8, 256, 256), (42, 3584, 16, 256, 256), (46, 4608, 32, 128, 144)],
    ids=["2B", "9B", "27B"],
)
def test_the_query_scale_is_that_of_the_report(layers, width, heads, head, scale):
    header = {
        "general.architecture": "gemma2",
        "gemma2.block_count": layers,
        "gemma2.embedding_length": width,
        "gemma2.attention.head_count": heads,
        "gemma2.attention.key_length": head,
        "gemma2.final_logit_softcapping": 30.0,
    }
    assert gemma2_settings(header) == {"query_pre_attn_scalar": scale, "final_logit_softcapping": 30.0}


def test_other_architectures_get_no_gemma_settings():
    assert gemma2_settings({"general.architecture": "llama", "llama.block_count": 46}) == {}


def test_a_directory_is_cast_tensor_by_tensor(source, tmp_path):
    result = run(source, tmp_path / "half", "bfloat16")
    before, after = load_file(source / "model.safetensors"), load_file(result.out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)
    manifest = json.loads((result.out / "gemma2.json").read_text())
    assert [parent["role"] for parent in manifest["parents"]] == ["source"]


def test_a_reward_model_is_converted_to_a_reward_model(tmp_path):
    save_model(random_reward_model(), tiny_tokenizer(), tmp_path / "reward")
    result = run(tmp_path / "reward", tmp_path / "half", "float16")
    model, _ = load_reward_model(result.out, torch.float16)
    assert model.config.num_labels == 1 and result.summary["architecture"] == "Gemma2ForSequenceClassification"


def test_a_pad_token_that_ends_turns_is_replaced(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = random_model()
    model.generation_config.eos_token_id = 1
    save_model(model, tokenizer, tmp_path / "model")
    result = run(tmp_path / "model", tmp_path / "out")
    generation = json.loads((result.out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 107]
    assert AutoTokenizer.from_pretrained(result.out).pad_token_id == generation["pad_token_id"] == 0


def test_a_tokenizer_without_turns_is_imported_with_a_warning(tmp_path, interrupting):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    save_model(random_model(), tokenizer, tmp_path / "model")
    progress = interrupting()
    config = ConvertConfig(source=tmp_path / "model")
    result = run_convert(config, RunOptions(tmp_path / "out"), progress)
    assert len(progress.warnings) == 1 and "sft and rlhf" in progress.warnings[0]
    assert result.summary["stop_ids"] == [1, 107]


def test_weights_that_overflow_the_dtype_are_refused_and_nothing_is_left(source, tmp_path):
    model = tmp_path / "model"
    save_random(model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight .* not finite in float16"):
        run(model, tmp_path / "out", "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert run(model, tmp_path / "out", "bfloat16").out.is_dir()


def test_a_quantised_directory_is_refused(source, tmp_path):
    save_random(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "x"}}))
    with pytest.raises(InputError, match=r"is quantised \(x\)"):
        run(tmp_path / "model", tmp_path / "out")


def test_the_missing_reader_is_named_with_its_extra(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(header_bytes())
    monkeypatch.setattr(convert, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package gguf; install the extra: pip install 'gemma2\[real\]'"):
        run(tmp_path / "model.gguf", tmp_path / "out")


def test_the_source_is_a_gguf_file_a_folder_with_one_or_a_model(source, tmp_path):
    assert find_gguf(source) is None
    with pytest.raises(InputError, match="does not exist"):
        find_gguf(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"neither \*\.gguf nor config\.json"):
        find_gguf(tmp_path)
    (tmp_path / "a.gguf").touch()
    assert find_gguf(tmp_path) == find_gguf(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(InputError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\)"):
        find_gguf(tmp_path)


def header_bytes():
    """A GGUF header, byte by byte: three entries, two of them arrays, and tensors of 2 x 3 and 5 elements."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    entries = text("llama.block_count") + struct.pack("<II", 4, 30)
    entries += text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc")
    entries += text("scores") + struct.pack("<IIQ3f", 9, 6, 3, 0, 1, 2)
    entries += text("name") + struct.pack("<I", 8) + text("tiny")
    tensors = text("w") + struct.pack("<IQQIQ", 2, 2, 3, 0, 0) + text("b") + struct.pack("<IQIQ", 1, 5, 0, 32)
    return b"GGUF" + struct.pack("<IQQ", 3, 2, 4) + entries + tensors


def test_the_header_gives_plain_values_and_the_number_of_parameters(tmp_path):
    (tmp_path / "model.gguf").write_bytes(header_bytes() + bytes(64))
    header = read_header(tmp_path / "model.gguf")
    assert header.metadata == {"llama.block_count": 30, "name": "tiny"}
    assert header.parameters == 2 * 3 + 5


@pytest.mark.parametrize("kept", [0, 3, 20, 60, 150])
def test_a_torn_header_is_an_input_error(tmp_path, kept):
    (tmp_path / "model.gguf").write_bytes(header_bytes()[:kept])
    with pytest.raises(InputError, match=r"model\.gguf is not a readable GGUF file"):
        read_header(tmp_path / "model.gguf")


def test_a_length_beyond_the_file_allocates_no_memory(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**62))
    with pytest.raises(InputError, match="in the middle of its header"):
        read_header(tmp_path / "model.gguf")


def test_a_dry_run_writes_nothing(source, tmp_path, capsys):
    assert invoke(["convert", str(source), "--out", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "safetensors" and document["parameters"] > 0
    assert not any(tmp_path.iterdir())


def test_the_command_takes_a_directory_and_a_dtype(source, tmp_path, capsys):
    assert invoke(["convert", str(source), "--dtype", "bfloat16", "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_the_prompts_of_the_package_are_many_and_distinct():
    prompts = read_prompts(PROMPTS)
    assert len({prompt.key for prompt in prompts}) == len(prompts) >= 120
