"""Files as mergekit's users publish them: each runs unchanged, or is refused by the name of the tool that it is for."""

import json

import jinja2
import numpy as np
import pytest
import structures
from model_files import added, random_arrays, read_model, read_raw, write_model
from tokenizer_models import write_tokenizer

from gemma2.core.errors import Gemma2Error, UsageError
from gemma2.merging.methods.request import MergeRequest, VocabularyChoice
from gemma2.merging.methods.request_check import check_request
from gemma2.merging.recipes.recipe import read_recipe
from gemma2.merging.recipes.run_recipe import merge_recipe
from gemma2.merging.tokenizers.chat_template import NAMED

LAYERS, WIDTH, ROWS = 8, 8, 14
SHAPES = {"model.embed_tokens.weight": (ROWS, WIDTH)}
for layer in range(LAYERS):
    for name, shape in {
        "self_attn.q_proj": (8, WIDTH), "self_attn.o_proj": (WIDTH, 8),
        "mlp.up_proj": (12, WIDTH), "mlp.down_proj": (WIDTH, 12), "input_layernorm": (WIDTH,),
    }.items():  # fmt: skip
        SHAPES[f"model.layers.{layer}.{name}.weight"] = shape
SHAPES["model.norm.weight"] = (WIDTH,)
TEMPLATES = {"base": "of two", "a": "of two", "b": "of one"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    base = random_arrays(0, 1.0, SHAPES)
    for seed, name in enumerate(("base", "a", "b", "c")):
        arrays = base if name == "base" else added(base, random_arrays(seed, 0.1, SHAPES))
        write_model(root / name, arrays, "BF16", config={"num_hidden_layers": LAYERS, "vocab_size": ROWS})
        write_tokenizer(root / name, ["<unk>", *"abcdefghij"])
        settings = {"chat_template": TEMPLATES[name]} if name in TEMPLATES else {}
        (root / name / "tokenizer_config.json").write_text(json.dumps(settings))
    generator = np.random.default_rng(9)
    named = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    pair = {f"{named}A.weight": generator.standard_normal((2, WIDTH)), f"{named}B.weight": np.ones((8, 2))}
    write_model(root / "lora", pair)
    (root / "lora" / "model.safetensors").rename(root / "lora" / "adapter_model.safetensors")
    (root / "lora" / "config.json").unlink()
    (root / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return root


def run(place, out, text, monkeypatch):
    """The output of the last merge of a file, and all notes."""
    monkeypatch.chdir(place)
    file = out.with_suffix(".yaml")
    file.write_text(text)
    recipe = read_recipe(file)
    results = merge_recipe(recipe, out=out)
    (found,) = results[-1].outputs
    return found, [*recipe.steps[-1].notes, *results[-1].plan.notes]


@pytest.mark.parametrize("name", structures.RUN)
def test_a_published_structure_runs(place, tmp_path, monkeypatch, name):
    found, _ = run(place, tmp_path / "out", structures.RUN[name], monkeypatch)
    config = json.loads((found / "config.json").read_text())
    tensors = read_model(found)
    layers = {name.split(".")[2] for name in tensors if ".layers." in name}
    assert len(layers) == config["num_hidden_layers"] == (10 if name in structures.STACKED else LAYERS)
    assert all(np.isfinite(array).all() for array in tensors.values())
    assert len(tensors["model.embed_tokens.weight"]) == config["vocab_size"]


def test_auto_takes_the_chat_template_of_most_inputs(place, tmp_path, monkeypatch):
    text = structures.RUN["dare_ties with chat_template"]
    found, notes = run(place, tmp_path / "out", text, monkeypatch)
    assert (found / "chat_template.jinja").read_text() == "of two"
    assert "chat template: that of base, which 2 of 3 inputs have" in notes
    assert "chat_template" not in json.loads((found / "tokenizer_config.json").read_text())


def test_a_chat_template_by_name_is_that_format(place, tmp_path, monkeypatch):
    found, notes = run(place, tmp_path / "out", structures.RUN["a chat template by name"], monkeypatch)
    written = (found / "chat_template.jinja").read_text()
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert jinja2.Template(written, keep_trailing_newline=True).render(messages=chat, add_generation_prompt=True) == (
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\ny<|im_end|>\n<|im_start|>assistant\n"
    )
    assert notes[-1].endswith("<|im_start|>, <|im_end|> not in the tokenizer, read as plain text")


@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_named_template_renders_a_chat(name):
    chat = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
    shown = jinja2.Template(NAMED[name][1]).render(messages=chat, bos_token="<s>", eos_token="</s>")
    assert shown.index("QUESTION") < shown.index("ANSWER")
    assert all(marker in shown for marker in NAMED[name][0])


def test_an_unknown_template_is_refused_with_the_names(place, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="'chatmll' is neither a name nor a template") as caught:
        run(
            place, tmp_path / "out", structures.RUN["a chat template by name"].replace("chatml", "chatmll"), monkeypatch
        )
    assert "chatml" in caught.value.hint


def embedding(path):
    return read_model(path)["model.embed_tokens.weight"]


def test_the_row_of_a_token_and_the_padding_are_as_chosen(place, tmp_path, monkeypatch):
    found, notes = run(place, tmp_path / "out", structures.RUN["tokens and padding"], monkeypatch)
    rows = embedding(found)
    assert rows.shape == (16, WIDTH)
    np.testing.assert_array_equal(rows[0], embedding(place / "a")[0])
    np.testing.assert_allclose(rows[1:14], ((embedding(place / "a") + embedding(place / "b")) / 2)[1:], rtol=2**-8)
    assert not rows[14:].any()
    assert any("2 padding rows filled with zeros" in note for note in notes)
    recorded = json.loads((found / "gemma2.json").read_text())["config"]["vocabulary"]
    assert (recorded["tokens"][0]["model"], recorded["multiple"]) == ("model 1", 8)  # no path of this machine


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_rows_of_zeros_and_of_other_tokens(place, tmp_path, monkeypatch, dtype):
    if dtype == "F32":  # inputs of two dtypes are read piece by piece
        write_model(tmp_path / "b", read_model(place / "b"), "F32", config={"num_hidden_layers": 8, "vocab_size": ROWS})
        write_tokenizer(tmp_path / "b", ["<unk>", *"abcdefghij"])
    other = tmp_path / "b" if dtype == "F32" else "b"
    text = f"""merge_method: linear
models: [{{model: a, parameters: {{weight: 1}}}}, {{model: {other}, parameters: {{weight: 1}}}}]
tokenizer:
  source: a
  tokens:
    a: {{source: {{kind: zero}}, force: true}}
    b: {{source: {{kind: model_token, model: a, token: c}}, force: true}}
    d: {{source: {{kind: model_token, model: a, token_id: 9}}, force: true}}
    e: {{source: a}}
"""
    found, _ = run(place, tmp_path / "out", text, monkeypatch)
    rows, one, two = embedding(found), embedding(place / "a"), embedding(place / "b")
    assert not rows[1].any()
    np.testing.assert_array_equal(rows[2], one[3])
    np.testing.assert_array_equal(rows[4], one[9])
    np.testing.assert_allclose(rows[5], (one[5] + two[5]) / 2, rtol=2**-8)  # both have it


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("x: {source: a}", "the output has no token 'x'"),
        ("a: {source: c}", "that of c, which is not one of the inputs"),
        ("a: {source: {kind: model_token, model: a, token: x}}", "has no token 'x'"),
        ("a: {source: {kind: model_token, model: a, token_id: 99}}", "has no row 99"),
    ],
)
def test_rows_that_no_input_has_are_refused(place, tmp_path, monkeypatch, token, message):
    text = f"merge_method: linear\n{structures.TWO}tokenizer: {{source: union, tokens: {{{token}}}}}\n"
    with pytest.raises(Gemma2Error, match=message):
        run(place, tmp_path / "out", text, monkeypatch)


