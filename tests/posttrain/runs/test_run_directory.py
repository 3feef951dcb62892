"""Run directories: what they record, when they resume and when they refuse to, and what an interrupt leaves."""

import json
from pathlib import Path

import pytest
from processes import finish, start
from text_model import text_of, write_text_model

from gemma2.core.errors import InputError, OutputError
from gemma2.core.outputs import digests, hashing
from gemma2.core.outputs.manifest import read_manifest, read_state, write_manifest
from gemma2.core.ranks import Ranks
from gemma2.posttrain.provenance.origin import changes
from gemma2.posttrain.runs import run_directory
from gemma2.posttrain.runs.run_directory import RunOptions, open_run
from gemma2.posttrain.schemas.config import Config


class Settings(Config):
    model: Path
    data: Path
    steps: int = 4
    etas: tuple[float, ...] = (0.0, 0.5)
    seed: int = 7


def changed(manifest, config):
    return [str(one) for one in changes(manifest, manifest["command"], config)]


class Stop(Exception):
    """What ends a run in the middle."""


@pytest.fixture
def place(tmp_path):
    """A directory with a model and a data file, both small and valid as far as a run directory looks."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    write_text_model(tmp_path / "model", "weights")
    (tmp_path / "data.jsonl").write_text('{"prompt": "hi"}\n')
    return tmp_path


def opened(place, *, resume=False, force=False, out="out", **settings):
    config = Settings(**({"model": place / "model", "data": place / "data.jsonl"} | settings))
    return open_run("sft", config, RunOptions(place / out, resume=resume, force=force))


def complete(place, text="result", **options):
    with opened(place, **options) as run:
        write_text_model(run.path, text)
        run.log(1, loss=0.5)
        return run.finish({"loss": 0.5})


def interrupt(place, **options):
    """A run that wrote one checkpoint and was stopped."""
    with pytest.raises(Stop), opened(place, **options) as run:
        (run.checkpoints / "checkpoint-2").mkdir(parents=True)
        run.log(1, loss=0.9)
        raise Stop


def hidden(place):
    return sorted(path.name for path in place.iterdir() if path.name.startswith("."))


# --- a complete run ---------------------------------------------------------------------------------------------------


def test_the_manifest_tells_where_an_output_comes_from(place):
    result = complete(place)
    assert result.summary == {"loss": 0.5}
    manifest = read_manifest(result.out)
    assert manifest["command"] == "sft"
    assert manifest["status"] == "complete"
    assert manifest["seed"] == 7
    assert manifest["config"]["steps"] == 4
    assert manifest["summary"] == {"loss": 0.5}
    files = {"config.json": "{}"}
    assert manifest["parents"] == [
        {"role": "model", "path": "../model", "weights": digests.digest_weights(place / "model"), "files": files}
    ]
    digest = hashing.digest_file(place / "data.jsonl")
    assert manifest["data"] == [{"role": "data", "path": "../data.jsonl", "digest": digest}]
    assert {"torch", "transformers", "gemma2"} <= manifest["versions"].keys() or manifest["gemma2"] == "source"
    assert {"machine", "system", "cpus"} <= set(manifest["hardware"])
    assert manifest["started"] <= manifest["ended"]
    assert set(manifest["files"]) == {"metrics.jsonl", "model.safetensors"}


def test_an_output_shows_only_when_it_is_complete_and_holds_no_resume_state(place):
    with opened(place) as run:
        assert not (place / "out").exists()
        assert run.path.parent == place
        assert run.path.name.startswith(".")
        (run.checkpoints / "checkpoint-1").mkdir(parents=True)
        run.sample(1, prompt="hi", completion="there")
        assert not (place / "out").exists()
        run.finish({})
    assert sorted(path.name for path in (place / "out").iterdir()) == ["gemma2.json", "samples.jsonl"]
    assert hidden(place) == []


def test_metrics_and_samples_are_one_json_object_per_line(place):
    with opened(place) as run:
        run.log(1, loss=0.5, text="ünï\u2028code")
        run.log(2, loss=0.25)
        run.finish({})
    lines = (place / "out" / "metrics.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"step": 1, "loss": 0.5, "text": "ünï\u2028code"},
        {"step": 2, "loss": 0.25},
    ]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_existing_output_is_refused_and_force_replaces_it(place):
    complete(place, "old")
    with pytest.raises(OutputError, match="exists"):
        complete(place, "new")
    complete(place, "new", force=True)
    assert text_of(place / "out") == "new"
    assert hidden(place) == []


def test_with_force_the_old_output_stays_until_the_new_one_is_complete(place):
    complete(place, "old")
    with pytest.raises(Stop), opened(place, force=True) as run:
        (run.path / "model.safetensors").write_text("half")
        raise Stop
    assert text_of(place / "out") == "old"
    assert hidden(place) == []


@pytest.mark.parametrize("out", ["model", "model/deeper", "."])
def test_an_output_that_overlaps_an_input_is_refused(place, out):
    with pytest.raises(OutputError, match=r"overlap|no name"), opened(place, out=out, force=True):
        pytest.fail("opened")


def test_an_output_that_holds_the_data_is_refused(place):
    (place / "out").mkdir()
    (place / "out" / "rows.jsonl").write_text("{}\n")
    with (
        pytest.raises(OutputError, match="something else"),
        opened(place, data=place / "out/rows.jsonl", force=True),
    ):
        pytest.fail("opened")
    assert (place / "out" / "rows.jsonl").exists()


def test_every_one_of_several_parents_of_a_role_is_kept_from_the_output(place):
    (place / "second").mkdir()
    (place / "second" / "config.json").write_text("{}")
    write_text_model(place / "second", "weights")

    class Several(Config):
        policies: tuple[Path, ...]

    for name in ("model", "second"):
        write_manifest(place / name, {"status": "complete"})
    config = Several(policies=(place / "model", place / "second"))
    for path in config.policies:
        with (
            pytest.raises(OutputError, match="overlap"),
            open_run("pareto", config, RunOptions(path, force=True)),
        ):
            pytest.fail("opened")


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda model: model.rename(model.with_name("gone")), "--model .* is not a directory"),
        (lambda model: (model / "config.json").unlink(), r"holds no config\.json"),
        (lambda model: (model / "model.safetensors").unlink(), r"holds no \*\.safetensors"),
        (lambda model: write_manifest(model, {"status": "running"}), "unfinished output .*'running'"),
    ],
)
def test_an_unusable_parent_is_refused_and_nothing_is_written(place, break_it, said):
    break_it(place / "model")
    with pytest.raises(InputError, match=said), opened(place):
        pytest.fail("opened")
    assert hidden(place) == []
    assert not (place / "out").exists()


HOLD = """
import sys
from pathlib import Path
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.runs.run_directory import RunOptions, open_run
with open_run("sft", Config(), RunOptions(Path(sys.argv[1]))) as run:
    print("ready", flush=True)
    sys.stdin.readline()
    run.finish({})
