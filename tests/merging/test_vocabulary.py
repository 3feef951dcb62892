"""Models whose tokenizers differ: rows follow their tokens, and the output has the vocabulary that was asked for."""

import json
import os

import numpy as np
import pytest
from model_files import SHAPES, added, random_arrays, read_model, read_raw, write_model
from test_adapter import write_adapter

from gemma2.merging import MergeRequest, engine, merge
from gemma2.merging.errors import InputError, UsageError
from gemma2.merging.feed import CUT
from gemma2.merging.request import Slice
from gemma2.merging.rows import RowMap

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
LETTERS = "abcdefghij"  # ten core tokens; a model of 16 rows has padding from there on


def write_tokenizer(path, core, extra=(), merges=(), **flags):
    """tokenizer.json of core tokens with ids 0, 1, ... (or as a mapping says) and added (token, id)."""
    vocab = core if isinstance(core, dict) else {token: index for index, token in enumerate(core)}
    entries = [{"id": index, "content": token} | FLAGS | flags for token, index in extra]
    file = {"added_tokens": entries, "model": {"type": "BPE", "vocab": vocab, "merges": list(merges)}}
    (path / "tokenizer.json").write_text(json.dumps(file))


def model(path, arrays, core=LETTERS, extra=(), dtype="F32", **config):
    rows = len(arrays[EMBEDDING])
    write_model(path, arrays, dtype, config={"vocab_size": rows} | config)
    write_tokenizer(path, core, extra)
    return path


def arrays(seed, rows=16, scale=1.0):
    return random_arrays(seed, scale, SHAPES | {EMBEDDING: (rows, 8)})


def linear(root, *names, method="linear", out="out", **options):
    request = MergeRequest(method=method, models=tuple(root / name for name in names), **options)
    return merge(request, out=root / out), root / out


def config_of(path, name="config.json"):
    return json.loads((path / name).read_text())


# --- row maps ---


def test_spans_are_runs_of_rows_cut_at_any_element():
    # Output rows 0..4 are rows 3 4 of input 0, row 1 of input 1, rows 0 1 of input 0; two elements in a row.
    runs = [np.array(column, np.int64) for column in ([0, 2, 3], [0, 1, 0], [3, 1, 0])]
    rows = RowMap(5, *runs, inputs=("x", "y"))

    def spans(first, count):
        return list(zip(*(column.tolist() for column in rows.spans(first, count, 2)), strict=True))

    assert spans(0, 10) == [(0, 6, 4), (1, 2, 2), (0, 0, 4)]
    assert spans(3, 2) == [(0, 9, 1), (1, 2, 1)]
    assert spans(7, 3) == [(0, 1, 3)]
    assert spans(4, 2) == [(1, 2, 2)]


def test_a_model_with_permuted_ids_merges_as_if_its_rows_were_put_in_order(tmp_path):
    left, right = arrays(1), arrays(2)
    model(tmp_path / "a", left)
    model(tmp_path / "b", right, core=LETTERS[::-1])
    result, out = linear(tmp_path, "a", "b", tokenizer=str(tmp_path / "a"))
    order = [*range(9, -1, -1), *range(10, 16)]  # token i of a is token 9 - i of b; padding stays
    expected = (left[EMBEDDING].astype(np.float32) + right[EMBEDDING][order].astype(np.float32)) / 2
    np.testing.assert_allclose(read_model(out)[EMBEDDING], expected, atol=1e-6)
    assert result.plan.notes == ("model 2: 10 tokens mapped",)
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "a/tokenizer.json").read_bytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("method", ["slerp", "ties", "linear"])
def test_the_merge_equals_that_of_a_model_permuted_by_hand_bit_for_bit(tmp_path, method, dtype):
    base = arrays(0)
    right = added(base, arrays(2, scale=0.1))
    order = np.random.default_rng(5).permutation(16)
    permuted = right | {EMBEDDING: right[EMBEDDING][order]}
    core = {token: int(np.flatnonzero(order == index)[0]) for index, token in enumerate("abcdefghijklmnop")}
    tokens = "abcdefghijklmnop"
    model(tmp_path / "base", base, tokens, dtype=dtype)
    model(tmp_path / "a", added(base, arrays(1, scale=0.1)), tokens, dtype=dtype)
    model(tmp_path / "b", right, tokens, dtype=dtype)
    model(tmp_path / "b-permuted", permuted, core, dtype=dtype)
    options = {"method": method, "base": tmp_path / "base"} if method != "linear" else {}
    _, expected = linear(tmp_path, "a", "b", out="expected", **options)
    _, found = linear(tmp_path, "a", "b-permuted", out="found", tokenizer=str(tmp_path / "a"), **options)
    assert read_raw(found) == read_raw(expected)