def test_rows_without_a_tokenizer_are_refused():
    with pytest.raises(UsageError, match="without a tokenizer"):
        check_request(MergeRequest(method="linear", models=("a", "b"), vocabulary=VocabularyChoice(multiple=8)))


def test_the_only_source_is_taken_as_it_is(place, tmp_path, monkeypatch):
    text = structures.RUN["task_arithmetic, the base is the only source"]
    found, notes = run(place, tmp_path / "out", text, monkeypatch)
    assert notes[0] == "the base is the only model of this task_arithmetic: it is taken as it is"
    plain, merged = read_model(place / "base"), read_model(found)
    changed = {name for name in plain if not np.array_equal(plain[name], merged[name])}
    assert changed == {"model.layers.0.self_attn.q_proj.weight"}


MIXED = """base_model: base
merge_method: {method}
slices:
- sources: [{{model: base, layer_range: [0, 4]}}]
- sources:
  - {{model: base, layer_range: [4, 8]}}
  - {{model: a, layer_range: [4, 8], parameters: {{weight: 1, density: 0.5}}}}
  - {{model: b, layer_range: [4, 8], parameters: {{weight: 1, density: 0.5}}}}
parameters: {{t: 0.05}}
"""


@pytest.mark.parametrize("method", ["ties", "della", "model_stock", "sce", "ramplus_tl", "nearswap", "arcee_fusion"])
def test_a_slice_of_the_base_alone_stays_beside_others(place, tmp_path, monkeypatch, method):
    text = MIXED.format(method=method)
    if method in ("nearswap", "arcee_fusion"):
        text = "".join(line for line in text.splitlines(keepends=True) if "model: b," not in line)
    found, _ = run(place, tmp_path / "out", text, monkeypatch)
    plain, merged = read_raw(place / "base"), read_raw(found)
    changed = {name for name in plain if plain[name] != merged[name]}
    first = {f"model.layers.{layer}." for layer in range(4)}
    assert changed and not any(name.startswith(tuple(first)) for name in changed)


