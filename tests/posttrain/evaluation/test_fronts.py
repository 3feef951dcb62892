"""Fronts that take over the points of earlier ones: what is measured again, what counts as a gain, what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
from policies import manifest, pareto_config, points_of

from gemma2.core.errors import InputError
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.evaluation import pareto
from gemma2.posttrain.evaluation.areas import Reference
from gemma2.posttrain.evaluation.candidates import Candidate, Weights, assign_names
from gemma2.posttrain.evaluation.carried import measured_with
from gemma2.posttrain.evaluation.evaluate import run_eval
from gemma2.posttrain.evaluation.front import hypervolume
from gemma2.posttrain.evaluation.front_files import FrontEntry
from gemma2.posttrain.evaluation.pareto import build_front, gain_of, in_order, run_pareto
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import EvalConfig
from gemma2.posttrain.tiny.networks import save_random

# --- gain and flat, by hand -----------------------------------------------------------------------------------------


def entry(name, kind, kl, reward):
    """A point with these values on four prompts."""
    candidate = Candidate(kind, (Weights(Path(name), name),))
    figures = {"kl": sum(kl) / 4, "reward": sum(reward) / 4}
    return FrontEntry(candidate, figures, [], {"kl": kl, "reward": reward})


def gained(entries, taken, tmp_path, flats=(), reference=None):
    fronts = []
    for number, flat in enumerate(flats):
        fronts.append(tmp_path / f"front-{number}")
        fronts[-1].mkdir()
        manifest(fronts[-1], command="pareto", summary={"flat": flat} if flat is not None else {})
    config = pareto_config(tmp_path, fronts=tuple(fronts))
    front = build_front(
        entries, [str(e.candidate.models[0].path) for e in entries], tmp_path / "out", config, reference
    )
    return front | gain_of(entries, front, taken, config)


def test_the_gain_is_the_area_that_the_new_points_add(tmp_path):
    entries = [
        entry("sft", "sft", [0.0] * 4, [1.0] * 4),
        entry("old", "policy", [2.0] * 4, [3.0] * 4),
        entry("new", "policy", [4.0] * 4, [6.0] * 4),
    ]
    front = gained(entries, [True, True, False], tmp_path)
    # Bounded by KL 4 and reward 1. Old alone: (4 - 2) * (3 - 1) = 4. The new point lies on the bound of KL: it adds 0.
    assert front["reference"] == {"kl": 4.0, "reward": 1.0}
    assert (front["hypervolume_before"], front["hypervolume_gain"]) == (4.0, 0.0)
    assert (front["improved"], front["flat"]) == (False, 1)

    entries[2] = entry("new", "policy", [1.0] * 4, [2.0] * 4)
    front = gained(entries, [True, True, False], tmp_path)
    # Bounded by KL 2, where the old one lies: nothing before, and the new one adds (2 - 1) * (2 - 1) = 1. No prompt
    # differs from another, so every resample says the same.
    assert (front["hypervolume_before"], front["hypervolume"]) == (0.0, 1.0)
    assert [front[f"hypervolume_gain{end}"] for end in ("", "_low", "_high")] == [1.0, 1.0, 1.0]
    assert (front["improved"], front["flat"]) == (True, 0)


def test_a_gain_is_paired_by_prompt(tmp_path):
    """One more of reward on every prompt: hard and easy prompts move both fronts alike, so the gain has no spread."""
    level = [0.0, 1.0, 2.0, 3.0]
    entries = [
        entry("sft", "sft", [0.0] * 4, level),
        entry("old", "policy", [1.0] * 4, [value + 2 for value in level]),
        entry("new", "policy", [1.0] * 4, [value + 3 for value in level]),
    ]
    bounds = Reference(9.0, entries[0].figures["reward"], "--reference")
    front = gained(entries, [True, True, False], tmp_path, reference=bounds)
    # From KL 1 to 9 the new point is 1 higher, in every resample.
    assert [front[f"hypervolume_gain{end}"] for end in ("", "_low", "_high")] == pytest.approx([8.0, 8.0, 8.0])
    assert front["hypervolume_high"] - front["hypervolume_low"] > 1


@pytest.mark.parametrize(("flats", "expected"), [((0,), 1), ((2,), 3), ((1, 3, 0), 4), ((None,), 1)])
def test_flat_counts_the_fronts_in_a_row_that_gained_nothing(tmp_path, flats, expected):
    entries = [entry("sft", "sft", [0.0] * 4, [1.0] * 4), entry("old", "policy", [2.0] * 4, [3.0] * 4)]
    assert gained(entries, [True, True], tmp_path, flats)["flat"] == expected


def test_a_gain_within_the_noise_is_none(tmp_path):
    """Better on two prompts by 3, worse on two by 2.9: the mean gains 0.05, and any other four prompts might not."""
    entries = [
        entry("sft", "sft", [0.0] * 4, [0.0] * 4),
        entry("old", "policy", [1.0] * 4, [4.0] * 4),
        entry("new", "policy", [1.0] * 4, [7.0, 7.0, 1.1, 1.1]),
    ]
    bounds = Reference(9.0, entries[0].figures["reward"], "--reference")
    front = gained(entries, [True, True, False], tmp_path, reference=bounds)
    assert front["hypervolume_gain"] == pytest.approx(8 * 0.05)
    assert front["hypervolume_gain_low"] == 0
    assert not front["improved"]


def test_the_base_bounds_nothing(tmp_path):
    entries = [
        entry("sft", "sft", [0.0] * 4, [1.0] * 4),
        entry("base", "base", [50.0] * 4, [-3.0] * 4),
        entry("rl", "policy", [2.0] * 4, [3.0] * 4),
    ]
    front = build_front(entries, ["sft", "base", "rl"], tmp_path / "out", pareto_config(tmp_path))
    assert front["reference"]["kl"] == 2.0


def test_one_prompt_tells_no_interval(tmp_path):
    one = {"kl": [0.0], "reward": [1.0]}
    entries = [FrontEntry(Candidate("sft", (Weights(Path("sft"), "s"),)), {"kl": 0.0, "reward": 1.0}, [], one)]
    front = build_front(entries, ["SFT"], tmp_path / "out", pareto_config(tmp_path))
    assert (front["hypervolume_low"], front["hypervolume_high"]) == (None, None)


def test_the_sft_policy_comes_first_whoever_measured_it():
    entries = [entry("rl", "policy", [1.0] * 4, [1.0] * 4), entry("sft", "sft", [0.0] * 4, [1.0] * 4)]
    assert [e.candidate.kind for e in in_order(entries)] == ["sft", "policy"]


def test_lines_are_told_apart_by_iteration_or_by_their_end():
    a, b, c = (Weights(Path(f"/run/{name}"), name) for name in ("sft", "one/slerp", "two/slerp"))
    assert assign_names([Candidate("line", (a, b), 1, 0.3)]) == ["eta 0.3"]
    two = [Candidate("line", (a, b), 1, 0.3), Candidate("line", (a, c), 2, 0.3)]
    assert assign_names(two) == ["iteration-1/eta 0.3", "iteration-2/eta 0.3"]
    assert assign_names([Candidate("line", (a, end), None, 0.3) for end in (b, c)]) == [
        "one/slerp/eta 0.3",
        "two/slerp/eta 0.3",
    ]


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_points_of_the_earlier_front_are_taken_over_with_all_that_belongs_to_them(iterations):
    first, second = (iterations / f"iteration-{i}" / "front" for i in (1, 2))
    old, new = points_of(first), points_of(second)
    assert set(old) == {"SFT", "policy-1", "slerp", "eta 0", "eta 0.5", "eta 1", "policy-1 step 2"}
    renamed = {name: name if name == "SFT" else f"iteration-1/{name}" for name in old}
    assert set(new) == {*renamed.values(), *(f"iteration-2/{name}" for name in old if name != "SFT")}
    for before, after in renamed.items():
        for key in ("kind", "iteration", "eta", "reward", "reward_low", "kl", "kl_high", "n"):
            assert old[before].get(key) == new[after].get(key), (before, key)
    assert new["iteration-1/policy-1 step 2"]["run"] == "iteration-1/policy-1"
    values = [json.loads((front / "prompts.json").read_text())["points"] for front in (first, second)]
    assert values[1]["iteration-1/slerp"] == values[0]["slerp"]
    samples = [json.loads(line) for line in (second / "samples.jsonl").read_text().splitlines()]
    assert {row["name"] for row in samples} == {name for name in new if "step" not in name}


def test_values_per_prompt_are_those_behind_the_means(iterations):
    front = iterations / "iteration-2" / "front"
    document = json.loads((front / "prompts.json").read_text())
    assert document["prompts"] == 4
    for name, point in points_of(front).items():
        if point["kind"] != "trajectory":
            for metric in ("reward", "kl"):
                values = document["points"][name][metric]
                assert len(values) == 4
                assert math.fsum(values) / 4 == pytest.approx(point[metric])


def test_a_taken_over_point_is_not_measured_again(iterations, tmp_path, monkeypatch):
    measured, measure = [], pareto.measure
    monkeypatch.setattr(pareto, "measure", lambda *arguments: measured.append(arguments[-1]) or measure(*arguments))
    fronts = tuple(iterations / f"iteration-{i}" / "front" for i in (1, 2))
    config = pareto_config(iterations, policies=(iterations / "base",), fronts=fronts)
    result = run_pareto(config, RunOptions(tmp_path / "front"))
    assert measured == ["base"]
    points = points_of(tmp_path / "front")
    assert sum(point["kind"] == "sft" for point in points.values()) == 1
    assert result.summary["points"] == 12
    kept = [p for p in points.values() if p["kind"] not in ("trajectory", "base")]
    reference = result.summary["reference"]
    assert result.summary["hypervolume_before"] == hypervolume(kept, (reference["kl"], reference["reward"]))
    assert (result.summary["hypervolume_gain"], result.summary["improved"]) == (0.0, False)
    assert result.summary["flat"] == 1 + read_manifest(fronts[1])["summary"]["flat"]


def test_a_front_taken_over_as_a_whole_needs_no_model(iterations, tmp_path, monkeypatch):
    monkeypatch.setattr(pareto, "Bench", None)
    run_pareto(pareto_config(iterations, 1, fronts=(iterations / "iteration-1" / "front",)), RunOptions(tmp_path / "f"))
    assert len(points_of(tmp_path / "f")) == 7


def test_what_is_taken_over_measures_as_it_would_here(iterations):
    """Common random numbers: `eval` of the policy gives the figures of the front that took its point over."""
    fields = {"prompts": iterations / "heldout.jsonl", "reward_fn": "policies:reward", "max_new_tokens": 6}
    measured = run_eval(EvalConfig(model=iterations / "iteration-1" / "slerp", sft=iterations / "sft", **fields))
    point = points_of(iterations / "iteration-2" / "front")["iteration-1/slerp"]
    assert point["reward"] == measured["reward"]
    assert point["kl"] == pytest.approx(measured["kl"], rel=1e-5)


def test_the_manifest_records_what_was_read(iterations):
    recorded = read_manifest(iterations / "iteration-2" / "front")
    data = [source["path"] for source in recorded["data"]]
    assert "../../iteration-1/front/front.json" in data
    assert "../../heldout.jsonl" in data


def test_every_point_tells_where_its_models_are(iterations):
    front = iterations / "iteration-2" / "front"
    for point in points_of(front).values():
        if point["kind"] != "trajectory":
            for name in ("init", "merged") if point["kind"] == "line" else ("source",):
                assert digest_weights(front / point[name]) == point[f"{name}_weights"]
    line = points_of(front)["iteration-1/eta 0.5"]
    assert (line["init"], line["merged"]) == ("../../sft", "../../iteration-1/slerp")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"temperature": 0.7}, "temperature 1.0, here 0.7"),
        ({"seed": 1}, "seed 0, here 1"),
        ({"n": 2}, "n 1, here 2"),
        ({"max_new_tokens": 5}, "max_new_tokens 6, here 5"),
        ({"limit": 3}, "limit None, here 3"),
        ({"length_penalty": 0.1}, r"length_penalty 0\.0, here 0\.1"),
        ({"sft": "base"}, "other SFT policy"),
        ({"prompts": "other.jsonl"}, "other prompts"),
    ],
)
def test_a_front_that_was_measured_otherwise_is_refused_by_what_differs(iterations, tmp_path, more, said):
    (iterations / "other.jsonl").write_text('{"prompt": "Hm?"}\n{"prompt": "Well?"}\n{"prompt": "So?"}\n')
    more = {key: iterations / value if key in ("sft", "prompts") else value for key, value in more.items()}
    config = pareto_config(iterations, fronts=(iterations / "iteration-1" / "front",), **more)
    with pytest.raises(InputError, match=said):
        run_pareto(config, RunOptions(tmp_path / "front"))
    assert list(tmp_path.iterdir()) == []


def drop(name):
    return lambda front: (front / name).unlink()


def unfinished(front):
    manifest(front, command="pareto", status="running")


def torn(front):
    text = (front / "prompts.json").read_text()
    (front / "prompts.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (drop("gemma2.json"), "not an output of gemma2 pareto"),
        (unfinished, "not a finished front"),
        (drop("front.json"), r"front\.json cannot be read"),
        (drop("prompts.json"), r"prompts\.json cannot be read"),
        (drop("samples.jsonl"), r"samples\.jsonl cannot be read"),
        (torn, r"prompts\.json cannot be read"),
    ],
)
def test_a_damaged_front_is_refused(iterations, tmp_path, harm, said):
    front = shutil.copytree(iterations / "iteration-1" / "front", tmp_path / "old")
    harm(front)
    with pytest.raises(InputError, match=said):
        run_pareto(pareto_config(iterations, fronts=(front,)), RunOptions(tmp_path / "new"))


@pytest.mark.parametrize("role", ["policies", "merged", "init"])
def test_a_reward_model_is_no_policy(iterations, tmp_path, monkeypatch, role):
    monkeypatch.setattr(pareto, "Bench", None)  # nothing is sampled before
    save_random(tmp_path / "rm", 3, kind="reward")
    given = {"policies": (tmp_path / "rm",), "merged": tmp_path / "rm", "init": tmp_path / "rm"}
    more = {"merged": iterations / "iteration-1" / "slerp"} if role == "init" else {}
    with pytest.raises(InputError, match=f"--{role} .*rm is a reward model"):
        run_pareto(pareto_config(iterations, **more, **{role: given[role]}), RunOptions(tmp_path / "front"))
    assert [path.name for path in tmp_path.iterdir()] == ["rm"]


def test_another_vocabulary_is_no_policy_of_this_front(iterations, tmp_path, monkeypatch):
    monkeypatch.setattr(pareto, "Bench", None)
    save_random(tmp_path / "large", 3, vocab_size=600)
    with pytest.raises(InputError, match=r"--policies .*large has a vocabulary of 600, --sft .*sft one of 512"):
        run_pareto(pareto_config(iterations, policies=(tmp_path / "large",)), RunOptions(tmp_path / "front"))
    save_random(tmp_path / "renamed", 3)
    file = tmp_path / "renamed" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"the tokenizers of .* differ"):
        run_pareto(pareto_config(iterations, policies=(tmp_path / "renamed",)), RunOptions(tmp_path / "front"))


def test_given_limits_are_the_rows_of_the_table(iterations, tmp_path):
    config = pareto_config(iterations, 1, fronts=(iterations / "iteration-1" / "front",), kl_limits=(0.0, 1000.0))
    result = run_pareto(config, RunOptions(tmp_path / "front"))
    rows = result.summary["best_at"]
    assert [row["limit"] for row in rows] == [0.0, 1000.0]
    assert rows[0]["kl"] == 0
    rewards = [p["reward"] for p in points_of(tmp_path / "front").values() if p["kind"] != "trajectory"]
    assert rows[1]["reward"] == max(rewards)


def test_what_a_front_was_measured_with_does_not_tell_where_it_lies(iterations, tmp_path):
    """So that the same measurement in another folder, or on another machine, gives the same bytes."""
    told = []
    for folder in ("here", "elsewhere"):
        save_random(tmp_path / folder / "rm", seed=3, kind="reward")
        told.append(measured_with(pareto_config(iterations, reward=(tmp_path / folder / "rm",))))
    assert told[0] == told[1]
    assert told[0]["settings"]["reward"] == ["rm"]