def test_rows_do_not_depend_on_cuts_or_threads(tmp_path):
    shapes = {EMBEDDING: (3000, 24)}  # 72000 elements: rows cross the edges of cuts of 4096
    names = [f"t{index}" for index in range(3000)]
    order = np.random.default_rng(1).permutation(3000)
    for number, name in enumerate(("base", "a", "b")):
        core = names if name != "b" else {names[i]: int(row) for i, row in enumerate(order)}
        model(tmp_path / name, random_arrays(number, 1.0, shapes), core, dtype="BF16")
    options = {"method": "slerp", "base": tmp_path / "base", "tokenizer": "base"}
    found = []
    for cut, threads in ((CUT, 1), (4096, 2), (12288, 3)):
        request = MergeRequest(models=(tmp_path / "a", tmp_path / "b"), threads=threads, **options)
        merge(request, out=tmp_path / f"out-{cut}", cut=cut)
        found.append(read_raw(tmp_path / f"out-{cut}"))
    assert found[0] == found[1] == found[2]


def test_a_token_that_a_model_lacks_has_the_row_of_the_base_and_no_task_vector(tmp_path):
    base, left, right = arrays(0, 12), arrays(1, 12), arrays(2, 11)
    model(tmp_path / "base", base, LETTERS, [("<x>", 10), ("<y>", 11)])
    model(tmp_path / "a", left, LETTERS, [("<x>", 10), ("<y>", 11)])
    model(tmp_path / "b", right, LETTERS, [("<y>", 10)])
    result, out = linear(tmp_path, "a", "b", method="task-arithmetic", base=tmp_path / "base", tokenizer="base")
    found = read_model(out)[EMBEDDING]
    delta = left[EMBEDDING] - base[EMBEDDING]
    np.testing.assert_allclose(found[10], base[EMBEDDING][10] + delta[10], atol=1e-5)
    np.testing.assert_allclose(found[11], right[EMBEDDING][10] + delta[11], atol=1e-5)
    assert result.plan.notes == ("model 2: 1 token mapped, 1 token taken from base",)


def test_a_token_that_the_base_lacks_has_the_row_of_the_chosen_model(tmp_path):
    base, left, right, third = arrays(0, 10), arrays(1, 10), arrays(2, 11), arrays(3, 11)
    for name, values in (("base", base), ("a", left)):
        model(tmp_path / name, values)
    for name, values in (("b", right), ("c", third)):
        model(tmp_path / name, values, LETTERS, [("<x>", 10)])
    options = {"method": "task-arithmetic", "base": tmp_path / "base", "tokenizer": str(tmp_path / "c")}
    result, out = linear(tmp_path, "a", "b", "c", **options)
    # base, a and c all have c's row there: only b has a task vector.
    np.testing.assert_allclose(read_model(out)[EMBEDDING][10], right[EMBEDDING][10], atol=1e-5)
    assert result.plan.notes == ("base: 1 token taken from model 3", "model 1: 1 token taken from model 3")
    assert config_of(out)["vocab_size"] == 11


