"""A run that goes on after an upgrade: what stands against that, what does not, and what its record says."""

from contextlib import suppress
from pathlib import Path

import pytest
from light_model import light_model
from text_model import write_text_model

from gemma2.cli.app import invoke
from gemma2.core.errors import Gemma2Error, InputError
from gemma2.core.outputs.manifest import RECORDED_PACKAGES, read_manifest
from gemma2.core.permissions import ALLOWED_VERSIONS, allow, versions_allowed
from gemma2.posttrain.provenance import version_rule
from gemma2.posttrain.provenance.output_state import can_go_on, output_state
from gemma2.posttrain.provenance.version_rule import NOTED, deciding_changes, noted_changes, other_versions
from gemma2.posttrain.runs import run_directory
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.runs.run_directory import RunOptions, open_run, resumed_with
from gemma2.posttrain.schemas.config import Config

DECIDE = [name for name in RECORDED_PACKAGES if name not in NOTED]
BEFORE = dict.fromkeys(RECORDED_PACKAGES, "1.2.3")


class Settings(Config):
    data: Path
    seed: int = 7


class Stop(Exception):
    """What ends a run in the middle."""


@pytest.fixture
def here(monkeypatch):
    """The installed versions; a test may change them."""
    installed = dict(BEFORE)
    monkeypatch.setattr(version_rule, "versions", lambda: dict(installed))
    monkeypatch.setenv(ALLOWED_VERSIONS, "")
    return installed


@pytest.fixture
def place(tmp_path, here):
    """A folder with an interrupted run."""
    (tmp_path / "data.jsonl").write_text("{}\n")
    with pytest.raises(Stop):
        run(tmp_path, stop=True)
    return tmp_path


def said(place):
    return resumed_with(Settings(data=place / "data.jsonl"), place / "out")


def run(place, stop=False, command="sft", **options):
    config = Settings(data=place / "data.jsonl")
    with open_run(command, config, RunOptions(place / "out", **options)) as opened:
        (opened.checkpoints / "checkpoint-2").mkdir(parents=True, exist_ok=True)
        if stop:
            raise Stop
        write_text_model(opened.path, "result")
        opened.finish({})
    return read_manifest(place / "out")


@pytest.mark.parametrize("version", ["1.2.4", "1.3.0", "1.2.3+cu126", None])
@pytest.mark.parametrize("package", DECIDE)
def test_a_package_that_computes_stands_against_a_resume_in_every_version(here, package, version):
    here.pop(package) if version is None else here.update({package: version})
    found = deciding_changes("rlhf", {"versions": BEFORE})
    assert [str(change) for change in found] == [f"{package} (1.2.3 -> {version or 'not installed'})"]
    assert noted_changes("rlhf", {"versions": BEFORE}) == []


@pytest.mark.parametrize("package", NOTED)
def test_a_package_that_computes_nothing_is_named_and_the_run_goes_on(place, here, package):
    here[package] = "9"
    assert said(place) == f"the run goes on with other versions: {package} (1.2.3 -> 9)"
    manifest = run(place, resume=True)
    assert manifest["versions"] == here
    assert [one["changed"] for one in manifest["continued"]] == [{package: ["1.2.3", "9"]}]


def test_without_a_change_the_record_says_nothing(place):
    assert said(place) == ""
    assert "continued" not in run(place, resume=True)
    assert said(place) == ""


@pytest.mark.parametrize("by", ["package", "arithmetic"])
def test_what_computes_is_refused_and_kept_and_every_way_on_leads_to_an_output(place, here, monkeypatch, by):
    if by == "package":
        here["torch"] = "1.2.4"
    else:
        monkeypatch.setattr(version_rule, "ARITHMETIC", {"sft": 2})
    assert said(place) == "", "the error names them"
    with pytest.raises(InputError) as caught:
        run(place, resume=True)
    named = "torch (1.2.3 -> 1.2.4)" if by == "package" else "the arithmetic of gemma2 (1 -> 2)"
    assert f"changed since it began: {named}; restore those, " in str(caught.value)
    assert "continue all the same with --allow-versions, or start over with --force" in str(caught.value)
    assert (place / ".out.partial" / "checkpoints" / "checkpoint-2").is_dir()
    allow(versions=True)
    assert said(place) == f"the run goes on with other versions: {named}"
    manifest = run(place, resume=True)
    assert [[*one["changed"]] for one in manifest["continued"]] == [[named.partition(" (")[0]]]
    monkeypatch.setenv(ALLOWED_VERSIONS, "")
    assert "continued" not in run(place, force=True)


