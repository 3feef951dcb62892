"""Flags come from the schemas: every field is one, with its bounds; recipe < --set < flag; nothing is dropped."""

import json
from pathlib import Path
from typing import get_origin

import pytest
from commands import all_commands
from light_model import light_model

from gemma2 import configs
from gemma2.cli.app import invoke
from gemma2.cli.terminal import options
from gemma2.core.errors import InputError, OutputError, UsageError
from gemma2.posttrain import schemas
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult
from gemma2.posttrain.schemas import measures

SCHEMA_OF = {
    "distill": schemas.DistillConfig,
    "distill cache": schemas.DistillCacheConfig,
    "eval policy": schemas.EvalConfig,
    "eval suite": measures.SuiteConfig,
    "filter": schemas.FilterConfig,
    "generate": schemas.GenerateConfig,
    "pareto": schemas.ParetoConfig,
    "reward": schemas.RewardConfig,
    "reward pairs": schemas.PairsConfig,
    "rlhf": schemas.RlhfConfig,
    "sft": schemas.SftConfig,
    "tiny": schemas.TinyConfig,
    "warp": schemas.WarpConfig,
}
COMMANDS = dict(all_commands())
SFT = ["sft", "--model", "m", "--data", "d", "--out", "o"]


@pytest.fixture
def resolved(monkeypatch):
    """Parse a command line and return what it would run: (configuration, given flags)."""
    found = []
    monkeypatch.setattr(options, "execute", lambda config, given, run, console: found.append((config, given)))

    def parse(*words: object):
        assert invoke([str(word) for word in words]) == 0
        return found.pop()

    return parse


# --- fields and flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMA_OF)
def test_every_field_is_a_flag_of_its_command_with_its_description(name):
    flags = {parameter.opts[0]: parameter for parameter in COMMANDS[name].params}
    for key, field in SCHEMA_OF[name].model_fields.items():
        if get_origin(field.annotation) is dict:  # through --set and recipes
            continue
        flag = flags[f"--{key.replace('_', '-')}"]
        assert flag.help.startswith(field.description), key
        assert ("required" in flag.help) == field.is_required(), key
        for item in field.metadata:
            for name_of_bound, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
                if hasattr(item, name_of_bound):
                    assert f"{sign}{getattr(item, name_of_bound):g}" in flag.help, key


def test_a_flag_that_is_not_given_leaves_the_default(resolved):
    config, given = resolved(*SFT)
    assert config == schemas.SftConfig(model="m", data="d")
    assert (given["out"], given["resume"], given["force"], given["dry_run"]) == (Path("o"), False, False, False)


def test_flags_of_every_kind_reach_the_configuration(resolved):
    config, _ = resolved(*SFT, "--epochs", "0.5", "--max-steps", 7, "--on-overlong", "error", "--learning-rate", "1e-6")
    assert (config.epochs, config.max_steps, config.on_overlong, config.learning_rate) == (0.5, 7, "error", 1e-6)
    switched, _ = resolved("generate", "--teacher", "t", "--prompts", "p", "--keep-truncated")
    assert switched.keep_truncated is True
    back, _ = resolved(
        "generate", "--teacher", "t", "--prompts", "p", "--set", "keep_truncated=true", "--no-keep-truncated"
    )
    assert back.keep_truncated is False
    lists, _ = resolved(
        "pareto", "--sft", "s", "--prompts", "p", "--policies", "a, b", "--merged", "b", "--etas", "0,.3,1"
    )
    assert lists.policies == (Path("a"), Path("b"))
    assert lists.etas == (0.0, 0.3, 1.0)


def test_an_argument_is_the_flag_without_its_name(resolved):
    by_argument, _ = resolved("filter", "d", "--out", "o")
    by_flag, _ = resolved("filter", "--data", "d", "--out", "o")
    assert by_argument == by_flag
    assert by_argument.data == Path("d")


