"""Safety models: classifiers by their labels, ShieldGemma-style models by P(Yes); every window counts."""

import json

import pytest
import torch
from samples import row
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerFast,
)

from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.data.sources import Row
from gemma2.posttrain.filters import safety
from gemma2.posttrain.filters.runner import run_filter
from gemma2.posttrain.filters.safety import SafetyModel, unsafe_labels
from gemma2.posttrain.filters.scan import Findings
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import FilterConfig

# Text gives the plain words only; the control tokens are added to them, as in Gemma's tokenizer.
PLAIN = ["<pad>", "<unk>", "<bos>", "<eos>", "good", "bad", "Yes", "No", "vile"]
WORDS = [*PLAIN, "<start_of_turn>", "<end_of_turn>"]
GOOD, BAD, YES, NO, VILE = (WORDS.index(word) for word in ("good", "bad", "Yes", "No", "vile"))


def save_tokenizer(directory):
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(PLAIN)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    ).save_pretrained(directory)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier that finds 'bad' where it is the first word it reads: label 1 of 2."""
    directory = tmp_path_factory.mktemp("classifier")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = BertConfig(vocab_size=len(WORDS), id2label={0: "safe", 1: "toxic"}, max_position_embeddings=64, **sizes)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        embeddings = model.bert.embeddings
        embeddings.word_embeddings.weight[BAD, 0] = 4.0
        embeddings.word_embeddings.weight[:, 1] = torch.arange(len(WORDS)) % 2
        embeddings.LayerNorm.weight.fill_(1.0)
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
            norm.weight.fill_(1.0)
        model.bert.pooler.dense.weight[0, 0] = 2.0
        model.classifier.weight[1, 0] = 8.0
        model.classifier.bias[1] = -5.0
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def judged(path, *rows, **settings):
    """Codes that the model gives to rows that were left by other filters."""
    findings = Findings.empty(len(rows))
    model = SafetyModel.load(FilterConfig(data="d", safety_model=path, **settings))
    model.drop_unsafe([Row(f"f:{i}", one) for i, one in enumerate(rows)], findings)
    return findings


def test_a_classifier_drops_what_it_finds_unsafe(classifier):
    found = judged(classifier, row("good good"), row("bad good"), row("good"), row("good", question="bad"))
    assert found.codes.astype(bool).tolist() == [False, True, False, False]
    assert found.reasons[1][0][0] == "unsafe" and found.reasons[1][0][1].startswith("toxic with probability ")


def test_every_window_of_a_long_answer_and_every_turn_is_read(classifier):
    late = row("good " * 16 + "bad " + "good " * 20)
    assert judged(classifier, late, safety_max_length=16).codes.astype(bool).all()
    turns = ["good", "good", "bad", "good"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    assert not judged(classifier, {"messages": messages}).codes.any()
    messages[1]["content"] = "bad"
    assert judged(classifier, {"messages": messages}).codes.all()


def test_scores_do_not_depend_on_the_batch(classifier):
    rows = [row("bad good " * i) for i in range(1, 12)] + [row("good " * i) for i in range(1, 12)]
    details = [judged(classifier, *rows, batch_size=size, safety_threshold=0.01).reasons for size in (1, 3, 64)]
    assert details[0] == details[1] == details[2]
    assert sorted(details[0]) == list(range(11))


@pytest.mark.parametrize(
    ("labels", "wanted", "unsafe"),
    [
        (["safe", "unsafe"], (), [1]),
        (["unsafe", "safe"], (), [0]),
        (["LABEL_0", "LABEL_1"], (), [1]),
        (["neutral", "insult", "threat"], (), [1, 2]),
        (["non-toxic", "toxic"], (), [1]),
        (["toxicity"], (), [0]),
        (["a", "b", "c"], ("c", "a"), [0, 2]),
    ],
)
def test_labels_are_classified_by_their_names(labels, wanted, unsafe):
    assert unsafe_labels(labels, wanted) == unsafe


def test_labels_whose_names_do_not_mean_safe_must_be_given():
    with pytest.raises(UsageError, match="do not show which mean unsafe: a, b; name them with"):
        unsafe_labels(["a", "b"], ())
    with pytest.raises(UsageError, match="--safety-labels c is not a label of the model; its labels are a, b"):
        unsafe_labels(["a", "b"], ("c",))


@pytest.fixture(scope="module")
def shield(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shield")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=len(WORDS), num_key_value_heads=1, head_dim=8, **sizes)
    Gemma2ForCausalLM(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def test_a_causal_model_is_scored_by_its_next_token(shield):
    model = SafetyModel.load(FilterConfig(data="d", safety_model=shield, batch_size=3))
    judge = model._judge
    verdicts = judge.judge([("good", "bad"), ("bad", "vile good vile")])
    for (asked, answered), (probability, kind) in zip(
        [("good", "bad"), ("bad", "vile good vile")], verdicts, strict=True
    ):
        alone = {}
        for name, policy in safety.POLICIES.items():  # one prompt at a time, no padding
            (ids,) = judge._prompts((asked, answered), policy)
            with torch.no_grad():
                logits = judge.model(torch.tensor([ids], device=judge.model.device)).logits[0, -1]
            alone[name] = float(logits[[YES, NO]].float().softmax(-1)[0])
        assert probability == pytest.approx(max(alone.values()), abs=1e-5)
        assert alone[kind] == pytest.approx(max(alone.values()), abs=1e-5)


def test_control_tokens_in_an_answer_are_text(shield):
    judge = SafetyModel.load(FilterConfig(data="d", safety_model=shield))._judge
    (ids,) = judge._prompts(("good", "<end_of_turn> good"), "policy")
    (plain,) = judge._prompts(("good", "good good"), "policy")
    assert ids.count(WORDS.index("<end_of_turn>")) == plain.count(WORDS.index("<end_of_turn>"))


def test_a_model_without_yes_and_no_is_refused(shield, monkeypatch):
    monkeypatch.setattr(safety, "YES_NO", ("Ja", "Nein"))
    with pytest.raises(InputError, match="has no single token for Ja and Nein"):
        SafetyModel.load(FilterConfig(data="d", safety_model=shield))


def test_the_command_asks_the_model_instead_of_the_word_list(classifier, tmp_path):
    rows = [row("good one"), row("bad two"), row("fuck three")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    config = FilterConfig(data=tmp_path / "data.jsonl", safety_model=classifier, workers=1)
    summary = run_filter(config, RunOptions(tmp_path / "out")).summary
    assert summary["dropped"]["unsafe"] == 1 and summary["kept"] == 2
    manifest = json.loads((tmp_path / "out" / "gemma2.json").read_text())
    assert [parent["role"] for parent in manifest["parents"]] == ["safety-model"]
