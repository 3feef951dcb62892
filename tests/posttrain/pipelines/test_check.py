"""A pipeline is checked whole before anything runs, without torch: files, kinds, vocabularies, architectures, disk."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from light_model import light_model
from processes import finish, start
from stages import compiled

from gemma2.configs import recipes
from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.pipelines import check
from gemma2.posttrain.pipelines.check import check_pipeline
from gemma2.posttrain.pipelines.compile import compile_pipeline, read_pipeline
from gemma2.posttrain.pipelines.expected_outputs import QUESTION_BYTES, promised_by
from gemma2.posttrain.planning.estimates import Sources


@pytest.fixture
def place(tmp_path):
    for name, settings in {
        "sft": {},
        "rl": {},
        "wide": {"hidden": 12},
        "other": {"vocabulary": 310},
        "reward": {"kind": "Gemma2ForSequenceClassification"},
    }.items():
        light_model(tmp_path / name, **settings)
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "completion": "z"}\n{"prompt": "y", "completion": "z"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "x", "chosen": "z", "rejected": "y"}\n' * 2)
    return tmp_path


def stage(command, **options):
    return {"command": command, "options": options}


def checked(place, **stages):
    return check_pipeline(compiled({k.replace("_", "-"): v for k, v in stages.items()}, place / "out"))


FUNCTION = "gemma2.posttrain.tiny.tasks:judge_reward"
CASES = {
    "a file that is not there": (
        lambda p: {"a": stage("sft", model=f"{p}/sft", data=[f"{p}/gone.jsonl"])},
        r"stages\.a: .*gone\.jsonl",
    ),
    "a model that is not there": (
        lambda p: {"a": stage("sft", model=f"{p}/gone", data=[f"{p}/rows.jsonl"])},
        r"stages\.a: --model .*gone is not a directory",
    ),
    "a data set in the place of a policy": (
        lambda p: {
            "data": stage("generate", teacher=f"{p}/sft", prompts=f"{p}/p.jsonl"),
            "a": stage("sft", model="${data.out}", data=["${data.out}"]),
        },
        r"stages\.a: --model .*out/data is a data set; give a policy",
    ),
    "a policy in the place of a reward model": (
        lambda p: {
            "sft": stage("sft", model=f"{p}/sft", data=[f"{p}/rows.jsonl"]),
            "a": stage("rlhf", policy="${sft.out}", reward=["${sft.out}"], prompts=f"{p}/p.jsonl"),
        },
        r"stages\.a: --reward .*out/sft is a policy; give a reward model",
    ),
    "a teacher of another vocabulary": (
        lambda p: {
            "sft": stage("sft", model=f"{p}/sft", data=[f"{p}/rows.jsonl"]),
            "a": stage("distill", model="${sft.out}", teacher=f"{p}/other", prompts=f"{p}/p.jsonl"),
        },
        r"stages\.a: --model .*out/sft has a vocabulary of 300, --teacher .*other one of 310",
    ),
    "models of two architectures in a merge": (
        lambda p: {
            "sft": stage("sft", model=f"{p}/wide", data=[f"{p}/rows.jsonl"]),
            "a": stage("merge slerp", models=["${sft.out}", f"{p}/rl"], base=f"{p}/sft"),
        },
        r"stages\.a: --models .*out/sft is gemma2 of 2 layers and width 12, --base .* of 2 layers and width 8",
    ),
    "models of two vocabularies in a merge": (
        lambda p: {"a": stage("merge linear", models=[f"{p}/sft", f"{p}/other"])},
        r"stages\.a: --models .*other has a vocabulary of 310, --models .*sft one of 300",
    ),
    "an option that a merge does not take": (
        lambda p: {"a": stage("merge linear", models=[f"{p}/sft", f"{p}/rl"], eta=0.3)},
        r"stages\.a: merge linear does not take --eta",
    ),
    "a merged model that is not there": (
        lambda p: {"a": stage("merge linear", models=[f"{p}/sft", f"{p}/gone"])},
        r"stages\.a: .*gone is not a directory",
    ),
    "an option that is none": (
        lambda p: {"a": stage("sft", model=f"{p}/sft", data=[f"{p}/rows.jsonl"], lerning_rate=1)},
        r"unknown key 'stages\.a\.options\.lerning_rate'; did you mean 'learning_rate'",
    ),
    "a value out of bounds": (
        lambda p: {"a": stage("sft", model=f"{p}/sft", data=[f"{p}/rows.jsonl"], learning_rate=2)},
        r"'stages\.a\.options\.learning_rate' = 2",
    ),
    "a stage that lacks an input": (
        lambda p: {"a": stage("sft", data=[f"{p}/rows.jsonl"])},
        r"'stages\.a\.options\.model' is missing",
    ),
    "options that do not go together": (
        lambda p: {
            "s": stage("sft", model=f"{p}/sft", data=[f"{p}/rows.jsonl"]),
            "a": stage("rlhf", policy="${s.out}", reward_fn=[FUNCTION], prompts=f"{p}/p.jsonl", anchor="sft", mu=0.3),
        },
        r"stages\.a\.options: --mu has no effect without --anchor ema; give that, or drop --mu",
    ),
    "a wrong value beside one that is not known yet": (
        lambda p: {
            "f": stage("pareto", sft=f"{p}/sft", reward_fn=[FUNCTION], prompts=f"{p}/p.jsonl"),
            "a": stage("merge liti", models=[f"{p}/rl"], base=f"{p}/sft", eta="${f.summary.best.eta}", dtype="int8"),
        },
        r"stages\.a\.options\.dtype",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_would_fail_later_fails_at_once_and_names_the_stage(place, name):
    stages, said = CASES[name]
    with pytest.raises((InputError, UsageError), match=said):
        checked(place, **stages(place))
    assert not (place / "out").exists()


def test_outputs_of_stages_stand_for_what_they_will_be(place):
    plan = checked(
        place,
        data=stage("generate", teacher=f"{place}/sft", prompts=f"{place}/p.jsonl", n=3, max_new_tokens=10),
        sft=stage("sft", model=f"{place}/sft", data=["${data.out}"], max_steps=2, batch_size=4, max_length=8),
        rm=stage("reward", model="${sft.out}", data=f"{place}/pairs.jsonl"),
        rl=stage("rlhf", policy="${sft.out}", reward=["${rm.out}"], prompts=f"{place}/p.jsonl"),
        m=stage("merge slerp", models=["${rl.out}", "${sft.out}"], base=f"{place}/sft"),
        anchor=stage("merge linear", models=["${rl.out}/ema", "${rl.out}"]),
    )
    assert [one.action for one in plan.stages.values()] == ["run"] * 6
    assert plan.stages["sft"].work.tokens == 2 * 4 * 8  # steps x rows x tokens
    assert all(row["memory_gib"] > 0 for row in plan.rows() if row["command"] in ("sft", "reward", "rlhf"))
    assert plan.disk > 0


def test_a_value_that_is_found_out_later_is_no_error_now(place):
    plan = checked(
        place,
        f=stage("pareto", sft=f"{place}/sft", reward_fn=[FUNCTION], prompts=f"{place}/p.jsonl"),
        a=stage("merge liti", models=[f"{place}/rl"], base=f"{place}/sft", eta="${f.summary.best.eta}"),
        b=stage("pick", front="${f.out}", pick="${f.summary.pick}"),
    )
    assert [one.action for one in plan.stages.values()] == ["run"] * 3


@pytest.mark.parametrize("width", [32, 96, 160, 192])
def test_the_embedded_models_are_what_they_are_said_to_be(tmp_path, width):
    """Next to the networks themselves, at the default width and at others."""
    from gemma2.posttrain.checks.kinds import look_at
    from gemma2.posttrain.tiny.build import recipe_of

    expected = compiled({"models": stage("tiny", width=width)}, tmp_path / "out").stages["models"]
    promised = {path.name: promise for path, promise in promised_by(expected, expected.config(), Sources())}
    for name in ("student", "teacher"):
        recipe_of(name, width).network().save_pretrained(tmp_path / name)
        assert replace(look_at(tmp_path / name), tokenizer=None) == promised[name]
    assert promised["student"].shape == ("gemma2", width, 4)


def test_a_student_of_another_width_is_not_merged_with_one_of_the_default(tmp_path):
    models = ["${small.out}/student", "${large.out}/student"]
    with pytest.raises(InputError, match=r"width 192.*width 96"):
        checked(tmp_path, small=stage("tiny"), large=stage("tiny", width=192), a=stage("merge linear", models=models))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_size_of_the_embedded_prompts_is_about_what_it_is_said_to_be(seed):
    from gemma2.posttrain.tiny.tasks import questions

    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in questions("train", 500, seed)]
    assert sum(map(len, rows)) / len(rows) == pytest.approx(QUESTION_BYTES, rel=0.05)


def test_too_little_disk_is_a_line_of_the_plan(place, monkeypatch):
    monkeypatch.setattr(check, "free_disk", lambda root: 1.0)
    plan = checked(place, a=stage("merge linear", models=[f"{place}/sft", f"{place}/rl"]))
    assert len(plan.problems) == 1
    assert "B, 1 B are free; free some space" in plan.problems[0]


def test_the_quickstart_is_checked_whole_without_torch(tmp_path):
    script = """
