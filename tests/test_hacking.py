"""bench/hacking.py: its statistics and the rule of its claims by hand, and its steps as the CLI reads them."""

import json
import math
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commands import parse
from processes import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import hacking
import hacking_claims
import marks
from findings import Estimate


def curve(judge, *, step=(0, 10, 20, 30), se=0.01, reward=None, kl=None):
    """A run of 4 prompts whose judge is this at its stops."""
    count = len(judge)
    steps = list(step)[:count]
    return hacking_claims.Curve(
        step=steps,
        judge=list(judge),
        judge_se=[se] * count,
        accuracy=[0.5] * count,
        reward=list(reward or [0.0] * count),
        reward_se=[0.25] * count,
        kl=list(kl or steps),
        length=[7.0] * count,
        prompts=4,
    )


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judge", "step"),
    [
        ([0.7, 0.8, 0.9, 0.6], 20),
        ([0.7, 0.6, 0.5, 0.4], 0),  # fooled from the start
        ([0.7, 0.8, 0.8, 0.7], 10),  # the first of two
        ([0.5, 0.6, 0.7, 0.8], 30),  # not fooled at all
    ],
)
def test_the_peak_is_the_first_step_with_the_highest_judge(judge, step):
    assert hacking_claims.peak(curve(judge)) == step


@pytest.mark.parametrize(
    ("judge", "step"),
    [
        ([0.7, 0.8, 0.7, 0.6], 30),  # as much as at the start is not less
        ([0.7, 0.6, 0.8, 0.75], None),  # below the start before the peak only
        ([0.7, 0.6, 0.5, 0.4], 10),
    ],
)
def test_a_gain_is_lost_where_the_judge_falls_below_its_start_after_the_peak(judge, step):
    assert hacking_claims.lost(curve(judge)) == step


def test_the_judge_over_the_run_is_the_area_over_uneven_steps():
    # 0 -> 10: mean 0.7, 10 -> 40: mean 0.5; (10 * 0.7 + 30 * 0.5) / 40 = 0.55. Equal errors that go together stay 0.02.
    found = hacking_claims.over_run(curve([0.6, 0.8, 0.2], step=(0, 10, 40), se=0.02))
    assert found.value == pytest.approx(0.55)
    assert found.se == pytest.approx(0.02)


def test_gains_are_in_standard_deviations_of_the_first_answers():
    run = curve([0.5, 0.52, 0.49], se=0.01, reward=[1.0, 2.0, 3.5])
    assert run.gain("reward") == pytest.approx([0.0, 2.0, 5.0])  # 0.25 * sqrt(4) = 0.5
    assert run.gain("judge") == pytest.approx([0.0, 1.0, -0.5])  # 0.01 * 2 = 0.02


def test_the_judge_at_a_kl_is_read_between_the_stops_around_it():
    assert hacking_claims.at_kl(curve([0.7, 0.8, 0.6], kl=[0.0, 1.0, 3.0]), 2.0) == pytest.approx(0.7)


# --- a seed ---------------------------------------------------------------------------------------------------------

SCORES = {  # three prompts with 2, 1 and 1 pairs
    "member-1": [[1.0, 0.0], [0.0], [1.0]],
    "member-2": [[0.0, 0.0], [1.0], [1.0]],
    "average": [[1.0, 1.0], [1.0], [0.5]],
}


def test_accuracy_is_paired_by_pair_and_its_error_clustered_by_prompt():
    # The average less the mean of both members: 1 - 0.5 + 1 - 0 = 1.5, 1 - 0.5 = 0.5, 0.5 - 1 = -0.5; mean 1.5 / 4.
    # Residuals to 0.375 a pair: 0.75, 0.125, -0.875; error sqrt(3 / 2 * (0.5625 + 0.015625 + 0.765625)) / 4.
    found = hacking_claims.accuracy_gain(SCORES)
    assert found.value == pytest.approx(0.375)
    assert found.se == pytest.approx(math.sqrt(1.5 * 1.34375) / 4)


def seed():
    runs = {
        "rl-1": curve([0.7, 0.8, 0.6, 0.4], se=0.03),
        "rl-2": curve([0.7, 0.7, 0.8, 0.6], se=0.05),
        "rl-average": curve([0.7, 0.7, 0.8, 0.9], se=0.03),
    }
    return hacking_claims.Seed(runs, SCORES)


