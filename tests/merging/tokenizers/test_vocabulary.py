"""Models whose tokenizers differ: each row of the output is merged from the models' rows of its token."""

import os

import numpy as np
import pytest
from model_files import added, random_arrays, read_model, read_raw
from test_adapter import write_adapter
from tokenizer_models import EMBEDDING, HEAD, LETTERS, arrays, config_of, merged, model, write_tokenizer

from gemma2.core.errors import InputError
from gemma2.merging import MergeRequest, engine, merge
from gemma2.merging.streaming.feeder import CUT
from gemma2.merging.tokenizers.row_map import RowMap


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
    result, out = merged(tmp_path, "a", "b", tokenizer=str(tmp_path / "a"))
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
    _, expected = merged(tmp_path, "a", "b", out="expected", **options)
    _, found = merged(tmp_path, "a", "b-permuted", out="found", tokenizer=str(tmp_path / "a"), **options)
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


def test_a_token_missing_in_a_model_has_the_row_of_the_base_and_a_zero_task_vector(tmp_path):
    base, left, right = arrays(0, 12), arrays(1, 12), arrays(2, 11)
    model(tmp_path / "base", base, LETTERS, [("<x>", 10), ("<y>", 11)])
    model(tmp_path / "a", left, LETTERS, [("<x>", 10), ("<y>", 11)])
    model(tmp_path / "b", right, LETTERS, [("<y>", 10)])
    result, out = merged(tmp_path, "a", "b", method="task-arithmetic", base=tmp_path / "base", tokenizer="base")
    found = read_model(out)[EMBEDDING]
    delta = left[EMBEDDING] - base[EMBEDDING]
    np.testing.assert_allclose(found[10], base[EMBEDDING][10] + delta[10], atol=1e-5)
    np.testing.assert_allclose(found[11], right[EMBEDDING][10] + delta[11], atol=1e-5)
    assert result.plan.notes == ("model 2: 1 token mapped, 1 token taken from base",)


def test_a_token_missing_in_the_base_has_the_row_of_the_chosen_model(tmp_path):
    base, left, right, third = arrays(0, 10), arrays(1, 10), arrays(2, 11), arrays(3, 11)
    for name, values in (("base", base), ("a", left)):
        model(tmp_path / name, values)
    for name, values in (("b", right), ("c", third)):
        model(tmp_path / name, values, LETTERS, [("<x>", 10)])
    options = {"method": "task-arithmetic", "base": tmp_path / "base", "tokenizer": str(tmp_path / "c")}
    result, out = merged(tmp_path, "a", "b", "c", **options)
    # base, a and c all have c's row: only b has a task vector.
    np.testing.assert_allclose(read_model(out)[EMBEDDING][10], right[EMBEDDING][10], atol=1e-5)
    assert result.plan.notes == ("base: 1 token taken from model 3", "model 1: 1 token taken from model 3")
    assert config_of(out)["vocab_size"] == 11


def test_the_base_comes_before_the_chosen_model(tmp_path):
    base, left, right = arrays(0, 11), arrays(1, 11), arrays(2, 10)
    for name, values in (("base", base), ("a", left)):
        model(tmp_path / name, values, LETTERS, [("<x>", 10)])
    model(tmp_path / "b", right)
    options = {"method": "task-arithmetic", "base": tmp_path / "base", "tokenizer": str(tmp_path / "a")}
    result, out = merged(tmp_path, "a", "b", **options)
    np.testing.assert_allclose(read_model(out)[EMBEDDING][10], left[EMBEDDING][10], atol=1e-5)
    assert result.plan.notes == ("model 2: 1 token taken from base",)


def test_tokens_that_the_output_does_not_have_are_named_as_dropped_and_reach_no_padding_row(tmp_path):
    base, left = arrays(0, 16), arrays(1, 16)
    model(tmp_path / "base", base)
    model(tmp_path / "a", left, LETTERS, [("<x>", 12)])
    result, out = merged(tmp_path, "a", method="task-arithmetic", base=tmp_path / "base", tokenizer="base")
    found = read_model(out)[EMBEDDING]
    np.testing.assert_array_equal(found[12], base[EMBEDDING][12].astype(np.float32))
    np.testing.assert_allclose(found[13], left[EMBEDDING][13], atol=1e-5)
    assert result.plan.notes == ("model 1: 1 padding row taken from base, 1 token dropped",)


def test_padding_rows_missing_in_a_model_come_from_the_chosen_one(tmp_path):
    left, right = arrays(1, 16), arrays(2, 10)
    model(tmp_path / "a", left)
    model(tmp_path / "b", right)
    result, out = merged(tmp_path, "a", "b", tokenizer=str(tmp_path / "a"))
    np.testing.assert_array_equal(read_model(out)[EMBEDDING][10:], left[EMBEDDING][10:].astype(np.float32))
    assert result.plan.notes == ("model 2: 6 padding rows taken from model 1",)
    _, out = merged(tmp_path, "a", "b", tokenizer=str(tmp_path / "b"), out="short")
    assert read_model(out)[EMBEDDING].shape == (10, 8) and config_of(out)["vocab_size"] == 10


def test_an_untied_head_is_mapped_like_the_embedding_and_other_tensors_are_not(tmp_path):
    shapes = {EMBEDDING: (10, 8), HEAD: (10, 8), "model.layers.0.mlp.up_proj.weight": (10, 8)}
    values = random_arrays(1, 1.0, shapes)
    order = list(range(9, -1, -1))
    permuted = values | {name: values[name][order] for name in (EMBEDDING, HEAD)}
    model(tmp_path / "a", values, tie_word_embeddings=False)
    model(tmp_path / "b", permuted, LETTERS[::-1], tie_word_embeddings=False)
    _, out = merged(tmp_path, "a", "b", tokenizer=str(tmp_path / "a"))
    assert read_raw(out) == read_raw(tmp_path / "a")


