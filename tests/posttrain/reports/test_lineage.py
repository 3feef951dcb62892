"""Lineages: parents are found and followed; changed and missing ones are marked."""

import json
import os
import shutil
import xml.etree.ElementTree as ET

import pytest
from processes import finish, gemma2, start
from text_model import write_text_model
from waiting import until_kept

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError
from gemma2.core.json_files import write_json
from gemma2.core.outputs import digests
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.hashing import digest_file
from gemma2.core.outputs.manifest import write_manifest
from gemma2.posttrain.reports.lineage import final_output, read_lineage
from gemma2.posttrain.reports.lineage_tree import lineage_text


def output(path, command, parents=(), data=(), rows=None, status="complete", **more):
    """An output of a command, with weights unless it has rows. parents: (role, directory); data: files."""
    path.mkdir(parents=True, exist_ok=True)
    for name, text in (rows or {"model.safetensors": f"weights of {path.name}"}).items():
        write_text_model(path, text) if name == "model.safetensors" else (path / name).write_text(text)
    manifest = {
        "command": command,
        "config": {},
        "parents": [
            {"role": role, "path": os.path.relpath(place, path), "weights": digest_weights(place)}
            for role, place in parents
        ],
        "data": [{"path": os.path.relpath(file, path), "digest": digest_file(file)} for file in data],
        "status": status,
    }
    write_manifest(path, manifest | more)
    return path


@pytest.fixture
def run(tmp_path):
    """base -> sft (on rows of a teacher) -> two policies -> slerp."""
    root = tmp_path / "run"
    base, teacher = output(root / "base", "tiny"), output(root / "teacher", "tiny")
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    rows = {"data-00000-of-00001.jsonl": "{}\n"}
    data = output(root / "data", "generate", [("teacher", teacher)], [tmp_path / "prompts.jsonl"], rows)
    sft = output(root / "sft", "sft", [("model", base)], [data / "data-00000-of-00001.jsonl"])
    policies = [output(root / f"policy-{m}", "rlhf", [("policy", sft)]) for m in (1, 2)]
    output(root / "slerp", "merge slerp", [("base", sft), *(("input", policy) for policy in policies)])
    return root


def by_name(lineage):
    return {origin.name: origin for origin in lineage.origins}


def edges(lineage):
    names = {origin.id: origin.name for origin in lineage.origins}
    return {(names[source], names[target], role) for source, target, role in lineage.uses}


def test_the_graph_reaches_back_to_every_root(run, tmp_path):
    found = read_lineage(run / "slerp")
    assert edges(found) == {
        ("teacher", "data", "teacher"),
        (str(tmp_path / "prompts.jsonl"), "data", "prompts"),
        ("base", "sft", "model"),
        ("data", "sft", "data"),
        ("sft", "policy-1", "policy"),
        ("sft", "policy-2", "policy"),
        ("sft", "slerp", "base"),
        ("policy-1", "slerp", "input"),
        ("policy-2", "slerp", "input"),
    }
    assert [origin.note for origin in found.origins] == [""] * 8
    assert found.origins[-1].id == found.result and found.origins[-1].name == "slerp"
    assert by_name(found)["sft"].digest == digest_weights(run / "sft")
    assert by_name(found)["data"].digest == digest_file(run / "data" / "data-00000-of-00001.jsonl")


def test_the_tree_has_every_origin_once_and_other_parents_by_name(run):
    found = read_lineage(run / "slerp")
    short = {name: origin.digest.removeprefix("blake3:")[:10] for name, origin in by_name(found).items()}
    text = lineage_text(found, 200).splitlines()
    assert [" ".join(line.split()) for line in text[1:]] == [
        f"teacher {short['teacher']} tiny",
        f"└─ teacher → data {short['data']} generate",
        next(line for line in text if "prompts:" in line).strip(),
        f"base {short['base']} tiny",
        f"└─ model → sft {short['sft']} sft",
        "│ data: data (above)",
        f"├─ policy → policy-1 {short['policy-1']} rlhf",
        f"├─ policy → policy-2 {short['policy-2']} rlhf",
        f"└─ base → slerp {short['slerp']} merge slerp",
        "input: policy-1, policy-2 (above)",
    ]
    assert text[0].endswith("file") and "prompts.jsonl" in text[0]


@pytest.mark.parametrize("width", [40, 80])
def test_the_tree_keeps_to_its_width(run, width):
    assert all(len(line) <= width for line in lineage_text(read_lineage(run / "slerp"), width).splitlines())


