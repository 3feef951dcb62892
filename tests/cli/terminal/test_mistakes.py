"""Command lines with a mistake: one line in our words, and a fix that is right when it is followed literally."""

import io
import re
import shlex
from contextlib import redirect_stdout

import pytest
from commands import all_commands, parse
from typer.core import TyperArgument, TyperOption
from typer.exceptions import TyperException

from gemma2.cli import main
from gemma2.cli.terminal.mistakes import ITEMS, explain
from gemma2.core.yaml_files import closest

LEAVES = [(name, command) for name, command in all_commands() if not getattr(command, "commands", None)]
WORDS_FOLLOW = {(name, "allow_config") for name, _ in LEAVES}  # the next word is one of any number of models
LISTS = [
    (name, option)
    for name, command in all_commands()
    for option in command.params
    if name != "merge plan"
    and (name, option.name) != ("reward eval", "set")
    and isinstance(option, TyperOption)
    and (option.metavar == ITEMS or (option.multiple and not option.is_flag))
    and (name, option.name) not in WORDS_FOLLOW
]


def refused(capsys, *words):
    assert main.run([*words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def arguments_of(name):
    """A word for each argument of a command."""
    command = dict(all_commands())[name]
    return ["a" for part in command.params if isinstance(part, TyperArgument) and (part.required or part.nargs == 1)]


@pytest.mark.parametrize(("name", "option"), LISTS, ids=lambda value: getattr(value, "name", value))
def test_items_given_as_words_are_answered_with_the_spelling_that_works(capsys, name, option):
    flag = max(option.opts, key=len)
    err = refused(capsys, *name.split(), *arguments_of(name), flag, "1", "2")
    fix = shlex.split(err.partition(": ")[2].rpartition(": ")[2])
    assert fix == ([flag, "1", flag, "2"] if option.multiple else [flag, "1,2"])
    _, values = parse([*name.split(), *arguments_of(name), *fix])
    assert [*values[option.name]] == ["1", "2"] if option.multiple else values[option.name] == "1,2"


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("merge linear --weights 0.4 0.6 a b", "--weights 0.4,0.6"),
        ("merge linear --weights 0.4, 0.6 a b", "--weights 0.4,0.6"),
        ("merge linear a b --weights=0.4 0.6", "--weights 0.4,0.6"),
        ("merge linear a b --weights '0.4 0.6' --out o", "--weights 0.4,0.6"),
        ("sft --model m --data d --weights '0.4  0.6' --out o", "--weights 0.4,0.6"),
        ("pareto --policies a --policies b", "--policies a,b"),
        ("pareto --policies a,b --policies 'c d'", "--policies 'a,b,c d'"),
        ("sft --model a b", "--model 'a b'"),
        ("reward --columns prompt=a chosen=b", "--columns prompt=a,chosen=b"),
    ],
)
def test_the_fix_says_what_to_write(capsys, line, fix):
    assert refused(capsys, *shlex.split(line)).endswith(f": {fix}\n")


def test_a_list_in_brackets_is_a_list(capsys):
    assert main.run(shlex.split("sft --model gone --data d,e --weights '[0.4, 0.6]' --out o")) == 1
    assert "--model gone is not a directory" in capsys.readouterr().err


def test_a_model_after_a_list_of_numbers_is_a_model():
    _, values = parse(shlex.split("merge linear --weights 0.4,0.6 a b"))
    assert [str(model) for model in values["models"]] == ["a", "b"]


@pytest.mark.parametrize(("name", "command"), LEAVES, ids=[name for name, _ in LEAVES])
def test_a_wrong_value_of_any_flag_is_described_in_our_words(name, command):
    # One flag of each type: a parse takes 0.1 s.
    for option in {part.metavar: part for part in command.params if isinstance(part, TyperOption)}.values():
        if option.is_flag:
            continue
        words = [*arguments_of(name), max(option.opts, key=len), "text"]
        try:
            command.make_context(name, [*words])
        except TyperException as error:
            text = str(explain(error, words))
            assert not re.search(
                r"input should|valid integer|unable to parse|pydantic|Invalid value", text, re.IGNORECASE
            )
            assert text.startswith(f"{words[-2]} text is not ")


