"""A file becomes stages: order, references, copies of a matrix, WARP's stages; errors name their place."""

import pytest
from stages import compiled

from gemma2.configs import recipes
from gemma2.core.errors import UsageError
from gemma2.posttrain.pipelines.compile import compile_pipeline, read_pipeline
from gemma2.posttrain.schemas import PipelineFile, WarpConfig
from gemma2.posttrain.schemas.config import validated

WARP = {"sft": "S", "reward": ["R"], "prompts": "P", "heldout": "H"}


def stage(command="make", **keys):
    options = keys.pop("options", {})
    return {"command": command, "options": options, **keys}


def test_stages_come_after_what_they_need_and_else_as_in_the_file(tmp_path):
    made = compiled(
        {
            "c": stage(options={"models": ["${a.out}", "${b.out}/sub"]}),
            "b": stage(options={"model": "${a.out}"}),
            "a": stage(),
            "z": stage(after=["c"]),
            "x": stage(when="${a.summary.value} < 1"),
        },
        tmp_path,
    )
    assert list(made.stages) == ["a", "b", "c", "z", "x"]
    assert made.stages["c"].needs == ("b", "a")
    assert made.stages["c"].options == {"models": [str(tmp_path / "a"), str(tmp_path / "b" / "sub")]}
    assert made.stages["z"].needs == ("c",)
    assert made.stages["x"].needs == ("a",)
    assert made.stages["a"].out == tmp_path / "a"


def test_vars_stand_for_their_values_with_their_types(tmp_path):
    made = compiled({"a": stage(options={"value": "${vars.x}", "data": "${vars.folder}/d"})}, tmp_path,
                    vars={"x": 1.5, "folder": "f"})  # fmt: skip
    assert made.stages["a"].options == {"value": 1.5, "data": "f/d"}


def test_a_variable_may_be_null_and_is_no_reference(tmp_path):
    made = compiled({"a": stage(options={"data": "${vars.x}", "fail": "x-${vars.x}"})}, tmp_path, vars={"x": None})
    assert made.stages["a"].options == {"data": None, "fail": "x-null"}
    with pytest.raises(
        UsageError, match=r"vars\.y\.0 = '\$\{vars\.x\}': the value of a variable cannot be a reference"
    ):
        compiled({"a": stage(options={"models": "${vars.y}"})}, tmp_path, vars={"x": 1, "y": ["${vars.x}"]})
    with pytest.raises(UsageError, match=r"\$\{vars\.x\}: there is no 'x'; no names are defined there"):
        compiled({"a": stage(options={"data": "${vars.x}"})}, tmp_path)


def test_paths_of_one_name_in_a_matrix_are_told_apart_by_their_folders(tmp_path):
    made = compiled({"a": stage(matrix={"data": ["x/rows.jsonl", "/y/rows.jsonl"]})}, tmp_path)
    assert {name: one.options["data"] for name, one in made.stages.items()} == {
        "a/data-x_rows.jsonl": "x/rows.jsonl",
        "a/data-y_rows.jsonl": "/y/rows.jsonl",
    }


def test_a_matrix_makes_a_copy_for_every_combination_and_its_name_stands_for_all(tmp_path):
    made = compiled(
        {
            "a": stage(matrix={"value": [1, 2], "data": ["x/p.jsonl", "q.jsonl"]}),
            "b": stage(options={"models": ["${a.out}"]}),
            "c": stage(options={"model": "${a/value-2-data-q.jsonl.out}"}),
        },
        tmp_path,
    )
    copies = ["a/value-1-data-p.jsonl", "a/value-1-data-q.jsonl", "a/value-2-data-p.jsonl", "a/value-2-data-q.jsonl"]
    assert list(made.stages) == [*copies, "b", "c"]
    assert made.stages[copies[2]].options == {"value": 2, "data": "x/p.jsonl"}
    assert made.stages["b"].options["models"] == [str(tmp_path / name) for name in copies]
    assert made.stages["b"].needs == tuple(copies)
    assert made.stages["c"].needs == (copies[3],)