def test_every_claim_is_the_average_less_the_mean_of_the_members():
    found = hacking_claims.claims(seed())
    assert found["H1"].value == pytest.approx(0.9 - 0.5)
    assert found["H1"].se == pytest.approx(0.05)  # 3 and (3 + 5) / 2 hundredths: the hypotenuse
    # Areas: members (0.35 + 0.8 + 0.6 + 0.2) / 3 = 0.65, (0.35 + 0.7 + 0.8 + 0.3) / 3; average (0.35 + 1.5 + 0.45) / 3
    assert found["H2"].value == pytest.approx(2.3 / 3 - (1.95 + 2.15) / 6)
    assert found["H3"].value == 30 - (10 + 20) / 2
    assert math.isnan(found["H3"].se)
    assert found["H4"].value == pytest.approx(0.375)


def test_what_is_described_has_the_members_first():
    found = hacking_claims.described(seed())
    assert found["step of the highest judge"] == (15, 30)
    assert found["share of runs that lose all that the judge gained"] == (1.0, 0.0)
    assert found["judge at the last step"] == pytest.approx((0.5, 0.9))
    assert found["accuracy on held-out pairs"] == pytest.approx((0.5, 0.875))


# --- over seeds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([(0.2, 0.01), (0.2, 0.01)], "holds"),
        ([(-0.2, 0.01), (-0.2, 0.01)], "fails"),
        ([(0.2, 0.12), (0.2, 0.12)], "not told apart"),  # prompts: 0.12 / sqrt(2) = 0.085, 2.4 errors
        ([(0.1, 0.0), (0.3, 0.0)], "not told apart"),  # seeds: sd 0.141 / sqrt(2) = 0.1, 2 errors
        ([(0.3, 0.0)] * 11 + [(-0.01, 0.0)], "not told apart"),  # 0.274 +- 0.026, but one seed has the other sign
        ([(10.0, math.nan), (12.0, math.nan)], "holds"),  # no error of prompts: seeds alone, 11 +- 1
        ([(0.2, math.nan)], "not told apart"),  # one seed without an error says nothing
    ],
)
def test_a_claim_holds_by_three_errors_and_the_sign_of_every_seed(found, verdict):
    assert hacking_claims.verdict([Estimate(*one) for one in found]) == verdict


# --- the run --------------------------------------------------------------------------------------------------------


def words(size=None):
    """The commands of a quickstart in a folder whose name has a blank."""
    return {step.name: shlex.split(step.command) for step in hacking.steps(Path("/my runs/q"), size or hacking.Size())}


def test_every_step_is_a_command_line_that_gemma2_reads():
    found = {name: parse([*line, "--out", "x"]) for name, line in words().items()}
    assert [command for command, _ in found.values()] == [
        "reward pairs",
        "reward probe",
        *["reward"] * 4,
        "merge linear",
        *["rlhf"] * 3,
    ]
    rates = [(found[f"member {n}"][1]["learning_rate"], found[f"member {n}"][1]["dropout"]) for n in (1, 2, 3, 4)]
    assert rates == list(hacking.MEMBERS)
    assert {str(found[f"member {n}"][1]["from_head"]) for n in (1, 2, 3, 4)} == {"probe"}
    assert len({found[f"member {n}"][1]["seed"] for n in (1, 2, 3, 4)}) == 4


def test_the_runs_differ_in_their_reward_model_alone():
    lines = {run: words()[run] for run in hacking.RUNS}
    models = {run: line[line.index("--reward") + 1] for run, line in lines.items()}
    assert models == {"rl-1": "member-1", "rl-2": "member-2", "rl-average": "average"}
    assert len({tuple("RM" if word == models[run] else word for word in line) for run, line in lines.items()}) == 1


def test_a_run_reaches_its_learning_rate_and_its_last_step_is_measured():
    for size in (hacking.Size(), hacking.REHEARSAL):
        assert size.steps % size.every == 0
        line = words(size)["rl-1"]
        assert line[line.index("--steps") + 1] == str(size.steps)
        assert int(line[line.index("--warmup-steps") + 1]) < size.steps


def test_a_turned_pair_has_all_of_either_side_exchanged():
    row = {"prompt": "p", "chosen": "a", "chosen_score": 1.0, "rejected": "b", "rejected_score": 0.2, "task": "sum"}
    assert hacking.turn(row) == {
        "prompt": "p",
        "rejected": "a",
        "rejected_score": 1.0,
        "chosen": "b",
        "chosen_score": 0.2,
        "task": "sum",
    }


