"""The adapters of extract-lora load in peft without a missing or unexpected tensor, and give the model there too."""

import warnings
from pathlib import Path

import pytest

from gemma2.merging import MergeRequest, merge
from gemma2.merging.lora.extract_plan import ExtractRequest
from gemma2.merging.lora.extraction import extract_lora

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.long
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 40,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "Gemma2ForCausalLM": ("Gemma2Config", SMALL),
    "Gemma2ForSequenceClassification": ("Gemma2Config", SMALL | {"num_labels": 1}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", SMALL),
    "LlamaForCausalLM": ("LlamaConfig", SMALL | {"tie_word_embeddings": False}),
    "Qwen2ForCausalLM": ("Qwen2Config", SMALL),
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
}


def save_models(root, kind):
    """base, and a model that differs from it in every parameter."""
    config, values = KINDS[kind]
    torch.manual_seed(0)
    net = getattr(transformers, kind)(getattr(transformers, config)(**values))
    for name in ("base", "model"):
        for parameter in net.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
        net.save_pretrained(root / name)


# peft does not know the tie of GPT-2: it reads both copies, and unties the model when it merges the adapter.
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("explained", [None, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_and_the_engine_make_the_same_model_of_base_and_adapter(tmp_path, kind, explained):
    save_models(tmp_path, kind)
    request = ExtractRequest(
        model=tmp_path / "model", base=tmp_path / "base", rank=4, explained=explained, save_modules=("all",)
    )
    summary = extract_lora(request, out=tmp_path / "adapter").summary
    assert 0 < summary["error"] < 0.9
    merge(MergeRequest(method="linear", models=(Path(f"{tmp_path}/base+{tmp_path}/adapter"),)), out=tmp_path / "back")
    load = getattr(transformers, kind).from_pretrained
    ids = torch.arange(3, 20)[None]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    assert [str(one.message) for one in said if "missing" in str(one.message)] == []
    expected, model = load(tmp_path / "back").eval(), load(tmp_path / "model").eval()
    with torch.no_grad():
        logits = [net(input_ids=ids).logits for net in (found, expected)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-5)
    plain = found.merge_and_unload().state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(plain[name], tensor, rtol=0, atol=2e-6)
    apart = sum((tensor - model.state_dict()[name]).square().sum() for name, tensor in counted(expected).items()).sqrt()
    assert apart == pytest.approx(summary["error"] * summary["norm"], rel=1e-4)


def counted(net):
    """The tensors of a model, a tied one once."""
    tied = getattr(net.config, "tie_word_embeddings", False)
    return {name: tensor for name, tensor in net.state_dict().items() if not (tied and name == "lm_head.weight")}
