"""Where rows come from: kinds of files, folders, outputs, shards, hub data sets; and the writer of shards."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gemma2.core.errors import InputError
from gemma2.posttrain.data.sources import ShardWriter, count_rows, data_files, iter_rows, to_line


def write(path, *rows):
    path.write_bytes(b"".join(row if isinstance(row, bytes) else to_line(row) for row in rows))
    return path


def prompts_of(path, **options):
    return [row.columns["prompt"] for row in iter_rows(path, **options)]


def parquet(path, *prompts):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": list(prompts)}), path)
    return path


def finished(directory):
    (directory / "gemma2.json").write_text(json.dumps({"status": "complete"}))
    return directory


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    lines = write(tmp_path / "a.jsonl", {"prompt": "one"}, {"prompt": "zwei €"})
    text = tmp_path / "a.txt"
    text.write_text("one\n\n  zwei € \n", encoding="utf-8")
    table = parquet(tmp_path / "a.parquet", "one", "zwei €")
    assert [prompts_of(path) for path in (lines, text, table)] == [["one", "zwei €"]] * 3
    assert [count_rows(path) for path in (lines, text, table)] == [2, 2, 2]
    assert [row.where for row in iter_rows(text)] == [f"{text}:1", f"{text}:3"]
    assert [row.where for row in iter_rows(table)] == [f"{table}:1", f"{table}:2"]


def test_nested_messages_survive_parquet(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [messages]}), tmp_path / "a.parquet")
    (row,) = iter_rows(tmp_path / "a.parquet")
    assert row.columns == {"messages": messages}


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    parquet(tmp_path / "b.parquet", "second")
    write(tmp_path / "a.jsonl", {"prompt": "first"})
    (tmp_path / "c.md").write_text("not data")
    assert prompts_of(tmp_path) == ["first", "second"]


def test_of_an_output_only_the_data_are_read(tmp_path):
    write(tmp_path / "metrics.jsonl", {"prompt": "no"})
    write(tmp_path / "dropped.jsonl", {"prompt": "no"})
    write(tmp_path / "data-00001-of-00002.jsonl", {"prompt": "b"})
    write(tmp_path / "data-00000-of-00002.jsonl", {"prompt": "a"})
    assert prompts_of(finished(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("name", ["data.jsonl", "pairs.jsonl"])
def test_an_output_with_one_file_is_read(tmp_path, name):
    assert data_files(finished(write(tmp_path / name, {"prompt": "a"}).parent)) == [tmp_path / name]


def test_an_unfinished_output_is_refused(tmp_path):
    write(tmp_path / "data.jsonl", {"prompt": "a"})
    (tmp_path / "gemma2.json").write_text(json.dumps({"status": "running"}))
    with pytest.raises(InputError, match="unfinished"):
        data_files(tmp_path)


def test_a_missing_shard_is_refused(tmp_path):
    write(tmp_path / "data-00000-of-00002.jsonl", {"prompt": "a"})
    with pytest.raises(InputError, match="holds 1 of 2 shards"):
        data_files(finished(tmp_path))


@pytest.mark.parametrize("complete", [True, False])
def test_a_directory_without_data_is_refused(tmp_path, complete):
    if complete:
        finished(tmp_path)
    with pytest.raises(InputError, match="without data"):
        data_files(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.jsonl", "data/rows.parquet", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_set(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=f"{name} does not exist"):
        data_files((tmp_path / name).relative_to(tmp_path))


def test_a_broken_parquet_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"a\.parquet is not a readable parquet file"):
        list(iter_rows(write(tmp_path / "a.parquet", b"PAR1 nonsense")))


def test_bad_rows_can_be_left_out_and_are_handed_over(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a"}, b"{broken\n", b"[1]\n", {"prompt": "b"})
    bad = []
    assert prompts_of(path, on_bad=lambda error, row: bad.append(error)) == ["a", "b"]
    assert [str(error).startswith(f"{path}:{line}: ") for line, error in zip((2, 3), bad, strict=True)] == [True, True]
    with pytest.raises(InputError, match=":2: not JSON"):
        prompts_of(path)


def test_text_that_is_no_utf8_is_a_bad_row(tmp_path):
    path = write(tmp_path / "a.txt", b"good\n\xff\n")
    with pytest.raises(InputError, match=":2: not UTF-8"):
        prompts_of(path)
    bad = []
    assert prompts_of(path, on_bad=lambda error, row: bad.append(error)) == ["good"] and len(bad) == 1


def test_a_limit_holds_over_several_files(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", {"prompt": name}, {"prompt": name})
    assert prompts_of(tmp_path, limit=3) == ["a", "a", "b"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one data set, and what was asked of it."""
    asked = []

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        if name != "org/set":
            raise ValueError(f"Couldn't reach '{name}' on the Hub\n (LocalEntryNotFoundError)")
        return datasets.Dataset.from_dict({"prompt": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_hub_set_becomes_one_file_in_the_cache(hub, tmp_path):
    (file,) = data_files(Path("org/set:main@test"))
    assert file.parent == tmp_path / "cache" / "gemma2" / "data" and prompts_of(file) == ["a", "b"]
    data_files(Path("org/set"))
    assert hub == [("org/set", "main", "test"), ("org/set", None, "train")]


def test_a_hub_set_that_cannot_be_had_is_one_line(hub):
    with pytest.raises(InputError, match=r"org/other is not a file here, and cannot be loaded from the hub") as caught:
        data_files(Path("org/other"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("rows", "sizes"), [(0, [0]), (3, [3]), (4, [4]), (5, [4, 1]), (8, [4, 4])])
def test_shards_hold_all_rows_in_order(tmp_path, rows, sizes):
    with ShardWriter(tmp_path, shard_rows=4) as writer:
        for number in range(rows):
            writer.write({"prompt": str(number)})
    names = [f"data-{number:05d}-of-{len(sizes):05d}.jsonl" for number in range(len(sizes))]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [len(prompts_of(tmp_path / name)) for name in names] == sizes
    assert prompts_of(tmp_path) == [str(number) for number in range(rows)] and writer.rows == rows


def test_an_error_leaves_no_shard(tmp_path):
    with pytest.raises(RuntimeError, match="in the middle"), ShardWriter(tmp_path, shard_rows=1) as writer:
        writer.write({"prompt": "a"})
        writer.write({"prompt": "b"})
        raise RuntimeError("in the middle")
    assert list(tmp_path.iterdir()) == []