def test_the_arithmetic_of_another_command_stands_against_nothing(place, monkeypatch):
    monkeypatch.setattr(version_rule, "ARITHMETIC", {"rlhf": 2})
    assert run(place, resume=True)["arithmetic"] == 1


def test_a_run_that_went_on_once_needs_no_word_the_next_time_and_keeps_its_whole_history(place, here, monkeypatch):
    here["torch"] = "2"
    allow(versions=True)
    with pytest.raises(Stop):
        run(place, stop=True, resume=True)
    monkeypatch.setenv(ALLOWED_VERSIONS, "")
    with pytest.raises(Stop):
        run(place, stop=True, resume=True)
    here["jinja2"] = "2"
    changed = [one["changed"] for one in run(place, resume=True)["continued"]]
    assert changed == [{"torch": ["1.2.3", "2"]}, {"jinja2": ["1.2.3", "2"]}]


REWARDS = "def score(completions, **columns):\n    return [{}] * len(completions)\n"


class Rewarded(Settings):
    reward_fn: tuple[str, ...] = ("mended_rewards:score",)


def test_a_function_that_was_mended_is_refused_and_kept_until_the_user_allows_it(tmp_path, here, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "mended_rewards.py").write_text(REWARDS.format(0))
    config = Rewarded(data=tmp_path / "data.jsonl")

    def rewarded(stop=False, **options):
        with open_run("rlhf", config, RunOptions(tmp_path / "out", **options)) as opened:
            (opened.checkpoints / "checkpoint-2").mkdir(parents=True, exist_ok=True)
            if stop:
                raise Stop
            write_text_model(opened.path, "result")
            opened.finish({})

    with pytest.raises(Stop):
        rewarded(stop=True)
    (tmp_path / "mended_rewards.py").write_text(REWARDS.format(1))
    with pytest.raises(
        InputError, match=r"changed since it began: the code of mended_rewards; restore .*--allow-versions"
    ):
        rewarded(resume=True)
    assert (tmp_path / ".out.partial" / "checkpoints" / "checkpoint-2").is_dir()
    allow(versions=True)
    assert resumed_with(config, tmp_path / "out") == "the run goes on with other versions: the code of mended_rewards"
    with pytest.raises(Stop):
        rewarded(stop=True, resume=True)
    monkeypatch.setenv(ALLOWED_VERSIONS, "")
    rewarded(resume=True)
    (part,) = read_manifest(tmp_path / "out")["continued"]
    assert [*part["changed"]] == ["the code of mended_rewards"]


def test_a_run_that_only_lacks_its_move_is_not_refused(place, here, monkeypatch):
    def killed(*arguments):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(run_directory, "publish", killed)
        run(place, resume=True)
    here["torch"] = "2"
    config = Settings(data=place / "data.jsonl")
    state = output_state("sft", config, place / "out")
    assert (state.state, state.versions) == ("interrupted", ())
    assert can_go_on("sft", config, place / "out")


def test_a_changed_setting_is_refused_whatever_is_allowed_about_versions(place, here):
    allow(versions=True)
    here["torch"] = "2"
    (place / "data.jsonl").write_text("{}\n{}\n")
    with pytest.raises(InputError, match=r"the content of .*; restore that, or start over with --force"):
        run(place, resume=True)


def test_commands_without_a_network_are_decided_by_what_they_use(here):
    here.update(torch="2", numpy="2", gemma2="2")
    record = {"versions": BEFORE}
    assert [change.what for change in other_versions("filter", record)] == ["numpy", "gemma2"]
    assert [change.what for change in other_versions("merge slerp", record)] == ["numpy", "gemma2"]
    assert [change.what for change in other_versions("sft", record)] == ["torch", "numpy", "gemma2"]


def test_a_package_that_was_not_installed_then_decided_nothing(here):
    assert other_versions("sft", {"versions": {"torch": "1.2.3"}}) == []


def test_numbers_of_the_arithmetic_are_those_of_commands():
    assert version_rule.ARITHMETIC.keys() <= COMMANDS.keys()


@pytest.mark.parametrize("command", ["sft", "pipeline run", "quickstart"])
@pytest.mark.parametrize("given", [True, False])
def test_the_flag_is_heard_by_every_command_that_goes_on(place, command, given):
    (place / "p.yaml").write_text("stages:\n  a: {command: tiny}\n")
    light_model(place / "model")
    inputs = {"sft": ["--model", place / "model", "--data", place / "data.jsonl"], "pipeline run": [place / "p.yaml"]}
    words = [*command.split(), *inputs.get(command, []), "--out", place / "new", "--dry-run", "--quiet", "--json"]
    with suppress(Gemma2Error):
        invoke([*map(str, words), *(["--allow-versions"] if given else [])])
    assert versions_allowed() == given