def test_the_base_comes_before_the_chosen_model(tmp_path):
    base, left, right = arrays(0, 11), arrays(1, 11), arrays(2, 10)
    for name, values in (("base", base), ("a", left)):
        model(tmp_path / name, values, LETTERS, [("<x>", 10)])
    model(tmp_path / "b", right)
    options = {"method": "task-arithmetic", "base": tmp_path / "base", "tokenizer": str(tmp_path / "a")}
    result, out = linear(tmp_path, "a", "b", **options)
    np.testing.assert_allclose(read_model(out)[EMBEDDING][10], left[EMBEDDING][10], atol=1e-5)
    assert result.plan.notes == ("model 2: 1 token taken from base",)


def test_tokens_that_the_output_does_not_have_are_named_as_dropped_and_reach_no_padding_row(tmp_path):
    base, left = arrays(0, 16), arrays(1, 16)
    model(tmp_path / "base", base)
    model(tmp_path / "a", left, LETTERS, [("<x>", 12)])
    result, out = linear(tmp_path, "a", method="task-arithmetic", base=tmp_path / "base", tokenizer="base")
    found = read_model(out)[EMBEDDING]
    np.testing.assert_array_equal(found[12], base[EMBEDDING][12].astype(np.float32))
    np.testing.assert_allclose(found[13], left[EMBEDDING][13], atol=1e-5)
    assert result.plan.notes == ("model 1: 1 padding row taken from base, 1 token dropped",)


def test_padding_rows_that_a_model_does_not_have_are_those_of_the_chosen_one(tmp_path):
    left, right = arrays(1, 16), arrays(2, 10)
    model(tmp_path / "a", left)
    model(tmp_path / "b", right)
    result, out = linear(tmp_path, "a", "b", tokenizer=str(tmp_path / "a"))
    np.testing.assert_array_equal(read_model(out)[EMBEDDING][10:], left[EMBEDDING][10:].astype(np.float32))
    assert result.plan.notes == ("model 2: 6 padding rows taken from model 1",)
    _, out = linear(tmp_path, "a", "b", tokenizer=str(tmp_path / "b"), out="short")
    assert read_model(out)[EMBEDDING].shape == (10, 8) and config_of(out)["vocab_size"] == 10


def test_a_head_of_its_own_is_mapped_like_the_embedding_and_other_tensors_are_not(tmp_path):
    shapes = {EMBEDDING: (10, 8), HEAD: (10, 8), "model.layers.0.mlp.up_proj.weight": (10, 8)}
    values = random_arrays(1, 1.0, shapes)
    order = list(range(9, -1, -1))
    permuted = values | {name: values[name][order] for name in (EMBEDDING, HEAD)}
    model(tmp_path / "a", values, tie_word_embeddings=False)
    model(tmp_path / "b", permuted, LETTERS[::-1], tie_word_embeddings=False)
    _, out = linear(tmp_path, "a", "b", tokenizer=str(tmp_path / "a"))
    assert read_raw(out) == read_raw(tmp_path / "a")


def test_a_cache_of_sums_belongs_to_its_map(tmp_path):
    """Another tokenizer.json over the same weights means other rows: an earlier merge's sums must not be found."""
    base = arrays(0)
    for number, name in enumerate(("base", "a", "b")):
        model(tmp_path / name, added(base, arrays(number, scale=0.1)))
    options = {"method": "slerp", "base": tmp_path / "base", "tokenizer": "base"}
    angles = []
    for number, core in enumerate((LETTERS, LETTERS[::-1], LETTERS[5:] + LETTERS[:5])):
        write_tokenizer(tmp_path / "b", core)
        result, _ = linear(tmp_path, "a", "b", out=f"out-{number}", **options)
        angles.append(str(result.groups[0].as_dict()["angles"]))
    assert len(set(angles)) == 3


