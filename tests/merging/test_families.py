"""Every supported architecture of transformers: two random models merge, the average loads and is the average."""

import json
import re

import pytest
from model_files import read_model, read_raw, write_model

from gemma2.core.errors import InputError, UsageError
from gemma2.core.outputs.manifest import read_manifest
from gemma2.merging import MergeRequest, merge, plan_merge
from gemma2.merging.inputs.families import ARCHITECTURES, FAMILIES, carried_tensors
from gemma2.merging.lora.extract_plan import ExtractRequest, plan_extract

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.long
LAYERS = 3
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40, "max_position_embeddings": 64}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS + 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
MAMBA = {"hidden_size": 32, "num_hidden_layers": LAYERS, "vocab_size": 40, "state_size": 8} | IDS
HEADS = {"num_attention_heads": 4}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "vocab_size": 40} | HEADS | IDS
GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": 40, "n_positions": 64} | IDS
SPECIAL = {
    "GPT2": GPT2,
    "Mamba": MAMBA,
    "FalconMamba": MAMBA,
    "Mamba2": MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ModernBert": BERT | {"cls_token_id": 1, "sep_token_id": 2},
    "Electra": BERT | {"embedding_size": 32},
    "Mixtral": TEXT | IDS | {"num_local_experts": 2},
    "GPTNeoX": BERT,
    "Phi": BERT | {"num_key_value_heads": 2},
    "Falcon": BERT,
}
SPECIAL |= dict.fromkeys(("Bert", "Roberta", "XLMRoberta", "DebertaV2"), BERT | {"max_position_embeddings": 64})
EMBEDDING = re.compile("embed_in|embed_tokens|embeddings|wte|wpe")
SPLIT = [
    pytest.param(family, head, id=family + head, marks=[] if head == heads[0] else pytest.mark.slow)
    for family, heads in FAMILIES.items()
    for head in heads
]


def config_of(family, head):
    if family == "Gemma3" and head != "ForCausalLM":
        return transformers.Gemma3Config(text_config=TEXT | IDS, vision_config=VISION, mm_tokens_per_image=4)
    name = "Gemma3TextConfig" if family.startswith("Gemma3") else f"{family}Config"
    return getattr(transformers, name)(**(SPECIAL.get(family) or TEXT | IDS))


def save_models(root, family, head, count=2):
    """Random models; their parameters in order, by their names in transformers."""
    found = []
    for number in range(count):
        torch.manual_seed(number)
        net = getattr(transformers, family + head)(config_of(family, head))
        for parameter in net.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape)
        net.save_pretrained(root / f"m{number}")
        found.append({name: parameter.data for name, parameter in net.named_parameters()})
    return found


