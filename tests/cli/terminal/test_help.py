"""Every command explains itself, with examples that the command itself takes."""

import importlib.util
import re
import shlex

import pytest
from commands import all_commands, parse
from processes import ROOT

from gemma2.cli.app import COMMANDS, invoke
from gemma2.cli.terminal import help as pages

ALL = dict(all_commands())
STANDARD = {
    "--config": "Recipe",
    "--set": "Set any key",
    "--out": "Output directory",
    "--resume": "Continue",
    "--force": "Replace",
    "--dry-run": "write nothing",
    "--json": "One JSON document",
    "--quiet": "No progress",
}


# Flags with another meaning: a file instead of a directory, a stage to run again.
FILES = ("report", "lineage", "data convert", "config import", "config schema", "recipes copy")
OTHERWISE = {(name, "--out") for name in FILES} | {("pipeline run", "--force")}


@pytest.fixture
def page(capsys):
    def read(*words: str) -> str:
        assert invoke([*words, "--help"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return read


def test_the_first_page_lists_every_command_by_panel_with_one_line(page):
    text = page()
    for name, entry in COMMANDS.items():
        assert re.search(rf"^  {name} +\S", text, re.MULTILINE), name
        assert f"\n{entry.panel}\n" in text


def test_no_arguments_show_the_page(page, capsys):
    for words in ([], ["merge"], ["config"]):
        expected = page(*words)
        assert invoke(words) == 0
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize("name", ALL)
def test_every_page_has_usage_a_sentence_and_a_text_for_every_option(page, name):
    text = page(*name.split())
    head, sentence, *_ = text.split("\n\n")
    assert head.startswith(f"Usage: gemma2 {name} ")
    assert sentence.strip().endswith((".", ":")), sentence
    for parameter in ALL[name].params:
        if getattr(parameter, "hidden", False):
            continue
        assert parameter.help, parameter.name
        shown = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
        assert re.search(rf"^  (-{{1,2}}[\w-]+, )?{re.escape(shown)}\b", text, re.MULTILINE), shown


@pytest.mark.parametrize("name", ALL)
def test_a_common_flag_means_the_same_everywhere(name):
    for parameter in ALL[name].params:
        expected = STANDARD.get(parameter.opts[0])
        if expected and (name, parameter.opts[0]) not in OTHERWISE:
            assert expected in parameter.help, parameter.opts[0]


@pytest.mark.parametrize("name", ALL)
def test_a_page_is_plain_in_a_pipe_and_no_wider_than_a_terminal(page, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = page(*name.split())
    assert "\033" not in text
    lines = [line for line in text.splitlines() if not line.startswith(("  gemma2 ", "Usage:"))]
    assert max(map(len, lines)) <= 80


def test_titles_are_bold_on_a_terminal_that_supports_it(monkeypatch):
    monkeypatch.setattr(pages.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert pages._bold("x") == "\033[1mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert pages._bold("x") == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert pages._bold("x") == "x"


def examples(name: str) -> list[str]:
    found = re.findall(r"^ *(gemma2 .*)$", (ALL[name].help or "").replace("\\\n", " "), re.MULTILINE)
    return [line.split("   ")[0] for line in found]


WITHOUT_EXAMPLE = ("merge", "config", "recipes", "pipeline", "data", "eval")  # groups: their commands have them


@pytest.mark.parametrize("name", [name for name in ALL if name not in WITHOUT_EXAMPLE])
def test_every_command_has_an_example_that_it_parses(name):
    lines = examples(name)
    assert lines or name.startswith("config ")
    for line in lines:
        parsed, parameters = parse(shlex.split(line)[1:])
        assert parsed == name
        assert any(value not in (None, False, ()) for value in parameters.values())


def test_every_entry_of_the_command_table_has_a_summary_and_the_module_of_its_name():
    for name, entry in COMMANDS.items():
        assert entry.summary.endswith(".")
        assert (
            entry.module.partition(".")[2].removesuffix("_page").removesuffix("_command").removesuffix("_group") == name
        )


def test_the_page_of_all_commands_is_up_to_date(monkeypatch):
    path = ROOT / "docs" / "generate.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("generate", path)
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    written = generate.TARGET.read_text(encoding="utf-8")
    assert written == generate.render(), "run `make docs`"
    assert generate.MERGING.read_text(encoding="utf-8") == generate.merging_page(), "run `make docs`"
    assert generate.PICTURE.read_text(encoding="utf-8") == generate.picture(), "run `make docs`"
    assert generate.YOURS.read_text(encoding="utf-8") == generate.your_page(), "run `make docs`"
    assert generate.RECIPES.read_text(encoding="utf-8") == generate.recipes_page(), "run `make docs`"
    assert generate.SCALE.read_text(encoding="utf-8") == generate.scale_page(), "run `make docs`"
    assert all(f"\n## gemma2 {name}\n" in written for name in ALL)
