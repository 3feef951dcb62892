"""A part of the rows of large files: the first ones, others at random with equal chances, and the number of all."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gemma2.core.errors import InputError
from gemma2.posttrain.data.files.row_sample import RowSample
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.sources import iter_rows
from gemma2.posttrain.schemas.fields import RowFields

N = 400
ROWS = [{"prompt": f"q{number}", "completion": "a"} for number in range(N)]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)


FILES = {
    "rows.jsonl": lambda path: path.write_bytes(lines(ROWS)),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(ROWS))),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "rows.csv": as_csv,
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=90),
    "rows.txt": lambda path: path.write_text("".join(f"q{number}\n\n" for number in range(N))),
}


@pytest.fixture(params=FILES)
def file(request, tmp_path):
    path = tmp_path / request.param
    FILES[request.param](path)
    return path


def test_the_first_rows_and_some_others_are_read_in_order_with_the_places_of_a_whole_reading(file):
    places = {row.columns["prompt"]: row.where for row in iter_rows(file)}
    sample = RowSample(10, 30)
    found = list(iter_rows(file, sample=sample))
    names = [row.columns["prompt"] for row in found]
    assert names[:10] == [f"q{number}" for number in range(10)]
    assert names == sorted(set(names), key=lambda name: int(name[1:]))
    assert len(names) == 40
    assert all(row.where == places[row.columns["prompt"]] for row in found)
    assert sample.totals == {file: N}
    assert sample.counted == {file: 40}
    assert not sample.is_whole([file])


def test_a_small_file_is_read_whole(file):
    sample = RowSample(100, N)
    assert [row.columns["prompt"] for row in iter_rows(file, sample=sample)] == [row["prompt"] for row in ROWS]
    assert sample.is_whole([file])


def test_every_row_has_the_same_chance(tmp_path):
    FILES["rows.jsonl"](path := tmp_path / "rows.jsonl")
    seen = Counter()
    for seed in range(200):
        seen.update(row.columns["prompt"] for row in list(iter_rows(path, sample=RowSample(10, 39, seed)))[10:])
    # 39 of 390 rows in each of 200 draws: 20 +- 4.2 times; five standard deviations
    assert set(seen) == {f"q{number}" for number in range(10, N)}
    assert all(0 < count < 42 for count in seen.values())
    thirds = [sum(seen[f"q{n}"] for n in range(a, a + 130)) for a in (10, 140, 270)]
    assert max(thirds) - min(thirds) < 0.1 * sum(thirds)


def test_every_file_of_a_folder_has_its_share(tmp_path):
    for number in range(20):
        (tmp_path / f"part-{number}.jsonl").write_bytes(lines(ROWS[:100]))
    sample = RowSample(40, 200)
    list(iter_rows(tmp_path, sample=sample))
    assert set(sample.counted.values()) == {5 + 10}  # at least five first ones
    assert set(sample.totals.values()) == {100}


def test_a_bad_row_among_the_chosen_is_refused_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS[:5]) + b"{oops\n" + lines(ROWS[5:]))
    with pytest.raises(InputError, match=r"rows\.jsonl:6: not JSON"):
        list(iter_rows(path, sample=RowSample(10, 0)))
    skipping = Reading(RowFields(on_bad_row="skip"), sample=RowSample(9, 1))
    assert len(list(skipping.each_conversation(path))) == 9 + 5 - 1  # of the first nine rows and five others
    assert list(skipping.skipped) == [f"{path}:6"]