@pytest.mark.parametrize("method", ["slerp", "nearswap"])
def test_slices_may_have_other_models_each(place, tmp_path, monkeypatch, method):
    slices = "\n".join(
        f"- sources: [{{model: a, layer_range: {span}}}, {{model: {other}, layer_range: {span}}}]"
        for other, span in (("b", [0, 4]), ("c", [4, 8]))
    )
    text = f"base_model: a\nmerge_method: {method}\nslices:\n{slices}\nparameters: {{t: 0.02}}\n"
    found, _ = run(place, tmp_path / "out", text, monkeypatch)
    plain, merged = read_raw(place / "a"), read_raw(found)
    assert all(plain[name] != merged[name] for name in plain if "q_proj" in name)


def test_a_slice_with_too_many_models_is_refused(place, tmp_path, monkeypatch):
    sources = ", ".join(f"{{model: {name}, layer_range: [0, 8]}}" for name in ("base", "a", "b"))
    text = f"base_model: base\nmerge_method: nearswap\nslices: [{{sources: [{sources}]}}]\nparameters: {{t: 0.1}}\n"
    with pytest.raises(UsageError, match="takes 1 model, 2 given in slice 1"):
        run(place, tmp_path / "out", text, monkeypatch)


@pytest.mark.parametrize("name", structures.REFUSED)
def test_a_file_of_another_tool_is_named_as_that(tmp_path, name):
    text, message = structures.REFUSED[name]
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        read_recipe(tmp_path / "x.yaml")
    assert message in caught.value.what
    assert caught.value.hint


def test_there_are_forty_one():
    assert len(structures.RUN) + len(structures.REFUSED) == 41