"""


def test_of_two_runs_to_one_output_one_fails_clearly(place):
    first = start(HOLD, place / "out", stdin=-1)
    assert first.stdout.readline() == "ready\n"
    with pytest.raises(OutputError, match="another gemma2 process is writing"), opened(place):
        pytest.fail("opened")
    code, _, err = finish(first)
    assert code == 0, err
    assert read_manifest(place / "out")["status"] == "complete"
    assert hidden(place) == []


# --- interrupts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_interrupted_run_without_a_checkpoint_leaves_nothing(place, error):
    with pytest.raises(error), opened(place) as run:
        run.log(1, loss=0.5)
        run.checkpoints.mkdir()
        raise error
    assert hidden(place) == []


@pytest.mark.parametrize("step", ["write_json", "Run"])
def test_a_run_that_is_interrupted_while_it_opens_leaves_nothing(place, monkeypatch, step):
    def interrupt_here(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_directory, step, interrupt_here)
    with pytest.raises(KeyboardInterrupt), opened(place):
        pytest.fail("opened")
    assert hidden(place) == []


@pytest.mark.parametrize("kept", ["checkpoints/checkpoint-2/x", "data.jsonl", "a/b/gemma2.json", "a/.b.partial/x"])
def test_what_is_worth_continuing_is_kept(place, kept):
    with pytest.raises(Stop), opened(place) as run:
        (run.path / kept).parent.mkdir(parents=True, exist_ok=True)
        (run.path / kept).write_text("work")
        raise Stop
    assert hidden(place) == [".out.partial"]
    assert not (place / "out").exists()


def test_an_interrupted_run_is_not_overwritten_without_being_told(place):
    interrupt(place)
    with pytest.raises(OutputError, match="continue it with --resume, or start over with --force"), opened(place):
        pytest.fail("opened")
    complete(place, force=True)
    assert hidden(place) == []


@pytest.mark.parametrize("left", ["run.json", "checkpoints/checkpoint-2/x"])
def test_what_a_killed_run_left_is_swept_when_it_cannot_be_resumed(place, left):
    (place / ".out.partial" / left).parent.mkdir(parents=True)
    (place / ".out.partial" / left).write_text("{}")
    complete(place)
    assert not (place / "out" / left).exists()
    assert hidden(place) == []


def test_a_resumed_run_goes_on_in_the_same_directory_and_keeps_its_start(place, monkeypatch):
    monkeypatch.setattr(run_directory, "now", lambda: "2020-01-01T00:00:00Z")
    interrupt(place)
    monkeypatch.undo()
    with opened(place, resume=True) as run:
        assert run.resumed
        assert (run.checkpoints / "checkpoint-2").is_dir()
        run.finish({})
    manifest = read_manifest(place / "out")
    assert manifest["started"] == "2020-01-01T00:00:00Z" < manifest["ended"]


def test_a_kill_while_the_manifest_is_written_loses_no_checkpoint(place, monkeypatch):
    def killed(*arguments):
        raise Stop

    monkeypatch.setattr(run_directory, "publish", killed)
    with pytest.raises(Stop), opened(place) as run:
        (run.checkpoints / "checkpoint-2").mkdir(parents=True)
        run.finish({})
    monkeypatch.undo()
    with opened(place, resume=True) as run:
        assert (run.checkpoints / "checkpoint-2").is_dir()
        run.finish({})
    assert read_manifest(place / "out")["files"] == {}


# --- resume against something else ------------------------------------------------------------------------------------


def test_there_must_be_something_to_resume(place):
    with pytest.raises(OutputError, match=r"no interrupted run .*; drop --resume"), opened(place, resume=True):
        pytest.fail("opened")
    complete(place)
    with pytest.raises(OutputError, match="is complete, there is nothing to resume"), opened(place, resume=True):
        pytest.fail("opened")


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (None, {"steps": 5}, r"steps \(4 -> 5\)"),
        (None, {"etas": (0.0, 0.7)}, r"etas \(\[0\.0, 0\.5\] -> \[0\.0, 0\.7\]\)"),
        (None, {"seed": 8, "steps": 5}, r"steps \(4 -> 5\), seed \(7 -> 8\)"),
        ("model/config.json", {}, r"config\.json of model .*/model"),
        ("weights", {}, r"the weights of model .*/model"),
        ("data.jsonl", {}, r"the content of .*/data\.jsonl"),
    ],
)
def test_a_resume_after_a_change_is_refused_and_names_it(place, change, settings, said):
    interrupt(place)
    if change:
        write_text_model(place / "model", "CHANGED") if change == "weights" else (place / change).write_text("CHANGED")
    with pytest.raises(InputError, match=f"cannot resume .*changed since it began: {said}") as caught:
        complete(place, resume=True, **settings)
    assert "restore that, or start over with --force" in str(caught.value)
    assert hidden(place) == [".out.partial"], "the work is kept"


def test_a_resume_from_another_directory_is_refused_unless_its_content_is_the_same(place):
    interrupt(place)
    for name, text in (("copy", "weights"), ("other", "WEIGHTS")):
        (place / name).mkdir()
        (place / name / "config.json").write_text("{}")
        write_text_model(place / name, text)
    with pytest.raises(InputError, match=r"cannot resume .*: the weights of model .*/other"):
        complete(place, resume=True, model=place / "other")
    assert complete(place, resume=True, model=place / "copy").out == place / "out"


def test_several_inputs_are_the_same_in_the_recorded_order_only(place):
    """The order of data sets, or of policies, counts: weights and names stand beside them."""
    (place / "more.jsonl").write_text('{"prompt": "ho"}\n')
    (place / "copy.jsonl").write_text((place / "data.jsonl").read_text())
    one, two = place / "data.jsonl", place / "more.jsonl"

    class Several(Config):
        data: tuple[Path, ...]

    with open_run("sft", Several(data=(one, two)), RunOptions(place / "out")) as run:
        run.finish({})
    manifest = read_manifest(place / "out")
    assert changed(manifest, Several(data=(one, two))) == []
    assert changed(manifest, Several(data=(place / "copy.jsonl", two))) == []
    assert len(changed(manifest, Several(data=(two, one)))) == 1


def test_a_teacher_s_cache_is_its_index_and_its_tensors(place):
    cache = place / "cache"
    cache.mkdir()
    files = [
        cache / name for name in ("cache.json", "topk-00000-of-00002.safetensors", "topk-00001-of-00002.safetensors")
    ]
    for file in files:
        file.write_text(file.name)

    class Cached(Config):
        teacher_cache: Path

    config = Cached(teacher_cache=cache)
    with open_run("distill", config, RunOptions(place / "out")) as run:
        run.finish({})
    manifest = read_manifest(place / "out")
    assert changed(manifest, config) == []
    files[2].write_text("other tensors")
    assert len(changed(manifest, config)) == 1


def test_what_is_incidental_may_change_between_the_parts_of_a_run(place):
    class Paced(Config):
        INCIDENTAL = frozenset({"concurrency"})
        steps: int = 4
        concurrency: int = 8

    with open_run("generate", Paced(), RunOptions(place / "out")) as run:
        run.finish({})
    manifest = read_manifest(place / "out")
    assert changed(manifest, Paced(concurrency=2)) == []
    assert changed(manifest, Paced(steps=5)) == ["steps (4 -> 5)"]


def test_a_resume_with_other_data_is_refused_unless_its_content_is_the_same(place):
    interrupt(place)
    (place / "copy.jsonl").write_bytes((place / "data.jsonl").read_bytes())
    (place / "other.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"cannot resume .*: the content of .*/other\.jsonl"):
        complete(place, resume=True, data=place / "other.jsonl")
    assert complete(place, resume=True, data=place / "copy.jsonl").out == place / "out"


def test_a_resume_by_another_command_is_refused(place):
    interrupt(place)
    config = Settings(model=place / "model", data=place / "data.jsonl")
    options = RunOptions(place / "out", resume=True)
    opened_again = open_run("reward", config, options)
    with pytest.raises(InputError, match=r"command \(sft -> reward\)"), opened_again:
        pytest.fail("opened")


# --- damaged inputs ---------------------------------------------------------------------------------------------------


def test_a_model_of_ours_whose_weights_changed_since_is_refused_and_the_advice_leads_to_a_run(place):
    write_manifest(place / "model", {"command": "sft", "status": "complete"})
    path = place / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"S")
    with pytest.raises(InputError, match=r"--model .*model\.safetensors is not what was written") as caught:
        complete(place)
    (place / "model" / "gemma2.json").unlink()  # the advice
    assert f"remove {place / 'model' / 'gemma2.json'}" in caught.value.hint
    assert complete(place).out == place / "out"


def test_another_file_of_a_model_may_be_edited_on_purpose(place):
    write_manifest(place / "model", {"command": "sft", "status": "complete"})
    (place / "model" / "config.json").write_text('{"final_logit_softcapping": 8}')
    assert complete(place).out == place / "out"


# --- rewind -----------------------------------------------------------------------------------------------------------


def test_rewind_drops_what_was_logged_after_the_step_and_the_torn_last_line(place):
    with opened(place) as run:
        for step in (1, 2, 3):
            run.log(step, loss=step / 10)
            run.sample(step, text=f"{step}\u2028\x85ünï")
        expected = [(run.path / name).read_bytes().split(b"\n")[:2] for name in ("metrics.jsonl", "samples.jsonl")]
        with (run.path / "samples.jsonl").open("ab") as file:
            file.write('{"step": 2, "text": "ü'.encode()[:-1])  # cut inside a character
        run.rewind(2)
        left = [(run.path / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")]
        assert left == [b"\n".join(lines) + b"\n" for lines in expected]
        run.rewind(-1)
        assert (run.path / "metrics.jsonl").read_bytes() == b""
        run.finish({})


def test_rewind_keeps_a_last_line_that_lacks_only_its_newline(place):
    with opened(place) as run:
        (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
        run.rewind(5)
        run.log(3)
        assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
        run.finish({})


def test_rewind_without_a_log_does_nothing(place):
    with opened(place) as run:
        run.rewind(-1)
        assert [path.name for path in run.path.iterdir()] == ["run.json"]
        run.finish({})


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_nothing_of_the_environment_is_recorded(place, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret")
    monkeypatch.setenv("SOME_API_KEY", "sk-planted-secret")
    complete(place)
    written = b"".join(path.read_bytes() for path in (place / "out").iterdir())
    assert b"planted" not in written


def test_an_output_that_appears_just_before_the_lock_is_refused_before_any_work(place, monkeypatch):
    """Two starts: one publishes and lets go of the lock between the check and the lock of the other."""
    take = run_directory.locked

    def after_another(out):
        monkeypatch.setattr(run_directory, "locked", take)
        complete(place)
        return take(out)

    monkeypatch.setattr(run_directory, "locked", after_another)
    with pytest.raises(OutputError, match="exists; choose another --out"), opened(place):
        pytest.fail("it has begun to work")
    assert text_of(place / "out") == "result"
    assert list(place.glob(".*")) == []


# --- the number of processes ------------------------------------------------------------------------------------------


class Of(Ranks):
    """Rank 0 of several, alone."""

    def on_main(self, work):
        return work()


def stopped(place, monkeypatch, processes, step, *, resume=True):
    """A sharded run on a number of processes that goes on from a step, and stops; return its record."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = Settings(model=place / "model", data=place / "data.jsonl")
    options = RunOptions(place / "out", resume=resume)
    with pytest.raises(Stop), open_run("sft", config, options, ranks=Of(0, processes), strategy="fsdp") as run:
        (run.checkpoints / "checkpoint-9").mkdir(parents=True, exist_ok=True)  # or one that is not whole
        if run.resumed:
            run.goes_on_at(step)
        raise Stop
    record = read_state(place / ".out.partial")
    assert "processes_before" not in record
    return record["processes"], record.get("processes_by_step")


def test_the_record_has_the_processes_that_computed_each_step(place, monkeypatch):
    assert stopped(place, monkeypatch, 2, 0, resume=False) == (2, None)
    assert stopped(place, monkeypatch, 2, 4) == (2, None)
    assert stopped(place, monkeypatch, 1, 4) == (1, "2, from step 4: 1")
    assert stopped(place, monkeypatch, 1, 6) == (1, "2, from step 4: 1")
    assert stopped(place, monkeypatch, 3, 8) == (3, "2, from step 4: 1, from step 8: 3")
    assert stopped(place, monkeypatch, 3, 2) == (3, "2, from step 2: 3")  # the checkpoints after it were broken


def test_a_run_that_begins_again_without_a_checkpoint_has_its_new_number_of_processes(place, monkeypatch):
    assert stopped(place, monkeypatch, 2, 0, resume=False) == (2, None)
    assert stopped(place, monkeypatch, 1, 0) == (1, None)
    assert stopped(place, monkeypatch, 4, 4) == (4, "1, from step 4: 4")
    assert stopped(place, monkeypatch, 4, 0) == (4, None)