@pytest.mark.parametrize(("name", "command"), LEAVES, ids=[name for name, _ in LEAVES])
def test_a_flag_with_a_slip_is_answered_with_the_flag_that_was_meant(name, command):
    flags = [flag for part in command.params for flag in part.opts if flag.startswith("--") and len(flag) > 5]
    for flag in flags:
        for typo in (flag[:3] + flag[4:], flag[:3] + flag[4] + flag[3] + flag[5:]):
            if typo not in flags and typo != flag:
                assert closest(typo, flags) == f"did you mean '{flag}'?"


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("sft --leraning-rate 1", "--learning-rate"),
        ("merge slerp a b --bse c", "--base"),
        ("chat m --agianst n", "--against"),
    ],
)
def test_the_answer_to_a_slip_is_one_line_with_the_flag(capsys, line, flag):
    assert refused(capsys, *line.split()).endswith(f"; did you mean '{flag}'?\n")


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, _ in all_commands() if name != "help"])
def test_help_of_a_command_is_the_page_of_its_help_flag(name):
    assert page("help", *name.split()) == page(*name.split(), "--help")


def page(*words):
    with redirect_stdout(io.StringIO()) as text:
        assert main.run([*words]) == 0
    assert text.getvalue().startswith("Usage: gemma2")
    return text.getvalue()


def test_help_alone_is_the_page_of_gemma2():
    assert page("help") == page("--help")


def test_help_of_an_unknown_command_suggests_one(capsys):
    assert "Did you mean 'sft'?" in refused(capsys, "help", "sfft")
    assert "Did you mean 'probe'?" in refused(capsys, "help", "reward", "prob")


# --- flags of every command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "command"), [leaf for leaf in LEAVES if leaf[0] != "help"], ids=lambda v: str(v)[:20])
def test_every_command_has_json_and_quiet(name, command):
    assert {"--json", "--quiet", "-q"} <= {flag for option in command.params for flag in option.opts}


@pytest.mark.parametrize(("name", "command"), LEAVES, ids=[name for name, _ in LEAVES])
def test_a_path_begins_at_home_in_every_place_of_a_command_line(monkeypatch, name, command):
    monkeypatch.setenv("HOME", "/users/me")
    paths = [part for part in command.params if getattr(part, "metavar", None) in ("PATH", "DIR", "FILE", "MODEL")]
    flags = [f"{max(part.opts, key=len)}=~/x" for part in paths if isinstance(part, TyperOption)]
    inputs = ["~/x" for part in command.params if isinstance(part, TyperArgument) and part.rich_help_panel == "Inputs"]
    values = command.make_context(name, [*flags, *(inputs or arguments_of(name))]).params
    assert {part.name: str(values[part.name]) for part in paths if isinstance(part, TyperOption)} == {
        part.name: "/users/me/x" for part in paths if isinstance(part, TyperOption)
    }
    of_another = name in ("plan", "merge plan")  # words that the parser of their command reads
    assert of_another or not any("~" in str(value) for value in values.values())


# --- a far guess is worse than none -----------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["push --to x y", "merge ema a b --eta 0.1 --out o", "eval --out x"])
def test_a_flag_without_a_near_one_gets_no_guess(capsys, line):
    said = refused(capsys, *line.split())
    assert "no such option" in said and "did you mean" not in said and "--help" in said


@pytest.mark.parametrize(
    ("line", "near"),
    [("sft --modle x", "--model"), ("push --froce a b", "--force"), ("sft --lr-rank 4", "--lora-rank")],
)
def test_a_slip_in_a_flag_is_named(capsys, line, near):
    assert f"did you mean '{near}'?" in refused(capsys, *line.split())


def test_a_second_model_of_chat_gets_its_flag(capsys):
    assert "policy-1 is a second model, and one is taken; compare with it: --against policy-1" in refused(
        capsys, "chat", "sft", "policy-1"
    )


@pytest.mark.parametrize("flags", [["--gpu", "24GB"], ["--gpus", "2"], ["--measure"]])
def test_flags_of_plan_without_a_command_are_an_error(capsys, flags):
    assert "plan names no command; give the command line behind it: gemma2 plan" in refused(capsys, "plan", *flags)
