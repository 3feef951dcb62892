"""Reasons read well: no `None`, no `[]`, no bare digest, in whatever a stage differs and wherever it is printed."""

import json
import re
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lineages import DAMAGES, lineage, stages_of
from stages import Inline, compiled

from gemma2.core.outputs.manifest import MANIFEST, SCHEMA_VERSION, STATE
from gemma2.core.outputs.staging import partial_path
from gemma2.posttrain.pipelines.check import check_pipeline
from gemma2.posttrain.pipelines.run import Watcher, run_pipeline, status_rows
from gemma2.posttrain.provenance.change import Change, shown

WORDS = r"\bNone\b|\[\]|\{\}|\(\)|\( ->|-> \)|PosixPath|b'"
DIGESTS = r"blake3:|(?<![\w.])(?=\d*[a-f])[0-9a-f]{16,}\b"
UNREADABLE = re.compile(f"{WORDS}|{DIGESTS}")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["", "a", "some words"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["k", "other"]), inner, max_size=2),
    max_leaves=6,
)


def readable(text):
    """Whether a reason reads well. The folders of tests have digits in their names."""
    return not UNREADABLE.search(text) and text == " ".join(text.split())


@given(JSON, JSON)
def test_values_of_every_shape_read_well(was, now):
    assert readable(str(Change("key", was, now, by_value=True)))


@pytest.mark.parametrize("text", ["models (None -> [a])", "etas ([] -> [1])", "x ( -> 1)", "weights blake3:12ab"])
def test_what_does_not_read_well_is_found(text):
    assert not readable(text)


def test_a_value_is_cut_in_a_line_and_whole_on_request():
    assert len(shown("x" * 500)) == 60 and shown("x" * 500, None) == "x" * 500


def edited(**changes):
    def edit(place):
        path = place.root / "d" / MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def options(name, **given):
    def change(place):
        stages = stages_of(place.root.parent)
        for key, value in given.items():
            if value is None:
                stages[name]["options"].pop(key)
            else:
                stages[name]["options"][key] = value
        return compiled(stages, place.root)

    return change


def raw(name, change):
    return lambda place: change(place.root.parent / name)


def interrupted(place):
    shutil.rmtree(place.root / "e")
    partial = partial_path(place.root / "e")
    partial.mkdir()
    versions = {"torch": "0.1", "gone": "1"}
    record = {"command": "make", "schema_version": SCHEMA_VERSION, "config": {"value": 8.0}, "versions": versions}
    (partial / STATE).write_text(json.dumps(record))


CHANGES = {
    "an input that was not named": options("e", model="${a.out}"),
    "an input that is not named any more": options("a", model=None),
    "a longer list": options("d", models=["${b.out}", "${c.out}", "${e.out}"]),
    "a shorter list": options("d", models=["${b.out}"]),
    "another order": options("d", models=["${c.out}", "${b.out}"]),
    "data that was not named": options("e", prompts=["${a.out}/config.json"]),
    "a setting": options("e", value=0),
    "a text": options("e", fail="x"),
    "a setting that does not exist any more": edited(config={"value": 4.0, "old": [1], "older": None}),
    "no command": edited(command=None),
    "an old record": edited(schema_version=1),
    "an old record without a version": edited(schema_version=None, gemma2=None),
    "a record that is unfinished": edited(status=None),
    "other versions": edited(versions={"torch": "0.1", "gone": "1"}),
    "a manifest that cannot be read": lambda place: (place.root / "d" / MANIFEST).write_text("{"),
    "a file without a digest": edited(files={"config.json": {"size": 99}}),
    "a file that is not one": edited(files={"config.json": 99}),
    "a damaged file": lambda place: DAMAGES["flipped"](place.root / "d" / "model.safetensors"),
    "a file that is gone": lambda place: (place.root / "d" / "config.json").unlink(),
    "a picture that is gone": edited(files={"front.png": {"size": 1, "digest": "blake3:00"}}),
    "another config": raw("raw/config.json", lambda path: path.write_text('{"hidden": 8}')),
    "a new file": raw("raw/special_tokens_map.json", lambda path: path.write_text("{}")),
    "a file of the model that is gone": raw("raw/chat_template.jinja", lambda path: path.unlink()),
    "other rows": raw("rows.jsonl", lambda path: path.write_text('{"prompt": "z", "completion": "y"}\n')),
    "an interrupted run of something else": interrupted,
}


class Hearing(Watcher):
    """Keeps the reason of every stage that starts."""

    def __init__(self):
        self.why = []

    def started(self, stage, command, why):
        self.why.append(why)


@pytest.mark.parametrize("change", CHANGES)
def test_every_reason_reads_well_in_status_plan_and_run(tmp_path_factory, change):
    folder = tmp_path_factory.mktemp("p")
    place = lineage(folder)
    pipeline = CHANGES[change](place)
    pipeline = pipeline if hasattr(pipeline, "stages") else place
    notes = [row["note"] for row in status_rows(pipeline) if row["note"]]
    plan = [row["why"] for row in check_pipeline(pipeline).rows() if row["why"]]
    heard = Hearing()
    if change not in ("a text",):  # that stage fails on purpose
        run_pipeline(pipeline, Inline(), observer=heard)
    assert notes and plan
    assert [text for text in (*notes, *plan, *heard.why) if not readable(text)] == []
