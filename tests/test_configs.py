"""Every recipe that comes with the package loads, and its first line says which command it is for."""

from pathlib import Path

import pytest

from gemma2.configs import recipes
from gemma2.posttrain import schemas
from gemma2.posttrain.pipelines.compile import compile_pipeline, read_pipeline
from gemma2.posttrain.recipe_files.schema_index import with_inputs
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.schemas import EvalConfig
from gemma2.posttrain.schemas.config import Config, load_yaml, resolve

RECIPES = recipes()


def command_of(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    command, colon, purpose = first.removeprefix("# gemma2 ").partition(":")
    assert first.startswith("# gemma2 ") and colon and purpose.strip(), f"{path.name}: first line {first!r}"
    return command


def schema_of(command: str) -> type[Config]:
    return EvalConfig if command == "eval" else COMMANDS[command].schema


def test_the_folder_holds_only_recipes():
    names = {path.name for path in Path(schemas.__file__).parents[2].joinpath("configs").rglob("*") if path.is_file()}
    kept = {name for name in names if not name.endswith(".pyc")} - {"__init__.py", "py.typed"}
    assert kept == {path.name for path in RECIPES.values()}


@pytest.mark.parametrize("name", [name for name, path in RECIPES.items() if command_of(path) != "pipeline"])
def test_a_recipe_resolves_with_the_schema_of_its_command(name):
    schema = schema_of(command_of(RECIPES[name]))
    given = load_yaml(RECIPES[name])
    assert given, "a recipe that sets nothing"
    missing = {key: value for key, value in with_inputs(schema, given).items() if key not in given}
    resolved = resolve(schema, file=RECIPES[name], flags=missing)
    for key, value in given.items():
        assert resolved.model_dump(mode="json")[key] == value, f"{name}: {key}"


@pytest.mark.parametrize("name", [name for name, path in RECIPES.items() if command_of(path) == "pipeline"])
def test_every_stage_of_a_pipeline_resolves_with_the_schema_of_its_command(name, tmp_path):
    pipeline = compile_pipeline(read_pipeline(RECIPES[name]), tmp_path)
    for stage in pipeline.stages.values():
        resolved = stage.config().model_dump(mode="json")
        given = {key: value for key, value in stage.options.items() if value is not None}
        for key, value in given.items():
            found = resolved[key]
            assert found == value or found == [value] or (isinstance(found, list) and list(value) == found), key


def test_the_merge_search_measures_every_candidate_and_keeps_the_best_of_two_generations(tmp_path):
    stages = compile_pipeline(read_pipeline(RECIPES["merge-search"]), tmp_path).stages
    first = {name for name in stages if name.startswith("first/")}
    second = {name for name in stages if name.startswith("second/")}
    assert (len(first), len(second)) == (9, 4)
    measured = {str(path) for path in stages["front"].options["policies"]}
    assert measured == {str(tmp_path / name) for name in first}
    assert {str(stages[name].options["base"]) for name in first | second} == {"sft"}
    last = {str(path) for path in stages["last"].options["policies"]}
    assert last == {"rl-1", "rl-2", str(tmp_path / "best"), *(str(tmp_path / name) for name in second)}
    assert stages["front"].options["prompts"] == stages["last"].options["prompts"]
