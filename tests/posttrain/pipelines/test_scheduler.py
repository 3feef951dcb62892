"""What runs, what is skipped, what is continued, what is left out; and what the state says of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from stages import Inline, Making, Stub, compiled, run
from text_model import text_of, write_text_model

from gemma2.core.errors import InputError
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.progress import SILENT
from gemma2.posttrain.pipelines.check import ALL, check_pipeline
from gemma2.posttrain.pipelines.executors.jobs import Outcome
from gemma2.posttrain.pipelines.run import Watcher, run_stages
from gemma2.posttrain.pipelines.scheduler import StageFailed
from gemma2.posttrain.pipelines.state import read_state
from gemma2.posttrain.runs.commands import COMMANDS, output_hash
from gemma2.posttrain.runs.run_directory import RunResult, open_run


def stage(**keys):
    options = {key: keys.pop(key) for key in [*keys] if key in ("model", "models", "data", "prompts", "value", "fail")}
    return {"command": "make", "options": options, **keys}


CHAIN = {"a": stage(value=1), "b": stage(model="${a.out}", value=2), "c": stage(model="${b.out}", value=3)}


def weights(root: Path, name: str) -> str:
    return text_of(root / name)


def ran(pipeline, **choice) -> list[str]:
    executor = Inline()
    run(pipeline, executor, **choice)
    return executor.started


class Counting(type(SILENT)):
    """Adds up the stages of a pipeline's bar."""

    done = 0

    def advance(self, amount=1, **fields):
        self.done += amount


def test_the_bar_counts_the_last_stage_too(tmp_path):
    pipeline, counting = compiled(CHAIN, tmp_path), Counting()
    run_stages(pipeline, check_pipeline(pipeline), Inline(), choice=ALL, observer=Watcher(), progress=counting)
    assert counting.done == len(CHAIN)


def test_stages_run_in_order_and_take_each_others_outputs(tmp_path):
    assert ran(compiled(CHAIN, tmp_path)) == ["a", "b", "c"]
    assert weights(tmp_path, "c") == "(3.0(2.0(1.0)))"
    assert {one["status"] for one in read_state(tmp_path)["stages"].values()} == {"complete"}


def test_what_is_complete_is_skipped(tmp_path):
    ran(compiled(CHAIN, tmp_path))
    assert ran(compiled(CHAIN, tmp_path)) == []


def test_a_changed_setting_runs_the_stage_and_what_needs_it(tmp_path):
    ran(compiled(CHAIN, tmp_path))
    changed = {**CHAIN, "b": stage(model="${a.out}", value=20)}
    assert ran(compiled(changed, tmp_path)) == ["b", "c"]
    assert weights(tmp_path, "c") == "(3.0(20.0(1.0)))"


def test_a_stage_made_again_with_the_same_result_stops_there(tmp_path):
    ran(compiled(CHAIN, tmp_path))
    assert ran(compiled(CHAIN, tmp_path), force=frozenset({"a"})) == ["a"]  # the weights are what they were


def test_an_output_that_is_gone_or_half_written_is_made_again(tmp_path):
    ran(compiled(CHAIN, tmp_path))
    shutil.rmtree(tmp_path / "b")
    assert ran(compiled(CHAIN, tmp_path)) == ["b"]
    manifest = json.loads((tmp_path / "b" / "gemma2.json").read_text())
    (tmp_path / "b" / "gemma2.json").write_text(json.dumps({**manifest, "status": "unfinished"}))
    assert ran(compiled(CHAIN, tmp_path)) == ["b"]


def test_weights_that_changed_in_place_are_made_again_and_what_needs_them_stays(tmp_path):
    ran(compiled(CHAIN, tmp_path))
    write_text_model(tmp_path / "a", "(9.0)")
    assert ran(compiled(CHAIN, tmp_path)) == ["a"]
    assert weights(tmp_path, "a") == "(1.0)"


