"""`gemma2 push` and `pull`: whole copies, verified on both sides, that go on after a break."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, OutputError, UsageError
from gemma2.core.outputs.manifest import MANIFEST, write_manifest
from gemma2.posttrain.pipelines.compile import compile_pipeline
from gemma2.posttrain.pipelines.run import executor_of, run_pipeline
from gemma2.posttrain.runs.commands import COMMANDS, spell
from gemma2.posttrain.schemas import PipelineFile
from gemma2.posttrain.schemas.config import validated
from gemma2.posttrain.schemas.delivery.transfer import PullConfig, PushConfig
from gemma2.posttrain.transfer.pulling import pull_output
from gemma2.posttrain.transfer.pushing import push_outputs

COMPLETE = {"command": "sft", "status": "complete", "config": {}, "summary": {"loss": 1.0}}


class Flaky(MemoryFileSystem):
    """An object store that a test disturbs: `fail` gets the name of what is opened, and raises."""

    protocol = "flaky"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    fail = staticmethod(lambda path, mode: None)
    opened: ClassVar[list] = []

    def open(self, path, mode="rb", *rest, **more):
        type(self).opened.append((path.rpartition("/")[2], mode))
        type(self).fail(path, mode)
        return super().open(path, mode, *rest, **more)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store, Flaky.pseudo_dirs, Flaky.opened, Flaky.fail = {}, [""], [], staticmethod(lambda path, mode: None)
    MemoryFileSystem.store.clear()
    output(tmp_path / "sft")
    return tmp_path


def output(path: Path, **files: bytes) -> Path:
    (path / "part").mkdir(parents=True)
    for name, data in ({"a": b"a" * 1000, "b": b"bb", "part/c": b""} | files).items():
        (path / name).write_bytes(data)
    write_manifest(path, COMPLETE)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in path.rglob("*") if one.is_file()}


@pytest.mark.parametrize("uri", ["there", "file://{}/there", "memory://runs", "flaky://bucket/runs"])
def test_an_output_comes_back_to_the_byte_and_is_not_sent_twice(place, uri):
    uri = uri.format(place)
    first = push_outputs(uri, [Path("sft")])
    assert (first["sent_files"], first["sent_bytes"]) == (3, 1002)
    assert push_outputs(uri, [Path("sft")])["sent_files"] == 0
    found = pull_output(f"{uri}/sft", Path("back"))
    assert (found["command"], found["fetched_files"], found["fetched_bytes"]) == ("sft", 3, 1002)
    assert contents(Path("back")) == contents(Path("sft"))
    assert not list(place.glob(".back*"))


def test_outputs_in_an_output_come_along_and_what_no_manifest_lists_does_not(place):
    inner = output(place / "sft" / "ema")
    output(inner / "deeper")
    (place / "sft" / "notes.txt").write_text("mine")
    (place / "sft" / "checkpoints").mkdir()
    (place / "sft" / "checkpoints" / "x").write_text("state")
    write = [name for name in contents(place / "sft") if "notes" not in name and "checkpoints" not in name]
    push_outputs("there", [Path("sft")])
    assert contents(Path("there/sft")).keys() == {*write}
    pull_output("there/sft", Path("back"))
    assert contents(Path("back")) == {name: (place / "sft" / name).read_bytes() for name in write}


def test_several_outputs_are_pushed_by_their_names_and_two_of_one_name_are_refused(place):
    output(place / "other" / "rl")
    assert len(push_outputs("there", [Path("sft"), Path("other/rl")])["outputs"]) == 2
    assert {path.name for path in Path("there").iterdir()} == {"sft", "rl"}
    with pytest.raises(UsageError, match="two outputs are called sft; push them one by one"):
        push_outputs("there", [Path("sft"), output(place / "other" / "sft")])


@pytest.mark.parametrize("name", ["b", "part/c", MANIFEST])
def test_a_push_that_breaks_off_is_no_output_there_and_goes_on(name):
    def fail(path, mode):
        if path.endswith((f"/{name}", f"/.{name}.tmp")) and "w" in mode:
            raise ConnectionResetError("reset by peer")

    Flaky.fail = staticmethod(fail)
    with pytest.raises(OutputError, match=r"flaky://b/sft.* cannot be written \(ConnectionResetError: reset by peer\)"):
        push_outputs("flaky://b", [Path("sft")])
    with pytest.raises(InputError, match=r"b/sft has no gemma2.json: it is missing, or its push was broken off"):
        pull_output("flaky://b/sft", Path("back"))
    assert not Path("back").exists()
    Flaky.fail = staticmethod(lambda path, mode: None)
    assert push_outputs("flaky://b", [Path("sft")])["sent_files"] == {"b": 2, "part/c": 1, MANIFEST: 0}[name]
    pull_output("flaky://b/sft", Path("back"))
    assert contents(Path("back")) == contents(Path("sft"))


def test_a_pull_that_breaks_off_leaves_nothing_at_its_place_and_goes_on(place):
    push_outputs("flaky://b", [Path("sft")])

    def fail(path, mode):
        if path.endswith("/b"):
            raise TimeoutError

    Flaky.fail = staticmethod(fail)
    with pytest.raises(InputError, match=r"flaky://b/sft/b cannot be read \(TimeoutError\).*the same command goes on"):
        pull_output("flaky://b/sft", Path("back"))
    assert not Path("back").exists()
    Flaky.fail = staticmethod(lambda path, mode: None)
    Flaky.opened.clear()
    assert pull_output("flaky://b/sft", Path("back"))["fetched_files"] == 2  # b and part/c
    assert ("a", "rb") not in Flaky.opened
    assert contents(Path("back")) == contents(Path("sft"))


def test_what_a_pull_of_something_else_has_left_is_not_taken(place):
    push_outputs("there", [Path("sft")])
    half = place / ".back.pull"
    half.mkdir()
    (half / "a").write_bytes(b"x" * 1000)  # the right size
    (half / "foreign").write_bytes(b"y")
    (half / "b").symlink_to(place / "sft" / "b")
    pull_output("there/sft", Path("back"))
    assert contents(Path("back")) == contents(Path("sft"))
    assert not (Path("back") / "b").is_symlink() and (place / "sft" / "b").read_bytes() == b"bb"


@pytest.mark.parametrize("spoil", [b"A" + b"a" * 999, b"a" * 999], ids=["byte", "size"])
def test_a_file_that_is_not_as_the_manifest_says_is_found_on_both_sides(spoil):
    push_outputs("memory://x", [Path("sft")])
    fsspec.filesystem("memory").pipe_file("/x/sft/a", spoil)
    with pytest.raises(InputError, match=r"memory://x/sft/a is not as its manifest says; push the output again"):
        pull_output("memory://x/sft", Path("back"))
    assert push_outputs("memory://x", [Path("sft")])["sent_files"] == 1  # the advice, followed
    pull_output("memory://x/sft", Path("back"))
    Path("sft/a").write_bytes(b"B" + b"a" * 999)
    with pytest.raises(InputError, match=r"sft/a is not as its manifest says; make it again, or see what `gemma2 ver"):
        push_outputs("memory://y", [Path("sft")])
    with pytest.raises(InputError, match=r"has no gemma2.json"):
        pull_output("memory://y/sft", Path("third"))


def test_bytes_that_change_on_the_way_are_noticed(monkeypatch):
    write = MemoryFileSystem._open

    def spoiled(self, path, mode="rb", **more):
        found = write(self, path, mode, **more)
        return found if mode != "rb" or not path.endswith("/b") else type(found)(self, path, b"bX")

    monkeypatch.setattr(MemoryFileSystem, "_open", spoiled)
    with pytest.raises(OutputError, match=r"memory://x/sft/b is not read back as it was sent; start the command again"):
        push_outputs("memory://x", [Path("sft")])


def test_another_output_there_is_replaced_only_with_force(place):
    push_outputs("there", [Path("sft")])
    shutil.rmtree("sft")
    output(place / "sft", b=b"other", d=b"more")
    with pytest.raises(OutputError, match=r"there/sft holds another output; replace it with --force, or give another"):
        push_outputs("there", [Path("sft")])
    Path("there/sft/x").write_text("of somebody")
    push_outputs("there", [Path("sft")], force=True)
    assert contents(Path("there/sft")) == contents(Path("sft"))
    Path("elsewhere/sft").mkdir(parents=True)
    Path("elsewhere/sft/letter").write_text("of somebody")
    with pytest.raises(OutputError, match="holds letter, which is not a file of this output"):
        push_outputs("elsewhere", [Path("sft")])


# --- where a copy may go ----------------------------------------------------------------------------------------------


def said(*words):
    """What the command line of these words raises; nothing here or there is another afterwards."""
    before = contents(Path())
    with pytest.raises((UsageError, OutputError, InputError)) as raised:
        invoke([*words, "--quiet"])
    assert contents(Path()) == before
    return str(raised.value)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("uri", ["sft", "sft/part", "sft/new", "file://{}/sft", "link"])
def test_nothing_is_copied_into_an_output(place, uri, dry):
    output(place / "rl")
    Path("link").symlink_to("sft")
    assert "into which nothing is copied; the URI comes first, then the outputs" in said(
        "push", uri.format(place), "rl", *dry
    )


def test_nothing_is_copied_into_an_output_of_a_store(place):
    push_outputs("memory://runs", [Path("sft")])
    output(place / "rl")
    assert said("push", "memory://runs/sft", "rl").startswith("memory://runs/sft is an output, into which nothing is")


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("uri, source", [(".", "sft"), ("{}", "sft"), (".", "a/a"), ("elsewhere", "sft")])
def test_a_copy_that_is_or_contains_what_it_is_made_from_is_refused(place, uri, source, force):
    output(place / "a" / "a")
    Path("elsewhere").symlink_to(place)
    assert re.search("and the output .* overlap; give another URI", said("push", uri.format(place), source, *force))


@pytest.mark.parametrize("last", ["/some/store", "there", "s3://bucket/x", "memory://a b/c"])
def test_the_order_of_cp_is_answered_with_the_line_that_runs(place, last):
    words = said("push", "sft", last)
    assert words.startswith(f"sft is an output, and {last} is not one; the URI comes first: gemma2 push ")
    line = shlex.split(words.rpartition(": ")[2])
    assert line == ["gemma2", "push", last, "sft"]
    if not last.startswith(("/", "s3")):
        assert invoke([*line[1:], "--quiet"]) in (0, None)


def test_an_empty_uri_is_not_the_working_folder(place):
    for line in (["push", "", "sft"], ["push", " ", "sft", "--dry-run"], ["pull", "", "back"]):
        assert said(*line) == "the URI is empty; give s3://BUCKET/FOLDER, gs://..., or a path"


def test_pull_names_its_argument_and_not_a_flag_that_it_lacks(place):
    push_outputs("there", [Path("sft")])
    assert said("pull", "there/sft", "sft") == "DIR sft exists; choose another DIR, or replace it with --force"
    assert re.search("^DIR there/sft/new and the URI .* overlap", said("pull", "there/sft", "there/sft/new"))


def test_unfinished_outputs_are_refused_on_both_sides(place):
    document = json.loads(Path("sft", MANIFEST).read_text())
    Path("sft", MANIFEST).write_text(json.dumps({**document, "status": "running"}))
    with pytest.raises(InputError, match="sft is not complete; push outputs that are complete"):
        push_outputs("there", [Path("sft")])
    shutil.copytree("sft", "there/sft")
    with pytest.raises(InputError, match=r"there/sft/gemma2.json is not a complete output"):
        pull_output("there/sft", Path("back"))
    Path("there/sft", MANIFEST).write_text(json.dumps(document))
    Path("there/sft/b").unlink()
    with pytest.raises(InputError, match="there/sft is not whole: b is missing; push the output again"):
        pull_output("there/sft", Path("back"))
    assert not Path("back").exists()


@pytest.mark.parametrize("name", ["../evil", "/evil", "part/../../evil", "a\\b", ""])
def test_a_manifest_of_others_cannot_name_a_file_outside(place, name):
    shutil.copytree("sft", "there/sft")
    manifest = Path("there/sft", MANIFEST)
    document = json.loads(manifest.read_text())
    document["files"][name] = {"size": 1}
    manifest.write_text(json.dumps(document))
    with pytest.raises(InputError, match="which is outside of it; it is not an output of ours"):
        pull_output("there/sft", Path("back"))
    assert {path.name for path in place.iterdir()} <= {"sft", "there"}


@pytest.mark.parametrize("record", [{"size": "1"}, {"size": 1, "digest": 5}, {}])
def test_a_record_that_is_not_one_is_one_line(record):
    shutil.copytree("sft", "there/sft")
    manifest = Path("there/sft", MANIFEST)
    document = json.loads(manifest.read_text())
    document["files"]["a"] = record
    manifest.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"the record of 'a' is not one"):
        pull_output("there/sft", Path("back"))


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://bucket/x", "s3:// needs s3fs, which is not installed; pip install s3fs"),
        ("nope://x", "nope:// is not known to fsspec; give s3://"),
        ("sftp://me:hunter2@host/x", r"sftp://\*\*\*@host/x holds a password or key; keep it in the environment"),
        ("simplecache::memory://x", "simplecache::memory://x is not the address of a folder"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line_without_its_secrets(uri, said):
    with pytest.raises(UsageError, match=said) as caught:
        push_outputs(uri, [Path("sft")])
    assert "hunter2" not in str(caught.value)


def test_what_the_other_side_says_is_shown_without_keys(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcdefghijklmnop1234")

    class ClientError(Exception):
        """As those of libraries are: not an OSError."""

    ClientError.__module__ = "botocore.exceptions"

    def fail(path, mode):
        raise ClientError("denied for abcdefghijklmnop1234")

    Flaky.fail = staticmethod(fail)
    with pytest.raises(OutputError, match=r"\(ClientError: denied for \*\*\*\)"):
        push_outputs("flaky://b", [Path("sft")])


def test_a_bug_keeps_its_traceback():
    def fail(path, mode):
        raise ZeroDivisionError

    Flaky.fail = staticmethod(fail)
    with pytest.raises(ZeroDivisionError):
        push_outputs("flaky://b", [Path("sft")])


def test_files_without_a_digest_are_copied_and_named(capsys):
    document = json.loads(Path("sft", MANIFEST).read_text())
    del document["files"]["a"]["digest"]
    Path("sft", MANIFEST).write_text(json.dumps(document))
    assert invoke(["push", "memory://x", "sft"]) == 0
    assert "sft: 1 files have no digest in its manifest" in capsys.readouterr().err
    assert invoke(["pull", "memory://x/sft", "back"]) == 0
    assert "memory://x/sft: 1 files have no digest" in capsys.readouterr().err
    assert contents(Path("back")) == contents(Path("sft"))


def test_plans_touch_nothing_and_documents_are_json(capsys):
    assert invoke(["push", "there", "sft", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"] == [
        {"output": "sft", "uri": "there/sft", "files": 3, "bytes": 1002}
    ]
    assert not Path("there").exists()
    assert invoke(["push", "there", "sft", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["sent_files"] == 3
    assert invoke(["pull", "there/sft", "back", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 1002
    assert not Path("back").exists()
    with pytest.raises(OutputError, match="DIR sft exists; choose another DIR, or replace it with --force"):
        invoke(["pull", "there/sft", "sft"])


# --- stages -----------------------------------------------------------------------------------------------------------


def run(stages, root):
    pipeline = compile_pipeline(validated(PipelineFile, {"stages": stages}), root)
    return run_pipeline(pipeline, executor_of("local", 1))


def test_they_are_stages_that_run_when_what_they_copy_has_changed(place):
    Path("rows.jsonl").write_text(
        '{"prompt": "What is two?", "completion": "It is the number after one, as all know."}\n'
    )
    stages = {
        "clean": {"command": "filter", "options": {"data": "rows.jsonl", "workers": 1}},
        "away": {"command": "push", "options": {"uri": str(place / "there"), "outputs": ["${clean.out}"]}},
        "back": {
            "command": "pull",
            "after": ["away"],
            "options": {"uri": str(place / "there" / "clean"), "kind": "data"},
        },
        "again": {"command": "filter", "options": {"data": "${back.out}", "workers": 1, "min_words": 1}},
    }
    assert run(stages, Path("runs")).ran == ("clean", "away", "back", "again")
    assert run(stages, Path("runs")).ran == ()
    receipt = json.loads(Path("runs/away/pushed.json").read_text())
    assert receipt["outputs"][0]["uri"] == str(place / "there" / "clean")
    there, here = (contents(place / path) for path in ("there/clean", "runs/back"))
    assert {name: there[name] for name in there if name != MANIFEST} == {
        name: here[name] for name in here if name not in (MANIFEST, "README.md")
    }
    assert json.loads(here[MANIFEST])["summary"]["made_by"] == "filter"
    Path("rows.jsonl").write_text('{"prompt": "What is 3?", "completion": "It is the number after two, know it."}\n')
    assert {"clean", "away"} <= {*run(stages, Path("runs")).ran}
    assert contents(place / "there/clean")[MANIFEST] == Path("runs/clean", MANIFEST).read_bytes()


def test_a_store_that_a_file_names_must_be_allowed(place, monkeypatch):
    monkeypatch.setenv("GEMMA2_ALLOW_HOSTS", "")
    for name, options in (("push", PushConfig(uri="s3://b/x", outputs=("sft",))), ("pull", PullConfig(uri="s3://b/x"))):
        with pytest.raises(UsageError, match=r"uri sends data to b, which is not allowed .*--allow-host b"):
            COMMANDS[name].run(options, None)
    monkeypatch.setenv("GEMMA2_ALLOW_HOSTS", "b")  # the advice, followed
    with pytest.raises(UsageError, match="s3:// needs s3fs"):
        COMMANDS["pull"].run(PullConfig(uri="s3://b/x"), None)


def test_a_stage_is_shown_as_its_command_line(capsys):
    assert spell("pull", PullConfig(uri="memory://a b/x"), Path("o")) == "gemma2 pull 'memory://a b/x' o"
    assert spell("push", PushConfig(uri="u", outputs=("a", "b c")), Path("o")) == "gemma2 push u a 'b c'"
