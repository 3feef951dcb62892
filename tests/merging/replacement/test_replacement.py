"""replace-tokenizer: rows by a calculation by hand, text round trips, and the model in transformers."""

import json

import numpy as np
import pytest
from model_files import read_model, read_raw

from gemma2.cli.main import run
from gemma2.core.errors import Gemma2Error, InputError, OutputError
from gemma2.core.outputs.manifest import read_manifest
from gemma2.merging.replacement.replacement import plan_replacement, replace_tokenizer
from gemma2.posttrain.tiny.networks import save_random, tiny_tokenizer

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.long
EMBEDDING = "model.embed_tokens.weight"
TEXTS = [
    "What is 2 + 3?",
    "the sum of two numbers",
    "  spaces  and\nlines\t",
    "naïve café, 日本語 🙂",
    "<eos>x<|im_end|>",
]


def byte_level(path, specials=("<pad>", "<eos>", "<|im_end|>"), template=None):
    """A byte-level BPE: other spelling (Ġ), other ids, other special tokens than the embedded one."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(
        ["the sum of two numbers is a number, the answer to everything is 42"] * 5,
        tokenizers.trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=list(specials),
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<|im_end|>", chat_template=template
    )
    fast.save_pretrained(path)
    return path


@pytest.fixture
def place(tmp_path):
    save_random(tmp_path / "model")
    byte_level(tmp_path / "other", template="{{ messages }}")
    return tmp_path


def replaced(root, donor="other", model="model", out="out", **options):
    return replace_tokenizer(root / model, root / donor, out=root / out, **options)


@pytest.mark.parametrize("tied", [True, False])
def test_every_row_is_the_mean_of_the_pieces_of_its_token(tmp_path, tied):
    save_random(tmp_path / "model", tie_word_embeddings=tied)
    byte_level(tmp_path / "other")
    plan = replaced(tmp_path)
    old, new = read_model(tmp_path / "model"), read_model(tmp_path / "out")
    ours, theirs = (tokenizers.Tokenizer.from_file(str(tmp_path / n / "tokenizer.json")) for n in ("model", "other"))
    assert plan.tables == ({EMBEDDING} if tied else {EMBEDDING, "lm_head.weight"})
    tokens = [token for token, index in ours.get_vocab().items() if index < 512]
    expected = {  # derived by hand: the new spelling, and the old tokens of its text
        "Ġthe": ["▁the"],
        "Ġnum": ["▁n", "u", "m"],
        "42": ["4", "2"],
        "the": ["t", "h", "e"],
        "<eos>": ["<eos>"],
        "<|im_end|>": tokens,
        "ŀ": tokens,  # a byte that is not a character
    }
    for table in plan.tables:
        for token, pieces in expected.items():
            rows = [old[table][ours.token_to_id(piece)] for piece in pieces]
            np.testing.assert_allclose(new[table][theirs.token_to_id(token)], np.mean(rows, axis=0), atol=1e-6)
    assert plan.sources.counts == {"kept": 107, "averaged": 26, "none": 161}
    assert new[EMBEDDING].shape == (theirs.get_vocab_size(), 16)


def test_all_other_tensors_are_copied_byte_for_byte(place):
    plan = replaced(place)
    old, new = read_raw(place / "model"), read_raw(place / "out")
    assert old.keys() == new.keys()
    assert all(new[name] == old[name] for name in old if name not in plan.tables)


@pytest.mark.parametrize("text", TEXTS)
def test_text_goes_round_and_is_cut_as_by_the_new_tokenizer(place, text):
    replaced(place)
    load = transformers.AutoTokenizer.from_pretrained
    found, new = load(place / "out"), load(place / "other")
    ids = found(text, add_special_tokens=False)["input_ids"]
    assert ids == new(text, add_special_tokens=False)["input_ids"]
    assert found.decode(ids, clean_up_tokenization_spaces=False) == text
    assert max(ids) < len(read_model(place / "out")[EMBEDDING])


def test_the_model_loads_and_answers_as_before_where_the_tokens_are_kept(place):
    replaced(place)
    load = transformers.AutoModelForCausalLM.from_pretrained
    net, report = load(place / "out", output_loading_info=True)
    assert {key: list(names) for key, names in report.items() if names} == {}
    before, after = (tokenizers.Tokenizer.from_file(str(place / n / "tokenizer.json")) for n in ("model", "out"))
    text = "A is the sum!A is"
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for tokenizer in (before, after)]
    assert [before.decode([i]).strip() for i in ids[0]] == [after.decode([i]).strip() for i in ids[1]]
    with torch.no_grad():
        old = load(place / "model")(input_ids=torch.tensor([ids[0]])).logits[0]
        new = net(input_ids=torch.tensor([ids[1]])).logits[0]
    torch.testing.assert_close(new[:, ids[1]], old[:, ids[0]], rtol=0, atol=1e-5)


def test_the_same_tokenizer_gives_the_same_model(place):
    tiny_tokenizer().save_pretrained(place / "same")
    plan = replaced(place, "same")
    assert plan.sources.counts["averaged"] == 0
    names = tokenizers.Tokenizer.from_file(str(place / "model/tokenizer.json")).get_vocab()
    old, new = read_model(place / "model")[EMBEDDING], read_model(place / "out")[EMBEDDING]
    kept = [index for index in names.values() if index < 512]
    assert (old[kept] == new[kept]).all()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((place / "out" / name).read_text()) == json.loads((place / "model" / name).read_text())


def test_ids_follow_their_tokens_or_are_the_new_tokenizers_own(place):
    plan = replaced(place)
    config = json.loads((place / "out/config.json").read_text())
    new = tokenizers.Tokenizer.from_file(str(place / "other/tokenizer.json"))
    old = json.loads((place / "model/config.json").read_text())
    assert config["vocab_size"] == new.get_vocab_size()
    assert config["pad_token_id"] == new.token_to_id("<pad>")
    assert config["eos_token_id"] in (new.token_to_id("<eos>"), [new.token_to_id("<eos>")])
    assert old["bos_token_id"] == 2
    assert config["bos_token_id"] is None
    assert [note for note in plan.notes if note.startswith("bos_token_id: the new tokenizer has no <bos>")]
    assert "the chat template is that of the new tokenizer" in plan.notes
    assert (place / "out/chat_template.jinja").read_text() == "{{ messages }}"


def test_a_template_that_is_lost_is_noted(place):
    byte_level(place / "bare")
    assert [note for note in replaced(place, "bare").notes if note.startswith("no chat template")]
    assert not (place / "out/chat_template.jinja").exists()


def test_manifest_and_card(place):
    replaced(place)
    manifest = read_manifest(place / "out")
    assert manifest["command"] == "merge replace-tokenizer"
    assert manifest["summary"]["kept"] == 107
    assert "../other/tokenizer.json" in [one["path"] for one in manifest["data"]]
    assert {one["role"] for one in manifest["data"]} == {"tokenizer"}
    assert all("digest" in entry for entry in manifest["files"].values())
    assert "A model with another tokenizer" in (place / "out/README.md").read_text()


# --- refusals and the command ---------------------------------------------------------------------------------------


def test_inputs_that_cannot_be_used_are_refused(place):
    (place / "empty").mkdir()
    with pytest.raises(InputError, match=r"tokenizer .*empty has no tokenizer\.json"):
        replaced(place, "empty")
    (place / "empty/tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer"):
        replaced(place, "empty")
    with pytest.raises(InputError, match="is not a directory"):
        replaced(place, "nowhere/at/all")
    with pytest.raises(OutputError, match="overlap"):
        replaced(place, out="other")
    assert plan_replacement(place / "model", place / "other", place / "out").sources.counts["kept"]
    assert not (place / "out").exists()


def test_a_failure_in_the_middle_leaves_nothing(place, monkeypatch):
    from gemma2.merging.replacement import replacement

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replacement, "_rows", fail)
    before = sorted(place.rglob("*"))
    with pytest.raises(Gemma2Error, match="No space left"):
        replaced(place, out="new/out")
    assert sorted(place.rglob("*")) == before


def test_the_command(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert run(["merge", "replace-tokenizer", "model", "--tokenizer", "other", "--dry-run"]) == 0
    assert "kept" in capsys.readouterr().out
    assert not (place / "out").exists()
    assert run(["merge", "replace-tokenizer", "model", "--tokenizer", "other", "--out", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["averaged"] == 26
    assert run(["merge", "replace-tokenizer", "model", "--out", "out"]) == 2
    assert "--tokenizer is missing" in capsys.readouterr().err