def test_data_that_changed_run_what_reads_them(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    stages = {"a": stage(value=1, data=str(data)), "b": stage(value=2)}
    ran(compiled(stages, tmp_path / "out"))
    data.write_text('{"x": 1}\n')
    assert ran(compiled(stages, tmp_path / "out")) == ["a"]


def test_the_same_content_at_another_place_is_the_same_input(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    ran(compiled({"a": stage(data=str(tmp_path / "one.jsonl"))}, tmp_path / "out"))
    assert ran(compiled({"a": stage(data=str(tmp_path / "two.jsonl"))}, tmp_path / "out")) == []


TWO = {"a": stage(value=1), "b": stage(value=2)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"models": ["${a.out}", "${b.out}"]}, {"models": ["${a.out}"]}),
        ({"models": ["${a.out}", "${b.out}"]}, {"models": ["${b.out}", "${a.out}"]}),
        ({"models": ["${a.out}"]}, {"models": ["${a.out}", "${a.out}"]}),
        ({"models": ["${a.out}"], "model": "${b.out}"}, {"models": ["${b.out}"], "model": "${a.out}"}),
        ({"models": ["${a.out}", "${b.out}"], "model": "${b.out}"},
         {"models": ["${a.out}", "${b.out}"], "model": "${a.out}"}),
        ({"models": ["${a.out}"], "model": "${b.out}"}, {"model": "${b.out}"}),
    ],
)  # fmt: skip
def test_inputs_that_are_fewer_or_elsewhere_among_the_options_are_a_change(tmp_path, before, after):
    ran(compiled({**TWO, "c": stage(**before)}, tmp_path))
    assert ran(compiled({**TWO, "c": stage(**after)}, tmp_path)) == ["c"]
    assert ran(compiled({**TWO, "c": stage(**after)}, tmp_path)) == []