# --- what is not as it was ------------------------------------------------------------------------------------------


def test_a_parent_with_other_weights_is_marked_and_not_followed(run):
    old = digest_weights(run / "sft")
    output(run / "sft", "sft", rows={"model.safetensors": "others"})
    found = read_lineage(run / "slerp")
    (sft,) = [origin for origin in found.origins if origin.name == "sft"]
    assert sft.digest == old
    assert sft.note == f"changed: weights {digest_weights(run / 'sft').removeprefix('blake3:')[:10]}"
    assert "base" not in by_name(found) and "data" not in by_name(found)
    assert "changed: weights" in lineage_text(found)


def test_a_child_of_the_old_and_one_of_the_new_weights_have_different_parents(run):
    output(run / "sft", "sft", rows={"model.safetensors": "others"})
    output(run / "both", "merge linear", [("input", run / "policy-1"), ("input", run / "sft")])
    found = [origin for origin in read_lineage(run / "both").origins if origin.name == "sft"]
    assert sorted(bool(origin.note) for origin in found) == [False, True]


def test_a_missing_parent_is_marked_once(run):
    shutil.rmtree(run / "sft")
    found = read_lineage(run / "slerp")
    (sft,) = [origin for origin in found.origins if origin.path == str(run / "sft")]
    assert sft.note == "not there"
    assert len([use for use in found.uses if use[0] == sft.id]) == 3


def test_a_moved_output_finds_its_parents_by_its_configuration(run, tmp_path):
    output(run / "sft", "sft", [("model", run / "base")], config={"model": str(run / "base"), "x": ["a\0", 3]})
    shutil.move(run / "sft", tmp_path / "elsewhere")
    found = read_lineage(tmp_path / "elsewhere")
    assert [origin.note for origin in found.origins] == ["", ""]
    shutil.rmtree(run / "base")
    assert [origin.note for origin in read_lineage(tmp_path / "elsewhere").origins] == ["not there", ""]


def test_changed_and_missing_rows_are_marked(run):
    file = run / "data" / "data-00000-of-00001.jsonl"
    file.write_text('{"other": 1}\n')
    (rows,) = [origin for origin in read_lineage(run / "sft").origins if origin.kind == "file"]
    assert rows.note.startswith("changed: ")
    file.unlink()
    (rows,) = [origin for origin in read_lineage(run / "sft").origins if origin.kind == "file"]
    assert rows.note == "not there"


def test_a_hub_model_is_named_by_its_id(run):
    manifest = json.loads((run / "sft/gemma2.json").read_text())
    manifest["parents"][0] |= {"path": "../../hub/x", "hub": "google/gemma-2-2b@abc"}
    write_json(run / "sft/gemma2.json", manifest)
    found = by_name(read_lineage(run / "sft"))["google/gemma-2-2b@abc"]
    assert (found.kind, found.note) == ("hub", "")


def test_unreadable_and_unfinished_parents_are_marked(run):
    (run / "base/gemma2.json").write_text("{")
    found = by_name(read_lineage(run / "sft"))
    assert found["base"].note == "gemma2.json cannot be read"
    output(run / "base", "tiny", status="failed")
    assert by_name(read_lineage(run / "sft"))["base"].note == "failed"


def test_a_model_without_a_manifest_is_a_root(tmp_path):
    (tmp_path / "plain").mkdir()
    write_text_model(tmp_path / "plain", "w")
    output(tmp_path / "sft", "sft", [("model", tmp_path / "plain")])
    assert "not made by gemma2" in lineage_text(read_lineage(tmp_path / "sft"))
    assert [origin.kind for origin in read_lineage(tmp_path / "plain").origins] == ["model"]


@pytest.mark.parametrize("parents", [[{}], [{"role": 3, "path": ["x"], "weights": None}]])
def test_malformed_parents_in_a_manifest_are_left_out(run, parents):
    manifest = json.loads((run / "slerp/gemma2.json").read_text()) | {"parents": parents, "data": parents}
    write_json(run / "slerp/gemma2.json", manifest)
    assert lineage_text(read_lineage(run / "slerp"))


@pytest.mark.parametrize("part", [{"parents": 3}, {"parents": ["x"]}, {"data": {"a": 1}}, {"config": 1}])
def test_a_record_of_another_kind_is_refused_by_name(run, part):
    write_json(run / "slerp/gemma2.json", json.loads((run / "slerp/gemma2.json").read_text()) | part)
    with pytest.raises(InputError, match=r"slerp/gemma2.json is not a gemma2 manifest"):
        read_lineage(run / "slerp")


