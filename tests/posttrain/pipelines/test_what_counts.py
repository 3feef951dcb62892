"""Does what each row of the table in docs/pipelines.md says, and looks at what becomes of the stage."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from random_pipelines import MIX, Recording, contents, interrupt_one, world_versions
from random_pipelines import World as RandomWorld
from stages import compiled
from text_model import write_text_model

from gemma2.core.errors import InputError
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.outputs.safetensors_header import encode_header
from gemma2.core.outputs.staging import partial_path
from gemma2.core.permissions import allow
from gemma2.posttrain.pipelines.check import check_pipeline, look_at_pipeline
from gemma2.posttrain.pipelines.decision import Choice
from gemma2.posttrain.pipelines.run import Watcher, run_stages, status_rows
from gemma2.posttrain.runs.commands import COMMANDS

ROOT = Path(__file__).parents[3]
OUTCOME = "(?:is skipped|is refused|runs|starts again|goes on).*"
ROW = re.compile(rf"^\| (?P<event>.+) \| (?P<outcome>{OUTCOME}) \|$", re.MULTILINE)
TABLE = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8").partition("## What counts as the same")[2]
ROWS = [(found["event"], found["outcome"]) for found in ROW.finditer(TABLE.partition("\n## ")[0])]
ACTIONS = {"is skipped": "skip", "runs again": "again", "starts again": "run", "goes on": "continue", "runs": "run"}

REWARDS = """
import importlib
import userhelp

def score():
    late = importlib.import_module("user" + "late")
    return userhelp.VALUE, open(__file__[:-9] + "words.txt").read(), late.VALUE
