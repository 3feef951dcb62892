"""A step is run when it is missing, skipped when it is there, continued when interrupted, never silently kept."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from gemma2.cli import app as command_table
from gemma2.cli.app import invoke
from gemma2.configs import recipes
from gemma2.merging.errors import OutputError, UsageError
from gemma2.merging.outputs import read_manifest, write_json
from gemma2.merging.progress import SILENT
from gemma2.posttrain.config import Config, resolve
from gemma2.posttrain.pipeline import Step, command_line, ensure
from gemma2.posttrain.quickstart import chapters, run_quickstart
from gemma2.posttrain.rundir import Parent, RunOptions, RunResult, open_run
from gemma2.posttrain.schemas import QuickstartConfig, RlhfConfig, SftConfig, WarpConfig


class Settings(Config):
    model: Path
    data: Path
    steps: int = 4
    trainer: dict[str, Any] = Field(default_factory=dict)


class Stop(Exception):
    """What ends a run in the middle."""


@pytest.fixture
def place(tmp_path):
    for name, text in (("model", "weights"), ("copy", "weights"), ("other", "WEIGHTS")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text(text)
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "other.jsonl").write_text('{"other": 1}\n')
    return tmp_path


class Counter:
    """A step that counts its runs, and stops in the middle of the first `stops` of them."""

    def __init__(self, stops=0):
        self.runs: list[RunOptions] = []
        self.stops = stops

    def __call__(self, config: Settings, options: RunOptions, progress: Any) -> RunResult:
        self.runs.append(options)
        parents = [Parent("model", config.model)]
        with open_run("sft", config, options, parents=parents, data=[config.data]) as run:
            if len(self.runs) <= self.stops:
                (run.checkpoints / "checkpoint-1").mkdir(parents=True)
                raise Stop
            (run.path / "model.safetensors").write_text(f"{config.steps}")
            return run.finish({"steps": config.steps})


def step(place, counter, **settings):
    config = Settings(**({"model": place / "model", "data": place / "data.jsonl"} | settings))
    return Step("sft", config, place / "out", counter)


def test_a_missing_step_is_run_and_a_finished_one_skipped(place):
    counter = Counter()
    made = ensure(step(place, counter), SILENT)
    found = ensure(step(place, counter), SILENT)
    assert made == found == RunResult(place / "out", {"steps": 4})
    assert counter.runs == [RunOptions(place / "out")]


def test_an_interrupted_step_is_continued(place):
    counter = Counter(stops=1)
    with pytest.raises(Stop):
        ensure(step(place, counter), SILENT)
    ensure(step(place, counter), SILENT)
    assert [options.resume for options in counter.runs] == [False, True]
    assert read_manifest(place / "out")["status"] == "complete"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 5}, r"steps \(4 -> 5\)"),
        ({"model": "other"}, r"model \(.*model' -> .*other'\)"),
        ({"data": "other.jsonl"}, r"data \(.*data\.jsonl' -> .*other\.jsonl'\)"),
        ({"model": "gone"}, r"model \("),
    ],
)
def test_an_output_of_other_settings_or_inputs_is_refused_by_name(place, settings, said):
    counter = Counter()
    ensure(step(place, counter), SILENT)
    changed = {key: place / value if isinstance(value, str) else value for key, value in settings.items()}
    with pytest.raises(OutputError, match=f"was made from something else: {said}"):
        ensure(step(place, counter, **changed), SILENT)
    assert len(counter.runs) == 1


@pytest.mark.parametrize(
    ("path", "said"), [("model/model.safetensors", "the weights of model"), ("data.jsonl", "the content of")]
)
def test_an_output_of_inputs_that_changed_in_place_is_refused(place, path, said):
    counter = Counter()
    ensure(step(place, counter), SILENT)
    (place / path).write_text("CHANGED")
    with pytest.raises(OutputError, match=said):
        ensure(step(place, counter), SILENT)


def test_the_same_content_at_another_place_is_the_same_input(place):
    counter = Counter()
    ensure(step(place, counter), SILENT)
    ensure(step(place, counter, model=place / "copy"), SILENT)
    assert len(counter.runs) == 1


def test_an_output_of_another_command_is_refused(place):
    counter = Counter()
    ensure(step(place, counter), SILENT)
    manifest = read_manifest(place / "out")
    write_json(place / "out" / "gemma2.json", manifest | {"command": "reward"})
    with pytest.raises(OutputError, match=r"command \(reward -> sft\)"):
        ensure(step(place, counter), SILENT)


def test_a_foreign_directory_in_the_place_of_an_output_is_refused(place):
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        ensure(step(place, Counter()), SILENT)


@pytest.mark.parametrize("there", ["a file", "a directory of something else"])
def test_a_quickstart_does_not_mix_with_what_is_there(place, there):
    out = place / "out"
    if there == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    before = sorted(place.rglob("*"))
    with pytest.raises(OutputError, match=r"is not a directory|holds something else"):
        run_quickstart(QuickstartConfig(), out)
    assert sorted(place.rglob("*")) == before


def test_a_quickstart_names_the_section_of_a_wrong_setting(place):
    for setting, said in (
        ({"stepps": 1}, r"'sft\.stepps'"),
        ({"model": "x"}, r"'sft\.model' is set by the quickstart"),
    ):
        with pytest.raises(UsageError, match=said):
            chapters(QuickstartConfig(sft=setting), place / "out")


# --- the command line of a step ---------------------------------------------------------------------------------------


@pytest.fixture
def parsed(monkeypatch):
    """Parse a command line with the real command and return (configuration, output) instead of running it."""
    from gemma2.cli import options

    found = []
    monkeypatch.setattr(options, "execute", lambda config, given, run, console: found.append((config, given["out"])))

    def parse(line: str):
        words = shlex.split(line)
        assert words[0] == "gemma2"
        assert invoke(words[1:]) == 0
        return found.pop()

    assert set(command_table.COMMANDS)
    return parse


def test_the_command_line_of_a_step_parses_back_to_its_configuration(parsed):
    sft = SftConfig(
        model="a b/m",
        data="d.jsonl",
        learning_rate=1e-6,
        lora_rank=4,
        trainer={"optim": "sgd", "adam_beta1": 0.5, "bf16": True, "x": None, "name": "1e-6", "on": "true", "a": [1, 2]},
    )
    made = Step("sft", sft, Path("o ut"), Counter())
    assert parsed(command_line(made)) == (sft, Path("o ut"))


def test_a_default_that_is_taken_away_shows_in_the_command_line(parsed):
    rlhf = RlhfConfig(policy="p", prompts="q", reward="r", max_kl=None)
    line = command_line(Step("rlhf", rlhf, Path("o"), Counter()))
    assert parsed(line)[0].max_kl is None


def test_a_list_shows_as_one_word(parsed):
    warp = WarpConfig(sft="s", prompts="p", heldout="h", reward_fn="m:f", etas=(0.1, 0.9), compare=("a", "b"))
    assert parsed(command_line(Step("warp", warp, Path("o"), Counter()))) == (warp, Path("o"))


@pytest.mark.parametrize("name", [name for name in [None, *recipes()] if name is None or name.startswith("quickstart")])
def test_the_commands_that_the_quickstart_shows_do_what_it_does(parsed, name):
    file = recipes()[name] if name else None
    if file is not None and not file.read_text().startswith("# gemma2 quickstart:"):
        pytest.skip("a recipe of another command")
    for chapter in chapters(resolve(QuickstartConfig, file=file), Path("runs/quick start")):
        assert parsed(command_line(chapter.step)) == (chapter.step.config, chapter.step.out)