def test_a_cycle_of_parents_ends(run):
    manifest = json.loads((run / "base/gemma2.json").read_text())
    manifest["parents"] = [{"role": "model", "path": "../slerp", "weights": digest_weights(run / "slerp")}]
    write_json(run / "base/gemma2.json", manifest)
    found = read_lineage(run / "slerp")
    assert len(lineage_text(found).splitlines()) >= len(found.origins)


def test_a_long_chain_does_not_exceed_the_recursion_limit(tmp_path):
    before = output(tmp_path / "0", "tiny")
    for i in range(1, 600):
        before = output(tmp_path / str(i), "sft", [("model", before)])
    lines = lineage_text(read_lineage(before), 80).splitlines()
    assert len(lines) == 600
    assert all(f"model → {i}  " in line and line.endswith("sft") for i, line in list(enumerate(lines))[1:])


def test_untouched_weights_are_not_read(run, monkeypatch):
    def refuse(path, *_):
        raise AssertionError(f"{path} was read")

    read_lineage(run / "slerp")
    (run.parent / "prompts.jsonl").unlink()
    until_kept(run / "slerp" / "model.safetensors")
    read_lineage(run / "slerp")
    monkeypatch.setattr(digests, "digest_file", refuse)
    monkeypatch.setattr(digests, "_digest_piece", refuse)
    assert len(read_lineage(run / "slerp").origins) == 8


# --- which output ---------------------------------------------------------------------------------------------------


def pipeline(run, needs):
    stages = {name: {"command": "x", "needs": list(parents), "status": "complete"} for name, parents in needs.items()}
    write_json(run / "pipeline.json", {"schema_version": 1, "name": "run", "status": "complete", "stages": stages})


def test_a_pipeline_stands_for_its_last_stage(run):
    pipeline(run, {"base": [], "sft": ["base"], "slerp": ["sft"]})
    assert final_output(run) == run / "slerp"
    assert edges(read_lineage(run)) == edges(read_lineage(run / "slerp"))


def test_a_pipeline_of_several_results_stands_for_model_or_is_refused_with_their_names(run):
    output(run.parent / "outside", "sft")
    outside = ["../outside", str(run.parent / "outside")]
    pipeline(run, {"sft": [], "slerp": ["sft"], "policy-1": ["sft"], "not/there": [], **{key: [] for key in outside}})
    with pytest.raises(InputError, match=r"several results.*name one of them: slerp, policy-1$"):
        final_output(run)
    output(run / "warp/model", "pick", [("base", run / "sft")])
    pipeline(run, {"sft": [], "slerp": ["sft"], "warp/model": ["sft"]})
    assert final_output(run) == run / "warp/model"


def test_a_quickstart_stands_for_its_model(run):
    output(run / "warp/model", "pick", [("base", run / "sft")])
    output(run, "quickstart", rows={"summary.json": "{}"})
    assert final_output(run) == run / "warp/model"


def test_a_directory_that_is_not_an_output_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a directory"):
        final_output(tmp_path / "none")
    with pytest.raises(InputError, match=r"holds no gemma2.json and no model"):
        final_output(tmp_path)
    (tmp_path / "pipeline.json").write_text("{")
    with pytest.raises(InputError, match=r"pipeline.json cannot be read"):
        final_output(tmp_path)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_tree_mermaid_svg_and_json(run, capsys):
    def printed(*words):
        assert invoke(["lineage", str(run / "slerp"), *words]) == 0
        return capsys.readouterr().out

    assert "└─ base → slerp" in printed()
    assert printed("--format", "mermaid").startswith("flowchart TD\n")
    assert ET.fromstring(printed("--format", "svg")).tag.endswith("svg")
    document = json.loads(printed("--json"))
    assert len(document["nodes"]) == 8 and len(document["edges"]) == 9
    assert {"source", "target", "role"} == document["edges"][0].keys()


def test_a_file_is_written_and_not_replaced_without_force(run, tmp_path):
    out = tmp_path / "family.svg"
    assert gemma2("lineage", run / "slerp", "--format", "svg", "--out", out)[0] == 0
    assert "<svg" in out.read_text(encoding="utf-8")
    code, _, err = gemma2("lineage", run / "slerp", "--out", out)
    assert code == 1 and err.count("\n") == 1 and "exists" in err


def test_the_lineage_needs_no_torch():
    script = (
        "import sys, gemma2.posttrain.reports.lineage_tree\nprint({'torch', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    assert finish(start(script))[1].strip() == "set()"
