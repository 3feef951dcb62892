"""A watcher's view of recorded folders, step by step, and what its alerts do."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from watched_folder import evaluation, line

from gemma2.core.errors import InputError, OutputError, UsageError
from gemma2.core.json_files import write_json
from gemma2.core.outputs.staging import partial_path
from gemma2.posttrain.rl.step_metrics import ScoredCompletions, batch_metrics
from gemma2.posttrain.runs.live import take_alert
from gemma2.posttrain.watch.alerts import parse_alert
from gemma2.posttrain.watch.following import Following
from gemma2.posttrain.watch.metric_names import is_expected

NOW = 1_795_946_460.0  # 2026-11-29T10:01:00Z


def following(folder, *alerts):
    return Following(folder.root, [parse_alert(text) for text in alerts])


def look(watcher, now=NOW):
    view = watcher.look(now)
    return view, {stage.name: stage.status for stage in view.stages}


# --- one run ----------------------------------------------------------------------------------------------------------


def test_a_run_from_before_it_exists_to_its_end(folder):
    watcher = following(folder)
    assert watcher.look(NOW) is None
    run = folder.run()
    folder.held()
    view, _ = look(watcher)
    assert (view.status, view.over, view.pipeline, view.eta) == ("running", False, False, None)
    folder.add(run, evaluation(0), line(1), line(2), evaluation(2))
    folder.add(run, {"step": 2, "prompt": "Why?", "completion": "So.", "reward": 1}, name="samples.jsonl")
    folder.live(run, 2, 10, [(NOW - 4, 0), (NOW, 2)])
    view, _ = look(watcher)
    [stage], [details] = view.stages, view.details
    assert (stage.pace.step, stage.pace.steps, stage.pace.rate, view.eta) == (2, 10, 0.5, 16.0)
    expected = {"reward": 0.2, "heldout_reward": 0.5, "kl": 1.0, "kl_anchor": 0.1, "learning_rate": 1e-6}
    assert {name: details.figures[name] for name in expected} == expected
    assert details.curves["reward"] == [(1, 0.1), (2, 0.2)]
    assert details.curves["kl"] == [(0, 0.0), (2, 1.0)]
    assert details.sample["completion"] == "So."
    run.rename(folder.root)
    ended = {
        "command": "rlhf",
        "status": "complete",
        "started": "2026-11-29T10:00:00Z",
        "ended": "2026-11-29T10:02:00Z",
    }
    write_json(folder.root / "gemma2.json", ended)
    folder.released()
    view, _ = look(watcher)
    assert (view.status, view.over, view.elapsed, view.eta) == ("complete", True, 120.0, None)
    assert view.details[0].figures["kl"] == 1.0


def test_a_finished_run_is_shown_at_the_first_look(folder):
    folder.root.mkdir()
    write_json(folder.root / "gemma2.json", {"command": "sft", "status": "complete"})
    folder.add(folder.root, line(1), {"step": 1, "heldout_loss": 0.7})
    view, _ = look(following(folder))
    assert (view.status, view.over, view.stages[0].command) == ("complete", True, "sft")
    assert view.details[0].figures["heldout_loss"] == 0.7


def test_a_killed_run_is_interrupted_and_one_that_failed_says_why(folder):
    run = folder.run()
    view, _ = look(following(folder))
    assert (view.status, view.over) == ("interrupted", True)
    record = {"step": 3, "steps": 9, "began": NOW, "times": [], "error": "step 4: NaN; lower it", "exit_code": 3}
    (run / ".live.json").write_text(json.dumps(record))
    view, _ = look(following(folder))
    assert (view.status, view.stages[0].error, view.stages[0].pace.step) == ("failed", "step 4: NaN; lower it", 3)


def test_a_run_that_keeps_nothing_is_over_when_it_is_gone(folder):
    run = folder.run()
    folder.held()
    watcher = following(folder)
    look(watcher)
    shutil.rmtree(run)
    folder.released()
    views = [watcher.look(NOW) for _ in range(3)]
    assert (views[-1].status, views[-1].over) == ("interrupted", True)
    assert "before its first checkpoint" in views[-1].stages[0].error


def test_a_run_that_replaces_an_output_is_shown_while_it_runs(folder):
    folder.root.mkdir()
    write_json(folder.root / "gemma2.json", {"command": "sft", "status": "complete"})
    folder.run()
    assert look(following(folder))[0].status == "complete"
    folder.held()
    view, _ = look(following(folder))
    assert (view.status, view.stages[0].command) == ("running", "rlhf")


@pytest.mark.parametrize("name", ["out", ".out.partial"])
def test_the_hidden_directory_stands_for_its_output(folder, name):
    folder.run()
    folder.held()
    view = Following(folder.root.with_name(name)).look(NOW)
    assert (view.out, view.status) == (str(folder.root), "running")


def test_something_else_is_refused(folder):
    folder.root.mkdir()
    (folder.root / "notes.txt").write_text("x")
    for path in (folder.root, folder.root / "notes.txt"):
        with pytest.raises(InputError, match="is not the output of a gemma2 command; give the --out"):
            Following(path).look(NOW)


def test_a_resume_takes_back_what_it_dropped(folder):
    run = folder.run()
    folder.held()
    watcher = following(folder)
    folder.add(run, *(line(step) for step in range(1, 6)))
    look(watcher)
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]
    (run / "aside").write_text("".join(kept))
    (run / "aside").replace(run / "metrics.jsonl")
    view, _ = look(watcher)
    assert view.details[0].curves["reward"] == [(1, 0.1), (2, 0.2)]


def test_figures_that_are_not_finite_neither_stop_it_nor_stay(folder):
    run = folder.run()
    folder.add(run, line(1), line(2, reward=math.nan, loss=math.inf, kl_anchor=None, length=10**400, odd="text"))
    view, _ = look(following(folder))
    figures = view.details[0].figures
    assert math.isnan(figures["reward"]) and figures["loss"] == figures["length"] == math.inf
    assert "kl_anchor" not in figures and "odd" not in figures
    assert view.details[0].curves["reward"] == [(1, 0.1)]


@pytest.mark.parametrize(
    ("rows", "near"),
    [
        ([line(1), evaluation(1, kl=5.0)], []),
        ([line(1), evaluation(1, kl=16.0)], ["KL to the SFT policy"]),
        ([line(1), evaluation(1, kl=math.nan)], ["KL to the SFT policy"]),
        ([line(1, truncated=0.6)], ["share of truncated completions"]),
        ([line(step, reward_std_in_group=0.0) for step in range(1, 10)], ["steps without variance of the reward"]),
        ([*(line(step, reward_std_in_group=0.0) for step in range(1, 10)), line(10)], []),
        (
            [line(4, reward_std_in_group=0.0), line(8, reward_std_in_group=1e-9)],
            ["steps without variance of the reward"],
        ),
    ],
)
def test_guards_near_their_limits_are_named(folder, rows, near):
    folder.add(folder.run(), *rows)
    view, _ = look(following(folder))
    assert [one.name for one in view.details[0].guards if one.near] == near


def test_settings_decide_the_limits_and_sft_has_none(folder):
    folder.add(folder.run(max_kl=None), line(1), evaluation(1, kl=1e9))
    assert "KL to the SFT policy" not in [one.name for one in look(following(folder))[0].details[0].guards]
    other = folder.run(folder.root.with_name("sft"), "sft", max_kl=None, max_dead_steps=None)
    folder.add(other, {"step": 1, "loss": 1.0, "learning_rate": 1e-5})
    assert Following(folder.root.with_name("sft")).look(NOW).details[0].guards == []


# --- pipelines --------------------------------------------------------------------------------------------------------


def test_a_pipeline_while_it_runs(folder):
    folder.pipeline(sft="complete", rl="running", merge="waiting", extra="not needed")
    folder.held()
    run = folder.run(folder.root / "rl")
    folder.add(run, line(1))
    folder.live(run, 5, 10, [(NOW - 5, 0), (NOW, 5)])
    view, statuses = look(following(folder))
    assert statuses == {"sft": "complete", "rl": "running", "merge": "waiting", "extra": "not needed"}
    assert (view.pipeline, view.status, view.over, view.done) == (True, "running", False, 2)
    assert view.stages[1].pace.eta == 5.0 and view.eta is None  # nobody knows how long the merge takes
    assert view.stages[1].elapsed == 60.0 and view.stages[0].elapsed == 5.0
    folder.pipeline(sft="complete", rl="running", merge="complete")
    assert look(following(folder))[0].eta == 5.0
    assert [one.name for one in view.details] == ["rl"]


def test_a_stage_that_becomes_complete_keeps_its_figures(folder):
    folder.pipeline(rl="running", merge="waiting")
    folder.held()
    run = folder.run(folder.root / "rl")
    folder.add(run, line(1))
    watcher = following(folder)
    look(watcher)
    folder.add(run, line(2))
    run.rename(folder.root / "rl")
    folder.pipeline("complete", rl="complete", merge="complete")
    folder.released()
    view, _ = look(watcher)
    assert (view.status, view.over, view.eta) == ("complete", True, None)
    assert view.details[0].curves["reward"] == [(1, 0.1), (2, 0.2)]


def test_a_killed_pipeline_is_interrupted_and_a_failed_one_says_why(folder):
    folder.pipeline(rl="running", merge="waiting")
    view, statuses = look(following(folder))
    assert (view.status, view.over, statuses["rl"]) == ("interrupted", True, "interrupted")
    folder.pipeline("failed", rl={"status": "failed", "error": "step 3: NaN; lower it"}, merge="blocked")
    view, statuses = look(following(folder))
    assert (view.status, view.over, view.stages[0].error) == ("failed", True, "step 3: NaN; lower it")


def test_warp_is_followed_from_its_hidden_directory_to_its_place(folder):
    partial = folder.run(command="warp")
    folder.held()
    hidden = type(folder)(partial)
    hidden.pipeline(**{"iteration-1/policy-1": "running"})
    run = folder.run(partial / "iteration-1/policy-1")
    folder.add(run, line(1))
    watcher = following(folder)
    view, statuses = look(watcher)
    assert (view.out, view.pipeline, statuses) == (str(folder.root), True, {"iteration-1/policy-1": "running"})
    run.rename(partial / "iteration-1/policy-1")
    hidden.pipeline("complete", **{"iteration-1/policy-1": "complete"})
    write_json(partial / "gemma2.json", {"command": "warp", "status": "complete"})
    partial.rename(folder.root)
    folder.released()
    view, _ = look(watcher)
    assert (view.status, view.over, view.details[0].figures["reward"]) == ("complete", True, 0.1)


@pytest.mark.parametrize(
    "text", ["", '{"stages"', '{"stages": 3}', "[]", '{"stages": {"../../x": {"status": "running"}, "a": 3}}']
)
def test_an_odd_state_is_an_empty_pipeline(folder, text):
    folder.pipeline()
    (folder.root / "pipeline.json").write_text(text)
    view, statuses = look(following(folder))
    assert statuses == {} and view.pipeline


def test_only_a_few_of_many_failed_stages_are_read(folder):
    folder.pipeline("failed", **{f"rl-{number}": "failed" for number in range(200)})
    view, _ = look(following(folder))
    assert len(view.stages) == 200 and len(view.details) <= 8


# --- alerts -----------------------------------------------------------------------------------------------------------


def test_an_alert_asks_the_run_to_end_once(folder):
    run = folder.run()
    folder.held()
    watcher = following(folder, "kl > 20", "reward < -5")
    folder.add(run, line(1), evaluation(1, kl=3.0))
    look(watcher)
    assert take_alert(run) is None
    folder.add(run, evaluation(2, kl=21.3))
    view, _ = look(watcher)
    assert view.alerts == {"out": "kl 21.3 > 20 at step 2"}
    assert take_alert(run) == "kl 21.3 > 20 at step 2"
    folder.add(run, evaluation(3, kl=22.0))
    look(watcher)
    assert take_alert(run) is None


def test_a_value_between_two_looks_counts_and_one_that_is_history_does_not(folder):
    run = folder.run()
    folder.held()
    folder.add(run, evaluation(1, kl=30.0), evaluation(2, kl=3.0), line(2))
    watcher = following(folder, "kl > 20")
    assert look(watcher)[0].alerts == {}
    folder.add(run, evaluation(3, kl=30.0), evaluation(4, kl=3.0))
    assert look(watcher)[0].alerts == {"out": "kl 30 > 20 at step 3"}


def test_the_newest_values_at_the_first_look_count(folder):
    run = folder.run()
    folder.held()
    folder.add(run, evaluation(1, kl=30.0), line(2))
    assert look(following(folder, "kl > 20"))[0].alerts == {"out": "kl 30 > 20 at step 1"}
    assert take_alert(run)


def test_only_the_stage_that_it_belongs_to_is_ended(folder):
    folder.pipeline(a="running", b="running", c="complete")
    folder.held()
    (folder.root / "c").mkdir()
    folder.add(folder.root / "c", evaluation(1, kl=99.0))
    runs = {name: folder.run(folder.root / name) for name in "ab"}
    watcher = following(folder, "kl > 20")
    folder.add(runs["b"], evaluation(1, kl=30.0))
    assert look(watcher)[0].alerts == {"b": "kl 30 > 20 at step 1"}
    assert take_alert(runs["a"]) is None and take_alert(runs["b"])


def test_the_page_does_not_take_lines_from_the_alerts(folder):
    run = folder.run()
    folder.held()
    watcher = following(folder, "kl > 20")
    folder.add(run, line(1))
    look(watcher)
    folder.add(run, evaluation(2, kl=30.0), evaluation(3, kl=1.0))
    watcher.details("out")
    assert look(watcher)[0].alerts


def test_what_is_over_is_not_ended(folder):
    run = folder.run()
    folder.add(run, line(1), evaluation(1, kl=30.0))
    assert look(following(folder, "kl > 20"))[0].alerts == {}
    assert take_alert(run) is None


def test_an_unknown_metric_is_refused_when_the_metrics_are_known(folder):
    run = folder.run()
    folder.held()
    watcher = following(folder, "gradient_nrm > 9")
    look(watcher)
    folder.add(run, evaluation(0))
    look(watcher)  # evaluations have no gradient
    folder.add(run, line(1))
    with pytest.raises(UsageError, match="out logs no metric 'gradient_nrm'; did you mean 'gradient_norm'"):
        look(watcher)


def test_a_metric_of_a_later_stage_is_waited_for(folder):
    folder.pipeline(sft="running", rl="waiting")
    folder.held()
    run = folder.run(folder.root / "sft", "sft", eval_every=None)
    folder.add(run, {"step": 1, "loss": 1.0, "learning_rate": 1e-5})
    look(following(folder, "kl > 20", "rewards/judge < 0"))
    with pytest.raises(UsageError, match="logs no metric 'kll'"):
        look(following(folder, "kll > 20"))


def test_a_refused_alert_file_is_one_line(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("gemma2.posttrain.watch.following.ask_to_end", refuse)
    run = folder.run()
    folder.held()
    folder.add(run, evaluation(1, kl=30.0))
    with pytest.raises(OutputError, match="cannot be written"):
        look(following(folder, "kl > 20"))


def test_a_view_is_plain_values(folder):
    folder.pipeline(rl="running")
    folder.held()
    folder.add(folder.run(folder.root / "rl"), line(1), evaluation(1))
    watcher = following(folder)
    document = json.loads(json.dumps(look(watcher)[0].document(), allow_nan=False))
    assert document["stages"][0]["figures"]["kl"] == 0.5
    assert watcher.details("rl").document(curves=True)["curves"]["kl"] == [[1, 0.5]]
    assert watcher.details("../rl") is None
    assert partial_path(folder.root / "rl").is_dir()


def test_a_dot_is_the_directory_that_we_are_in(folder, monkeypatch):
    folder.pipeline("failed", rl="waiting")
    monkeypatch.chdir(folder.root)
    for path in (".", "", "../out"):
        assert Following(Path(path)).look(NOW).out.endswith("out")
    with pytest.raises(InputError, match="/ is not the output"):
        Following(Path("/")).look(NOW)


def test_the_metrics_of_rl_are_expected(folder):
    scored = ScoredCompletions(
        [[1, 2], [3]], [False, True], torch.ones(2), torch.zeros(2), {"rewards/judge": [1.0, 2.0]}
    )
    names = batch_metrics(scored, True, 2)
    assert [name for name in names if not is_expected(name)] == []
    assert is_expected("heldout_kl_low") and is_expected("mine", {"mine"}) and not is_expected("mine")