def test_files_that_change_places_are_a_change(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"x": "{name}"}}\n')
    one, two = (str(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    ran(compiled({"a": stage(data=one, prompts=[two])}, tmp_path / "out"))
    assert ran(compiled({"a": stage(data=two, prompts=[one])}, tmp_path / "out")) == ["a"]
    assert ran(compiled({"a": stage(data=two, prompts=[one, one])}, tmp_path / "out")) == ["a"]
    assert ran(compiled({"a": stage(data=two, prompts=[one])}, tmp_path / "out")) == ["a"]


def test_moved_outputs_and_moved_inputs_are_what_they_were(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"x": "{name}"}}\n')
    one, two = (tmp_path / f"{name}.jsonl" for name in ("one", "two"))
    ran(compiled({"a": stage(data=str(two), prompts=[str(one)]), "b": stage(model="${a.out}")}, tmp_path / "out"))
    (tmp_path / "moved").mkdir()
    one = one.rename(tmp_path / "moved" / "first.jsonl")
    (tmp_path / "out").rename(tmp_path / "moved" / "out")  # no recorded path leads to its input any longer
    stages = {"a": stage(data=str(two), prompts=[str(one)]), "b": stage(model="${a.out}")}
    assert ran(compiled(stages, tmp_path / "moved" / "out")) == []
    two.write_text("{}\n")
    found = check_pipeline(compiled(stages, tmp_path / "moved" / "out"))
    assert found.stages["a"].why == (f"the content of {two}",)


def test_a_file_added_to_a_folder_of_data_is_a_change(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "b.jsonl").write_text("{}\n")
    stages = {"a": stage(data=str(folder), prompts=[str(folder / "b.jsonl")]), "b": stage(data=str(folder))}
    ran(compiled(stages, tmp_path / "out"))
    assert ran(compiled(stages, tmp_path / "out")) == []
    (folder / "a.jsonl").write_text('{"x": 1}\n')
    assert check_pipeline(compiled(stages, tmp_path / "out")).stages["b"].why == (f"data (added {folder / 'a.jsonl'})",)
    assert ran(compiled(stages, tmp_path / "out")) == ["a", "b"]
    assert ran(compiled(stages, tmp_path / "out")) == []


def test_a_file_that_two_options_name_is_the_same_input_under_another_name(tmp_path, monkeypatch):
    (tmp_path / "one.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    ran(compiled({"a": stage(data="one.jsonl", prompts=["one.jsonl"])}, tmp_path / "out"))
    full = str(tmp_path / "one.jsonl")
    assert ran(compiled({"a": stage(data=full, prompts=[full])}, tmp_path / "out")) == []


def test_a_folder_that_is_no_output_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        ran(compiled(CHAIN, tmp_path))
    assert (tmp_path / "a" / "thesis.txt").read_text() == "mine"


def test_the_hash_stands_for_settings_parents_and_data_and_for_nothing_else(tmp_path):
    ran(compiled(CHAIN, tmp_path / "x"))
    ran(compiled(CHAIN, tmp_path / "elsewhere" / "y"))
    hashes = [
        [output_hash(read_manifest(root / name)) for name in CHAIN]
        for root in (tmp_path / "x", tmp_path / "elsewhere" / "y")
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 3
    ran(compiled({**CHAIN, "a": stage(value=1.5)}, tmp_path / "x"))
    after = [output_hash(read_manifest(tmp_path / "x" / name)) for name in CHAIN]
    assert not set(after) & set(hashes[0])


# --- failures ---------------------------------------------------------------------------------------------------------

BROKEN = {
    "a": stage(value=1),
    "bad": stage(model="${a.out}", fail="mend it"),
    "after": stage(model="${bad.out}"),
    "apart": stage(value=4),
}


def statuses(root: Path) -> dict[str, str]:
    return {name: one["status"] for name, one in read_state(root)["stages"].items()}


def test_a_failure_stops_what_has_not_begun_and_names_the_stage(tmp_path):
    executor = Inline()
    with pytest.raises(StageFailed, match=r"stage bad: it cannot be; mend it; its log is .*logs/bad\.log") as caught:
        run(compiled(BROKEN, tmp_path), executor)
    assert caught.value.exit_code == 1
    assert executor.started == ["a", "bad"]
    assert statuses(tmp_path) == {"a": "complete", "bad": "failed", "after": "blocked", "apart": "blocked"}
    assert read_state(tmp_path)["stages"]["bad"]["error"] == "it cannot be; mend it"
    assert not (tmp_path / "bad").exists()


def test_keep_going_runs_what_does_not_need_the_failed_stage(tmp_path):
    with pytest.raises(StageFailed):
        run(compiled(BROKEN, tmp_path), keep_going=True)
    assert statuses(tmp_path) == {"a": "complete", "bad": "failed", "after": "blocked", "apart": "complete"}


def test_after_the_mend_only_the_rest_runs(tmp_path):
    with pytest.raises(StageFailed):
        run(compiled(BROKEN, tmp_path))
    assert ran(compiled({**BROKEN, "bad": stage(model="${a.out}")}, tmp_path)) == ["bad", "after", "apart"]


def test_a_bug_keeps_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)stage a has a bug:.*Traceback.*ZeroDivisionError: a bug"):
        run(compiled({"a": stage(fail="bug")}, tmp_path))
    assert read_state(tmp_path)["stages"]["a"]["error"] == "ZeroDivisionError: a bug"


def test_a_lost_process_is_tried_again_as_often_as_the_stage_says(tmp_path):
    stages = {"a": stage(value=1, retries=2)}
    executor = Inline(lost={"a": 2})
    assert run(compiled(stages, tmp_path / "x"), executor) == {"a": "complete"}
    assert executor.started == ["a"] * 3
    with pytest.raises(StageFailed, match="SIGKILL"):
        run(compiled(stages, tmp_path / "y"), Inline(lost={"a": 3}))


def test_a_stage_whose_output_is_not_there_is_not_complete_whatever_its_process_says(tmp_path, monkeypatch):
    def body(config, options, progress):
        return RunResult(options.out)

    monkeypatch.setitem(COMMANDS, "make", replace(COMMANDS["make"], body=body))
    with pytest.raises(StageFailed, match="is not there, or has no manifest; run it again"):
        run(compiled({"a": stage(value=1)}, tmp_path))
    assert read_state(tmp_path)["stages"]["a"]["status"] == "failed"


def test_a_clear_error_is_not_tried_again(tmp_path):
    executor = Inline()
    with pytest.raises(StageFailed):
        run(compiled({"a": stage(fail="mend it", retries=5)}, tmp_path), executor)
    assert executor.started == ["a"]


# --- what was interrupted ---------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """The command `make` with a checkpoint, lost after it as often as `lost` says; `began` tells where it began."""
    began: list[int] = []
    lost: list[str] = []

    def body(config, options, progress):
        with open_run("make", config, options) as run:
            done = run.checkpoints / "done"
            began.append(len(list(run.checkpoints.glob("*"))))
            done.parent.mkdir(exist_ok=True)
            done.write_text("")
            if lost:
                raise InputError(lost.pop(), "mend it")
            write_text_model(run.path, f"({config.value})")
            return run.finish({})

    monkeypatch.setitem(COMMANDS, "make", Stub(Making, "none", "none", "makes", accelerated=False, body=body))
    return began, lost


def test_an_output_that_is_made_again_goes_on_where_that_was_interrupted(tmp_path, steps):
    began, lost = steps
    ran(compiled({"a": stage(value=1)}, tmp_path))
    lost.append("stopped")
    changed = compiled({"a": stage(value=2)}, tmp_path)
    with pytest.raises(StageFailed):
        ran(changed)
    assert weights(tmp_path, "a") == "(1.0)"
    assert check_pipeline(changed).stages["a"].action == "continue"
    assert ran(changed) == ["a"]
    assert (began, weights(tmp_path, "a")) == ([0, 0, 1], "(2.0)")
    assert ran(changed) == []


class Losing(Inline):
    """The first process of a stage is lost when it has made its checkpoint."""

    def poll(self, seconds):
        events, ended = super().poll(seconds)
        return events, {name: Outcome(-9, error="lost") if one.code else one for name, one in ended.items()}


def test_a_forced_stage_that_is_lost_goes_on_from_its_checkpoint(tmp_path, steps):
    began, lost = steps
    pipeline = compiled({"a": stage(value=1, retries=1)}, tmp_path)
    ran(pipeline)
    lost.append("stopped")
    executor = Losing()
    run(pipeline, executor, force=frozenset({"a"}))
    assert (executor.started, began) == (["a", "a"], [0, 0, 1])


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text("(")])
def test_weights_that_are_gone_or_cut_are_made_again(tmp_path, spoil):
    ran(compiled(CHAIN, tmp_path))
    spoil(tmp_path / "c" / "model.safetensors")
    assert "model.safetensors" in check_pipeline(compiled(CHAIN, tmp_path)).stages["c"].why[0]
    assert ran(compiled(CHAIN, tmp_path)) == ["c"]