import sys, time
from pathlib import Path
from gemma2.posttrain.pipelines.check import check_pipeline
from gemma2.posttrain.pipelines.compile import compile_pipeline, read_pipeline
from gemma2.posttrain.pipelines.expected_outputs import QUESTION_BYTES, promised_by
from gemma2.posttrain.planning.estimates import Sources
pipeline = compile_pipeline(read_pipeline(Path(sys.argv[1])), Path(sys.argv[2]))
print(len(check_pipeline(pipeline).stages), "torch" in sys.modules, "transformers" in sys.modules)
"""
    code, out, err = finish(start(script, recipes()["quickstart"], tmp_path / "out"))
    assert code == 0, err
    # 7 up to the reward model, 2 iterations of 4 policies, slerp, init and front, the last front, the chosen model.
    assert out.split() == ["23", "False", "False"]
    assert len(compile_pipeline(read_pipeline(recipes()["quickstart"]), tmp_path).stages) == 23


def test_an_output_that_looks_like_a_hub_id_is_none(place, monkeypatch):
    """`out/sft`, before it is there, has the form of `owner/name`."""
    monkeypatch.chdir(place)
    stages = {
        "sft": stage("sft", model="sft", data=["rows.jsonl"]),
        "distilled": stage("distill", model="${sft.out}", teacher="sft", prompts="p.jsonl"),
        "rm": stage("reward", model="${distilled.out}", data="pairs.jsonl"),
        "rl": stage("rlhf", policy="${distilled.out}", reward=["${rm.out}"], prompts="p.jsonl"),
        "m": stage("merge slerp", models=["${rl.out}", "${sft.out}"], base="${distilled.out}"),
        "f": stage("pareto", sft="${sft.out}", policies=["${rl.out}"], merged="${m.out}", reward_fn=[FUNCTION],
                   prompts="p.jsonl"),
        "end": stage("pick", front="${f.out}"),
    }  # fmt: skip
    plan = check_pipeline(compiled(stages, Path("out")))
    assert {one.action for one in plan.stages.values()} == {"run"}


def test_a_place_in_an_output_that_nobody_promised_is_not_known_and_no_error(place):
    plan = checked(
        place,
        data=stage("generate", teacher=f"{place}/sft", prompts=f"{place}/p.jsonl"),
        sft=stage("sft", model=f"{place}/sft", data=["${data.out}/data.jsonl"]),
        clean=stage("filter", data="${data.out}/data.jsonl"),
    )
    assert math.isnan(plan.stages["sft"].work.tokens)
    assert all(row["tokens"] is None or row["stage"] != "sft" for row in plan.rows())


def test_a_bad_row_is_located_at_the_option_that_names_its_file(place):
    (place / "bad.jsonl").write_text('{"prompt": 5}\n')
    text = f"""stages:
  a:
    command: sft
    options:
      model: {place}/sft
      data: [{place}/bad.jsonl]
"""
    (place / "p.yaml").write_text(text)
    pipeline = compile_pipeline(read_pipeline(place / "p.yaml"), place / "out")
    with pytest.raises(InputError, match=r"bad\.jsonl:1: .*p\.yaml:6:\d+"):
        check_pipeline(pipeline)