def test_a_value_of_a_matrix_can_name_the_copy_of_another_stage(tmp_path):
    matrix = {"seed": [0, 1]}
    made = compiled(
        {
            "a": stage(options={"value": "${matrix.seed}"}, matrix=matrix),
            "b": stage(options={"model": "${a/seed-${matrix.seed}.out}"}, matrix=matrix),
        },
        tmp_path,
    )
    assert made.stages["b/seed-1"].options == {"model": str(tmp_path / "a" / "seed-1")}
    assert made.stages["b/seed-1"].needs == ("a/seed-1",)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"a": stage("sfft")}, r"stages\.a: unknown command 'sfft'; did you mean 'sft'"),
        ({"a": stage(options={"model": "${b.out}"})}, r"stages\.a\.options\.model: no stage is called 'b'"),
        ({"good": stage(), "a": stage(options={"model": "${goood.out}"})}, r"did you mean 'good'"),
        ({"a": stage(options={"model": "${a.output}"})}, r"\$\{a\.output\} is not a reference"),
        ({"a": stage(options={"model": "${vars.x}"})}, r"\$\{vars\.x\}: there is no 'x'"),
        ({"a": stage(options={"model": "${a.out}"})}, r"stages need each other: a <- a"),
        (
            {"a": stage(options={"model": "${b.out}"}), "b": stage(options={"model": "${a.out}"})},
            "stages need each other: . <- . <- .",
        ),
        ({"a": stage(after=["nothing"])}, r"stages\.a\.after: no stage is called 'nothing'"),
        ({"a b": stage()}, "cannot be the name of a stage"),
        ({"../a": stage()}, "cannot be the name of a stage"),
        ({"logs": stage()}, "cannot be the name of a stage"),
        ({"pipeline.json": stage()}, "cannot be the name of a stage"),
        ({"gemma2.json/x": stage()}, "cannot be the name of a stage"),
        ({"a.summary.b": stage()}, "cannot be the name of a stage"),
        ({"vars.x": stage()}, "cannot be the name of a stage"),
        ({"a" * 201: stage()}, "cannot be the name of a stage"),
        ({"a": stage(), "a/b": stage()}, r"stages\.a/b would lie in the output of a; rename one"),
        ({"a": stage(matrix={"value": [1]}), "a/value-1/x/y": stage()}, "would lie in the output of a/value-1"),
        ({"w": stage("warp", options={**WARP, "jobs": 2})}, r"stages\.w\.options\.jobs is for a whole pipeline"),
        ({"a": stage(matrix={"valeu": [1]})}, r"matrix\.valeu is not an option of make.*did you mean 'value'"),
        ({"a": stage(matrix={"value": [1, 1]})}, "copies with equal names"),
        ({"a": stage(matrix={"value": 1})}, "not a list of values"),
        ({"a": stage(when="${b.summary.x}")}, "no stage is called 'b'"),
        ({"a": stage(when="yes")}, "not a comparison"),
        ({"a": {"commnd": "make"}}, r"unknown key 'stages\.a\.commnd'"),
        ({}, "'stages' holds too few items; give 1 or more"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, stages, said):
    with pytest.raises(UsageError, match=said):
        compiled(stages, tmp_path)