# --- choices ----------------------------------------------------------------------------------------------------------


def test_a_choice_of_stages_takes_the_others_as_they_are(tmp_path):
    pipeline = compiled(CHAIN, tmp_path)
    ran(pipeline)
    changed = compiled({**CHAIN, "a": stage(value=7), "b": stage(model="${a.out}", value=8)}, tmp_path)
    assert ran(changed, within=frozenset({"b"})) == ["b"]  # a is of another value, and that is not looked at
    assert weights(tmp_path, "b") == "(8.0(1.0))"


def test_a_choice_needs_what_it_takes_complete_and_nothing_else(tmp_path):
    with pytest.raises(InputError, match=r"stages\.b: needs a, which is neither complete nor chosen"):
        run(compiled(CHAIN, tmp_path), within=frozenset({"b"}))
    assert ran(compiled(CHAIN, tmp_path), within=frozenset({"a"})) == ["a"]
    assert {name: one["status"] for name, one in read_state(tmp_path)["stages"].items()} == {
        "a": "complete", "b": "waiting", "c": "waiting",
    }  # fmt: skip


def test_what_was_not_needed_is_no_hindrance_to_a_choice_behind_it(tmp_path):
    pipeline = compiled(conditional(6), tmp_path)
    assert ran(pipeline) == ["a", "all"]
    assert run(pipeline, within=frozenset({"all"}), force=frozenset({"all"})) == {"all": "complete"}
    assert weights(tmp_path, "all") == "(0.0(6.0))"
    assert read_state(tmp_path)["stages"]["more"]["status"] == "not needed"


# --- conditions -------------------------------------------------------------------------------------------------------


def conditional(value: float) -> dict:
    return {
        "a": stage(value=value),
        "more": stage(model="${a.out}", when="${a.summary.value} < 5"),
        "then": stage(model="${more.out}"),
        "all": stage(models=["${a.out}", "${more.out}", "${then.out}"]),
    }