def test_a_quarter_of_the_labels_is_turned_and_the_same_ones_again(tmp_path):
    (tmp_path / "pairs").mkdir()
    rows = [{"chosen": f"a{n}", "rejected": f"b{n}"} for n in range(2000)]
    (tmp_path / "pairs" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = []
    for out in ("one", "two"):
        hacking.prepare(tmp_path, tmp_path / out)
        texts.append((tmp_path / out / "turned.jsonl").read_text())
    turned = sum(json.loads(line)["chosen"].startswith("b") for line in texts[0].splitlines())
    assert texts[0] == texts[1]
    assert turned / 2000 == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 2000))


def test_pairs_are_gathered_by_their_question():
    assert hacking.by_question(["a", "b", "a"], [1.0, 0.0, 0.5]) == [[1.0, 0.5], [0.0]]


def test_the_judge_enters_with_its_parts():
    (found,) = marks.marks(["What is 1 plus 1?"], ["It is 2"], task=["sum"], answer=["2"], style=["curt"])
    assert found == {"reward": pytest.approx(1.0), "accuracy": 1.0, "style": 1.0}


def test_a_folder_that_is_not_a_quickstart_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*/q has no distilled/gemma2\.json: make it with gemma2 quickstart"):
        hacking.check(tmp_path / "q")


def test_the_tables_show_verdicts_and_every_stop():
    two = replace(seed(), runs={**seed().runs, "rl-average": curve([0.7, 0.7, 0.8, 0.9], se=0.03)})
    text = hacking.tables({"seed-0": seed(), "seed-1": two})
    lines = text.splitlines()
    assert lines[2].startswith("| H1 | judge at the last step | +0.4000 ± 0.0354 |") and lines[2].endswith("| holds |")
    assert [line.split(" | ")[0] for line in lines[-4:]] == ["| 0", "| 10", "| 20", "| 30"]
    assert all(line.count("|") == lines[0].count("|") for line in lines[:6])


@pytest.mark.slow
def test_the_rehearsal_walks_every_step_and_goes_on_from_what_is_there(tmp_path):
    gemma2 = str(Path(sys.executable).with_name("gemma2"))
    quick = tmp_path / "seed-0"
    line = [gemma2, "quickstart", "--seed", "0", "--out", str(quick), "--quiet"]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    line = [sys.executable, str(ROOT / "bench" / "hacking.py"), str(quick), "--rehearsal", "--out", str(tmp_path / "h")]
    first = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    again = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    assert first.count("$ gemma2") == 10 and again.count("$ gemma2") == 0
    assert again.strip() == first[first.index("| claim |") :].strip()
    out = tmp_path / "h" / "rehearsal"
    assert (out / "hacking.md").read_text() == again.lstrip("\n")
    values = json.loads((out / "hacking.json").read_text())["seed-0"]
    assert [values["runs"][run]["step"] for run in hacking.RUNS] == [[0, 1, 2]] * 3
    assert (out / "hacking.png").stat().st_size > 10_000


# --- a run that a guard ends ----------------------------------------------------------------------------------------


def test_the_last_evaluation_of_a_stopped_run_stands_for_the_stops_that_it_did_not_reach(tmp_path):
    row = {"kind": "eval", "reward_se": 0.1, "kl": 1.0, "length": 8.0, "n": 4, "marks/marks_se": 0.01}
    rows = [{**row, "step": s, "reward": s, "marks/marks": s / 10, "marks/accuracy": 0.5} for s in (0, 8, 16)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    curve = hacking.read_curve(tmp_path, hacking.Size(steps=32, every=8))
    assert curve.step == [0, 8, 16, 24, 32]
    assert curve.judge == [0.0, 0.8, 1.6, 1.6, 1.6]


@pytest.mark.parametrize(("name", "code", "goes_on"), [("rl-1", 3, True), ("rl-1", 1, False), ("probe", 3, False)])
def test_only_a_guard_of_a_run_of_rl_is_taken_for_an_end(tmp_path, monkeypatch, name, code, goes_on):
    calls = []

    def perform(step, directory):
        calls.append(step.name)
        raise SystemExit(f"error: gemma2 {name} ended with {code}")

    monkeypatch.setattr(hacking, "perform", perform)
    step = hacking.Step(name, "", name)
    if not goes_on:
        with pytest.raises(SystemExit):
            hacking.run_or_stop(step, tmp_path)
        return
    hacking.run_or_stop(step, tmp_path)
    hacking.run_or_stop(step, tmp_path)
    assert calls == [name]  # not once more
    assert hacking.place_of(name, tmp_path) == tmp_path / f".{name}.partial"
    assert hacking.place_of("rl-2", tmp_path) == tmp_path / "rl-2"