def test_cached_sums_are_used_for_the_same_row_map_only(tmp_path):
    """Another tokenizer.json over the same weights means other rows: sums of an earlier merge must not be used."""
    base = arrays(0)
    for number, name in enumerate(("base", "a", "b")):
        model(tmp_path / name, added(base, arrays(number, scale=0.1)))
    options = {"method": "slerp", "base": tmp_path / "base", "tokenizer": "base"}
    angles = []
    for number, core in enumerate((LETTERS, LETTERS[::-1], LETTERS[5:] + LETTERS[:5])):
        write_tokenizer(tmp_path / "b", core)
        result, _ = merged(tmp_path, "a", "b", out=f"out-{number}", **options)
        angles.append(str(result.groups[0].as_dict()["angles"]))
    assert len(set(angles)) == 3


def test_rows_are_the_same_read_in_one_call_or_one_by_one(tmp_path, monkeypatch):
    model(tmp_path / "a", arrays(1, 11), LETTERS, [("<x>", 10)], dtype="BF16")
    model(tmp_path / "b", arrays(2, 12), LETTERS[::-1], [("<z>", 10), ("<x>", 11)], dtype="BF16")
    _, one = merged(tmp_path, "a", "b", tokenizer=str(tmp_path / "b"), out="one")
    monkeypatch.setattr("gemma2.merging.streaming.feeder.gather", lambda places, into: False)
    _, other = merged(tmp_path, "a", "b", tokenizer=str(tmp_path / "b"), out="other")
    assert read_raw(one) == read_raw(other)


def test_rows_are_taken_from_models_of_other_dtypes(tmp_path):
    right = arrays(2, 11)
    model(tmp_path / "base", arrays(0, 10), dtype="BF16")
    model(tmp_path / "a", arrays(1, 10), dtype="BF16")
    model(tmp_path / "b", right, LETTERS, [("<x>", 10)], dtype="F32")
    options = {"method": "task-arithmetic", "base": tmp_path / "base", "dtype": "float32"}
    _, out = merged(tmp_path, "a", "b", tokenizer="union", **options)
    np.testing.assert_array_equal(read_model(out)[EMBEDDING][10], right[EMBEDDING][10].astype(np.float32))


def test_a_file_that_ends_while_rows_are_read_is_named(tmp_path, monkeypatch):
    model(tmp_path / "a", arrays(1))
    model(tmp_path / "b", arrays(2), LETTERS[::-1])
    planned = engine.plan_merge

    def shorten(*arguments, **options):
        plan = planned(*arguments, **options)
        os.truncate(tmp_path / "b/model.safetensors", plan.models[1].tensors[EMBEDDING].offset + 100)
        return plan

    monkeypatch.setattr(engine, "plan_merge", shorten)
    with pytest.raises(InputError, match=r"b/model.safetensors ended while model.embed_tokens.weight was read"):
        merged(tmp_path, "a", "b", tokenizer=str(tmp_path / "a"))


def test_an_adapted_embedding_is_mapped_with_its_update(tmp_path):
    """The output is the same as with the adapter's product stored in full, and then mapped."""
    base, left = arrays(0, 10), arrays(1, 11)
    a, b = np.random.default_rng(7).standard_normal((2, 11)), np.random.default_rng(8).standard_normal((8, 2))
    model(tmp_path / "base", base, LETTERS)
    inner = model(tmp_path / "inner", left | {HEAD: left[EMBEDDING]}, ["<x>", *LETTERS], tie_word_embeddings=False)
    model(tmp_path / "base", base | {HEAD: base[EMBEDDING]}, LETTERS, tie_word_embeddings=False)
    pair = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    write_adapter(tmp_path / "lora", pair, base_model_name_or_path=str(inner))
    options = {"method": "task-arithmetic", "base": tmp_path / "base", "tokenizer": "base"}
    _, out = merged(tmp_path, "lora", **options)
    expected = left[EMBEDDING] + 2.0 * (b @ a).T  # alpha / rank = 2
    np.testing.assert_allclose(read_model(out)[EMBEDDING], expected[1:], atol=1e-5)
    np.testing.assert_allclose(read_model(out)[HEAD], left[EMBEDDING][1:], atol=1e-5)


def test_a_row_that_is_not_finite_is_named_with_its_stored_place(tmp_path):
    """Also if another input reads it first: row 10 of b is row 11 of the output, and of the base."""
    right = arrays(2, 11)
    right[EMBEDDING][10, 3] = np.nan
    model(tmp_path / "base", arrays(0, 10))
    model(tmp_path / "a", arrays(1, 11), LETTERS, [("<x>", 10)])
    model(tmp_path / "b", right, LETTERS, [("<y>", 10)])
    with pytest.raises(InputError, match=r"model 2 .*/b: model.embed_tokens.weight holds nan at element 83"):
        merged(tmp_path, "a", "b", method="task-arithmetic", base=tmp_path / "base", tokenizer="union")


@pytest.mark.parametrize("method", ["slerp", "ties", "della"])
def test_a_smaller_base_merges_like_one_extended_by_hand(tmp_path, method):
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
    expected, whole = merged(tmp_path, "a", "b", method=method, base=tmp_path / "extended", out="whole")
    found, out = merged(tmp_path, "a", "b", method=method, base=tmp_path / "base", tokenizer="union")
    assert read_raw(out) == read_raw(whole)
    assert [group.as_dict() for group in found.groups] == [group.as_dict() for group in expected.groups]
    assert found.plan.input_bytes == expected.plan.input_bytes and found.plan.parameters == expected.plan.parameters