def test_a_condition_that_holds_runs_the_stage(tmp_path):
    assert set(run(compiled(conditional(1), tmp_path)).values()) == {"complete"}
    assert weights(tmp_path, "all") == "(0.0(1.0)(0.0(1.0))(0.0(0.0(1.0))))"


def test_what_is_not_needed_leaves_lists_and_takes_single_users_along(tmp_path):
    found = run(compiled(conditional(6), tmp_path))
    assert found == {"a": "complete", "more": "not needed", "then": "not needed", "all": "complete"}
    assert weights(tmp_path, "all") == "(0.0(6.0))"


def test_a_summary_of_another_stage_becomes_an_option_with_its_type(tmp_path):
    stages = {"a": stage(value=2.5), "b": stage(value="${a.summary.nested.list.1}")}
    run(compiled(stages, tmp_path))
    assert weights(tmp_path, "b") == "(2.5)"
    assert ran(compiled({**stages, "a": stage(value=3.5)}, tmp_path)) == ["a", "b"]


def test_a_summary_that_is_not_there_fails_the_stage_with_the_key(tmp_path):
    with pytest.raises(StageFailed, match="there is no 'valeu'; did you mean 'value'"):
        run(compiled({"a": stage(), "b": stage(value="${a.summary.valeu}")}, tmp_path))


# --- several at once --------------------------------------------------------------------------------------------------


def test_independent_stages_run_side_by_side_up_to_the_number_of_jobs(tmp_path):
    stages = {"m": stage(matrix={"value": [1, 2, 3, 4]}), "end": stage(models="${m.out}")}
    executor = Inline(jobs=3)
    run(compiled(stages, tmp_path), executor)
    assert executor.most == 3
    assert weights(tmp_path, "end") == "(0.0(1)(2)(3)(4))".replace("(1)(2)(3)(4)", "(1.0)(2.0)(3.0)(4.0)")


def test_an_interrupt_leaves_a_state_that_says_so(tmp_path):
    class Interrupting(Inline):
        def poll(self, seconds):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(compiled(CHAIN, tmp_path), Interrupting())
    state = read_state(tmp_path)
    assert state["status"] == "interrupted"
    assert state["stages"]["a"]["status"] == "interrupted"
    assert ran(compiled(CHAIN, tmp_path)) == ["a", "b", "c"]


def test_an_escaped_brace_is_one_in_the_check_and_in_the_run(tmp_path):
    (tmp_path / "${x}.jsonl").write_text("{}\n")
    pipeline = compiled({"a": stage(data=f"{tmp_path}/$${{x}}.jsonl")}, tmp_path / "out")
    assert ran(pipeline) == ["a"]
    assert check_pipeline(pipeline).stages["a"].action == "skip"


def test_a_stage_that_reads_a_figure_of_one_that_is_not_needed_is_not_needed_either(tmp_path):
    stages = {
        "a": stage(value=1),
        "b": stage(value=2, when="${a.summary.value} > 5"),
        "c": stage(value="${b.summary.value}"),
    }
    assert run(compiled(stages, tmp_path)) == {"a": "complete", "b": "not needed", "c": "not needed"}
    planned = check_pipeline(compiled(stages, tmp_path)).stages
    assert [one.action for one in planned.values()] == ["skip", "not needed", "not needed"]


def test_a_list_that_names_a_stage_that_is_not_needed_is_current_without_it(tmp_path):
    stages = {
        "a": stage(value=1),
        "b": stage(value=2, when="${a.summary.value} > 5"),
        "c": stage(models=["${a.out}", "${b.out}"]),
    }
    assert ran(compiled(stages, tmp_path)) == ["a", "c"]
    planned = check_pipeline(compiled(stages, tmp_path)).stages
    assert [one.action for one in planned.values()] == ["skip", "not needed", "skip"]


def test_a_choice_is_refused_where_it_would_take_a_damaged_output(tmp_path):
    run(compiled(CHAIN, tmp_path))
    write_text_model(tmp_path / "a", "(9.0)")
    with pytest.raises(
        InputError, match=r"stages\.b: needs a, which is not chosen and damaged: its model\.safetensors"
    ):
        run(compiled(CHAIN, tmp_path), within=frozenset({"b"}))
    assert ran(compiled(CHAIN, tmp_path), within=frozenset({"a", "b"})) == ["a"]  # the advice