def test_an_argument_takes_precedence_over_the_recipe_and_sets_only_its_field(resolved, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: from-the-recipe\nmin_words: 3\n", encoding="utf-8")
    config, _ = resolved("filter", "--config", recipe, "--out", "o")
    assert (config.data, config.min_words) == (Path("from-the-recipe"), 3)
    config, _ = resolved("filter", "d", "--config", recipe, "--out", "o")
    assert (config.data, config.min_words) == (Path("d"), 3)


def test_an_argument_and_its_flag_are_refused_together():
    with pytest.raises(UsageError, match="'d' and --data e name two inputs"):
        invoke(["filter", "d", "--data", "e", "--out", "o"])


def test_recipe_then_set_then_flag(resolved, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("epochs: 2\nmax_length: 64\nbatch_size: 2\ntrainer: {optim: sgd, adam_beta1: 0.5}\n")
    config, _ = resolved(
        *SFT,
        "--config",
        recipe,
        "--set",
        "max-length=128",
        "--set",
        "batch_size=4",
        "--set",
        "trainer.adam_beta1=0.6",
        "--batch-size",
        8,
    )
    assert (config.epochs, config.max_length, config.batch_size) == (2.0, 128, 8)
    assert config.trainer == {"optim": "sgd", "adam_beta1": 0.6}


def test_config_takes_an_output_and_repeats_it(resolved, tmp_path):
    recorded = schemas.SftConfig(model="m", data="d", epochs=3)
    document = {"schema_version": 1, "command": "sft", "config": recorded.model_dump(mode="json")}
    (tmp_path / "gemma2.json").write_text(json.dumps(document))
    assert resolved("sft", "--config", tmp_path, "--out", "o")[0] == recorded
    assert resolved("sft", "--config", tmp_path / "gemma2.json", "--seed", 5, "--out", "o")[0].seed == 5


def test_config_takes_the_name_of_a_recipe_of_the_package(resolved, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("epochs: 4\n")
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "__init__.py"))
    assert resolved(*SFT, "--config", "mine")[0].epochs == 4.0
    with pytest.raises(InputError, match=r"--config mime does not exist; .* .did you mean 'mine'"):
        invoke([*SFT, "--config", "mime"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "epohcs=3"], "unknown key 'epohcs' in --set epohcs=3; did you mean 'epochs'"),
        (["--epochs", "0"], "--epochs 0.0 is not above 0; give a number >0"),
        (["--set", "trainer=3"], "'trainer' = 3 in --set trainer=3 is not a mapping"),
    ],
)
def test_a_wrong_value_is_a_usage_error(words, said):
    with pytest.raises(UsageError, match=said):
        invoke([*SFT, *words])