def test_rows_are_the_same_read_in_one_call_or_one_by_one(tmp_path, monkeypatch):
    model(tmp_path / "a", arrays(1, 11), LETTERS, [("<x>", 10)], dtype="BF16")
    model(tmp_path / "b", arrays(2, 12), LETTERS[::-1], [("<z>", 10), ("<x>", 11)], dtype="BF16")
    _, one = linear(tmp_path, "a", "b", tokenizer=str(tmp_path / "b"), out="one")
    monkeypatch.setattr("gemma2.merging.feed.gather", lambda places, into: False)
    _, other = linear(tmp_path, "a", "b", tokenizer=str(tmp_path / "b"), out="other")
    assert read_raw(one) == read_raw(other)


def test_rows_are_taken_from_models_of_other_dtypes(tmp_path):
    right = arrays(2, 11)
    model(tmp_path / "base", arrays(0, 10), dtype="BF16")
    model(tmp_path / "a", arrays(1, 10), dtype="BF16")
    model(tmp_path / "b", right, LETTERS, [("<x>", 10)], dtype="F32")
    options = {"method": "task-arithmetic", "base": tmp_path / "base", "dtype": "float32"}
    _, out = linear(tmp_path, "a", "b", tokenizer="union", **options)
    np.testing.assert_array_equal(read_model(out)[EMBEDDING][10], right[EMBEDDING][10].astype(np.float32))


def test_a_file_that_ends_while_rows_are_read_is_named(tmp_path, monkeypatch):
    model(tmp_path / "a", arrays(1))
    model(tmp_path / "b", arrays(2), LETTERS[::-1])
    planned = engine.plan_merge

    def shorten(*arguments):
        plan = planned(*arguments)
        os.truncate(tmp_path / "b/model.safetensors", plan.models[1].tensors[EMBEDDING].offset + 100)
        return plan

    monkeypatch.setattr(engine, "plan_merge", shorten)
    with pytest.raises(InputError, match=r"b/model.safetensors ended while model.embed_tokens.weight was read"):
        linear(tmp_path, "a", "b", tokenizer=str(tmp_path / "a"))


def test_an_adapted_embedding_is_mapped_with_its_update(tmp_path):
    """The output is that of the adapter's product stored in full, and then mapped."""
    base, left = arrays(0, 10), arrays(1, 11)
    a, b = np.random.default_rng(7).standard_normal((2, 11)), np.random.default_rng(8).standard_normal((8, 2))
    model(tmp_path / "base", base, LETTERS)
    inner = model(tmp_path / "inner", left | {HEAD: left[EMBEDDING]}, ["<x>", *LETTERS], tie_word_embeddings=False)
    model(tmp_path / "base", base | {HEAD: base[EMBEDDING]}, LETTERS, tie_word_embeddings=False)
    pair = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    write_adapter(tmp_path / "lora", pair, base_model_name_or_path=str(inner))
    options = {"method": "task-arithmetic", "base": tmp_path / "base", "tokenizer": "base"}
    _, out = linear(tmp_path, "lora", **options)
    expected = left[EMBEDDING] + 2.0 * (b @ a).T  # alpha / rank = 2
    np.testing.assert_allclose(read_model(out)[EMBEDDING], expected[1:], atol=1e-5)
    np.testing.assert_allclose(read_model(out)[HEAD], left[EMBEDDING][1:], atol=1e-5)


def test_a_broken_row_is_named_where_it_is_stored(tmp_path):
    """Also where another input reads it first: row 10 of b is row 11 of the output, and of the base."""
    right = arrays(2, 11)
    right[EMBEDDING][10, 3] = np.nan
    model(tmp_path / "base", arrays(0, 10))
    model(tmp_path / "a", arrays(1, 11), LETTERS, [("<x>", 10)])
    model(tmp_path / "b", right, LETTERS, [("<y>", 10)])
    with pytest.raises(InputError, match=r"model 2 .*/b: model.embed_tokens.weight holds nan at element 83"):
        linear(tmp_path, "a", "b", method="task-arithmetic", base=tmp_path / "base", tokenizer="union")