def test_a_setting_is_changed_by_the_full_path_or_by_the_stages_name(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("vars: {x: 1}\nstages:\n  a: {command: make, options: {value: 2}}\n")
    found = read_pipeline(file, ["a.value=3", "stages.a.retries=4", "vars.x=5"])
    assert found.stages["a"].options == {"value": 3}
    assert (found.stages["a"].retries, found.vars) == (4, {"x": 5})


def test_a_file_without_stages_is_told_what_to_write(tmp_path):
    (tmp_path / "p.yaml").write_text("")
    with pytest.raises(UsageError, match=r"p\.yaml has no stages; write stages: "):
        read_pipeline(tmp_path / "p.yaml")


def test_a_choice_names_stages_groups_folders_and_patterns(tmp_path):
    made = compiled(
        {"a": stage(matrix={"value": [1, 2]}), "b": stage(options={"models": "${a.out}"}), "f/x": stage()}, tmp_path
    )
    assert made.chosen(["a"]) == {"a/value-1", "a/value-2"}
    assert made.chosen(["f", "b"]) == {"f/x", "b"}
    assert made.chosen(["*value-2"]) == {"a/value-2"}
    assert made.after({"a/value-1"}) == {"a/value-1", "b"}
    with pytest.raises(UsageError, match="no stage is called 'bb'; did you mean 'b'"):
        made.chosen(["bb"])


# --- warp -------------------------------------------------------------------------------------------------------------


def needs(made, name):
    return set(made.stages[name].needs)


def test_warp_is_algorithm_1(tmp_path):
    made = compiled({"w": stage("warp", options={**WARP, "policies": 3, "iterations": 2, "steps": [9, 7]})}, tmp_path)
    assert {name.removeprefix("w/") for name in made.stages} == {
        *(f"iteration-{i}/{name}" for i in (1, 2) for name in ("policy-1", "policy-2", "policy-3")),
        *(f"iteration-{i}/{name}" for i in (1, 2) for name in ("slerp", "init", "front")),
        "front",
        "model",
    }
    first, second = made.stages["w/iteration-1/policy-2"], made.stages["w/iteration-2/policy-2"]
    assert (first.options["policy"], first.options["sft"]) == ("S", "S")
    assert second.options["policy"] == str(tmp_path / "w/iteration-1/init")  # this iteration's init ...
    assert second.options["sft"] == "S"  # ... while KL is measured to the SFT policy
    assert (first.options["steps"], second.options["steps"]) == (9, 7)
    slerp = made.stages["w/iteration-2/slerp"]
    assert slerp.options["models"] == [str(tmp_path / f"w/iteration-2/policy-{m}") for m in (1, 2, 3)]  # no anchors
    assert slerp.options["base"] == str(tmp_path / "w/iteration-1/init")
    init = made.stages["w/iteration-2/init"].options
    assert (init["base"], init["eta"]) == (str(tmp_path / "w/iteration-1/init"), 0.3)
    front = made.stages["w/iteration-2/front"].options
    assert front["sft"] == "S" and "init" not in front  # the line goes towards the SFT policy
    assert front["merged"] == str(tmp_path / "w/iteration-2/slerp")  # from the slerp, before LITI
    assert needs(made, "w/model") == {"w/front"}


def test_every_run_of_warp_has_a_seed_of_its_own(tmp_path):
    made = compiled({"w": stage("warp", options={**WARP, "policies": 3, "iterations": 2, "seed": 4})}, tmp_path)
    seeds = [stage.options["seed"] for stage in made.stages.values() if stage.command == "rlhf"]
    assert len(set(seeds)) == 6


def test_one_policy_is_plain_rl_and_liti(tmp_path):
    made = compiled({"w": stage("warp", options={**WARP, "policies": 1, "iterations": 1})}, tmp_path)
    assert "w/iteration-1/slerp" not in made.stages
    policy = str(tmp_path / "w/iteration-1/policy-1")
    assert made.stages["w/iteration-1/init"].options["models"] == [policy]
    assert made.stages["w/iteration-1/front"].options["merged"] == policy


def test_vary_gives_every_policy_its_value(tmp_path):
    vary = ["learning_rate=1e-6:2e-6", "length-penalty=0:0.0005", "reward=R1:R2"]
    made = compiled({"w": stage("warp", options={**WARP, "vary": vary})}, tmp_path)
    for m, (rate, penalty, reward) in enumerate(((1e-6, 0, "R1"), (2e-6, 0.0005, "R2")), start=1):
        options = made.stages[f"w/iteration-1/policy-{m}"].config()
        assert (options.learning_rate, options.length_penalty) == (rate, penalty)
        assert [str(path) for path in options.reward] == [reward]
    assert [str(p) for p in made.stages["w/iteration-1/front"].config().reward] == ["R"]  # measured alike


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vary": ["learning_rate=1e-6"]}, "1 values for 2 policies"),
        ({"vary": ["steps=1:2"]}, "is not KEY=A:B"),
        ({"steps": [1, 2, 3]}, "3 numbers for 2 iterations"),
        ({"steps": [0]}, "at least one step"),
        ({"etas": [2.0]}, "shares of the merge"),
        ({"stepz": 1}, r"unknown key 'stages\.w\.options\.stepz'"),
    ],
)
def test_options_of_warp_that_do_not_fit_are_refused(tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        compiled({"w": stage("warp", options={**WARP, **options})}, tmp_path)


def test_patience_makes_the_next_iteration_depend_on_the_front(tmp_path):
    options = {**WARP, "iterations": 3, "patience": 2}
    made = compiled({"w": stage("warp", options=options)}, tmp_path)
    assert made.stages["w/iteration-1/policy-1"].when is None
    assert made.stages["w/iteration-3/policy-2"].when == "${w/iteration-2/front.summary.flat} < 2"
    plain = compiled({"w": stage("warp", options=WARP)}, tmp_path)
    assert all(stage.when is None for stage in plain.stages.values())


def test_warp_takes_other_stages_outputs_and_gives_its_own(tmp_path):
    made = compiled(
        {
            "s": stage("sft", options={"model": "m", "data": "d"}),
            "w": stage("warp", options={**WARP, "sft": "${s.out}"}),
            "after": stage(options={"model": "${w.out}/model"}),
            "all": stage(options={"data": "${w.out}"}),
        },
        tmp_path,
    )
    assert needs(made, "after") == {"w/model"}
    assert len(needs(made, "all")) == len(made.groups["w"])
    assert needs(made, "w/iteration-1/policy-1") == {"s"}


def test_the_threads_of_warp_are_those_of_its_stages(tmp_path):
    made = compiled({"w": stage("warp", options={**WARP, "cpus": 2}, resources={"gpus": 0})}, tmp_path)
    assert {(one.resources.cpus, one.resources.gpus) for one in made.stages.values()} == {(2, 0)}


def test_the_steps_of_the_last_given_iteration_hold_for_those_after_it():
    config = validated(WarpConfig, {**WARP, "iterations": 4, "steps": [9, 7]})
    assert [config.steps_of(i) for i in (1, 2, 3, 4)] == [9, 7, 7, 7]


PIPELINES = [name for name, path in recipes().items() if path.read_text().startswith("# gemma2 pipeline:")]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_that_comes_with_the_package_compiles(tmp_path, name):
    made = compile_pipeline(read_pipeline(recipes()[name]), tmp_path)
    for one in made.stages.values():
        assert one.deferred or one.config()
    again = validated(PipelineFile, made.file.model_dump(mode="json", exclude_defaults=True))
    assert compile_pipeline(again, tmp_path).stages == made.stages
