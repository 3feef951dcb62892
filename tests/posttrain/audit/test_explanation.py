"""pipeline status --why: both values of everything that differs, uncut; of a complete stage what it was made from."""

import json

import pytest
from lineages import lineage, stages_of
from stages import Inline, compiled, run

from gemma2.core.outputs.hashing import digest_file
from gemma2.core.outputs.manifest import MANIFEST, read_manifest
from gemma2.core.outputs.model_identity import identity_of
from gemma2.posttrain.audit.explanation import explain
from gemma2.posttrain.pipelines.scheduler import StageFailed
from gemma2.posttrain.runs.commands import output_hash


@pytest.fixture
def place(tmp_path):
    return lineage(tmp_path)


def explained(pipeline, name):
    (found,) = explain(pipeline, [name])
    json.dumps(found)
    return found


def changes(pipeline, name):
    return {one["what"]: (one["was"], one["now"]) for one in explained(pipeline, name)["differences"]}


def altered(place, name, **options):
    stages = stages_of(place.root.parent)
    stages[name]["options"] |= options
    return compiled(stages, place.root)


def test_a_setting_has_both_values(place):
    assert changes(altered(place, "e", value=1.5), "e") == {"value": (5.0, 1.5)}


def test_an_input_has_both_values_of_a_setting_and_both_digests_of_another_file(place):
    raw = place.root.parent / "raw"
    (raw / "config.json").write_text('{"hidden": 8}')
    assert [*changes(place, "a").values()] == [(4, 8)]
    (raw / "chat_template.jinja").write_text("{{ x }}")
    assert identity_of(raw).files["chat_template.jinja"] in [now for _, now in changes(place, "a").values()]


def test_a_list_of_inputs_has_both_lists(place):
    pipeline = altered(place, "d", models=["${b.out}", "${c.out}", "${e.out}"])
    (found,) = changes(pipeline, "d").values()
    assert found == (["../b", "../c"], [str(place.root / name) for name in "bce"])


def test_a_file_has_sizes_and_digests(place):
    path = place.root / "e" / "config.json"
    was = {"size": path.stat().st_size, "digest": digest_file(path)}
    path.write_text('{"x": "' + "y" * 200 + '"}')
    assert list(changes(place, "e").values()) == [(was, {"size": 209, "digest": digest_file(path)})]
    path.unlink()
    assert list(changes(place, "e").values()) == [(was, None)]


def test_a_long_value_is_not_cut(place):
    text = "x" * 500
    assert changes(altered(place, "e", fail=text), "e") == {"fail": ("", text)}


def test_other_versions_of_a_complete_stage_have_both(place):
    path = place.root / "e" / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "versions": {**manifest["versions"], "numpy": "0.1", "gone": "1"}}))
    found = explained(place, "e")
    assert found["status"] == "complete"
    assert {one["what"]: one["was"] for one in found["versions"]} == {"numpy": "0.1", "gone": "1"}
    assert {one["what"]: one["now"] for one in found["versions"]}["gone"] == "not installed"


def test_a_complete_stage_says_what_it_was_made_from(place):
    found, manifest = explained(place, "d"), read_manifest(place.root / "d")
    made = found["made_from"]
    assert (found["status"], found["differences"], found["notes"]) == ("complete", [], [])
    assert made["hash"] == output_hash(manifest) and made["settings"] == {"value": 4.0, "fail": ""}
    assert [parent["path"] for parent in made["parents"]] == ["../b", "../c"]
    assert made["parents"] == manifest["parents"] and made["versions"] == manifest["versions"]
    assert explained(place, "c")["made_from"]["data"] == read_manifest(place.root / "c")["data"]


def test_a_stage_that_waits_that_failed_or_was_never_made_is_explained_too(tmp_path):
    stages = {
        "a": {"command": "make", "options": {"fail": "fix it"}},
        "b": {"command": "make", "options": {"model": "${a.out}"}},
    }
    pipeline = compiled(stages, tmp_path / "out")
    assert [one["status"] for one in explain(pipeline, ["a", "b"])] == ["to run", "to run"]
    with pytest.raises(StageFailed):
        run(pipeline, Inline())
    failed, blocked = explain(pipeline, ["a", "b"])
    assert failed["status"] == "failed" and any("it cannot be; fix it" in note for note in failed["notes"])
    assert blocked["made_from"] is None and "after a" in blocked["notes"]


def test_nothing_is_refused(place):
    (place.root / "b" / MANIFEST).write_text("{")
    assert explained(place, "b")["made_from"] is None
    (place.root.parent / "rows.jsonl").unlink()
    assert explained(place, "c")["status"] in ("unknown", "changed")