@pytest.mark.parametrize("method", ["slerp", "ties", "della"])
def test_a_base_with_fewer_rows_counts_with_those_it_is_given(tmp_path, method):
    base = arrays(0, 10)
    left, right = (added(arrays(0, 12), arrays(seed, 12, 0.1)) for seed in (1, 2))
    for values in (left, right):
        values[EMBEDDING][:10] += base[EMBEDDING] - arrays(0, 12)[EMBEDDING][:10]
    extended = base | {EMBEDDING: np.concatenate([base[EMBEDDING], left[EMBEDDING][10:]])}
    tokens = [("<x>", 10), ("<y>", 11)]
    model(tmp_path / "base", base)
    model(tmp_path / "extended", extended, LETTERS, tokens)
    for name, values in (("a", left), ("b", right)):
        model(tmp_path / name, values, LETTERS, tokens)
    expected, whole = linear(tmp_path, "a", "b", method=method, base=tmp_path / "extended", out="whole")
    found, out = linear(tmp_path, "a", "b", method=method, base=tmp_path / "base", tokenizer="union")
    assert read_raw(out) == read_raw(whole)
    assert [group.as_dict() for group in found.groups] == [group.as_dict() for group in expected.groups]
    assert found.plan.input_bytes == expected.plan.input_bytes and found.plan.parameters == expected.plan.parameters


# --- choices ---


@pytest.mark.parametrize("choice", ["base", "union", "path"])
def test_where_all_tokenizers_are_equal_a_choice_changes_nothing(tmp_path, choice):
    base = arrays(0)
    for number, name in enumerate(("base", "a", "b")):
        path = model(tmp_path / name, added(base, arrays(number, scale=0.1)), LETTERS, [("<x>", 10)], dtype="BF16")
        (path / "generation_config.json").write_text('{"eos_token_id":   10}')
    options = {"method": "slerp", "base": tmp_path / "base"}
    _, plain = linear(tmp_path, "a", "b", out="plain", **options)
    chosen = choice if choice != "path" else str(tmp_path / "b")
    result, out = linear(tmp_path, "a", "b", tokenizer=chosen, **options)
    assert result.plan.notes == ()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        assert (out / name).read_bytes() == (plain / name).read_bytes()


def refused(root, kind, message, *names, **options):
    before = sorted(root.rglob("*"))
    with pytest.raises(kind) as caught:
        linear(root, *names, **options)
    assert message in str(caught.value)
    assert sorted(root.rglob("*")) == before


@pytest.fixture
def pair(tmp_path):
    model(tmp_path / "a", arrays(1, 11), LETTERS, [("<x>", 10)])
    model(tmp_path / "b", arrays(2, 11), LETTERS, [("<y>", 10)])
    return tmp_path


def test_without_a_choice_tokenizers_must_be_equal(pair):
    refused(pair, InputError, "choose whose, merge --tokenizer", "a", "b")
    model(pair / "b", arrays(2, 12), LETTERS, [("<y>", 11)])
    refused(pair, InputError, "choose one: merge --tokenizer", "a", "b")


def test_the_tokenizer_of_a_base_needs_a_base(pair):
    refused(pair, UsageError, "--tokenizer base: this merge has no base", "a", "b", tokenizer="base")


def test_the_tokenizer_of_another_model_is_refused(pair):
    refused(pair, UsageError, "--tokenizer c is none of the inputs", "a", "b", tokenizer="c")