"""


class World(RandomWorld):
    """One stage `s` with every kind of input, next to nothing."""

    def build(self) -> None:
        base = self.place / "base"
        base.mkdir(parents=True)
        write_text_model(base, "base")
        (base / "config.json").write_text(json.dumps({"cap": 30, "size": 1}))
        (self.place / "rows").mkdir()
        for name in "ab":
            (self.place / "rows" / f"{name}.jsonl").write_text(json.dumps({"row": name}) + "\n")
        (self.place / "userhelp.py").write_text("VALUE = 1\n")
        (self.place / "userlate.py").write_text("VALUE = 1\n")
        (self.place / "words.txt").write_text("words")
        (self.place / "chat.jinja").write_text("{{ chat }}")
        (self.place / "userfn.py").write_text(REWARDS)
        rows = [str(self.place / "rows" / f"{name}.jsonl") for name in "ab"]
        self.options = {"model": str(base), "data": [*rows, str(self.place / "rows")], "reward_fn": ["userfn:score"]}
        self.options["chat_template"] = str(self.place / "chat.jinja")
        self.stages = {"s": {"command": "mix", "options": self.options}}

    @property
    def base(self) -> Path:
        return self.place / "base"

    @property
    def made(self) -> Path:
        return self.root / "s"


@pytest.fixture
def world(tmp_path, monkeypatch):
    found = World(tmp_path, None)
    found.build()
    found.random = type("First", (), {"choice": staticmethod(lambda items: items[0])})()
    monkeypatch.setitem(COMMANDS, "mix", MIX)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with world_versions(found):
        yield found


def run(world) -> Recording:
    pipeline, executor = compiled(world.stages, world.root), Recording()
    pipeline.root.mkdir(exist_ok=True)
    run_stages(pipeline, check_pipeline(pipeline, contents=False), executor, choice=Choice(), observer=Watcher())
    return executor


def interrupt(world) -> None:
    """The run of the stage stops half-way; there was no output of it."""
    shutil.rmtree(world.root)
    interrupt_one(world)


def rewrite_header(world) -> None:
    text = b"base"
    header, _ = encode_header({"text": ("U8", (len(text),))})
    length = int.from_bytes(header[:8], "little") + 64
    (world.base / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header[8:].ljust(length) + text)


def edit_output(world) -> None:
    path = world.made / "data.jsonl"
    path.write_text(path.read_text().replace("row", "ROW"))


def copy_and_move_output(world) -> None:
    (world.made / "model.safetensors").touch()
    (world.made / "gemma2.json").chmod(0o600)
    shutil.copytree(world.root, world.place / "copy")
    shutil.rmtree(world.root)
    (world.place / "copy").rename(world.root)


def move_input(world) -> None:
    world.base.rename(world.place / "moved")
    world.options["model"] = str(world.place / "moved")


def rename_stage(world) -> None:
    world.stages["renamed"] = world.stages.pop("s")


EVENTS = {
    "nothing happens": [lambda w: None],
    "a setting is changed": [lambda w: w.options.update(value=2)],
    "a setting that decides nothing is changed": [lambda w: w.options.update(pace=2)],
    "the weights of an input model are changed": [lambda w: write_text_model(w.base, "BASE")],
    "`config.json` of an input model is changed, or its generation config, chat template or tokenizer": [
        lambda w: (w.base / "config.json").write_text(json.dumps({"cap": 8, "size": 1})),
        lambda w: (w.base / "generation_config.json").write_text("{}"),
        lambda w: (w.base / "chat_template.jinja").write_text("{{ x }}"),
        lambda w: (w.base / "tokenizer.json").write_text("{}"),
    ],
    "an unknown file appears in the directory of an input model": [lambda w: (w.base / "new.json").write_text("{}")],
    "README, licence, pictures or logs of an input model are changed": [
        lambda w: [(w.base / name).write_text("x") for name in ("README.md", "LICENSE", "x.png", "metrics.jsonl")]
    ],
    "`config.json` of an input model is written in another order, or by another `transformers_version`": [
        lambda w: (w.base / "config.json").write_text('{"size": 1,\n "transformers_version": "9", "cap": 30}')
    ],
    "the tensors of an input model are written into other shards, or with another header": [rewrite_header],
    "a data file is edited, or added to a folder": [
        lambda w: (w.place / "rows" / "a.jsonl").write_text('{"row": "A"}\n'),
        lambda w: (w.place / "rows" / "c.jsonl").write_text('{"row": "c"}\n'),
    ],
    "a file is edited that an option names": [lambda w: (w.place / "chat.jinja").write_text("{{ CHAT }}")],
    "the inputs of an option come in another order": [lambda w: w.options["data"].reverse()],
    "an input is moved, and the option points to its new place": [move_input],
    "the module of a reward function is edited": [lambda w: (w.place / "userfn.py").write_text(REWARDS + "# new\n")],
    "a module of yours is edited that this module imports": [
        lambda w: (w.place / "userhelp.py").write_text("VALUE = 2\n")
    ],
    "a file is edited that a reward function opens when it runs": [lambda w: (w.place / "words.txt").write_text("x")],
    "a module is edited whose name the code puts together when it runs": [
        lambda w: (w.place / "userlate.py").write_text("VALUE = 2\n")
    ],
    "a file of its output is edited, cut or removed": [
        edit_output,
        lambda w: (w.made / "data.jsonl").write_text(""),
        lambda w: (w.made / "config.json").unlink(),
        lambda w: (w.made / "model.safetensors").unlink(),
    ],
    "README, a picture, a CSV table or a log of its output is removed": [lambda w: (w.made / "README.md").unlink()],
    "the `gemma2.json` of its output is cut": [lambda w: (w.made / "gemma2.json").write_text('{"status": "comp')],
    "its output is touched, copied, moved, or gets another mode": [copy_and_move_output],
    "another version of gemma2 or of a library is installed": [lambda w: w.versions.update(numpy="2")],
    "gemma2 or a library that computes nothing has another version, and its run was interrupted": [
        lambda w: (interrupt(w), w.versions.update(gemma2="2")),
        lambda w: (interrupt(w), w.versions.update(jinja2="2")),
    ],
    "a library that computes has another version, and its run was interrupted": [
        lambda w: (interrupt(w), w.versions.update(numpy="2")),
        lambda w: (interrupt(w), w.versions.update(numpy="1.0.1")),
    ],
    "the module of a reward function is edited, and its run was interrupted": [
        lambda w: (interrupt(w), (w.place / "userfn.py").write_text(REWARDS + "# mended\n"))
    ],
    "the same, with `--allow-versions`": [
        lambda w: (interrupt(w), w.versions.update(numpy="2"), allow(versions=True)),
        lambda w: (interrupt(w), (w.place / "userfn.py").write_text(REWARDS + "# mended\n"), allow(versions=True)),
    ],
    "its settings are changed, and its run was interrupted": [lambda w: (interrupt(w), w.options.update(value=2))],
    "its run was interrupted": [interrupt],
    "the stage is renamed": [rename_stage],
    "it runs on another machine, or with other threads or GPUs": [
        lambda w: w.stages["s"].update(resources={"cpus": 2})
    ],
}
NAMED = {
    "is skipped, and the loss is named": "README.md",
    "is skipped, and the versions are named": "numpy (1 -> 2)",
    "goes on, and the versions are named": "begun with other versions: ",
}


def key_of(event: str) -> str:
    return event.partition(": ")[0]


def test_every_row_of_the_table_is_executed():
    assert [key_of(event) for event, _ in ROWS] == [*EVENTS]


CASES = [
    pytest.param(outcome, happen, id=f"{key_of(event)}-{number}")
    for event, outcome in ROWS
    for number, happen in enumerate(EVENTS[key_of(event)])
]


def assert_refused(world):
    """Plan and run refuse, status says why, nothing is lost; each way on that the error names leads to an output."""
    pipeline, partial = compiled(world.stages, world.root), partial_path(world.made)
    kept = contents(partial)
    refused = "the interrupted run of s was begun with other versions: "
    for refuses in (lambda: check_pipeline(pipeline, contents=False), lambda: run(world)):
        with pytest.raises(InputError, match=rf"stages\.s: {refused}.*--allow-versions, or start over with --force s"):
            refuses()
    assert [refused in row["note"] for row in status_rows(pipeline)] == [True]
    assert kept and contents(partial) == kept
    assert check_pipeline(pipeline, Choice(force=frozenset("s")), contents=False).stages["s"].action == "again"
    allow(versions=True)
    executor = run(world)
    assert executor.resumed == {"s": True}
    record = read_manifest(world.made)
    assert [[*one["changed"]] for one in record["continued"]] in ([["numpy"]], [["the code of userfn"]])
    assert record["versions"] == world.versions


@pytest.mark.parametrize(("outcome", "happen"), CASES)
def test_the_stage_does_what_the_table_says(world, outcome, happen):
    run(world)
    happen(world)
    if outcome.startswith("is refused"):
        assert_refused(world)
        return
    expected = next(action for word, action in ACTIONS.items() if outcome.startswith(word))
    name = next(iter(world.stages))
    pipeline = compiled(world.stages, world.root)
    planned, looked = check_pipeline(pipeline, contents=False).stages[name], look_at_pipeline(pipeline)[name]
    assert (planned.action, looked.action) == (expected, expected), planned.why
    if outcome in NAMED:
        assert any(NAMED[outcome] in line for line in planned.why)
        assert any(NAMED[outcome] in str(row["note"]) for row in status_rows(pipeline))
    if "of no stage" in outcome:
        assert ("s", "of no stage") in [(row["stage"], row["status"]) for row in status_rows(pipeline)]
    executor = run(world)
    assert (name in executor.started) == (expected != "skip")
    if expected != "skip":
        assert executor.resumed[name] == (expected == "continue")
    assert run(world).started == []
