"""Verify: what is changed on the disk is named, and nothing else."""

import json
import random
import shutil

import pytest
from lineages import DAMAGES, base_model, lineage, made

from gemma2.core.errors import InputError
from gemma2.core.outputs.digest_cache import stamp_of, store
from gemma2.core.outputs.digests import digest_input, digest_weights
from gemma2.core.outputs.hashing import digest_file
from gemma2.core.outputs.manifest import MANIFEST, read_manifest
from gemma2.posttrain.audit import disk_reading as reading
from gemma2.posttrain.audit.verification import verify


def faults(*paths, **options):
    """(kind, output/file, user) of every fault."""
    found = verify(paths, **options)
    return {
        (fault.kind, f"{fault.output.name}/{fault.file}", fault.used_by.name if fault.used_by else None)
        for fault in found.faults
    }


def remarks(*paths):
    return {(remark.kind, f"{remark.output.name}/{remark.file}") for remark in verify(paths).remarks}


def edited(output, **changes):
    """Change entries of a manifest."""
    path = output / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_finished_pipeline_is_all_right_and_all_of_it_is_read_once(tmp_path, monkeypatch):
    pipeline = lineage(tmp_path)
    opened = []
    inner = reading._read_file
    monkeypatch.setattr(reading, "_read_file", lambda path, *rest: opened.append(path.resolve()) or inner(path, *rest))
    found = verify([pipeline.root])
    assert (found.faults, found.remarks) == ((), ())
    files = [path for folder in ("out", "raw") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    wanted = {path for path in [*files, tmp_path / "rows.jsonl"] if path.name not in (MANIFEST, "pipeline.json")}
    wanted = {path for path in wanted if path.suffix != ".log"}
    assert sorted(opened) == sorted(wanted)
    assert found.bytes == sum(path.stat().st_size for path in wanted) and found.files == len(wanted)


def test_the_last_output_stands_for_its_lineage(tmp_path):
    pipeline = lineage(tmp_path)
    assert [path.name for path in verify([pipeline.root / "d"]).gathered.outputs] == ["d", "b", "c", "a"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_file_that_is_damaged_is_named_and_nothing_else(tmp_path, damage):
    pipeline = lineage(tmp_path)
    stages = [one.out for one in pipeline.stages.values()]
    files = [path for out in stages for path in sorted(out.iterdir()) if path.name != MANIFEST]
    whole = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-whole")
    for path in files:
        DAMAGES[damage](path)
        kind = "gone" if damage == "gone" else "damaged"
        assert faults(pipeline.root) == {(kind, f"{path.parent.name}/{path.name}", None)}
        assert remarks(pipeline.root) == set()
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.copy(whole / path.relative_to(tmp_path), path)
    assert faults(pipeline.root) == set()


def test_several_damaged_files_are_all_named(tmp_path):
    pipeline = lineage(tmp_path)
    rng = random.Random(0)
    names = ("config.json", "model.safetensors")
    chosen = rng.sample([one.out / name for one in pipeline.stages.values() for name in names], 4)
    for path in chosen:
        DAMAGES["flipped"](path)
    assert faults(pipeline.root) == {("damaged", f"{path.parent.name}/{path.name}", None) for path in chosen}


def test_what_is_remembered_of_a_file_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr("gemma2.core.outputs.digest_cache._not_before", lambda stamp: 0)
    out = made(tmp_path / "a")
    weights = out / "model.safetensors"
    before = digest_file(weights)
    DAMAGES["flipped"](weights)
    store("file", [weights], [stamp_of(weights)], 1, before)  # as after rot: the bytes change, the stamp does not
    store("tensors", [weights], [stamp_of(weights)], 1, "blake3:before")
    assert faults(out) == {("damaged", "a/model.safetensors", None)}
    assert digest_input(weights) == digest_file(weights) != before  # from now on all commands see it
    assert digest_weights(out) != "blake3:before"


@pytest.mark.parametrize(
    ("name", "part", "user"),
    [
        ("raw/model.safetensors", "raw/weights", "a"),
        ("raw/config.json", "raw/config.json", "a"),
        ("raw/chat_template.jinja", "raw/chat_template.jinja", "a"),
        ("rows.jsonl", "rows.jsonl", "c"),
    ],
)
def test_an_input_that_no_command_made_is_compared_with_what_its_users_record(tmp_path, name, part, user):
    pipeline = lineage(tmp_path)
    text = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(
        text.replace(b"base", b"case").replace(b"4", b"8").replace(b"m", b"n").replace(b"y", b"z")
    )
    found = verify([pipeline.root]).faults
    assert [(one.kind, one.used_by.name) for one in found] == [("input changed", user)]
    assert f"{found[0].output.name}/{found[0].file}".endswith(part)
    (tmp_path / name).unlink()
    assert {kind for kind, _, _ in faults(pipeline.root)} <= {"input changed"}


def test_what_decides_nothing_in_a_config_is_no_change(tmp_path):
    pipeline = lineage(tmp_path)
    (tmp_path / "raw" / "config.json").write_text('{"transformers_version": "6",\n "hidden": 4}')
    (tmp_path / "raw" / "README.md").write_text("new")
    assert faults(pipeline.root) == set()


def test_inputs_that_are_not_on_the_disk_are_a_remark(tmp_path):
    pipeline = lineage(tmp_path)
    shutil.rmtree(tmp_path / "raw")
    (tmp_path / "rows.jsonl").unlink()
    assert faults(pipeline.root) == set()
    assert {kind for kind, _ in remarks(pipeline.root)} == {"input not on disk"}


def test_an_output_that_was_made_again_since_its_use_is_an_input_that_changed(tmp_path):
    pipeline = lineage(tmp_path)
    shutil.rmtree(pipeline.root / "b")
    made(pipeline.root / "b", model=pipeline.root / "a", value=7)
    assert faults(pipeline.root) == {("input changed", "b/weights", "d")}


def test_damage_of_an_input_is_named_once_where_it_is(tmp_path):
    pipeline = lineage(tmp_path)
    DAMAGES["flipped"](pipeline.root / "b" / "config.json")
    DAMAGES["flipped"](pipeline.root / "b" / "model.safetensors")
    assert {kind for kind, _, _ in faults(pipeline.root / "d")} == {"damaged"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', "\ud800", '{"status": "complete"} x'])
def test_a_manifest_that_cannot_be_read_is_named(tmp_path, text):
    pipeline = lineage(tmp_path)
    (pipeline.root / "b" / MANIFEST).write_text(text, errors="surrogatepass")
    assert faults(pipeline.root) == {("manifest unreadable", "b/", None)}
    assert faults(pipeline.root / "d") == {("manifest unreadable", "b/", None)}


def test_a_stage_that_is_gone_is_named(tmp_path):
    pipeline = lineage(tmp_path)
    (pipeline.root / "b" / MANIFEST).unlink()
    shutil.rmtree(pipeline.root / "e")
    found = verify([pipeline.root]).faults
    assert [(one.kind, one.output.name) for one in found] == [
        ("manifest unreadable", "b"),
        ("manifest unreadable", "e"),
    ]
    assert all(one.found.endswith("is gone") for one in found)


@pytest.mark.parametrize(
    "changes",
    [
        {"parents": 3},
        {"parents": [1, {}, {"path": 3, "weights": []}]},
        {"parents": [{"role": "x", "path": "\0", "weights": "w", "files": 7}]},
        {"data": [{"digest": None}]},
        {"files": {"config.json": 7, "x": {"size": "y", "digest": 3}}},
        {"files": {"../../raw/config.json": {"size": 1}}},
        {"config": [], "summary": 3, "command": None},
    ],
)
def test_a_manifest_with_other_types_is_no_bug(tmp_path, changes):
    pipeline = lineage(tmp_path)
    edited(pipeline.root / "d", **changes)
    verify([pipeline.root])


def test_what_is_worth_knowing_is_a_remark_and_no_fault(tmp_path):
    out = made(tmp_path / "a")
    files = read_manifest(out)["files"]
    files["config.json"].pop("digest")
    edited(out, status="running", files=files)
    (out / "new.txt").write_text("new")
    assert faults(out) == set()
    assert remarks(out) == {("unfinished", "a/"), ("without a digest", "a/config.json"), ("not recorded", "a/new.txt")}


def test_of_a_record_of_another_version_the_files_are_compared_and_the_inputs_are_not(tmp_path):
    pipeline = lineage(tmp_path)
    parents = [{**one, "weights": "blake3:0"} for one in read_manifest(pipeline.root / "b")["parents"]]
    edited(pipeline.root / "b", schema_version=1, parents=parents)
    assert faults(pipeline.root) == set()
    assert remarks(pipeline.root) == {("other record", "b/")}
    DAMAGES["flipped"](pipeline.root / "b" / "config.json")
    assert faults(pipeline.root / "d") == {("damaged", "b/config.json", None)}


def test_a_snapshot_of_the_hub_is_followed_through_its_links(tmp_path):
    blobs = base_model(tmp_path / "models--o--n" / "blobs")
    snapshot = tmp_path / "models--o--n" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    out = made(tmp_path / "a", model=snapshot)
    assert faults(out) == set()
    DAMAGES["flipped"](blobs / "model.safetensors")
    assert faults(out) == {("input changed", "0123abcd/weights", "a")}


def test_a_moved_lineage_is_all_right(tmp_path):
    pipeline = lineage(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    found = verify([tmp_path / "there" / pipeline.root.name])
    assert (found.faults, found.remarks) == ((), ())


def test_a_path_without_a_record_is_one_line(tmp_path):
    for path in (base_model(tmp_path / "raw"), tmp_path / "gone", tmp_path / "raw" / "config.json"):
        with pytest.raises(InputError, match="give the output of a gemma2 command"):
            verify([path])