def test_a_choice_needs_fast_tokenizers(pair):
    (pair / "b/tokenizer.json").rename(pair / "b/tokenizer.model")
    refused(pair, InputError, f"model 2 {pair / 'b'} has no tokenizer.json", "a", "b", tokenizer="union")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {}}', "holds no vocabulary"),
        ('{"model": {"vocab": {"a": 0, "b": 0}}}', "gives the id 0 to 2 tokens"),
        ('{"model": {"vocab": {"a": -1}}}', "'a' has the id -1"),
        ('{"model": {"vocab": {"a": "0"}}}', "'a' has the id 0"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}', "added_tokens is malformed"),
        ('{"model": {"vocab": [["a"]]}}', "holds no vocabulary"),
        ('{"model": {"vocab": {"a": 0}, "merges": [3]}}', "holds no vocabulary"),
        ("[]", "is not a JSON object"),
    ],
)
def test_malformed_tokenizers(pair, text, message):
    (pair / "b/tokenizer.json").write_text(text)
    refused(pair, InputError, message, "a", "b", tokenizer="union")


def test_other_differences_than_the_vocabulary_are_still_refused(pair):
    model(pair / "b", random_arrays(2, 1.0, SHAPES | {EMBEDDING: (11, 9)}), LETTERS, [("<y>", 10)])
    refused(pair, InputError, "model.embed_tokens.weight is [11, 8]", "a", "b", tokenizer="union")
    model(pair / "b", random_arrays(2, 1.0, SHAPES | {"model.norm.weight": (11,)}), LETTERS)
    refused(pair, InputError, "model.norm.weight is [8]", "a", "b", tokenizer="union")


# --- unions ---


def test_a_union_has_the_rows_of_all_tokens(pair):
    left, right = read_model(pair / "a")[EMBEDDING], read_model(pair / "b")[EMBEDDING]
    result, out = linear(pair, "a", "b", tokenizer="union")
    found = read_model(out)[EMBEDDING]
    np.testing.assert_allclose(found[:10], (left[:10] + right[:10]) / 2, atol=1e-6)
    np.testing.assert_array_equal(found[10:], [left[10], right[10]])  # each is one model's alone
    assert config_of(out)["vocab_size"] == 12
    entries = config_of(out, "tokenizer.json")["added_tokens"]
    assert [(entry["content"], entry["id"], entry["special"]) for entry in entries] == [
        ("<x>", 10, True),
        ("<y>", 11, True),
    ]
    assert result.plan.notes == (
        "tokenizer of model 1 with 1 token added: id 11",
        "model 1: 1 token taken from model 2",
        "model 2: 1 token mapped, 1 token taken from model 1",
    )


def test_new_tokens_use_rows_without_a_token_before_rows_are_added(tmp_path):
    model(tmp_path / "a", arrays(1, 12))  # rows 10 and 11 are free
    model(tmp_path / "b", arrays(2, 13), LETTERS, [("<p>", 10), ("<q>", 11), ("<r>", 12)])
    right = read_model(tmp_path / "b")[EMBEDDING]
    _, out = linear(tmp_path, "a", "b", tokenizer="union")
    np.testing.assert_array_equal(read_model(out)[EMBEDDING][10:], right[10:])
    assert config_of(out)["vocab_size"] == 13
    model(tmp_path / "c", arrays(3, 11), LETTERS, [("<p>", 10)])
    result, out = linear(tmp_path, "a", "c", tokenizer="union", out="fits")
    assert read_model(out)[EMBEDDING].shape == (12, 8) and "vocab_size" not in result.plan.config


def test_a_core_token_that_another_model_flags_keeps_its_row(tmp_path):
    model(tmp_path / "a", arrays(1, 10))
    model(tmp_path / "b", arrays(2, 10), LETTERS, [("c", 2)])
    result, out = linear(tmp_path, "a", "b", tokenizer="union")
    assert config_of(out, "tokenizer.json")["added_tokens"] == [{"id": 2, "content": "c"} | FLAGS]
    assert read_model(out)[EMBEDDING].shape == (10, 8) and result.plan.notes == ()


