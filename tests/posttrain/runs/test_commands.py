"""Every command that a pipeline may name runs what it says, and its spelling parses back to its configuration."""

import shlex
from pathlib import Path

import pytest

from gemma2.cli.app import COMMANDS as ON_THE_COMMAND_LINE
from gemma2.cli.app import invoke
from gemma2.cli.stages.merge import TOOLS
from gemma2.configs import recipes
from gemma2.merging.methods.table import METHODS
from gemma2.posttrain.pipelines.compile import compile_pipeline, read_pipeline
from gemma2.posttrain.runs.commands import COMMANDS, spell
from gemma2.posttrain.schemas import GenerateConfig, MergeConfig, RlhfConfig, SftConfig, WarpConfig


@pytest.fixture
def parsed(monkeypatch):
    """Parse a command line with the real command and return (configuration, output) instead of running it."""
    from gemma2.cli.stages import merge
    from gemma2.cli.terminal import options

    found = []
    monkeypatch.setattr(options, "execute", lambda config, given, run, console: found.append((config, given["out"])))
    monkeypatch.setattr(
        merge, "run_method", lambda m, models, given: found.append((merge.request_of(m, models, given), given["out"]))
    )

    def parse(line: str):
        words = shlex.split(line)
        assert words[0] == "gemma2"
        assert invoke(words[1:]) == 0
        return found.pop()

    return parse


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_a_pipeline_is_one_of_the_command_line_and_has_its_function(name):
    first, _, second = name.partition(" ")
    assert first in ON_THE_COMMAND_LINE
    assert first != "merge" or second in {*METHODS, *TOOLS}
    assert callable(COMMANDS[name].run)
    assert COMMANDS[name].why


def test_every_merge_method_can_be_a_stage():
    assert {name.removeprefix("merge ") for name in COMMANDS if name.startswith("merge ")} == {*METHODS, *TOOLS}


def test_a_command_line_parses_back_to_its_configuration(parsed):
    sft = SftConfig(
        model="a b/m",
        data="d.jsonl",
        learning_rate=1e-6,
        lora_rank=4,
        trainer={"optim": "sgd", "adam_beta1": 0.5, "bf16": True, "x": None, "name": "1e-6", "on": "true", "a": [1, 2]},
    )
    assert parsed(spell("sft", sft, Path("o ut"))) == (sft, Path("o ut"))


def test_a_default_that_is_taken_away_shows_in_the_command_line(parsed):
    rlhf = RlhfConfig(policy="p", prompts="q", reward="r", max_kl=None)
    assert parsed(spell("rlhf", rlhf, Path("o")))[0].max_kl is None


def test_a_list_shows_as_one_word(parsed):
    warp = WarpConfig(
        sft="s", prompts="p", heldout="h", reward_fn="m:f", etas=(0.1, 0.9), compare=("a", "b"), steps=(9, 7),
        vary=("learning_rate=1e-6:2e-6", "length_penalty=0:1e-3"),
    )  # fmt: skip
    assert parsed(spell("warp", warp, Path("o"))) == (warp, Path("o"))


def test_items_with_commas_and_blanks_are_given_one_by_one(parsed):
    stops = ("a, b", "\n\n", "--x", " User:")
    config = GenerateConfig(teacher="t", prompts="p", stop=stops)
    assert parsed(spell("generate", config, Path("o"))) == (config, Path("o"))
    alone = GenerateConfig(teacher="t", prompts="p", stop=("a,b",))
    assert parsed(spell("generate", alone, Path("o"))) == (alone, Path("o"))


def test_a_merge_is_spelt_as_gemma2_merge_takes_it(parsed):
    config = MergeConfig(method="ties", models=("a", "b"), base="c", density=0.2, weights=(1.0, 2.0), dtype="bfloat16")
    assert parsed(spell("merge ties", config, Path("o"))) == (config.request(), Path("o"))
    nested = MergeConfig(
        method="slerp", models=("a", "b"), base="c", t=[{"match": "mlp", "value": 0.3}, {"layers": [0, 1]}],
        slices=({"sources": [{"model": 0, "layers": [0, 1]}, {"model": 1, "layers": [1, 2]}], "t": 0.5},),
    )  # fmt: skip
    assert parsed(spell("merge slerp", nested, Path("o"))) == (nested.request(), Path("o"))
    densities = MergeConfig(method="ties", models=("a", "b"), base="c", density=[{"layers": [0.1, 0.9]}, 0.5])
    assert parsed(spell("merge ties", densities, Path("o"))) == (densities.request(), Path("o"))
    uniform = MergeConfig(method="ema", models=("a", "b"), uniform=True)
    assert parsed(spell("merge ema", uniform, Path("o"))) == (uniform.request(), Path("o"))


PIPELINES = [name for name, path in recipes().items() if path.read_text().startswith("# gemma2 pipeline:")]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_commands_that_a_pipeline_shows_do_what_it_does(parsed, name, monkeypatch):
    monkeypatch.setattr("gemma2.posttrain.runs.inputs.located", lambda config: config)  # hub ids stay as they are
    pipeline = compile_pipeline(read_pipeline(recipes()[name]), Path("runs/quick start"))
    for stage in pipeline.stages.values():
        config = stage.config()
        found, out = parsed(spell(stage.command, config, stage.out))
        assert found == (config.request() if isinstance(config, MergeConfig) else config)
        assert out == stage.out
