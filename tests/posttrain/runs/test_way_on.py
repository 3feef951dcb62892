"""What an error of a run says about going on is what the next start accepts."""

import re

import pytest

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.options import execute
from gemma2.cli.tools.pipeline import kept_for_later
from gemma2.core.errors import AlertStop, GuardStop, InputError, UsageError
from gemma2.posttrain.pipelines.state import STATE_FILE
from gemma2.posttrain.runs.run_directory import RunOptions, open_run
from gemma2.posttrain.runs.way_on import in_a_pipeline, names_the_way
from gemma2.posttrain.schemas import GenerateConfig


def stopped(folder, error, leaves=None, **options):
    """The error that leaves a run in which `error` was raised, with a file of that text in its checkpoints."""
    (folder / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    config = GenerateConfig(
        teacher="t", engine="openai", prompts=folder / "prompts.jsonl", base_url="http://localhost:1/v1"
    )
    with (
        pytest.raises(type(error)) as caught,
        open_run("generate", config, RunOptions(folder / "out", **options)) as run,
    ):
        if leaves is not None:
            run.checkpoints.mkdir(exist_ok=True)
            (run.checkpoints / "answers.jsonl").write_text(leaves)
        raise error
    return str(caught.value)


@pytest.mark.parametrize("leaves", [None, ""])
def test_an_alert_before_anything_was_saved_asks_for_the_same_command(tmp_path, leaves):
    for _ in range(2):  # the second start is what the first error says
        said = stopped(tmp_path, AlertStop("step 1: ended by an alert"), leaves)
        assert said == "step 1: ended by an alert; it had no checkpoint yet: the same command starts it again"


def test_an_alert_after_a_checkpoint_names_both_ways_and_both_are_accepted(tmp_path):
    said = stopped(tmp_path, AlertStop("step 3: ended by an alert"), "row\n")
    assert said.endswith("; --resume continues from the last checkpoint, --force starts over")
    assert stopped(tmp_path, AlertStop("x"), resume=True).endswith("starts over")
    assert stopped(tmp_path, AlertStop("x"), "row\n", force=True).endswith("starts over")


def test_a_guard_asks_for_other_settings_and_for_force_only_where_something_is_in_the_way(tmp_path):
    guard = GuardStop("step 1: the loss is nan", "lower --learning-rate")
    assert stopped(tmp_path, guard) == "step 1: the loss is nan; lower --learning-rate"
    said = stopped(tmp_path, guard, "row\n")
    assert said == "step 1: the loss is nan; lower --learning-rate, and start over with --force"
    assert stopped(tmp_path, guard, force=True) == "step 1: the loss is nan; lower --learning-rate"


@pytest.mark.parametrize(
    "error",
    [GuardStop("x", "report it"), GuardStop("x", "raise --n, and start over with --force"), InputError("x", "y")],
)
def test_an_error_with_nothing_to_add_stays_as_it_is(tmp_path, error):
    assert stopped(tmp_path, error, "row\n") == str(error)


def test_a_pipeline_which_has_no_such_flags_says_neither(tmp_path):
    errors = [AlertStop("x"), GuardStop("x", "lower --learning-rate")]
    for error in errors:
        said = stopped(tmp_path, error, "row\n", force=True).partition("; ")[2]
        assert names_the_way(said) and not re.search("--resume|--force", in_a_pipeline(said))
    assert in_a_pipeline("restore that, or start over with --force") == "restore that"


# --- the note in front of an error ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, noted",
    [
        (GuardStop("all 3 completions ran into it", "raise it, and start over with --force"), False),
        (GuardStop("the loss is nan", "lower --learning-rate"), False),
        (AlertStop("ended by an alert"), False),
        (InputError("the reward function failed", "repair it"), True),
        (KeyboardInterrupt(), True),
    ],
)
def test_work_that_is_kept_is_noted_unless_the_error_says_how_to_go_on(tmp_path, capsys, error, noted):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    config = GenerateConfig(
        teacher="t", engine="openai", prompts=tmp_path / "prompts.jsonl", base_url="http://localhost:1/v1"
    )
    given = {"out": tmp_path / "out", "resume": False, "force": False, "allow_versions": False}

    def run(config, options, progress):
        with open_run("generate", config, options) as opened:
            opened.checkpoints.mkdir()
            (opened.checkpoints / "answers.jsonl").write_text("row\n")
            raise error

    with pytest.raises(type(error)):
        execute(config, given, run, Console())
    assert ("work done so far is kept" in capsys.readouterr().err) == noted


@pytest.mark.parametrize("error, noted", [(UsageError("unknown key"), False), (InputError("stage a failed"), True)])
def test_a_pipeline_that_refuses_its_command_line_does_not_say_that_it_continues(tmp_path, capsys, error, noted):
    (tmp_path / STATE_FILE).write_text("{}")
    with pytest.raises(type(error)), kept_for_later(Console(), tmp_path):
        raise error
    assert ("the same command continues" in capsys.readouterr().err) == noted