def test_new_ids_begin_after_the_core_also_where_the_added_tokens_are_in_it(tmp_path):
    model(tmp_path / "a", arrays(1, 10), LETTERS, [("c", 2)])
    model(tmp_path / "b", arrays(2, 11), LETTERS, [("c", 2), ("<y>", 10)])
    _, out = linear(tmp_path, "a", "b", tokenizer="union")
    assert [entry["id"] for entry in config_of(out, "tokenizer.json")["added_tokens"]] == [2, 10]


def test_an_added_entry_of_a_core_token_has_the_core_id(tmp_path):
    """So does the tokenizers library, whatever id the entry states."""
    model(tmp_path / "a", arrays(1, 10))
    model(tmp_path / "b", arrays(2, 10), LETTERS, [("c", 9_999)])
    result, _ = linear(tmp_path, "a", "b", tokenizer=str(tmp_path / "a"))
    assert result.plan.notes == () and result.plan.request.tokenizer == "model 1"


def test_flags_that_disagree_are_those_of_the_first(pair):
    write_tokenizer(pair / "b", LETTERS, [("<x>", 10)], special=False)
    result, out = linear(pair, "a", "b", tokenizer="union")
    assert result.plan.notes == ("<x> has other flags in model 2: the first ones are kept",)
    assert config_of(out, "tokenizer.json")["added_tokens"][0]["special"] is True


def test_a_union_of_different_cores_is_refused(pair):
    message = "a union of different vocabularies is no tokenizer"
    write_tokenizer(pair / "b", LETTERS, [("<y>", 10)], merges=["a b"])
    refused(pair, InputError, message, "a", "b", tokenizer="union")
    write_tokenizer(pair / "b", LETTERS[::-1], [("<y>", 10)])
    refused(pair, InputError, message, "a", "b", tokenizer="union")


def test_merges_in_another_spelling_are_the_same_core(pair):
    write_tokenizer(pair / "a", LETTERS, [("<x>", 10)], merges=["a b"])
    write_tokenizer(pair / "b", LETTERS, [("<y>", 10)], merges=[["a", "b"]])
    linear(pair, "a", "b", tokenizer="union")


def test_ids_that_leave_no_place_are_refused(pair):
    holes = {token: 2 * index for index, token in enumerate("abcde")}  # five tokens: the sixth would be id 5, then 6
    write_tokenizer(pair / "a", holes)
    write_tokenizer(pair / "b", holes, [("<y>", 7), ("<z>", 9)])
    refused(
        pair, InputError, "cannot take a token of id 5: its ids have holes (6 is in use)", "a", "b", tokenizer="union"
    )
    write_tokenizer(pair / "a", LETTERS, [("<x>", 10**12)])
    write_tokenizer(pair / "b", LETTERS, [("<y>", 10)])
    refused(pair, InputError, "its embedding ends at row 11", "a", "b", tokenizer="union")