@pytest.mark.parametrize(("family", "head"), SPLIT)
def test_the_average_of_two_models_loads_in_transformers_and_is_their_average(tmp_path, family, head):
    first, second = save_models(tmp_path, family, head)
    merge(MergeRequest(method="linear", models=(tmp_path / "m0", tmp_path / "m1")), out=tmp_path / "out")
    net, report = getattr(transformers, family + head).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key: list(names) for key, names in report.items() if names} == {}
    found = dict(net.named_parameters())
    assert found.keys() == first.keys()
    for name, parameter in found.items():
        tower = "vision_tower" in name or "multi_modal_projector" in name
        expected = first[name] if tower else (first[name] + second[name]) / 2
        torch.testing.assert_close(parameter.data, expected, rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_is_a_layer(tmp_path, family):
    save_models(tmp_path, family, FAMILIES[family][0], count=1)
    plan = plan_merge(MergeRequest(method="passthrough", models=(tmp_path / "m0",)), tmp_path / "out")
    names = [group.name for group in plan.groups]
    layers = [name for name in names if name[-1].isdecimal()]
    assert [int(name.rpartition(".")[2]) for name in layers] == list(range(LAYERS))
    embeddings = [part.depth for name, part in plan.parts.items() if EMBEDDING.search(name)]
    assert set(embeddings) == {0.0}


# --- vision towers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {"weights": (0.9, 0.1)}),
        ("slerp", {}),
        ("slerp", {"base": "m2"}),
        ("task-arithmetic", {"base": "m2"}),
        ("ties", {"base": "m2"}),
        ("linear", {"dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_a_vision_tower_is_that_of_the_first_model_byte_for_byte(tmp_path, method, options):
    save_models(tmp_path, "Gemma3", "ForConditionalGeneration", count=3)
    given = {key: tmp_path / value if key == "base" else value for key, value in options.items()}
    values = {"weights": given.pop("weights")} if "weights" in given else {}
    request = MergeRequest(method=method, models=(tmp_path / "m0", tmp_path / "m1"), **given, values=values)
    result = merge(request, out=tmp_path / "out")
    assert all(group.group.startswith("language_model.") for group in result.groups)
    ours, theirs, other = (read_raw(tmp_path / name) for name in ("out", "m0", "m1"))
    towers = [name for name in ours if not name.startswith("language_model")]
    assert len(towers) > 60
    values, kept = read_model(tmp_path / "out"), read_model(tmp_path / "m0")
    for name in towers:
        if "dtype" in options:
            assert ours[name][0] == "BF16"
            assert abs(values[name] - kept[name]).max() <= abs(kept[name]).max() * 2**-8
        else:
            assert ours[name] == theirs[name] != other[name]
    (said,) = [note for note in result.plan.notes if "not merged" in note]
    assert {"vision_tower", "multi_modal_projector:"} <= set(said.split()) or "vision_tower:" in said
    assert said.endswith(f"{len(towers)} tensors are those of model 1, not merged")
    assert "tensors are those of model 1, not merged" in (tmp_path / "out/README.md").read_text()
    assert read_manifest(tmp_path / "out")["summary"]["towers"] == said


def test_text_models_that_differ_below_their_towers_are_refused(tmp_path):
    save_models(tmp_path, "Gemma3", "ForConditionalGeneration")
    config = json.loads((tmp_path / "m1/config.json").read_text())
    config["text_config"]["query_pre_attn_scalar"] = 99
    (tmp_path / "m1/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"query_pre_attn_scalar.* differs"):
        merge(MergeRequest(method="linear", models=(tmp_path / "m0", tmp_path / "m1")), out=tmp_path / "out")


def test_what_a_tower_rules_out_is_refused(tmp_path):
    save_models(tmp_path, "Gemma3", "ForConditionalGeneration")
    request = MergeRequest(method="linear", models=(tmp_path / "m0", tmp_path / "m1"), tokenizer="union")
    for name in ("m0", "m1"):
        vocabulary = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UsageError, match=r"--tokenizer: model 1 .* has a vision tower"):
        plan_merge(request, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "head"), [("Gemma3", "ForConditionalGeneration"), ("Bert", "ForMaskedLM"), ("Mamba", "ForCausalLM")]
)
def test_no_adapter_is_extracted_from_models_whose_layers_peft_would_not_find(tmp_path, family, head):
    save_models(tmp_path, family, head)
    with pytest.raises(InputError, match=rf"{family}{head}: extract-lora is for decoders of text"):
        plan_extract(ExtractRequest(model=tmp_path / "m1", base=tmp_path / "m0", rank=2), tmp_path / "out")


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}, "has a vision_config"),
        ({"architectures": ["RwkvForCausalLM"], "attention_hidden_size": 8}, "only Mamba, Mamba 2 and Falcon Mamba"),
        ({"architectures": ["JambaForCausalLM"], "mamba_d_state": 8}, "only Mamba, Mamba 2 and Falcon Mamba"),
        ({"architectures": ["SomethingForCausalLM"]}, "no test shows that it loads"),
        ({"architectures": ["Gemma2ForMaskedLM"]}, "no test shows that it loads"),
    ],
    ids=str,
)
def test_another_architecture_is_refused_with_what_is_missing(tmp_path, config, message):
    import numpy as np

    write_model(tmp_path / "m0", {"w": np.ones((2, 2))}, config=config)
    with pytest.raises(InputError, match=message):
        plan_merge(MergeRequest(method="passthrough", models=(tmp_path / "m0",)), tmp_path / "out")


def test_every_class_in_the_table_exists():
    assert [name for name in sorted(ARCHITECTURES) if not hasattr(transformers, name)] == []
    assert carried_tensors.__doc__