def test_options_before_a_sub_command_are_refused():
    for words in (["--out", "x"], ["--epochs", "1"], ["--force"], ["--set", "a=1"]):
        with pytest.raises(UsageError, match="options come before 'pairs'"):
            invoke(["reward", *words, "pairs", "--model", "m"])


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Inputs that exist, in the working directory."""
    monkeypatch.chdir(tmp_path)
    light_model(tmp_path / "m")
    (tmp_path / "d").write_text('{"prompt": "Why?", "completion": "So."}\n')
    return tmp_path


def given(**changes):
    flags = dict.fromkeys(("resume", "allow_versions", "force", "dry_run"), False)
    return {"out": Path("o"), **flags} | changes


def never(config, options, progress):
    pytest.fail("the step was run")


def config_of(**changes):
    return schemas.SftConfig(**({"model": Path("m"), "data": Path("d")} | changes))


def test_an_output_must_be_named(place):
    for words in (SFT[:-2], ["quickstart"], ["merge", "slerp", "a", "b"], ["convert", "m"]):
        with pytest.raises(UsageError, match="--out is missing"):
            invoke(words)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model": Path("gone")}, InputError, "--model gone is not a directory"),
        ({"data": Path("gone")}, InputError, "gone does not exist"),
        ({}, OutputError, "--out o exists"),
    ],
)
def test_inputs_and_output_are_checked_before_the_step_imports_torch(place, dry_run, changes, error, said):
    (place / "o").mkdir()
    (place / "o" / "file").write_text("x")
    with pytest.raises(error, match=said):
        options.execute(config_of(**changes), given(dry_run=dry_run), never, options.Console())


def test_a_dry_run_prints_the_plan_and_runs_nothing(place, capsys):
    before = sorted(place.rglob("*"))
    assert invoke(["sft", "--model", "m", "--data", "d", "--out", "o", "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["config"]["epochs"] == 1.0
    assert sorted(place.rglob("*")) == before


def test_a_step_gets_configuration_and_options_and_its_summary_is_the_result(place, capsys):
    seen = []

    def run(config, run_options, progress):
        seen.append((config, run_options))
        return RunResult(run_options.out, {"loss": 0.25})

    (place / "o").mkdir()
    (place / "o" / "gemma2.json").write_text("{}")
    options.execute(config_of(), given(resume=True), run, options.Console())
    options.execute(config_of(), given(force=True), run, options.Console(as_json=True))
    assert seen == [
        (config_of(), RunOptions(Path("o"), resume=True)),
        (config_of(), RunOptions(Path("o"), force=True)),
    ]
    out, err = capsys.readouterr()
    assert out.startswith("loss    0.25\noutput  o\n")
    assert json.loads(out.removeprefix("loss    0.25\noutput  o\n")) == {"out": "o", "loss": 0.25}
    assert err == ""


# --- config -----------------------------------------------------------------------------------------------------------


def test_recipes_are_listed_with_their_purpose_and_shown_as_they_are(tmp_path, monkeypatch, capsys):
    text = "# gemma2 sft: a start\nlearning_rate: 1e-6  # peak\n"
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "__init__.py"))
    invoke(["recipes", "list", "--json"])
    (row,) = json.loads(capsys.readouterr().out)["recipes"]
    assert (row["name"], row["command"], row["purpose"]) == ("mine", "sft", "a start")
    invoke(["recipes", "show", "mine"])
    assert capsys.readouterr().out == text
    with pytest.raises(InputError, match="there is no recipe other"):
        invoke(["recipes", "show", "other"])


def test_the_settings_of_an_output_are_shown_as_a_recipe(resolved, tmp_path, capsys):
    recorded = schemas.SftConfig(model="m", data="d", learning_rate=1e-6)
    (tmp_path / "gemma2.json").write_text(json.dumps({"config": recorded.model_dump(mode="json")}))
    invoke(["recipes", "show", str(tmp_path)])
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert resolved("sft", "--config", tmp_path / "again.yaml", "--out", "o")[0] == recorded


# --- the place of a value that is wrong on disk -----------------------------------------------------------------------


def test_a_value_that_is_wrong_on_disk_is_named_with_what_gave_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("data: d\nmodel: gone\n")
    for words, said in (
        (["--config", "r.yaml"], "--model gone is not a directory in r.yaml:2:8; give"),
        (["--config", "r.yaml", "--set", "model=lost"], "--model lost is not a directory in --set model=lost; give"),
        (["--config", "r.yaml", "--model", "none"], "--model none is not a directory; give"),
    ):
        with pytest.raises(InputError) as caught:
            invoke(["sft", *words, "--out", "o"])
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "warp-paper"], "is a recipe for gemma2 warp; use it with gemma2 warp --config warp-paper"),
        (["--config", "align"], "is a recipe for gemma2 pipeline; use it with gemma2 pipeline run align"),
        (["--config", "p.yaml"], "use the file with gemma2 pipeline run FILE"),
        (["--config", "m.yaml"], "use the file with gemma2 merge --config FILE"),
    ],
)
def test_a_file_of_another_command_is_answered_with_that_command(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text("stages: {a: {command: sft}}\n")
    Path("m.yaml").write_text("method: slerp\nmodels: [a, b]\n")
    with pytest.raises(UsageError, match=said):
        invoke(["sft", *words, "--out", "o"])


def test_a_variable_that_no_stage_reads_is_refused(place):
    with pytest.raises(UsageError, match=r"--set vars\.sed=1: the pipeline has no variable 'sed'; did you mean 'seed'"):
        invoke(["pipeline", "run", "quickstart", "--out", "o", "--set", "vars.sed=1", "--dry-run"])