def test_the_other_tokenizer_files_are_extended_where_they_are(pair):
    (pair / "a/added_tokens.json").write_text('{"<x>": 10}')
    flags = {"content": "<x>"} | FLAGS
    (pair / "a/tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"10": flags}, "pad": 1}))
    (pair / "b/chat_template.jinja").write_text("b")
    _, out = linear(pair, "b", "a", tokenizer="union", method="task-arithmetic", base=pair / "a")
    assert config_of(out, "added_tokens.json") == {"<x>": 10, "<y>": 11}
    decoder = {"10": flags, "11": {"content": "<y>"} | FLAGS}
    assert config_of(out, "tokenizer_config.json") == {"added_tokens_decoder": decoder, "pad": 1}
    assert not (out / "chat_template.jinja").exists()  # that of model 1, whose tokenizer it is not


def test_a_chat_template_that_is_lost_with_its_tokenizer_is_named(pair):
    (pair / "b/chat_template.jinja").write_text("b")
    result, _ = linear(pair, "b", "a", tokenizer=str(pair / "a"))
    lost = "no chat template: that of model 1 is not taken with the tokenizer of model 2"
    assert result.plan.notes[-1] == lost and result.summary["notes"][-1] == lost
    (pair / "a/tokenizer_config.json").write_text('{"chat_template": "a"}')
    result, _ = linear(pair, "b", "a", tokenizer=str(pair / "a"), out="kept")
    assert lost not in result.plan.notes


def test_configured_ids_follow_their_tokens(pair):
    write_model(pair / "b", arrays(2, 11), config={"vocab_size": 11, "eos_token_id": 10, "pad_token_id": 3})
    (pair / "b/generation_config.json").write_text('{"eos_token_id": [1, 10], "max_new_tokens": 10}')
    (pair / "a/generation_config.json").write_text('{"eos_token_id": 2}')
    _, out = linear(pair, "b", "a", tokenizer="union", base=pair / "a", method="task-arithmetic")
    assert config_of(out)["eos_token_id"] == 11 and config_of(out)["pad_token_id"] == 3
    assert config_of(out, "generation_config.json") == {"eos_token_id": [1, 11], "max_new_tokens": 10}
    _, out = linear(pair, "b", "a", tokenizer=str(pair / "a"), out="chosen")  # <y> is no token of a
    assert config_of(out)["eos_token_id"] is None
    assert config_of(out, "generation_config.json")["eos_token_id"] == [1]


def tiny_llama(path, tokens, seed):
    """A random Llama with a trained byte-level tokenizer that has `tokens` added."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AddedToken, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the rows follow their tokens, the tokens follow their rows"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens], special_tokens=True)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes))
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return network, tokenizer


def test_transformers_loads_a_union_and_knows_the_new_tokens(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_llama(tmp_path / "base", [], 0)
    left, one = tiny_llama(tmp_path / "a", ["<tool>"], 1)
    right, other = tiny_llama(tmp_path / "b", ["<think>", "<tool>"], 2)
    options = {"method": "task-arithmetic", "base": tmp_path / "base", "weights": (0.5, 0.5)}
    _, out = linear(tmp_path, "a", "b", tokenizer="union", **options)
    tokenizer, network = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    size = len(one) - 1
    assert tokenizer.convert_tokens_to_ids(["<tool>", "<think>"]) == [size, size + 1]
    ids = tokenizer("the rows<think> follow<tool>", return_tensors="pt")
    assert ids["input_ids"][0, -1] == size and size + 1 in ids["input_ids"][0]
    assert tokenizer.decode(ids["input_ids"][0]) == "the rows<think> follow<tool>"
    assert tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True) == "the rows follow"
    logits = network(**ids).logits
    assert logits.shape[-1] == size + 2 == network.config.vocab_size and torch.isfinite(logits).all()
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        merged, a, b = (getattr(item, layer)().weight.detach() for item in (network, left, right))
        # The base has a's row of <tool>, the only one that both models brought; <think> is b's alone.
        torch.testing.assert_close(merged[size], (a[size] + b[other.convert_tokens_to_ids("<tool>")]) / 2)
        # base and a have b's row: no task vector at all.
        torch.testing.assert_close(merged[size + 1], b[other.convert_tokens_to_ids("<think>")])


# --- slices ---


def test_stacked_layers_take_the_chosen_vocabulary_too(pair):
    slices = (Slice(layers=((0, 0, 1),)), Slice(layers=((1, 1, 2),)))
    _, out = linear(pair, "a", "b", method="passthrough", slices=slices, tokenizer="union")
    left, right = read_model(pair / "a"), read_model(pair / "b")
    np.testing.assert_array_equal(read_model(out)[EMBEDDING], [*left[EMBEDDING], right[EMBEDDING][10]])
    assert config_of(out)["num_hidden_layers"] == 2 and config_of(out)["vocab_size"] == 12
    assert (
        read_model(out)["model.layers.1.mlp.up_proj.weight"].tolist()
        == right["model.layers.1.mlp.up_proj.weight"].tolist()
    )
