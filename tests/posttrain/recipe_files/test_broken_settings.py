"""Files with random damage: `config check` never fails, and finds a fault exactly where the command would stop."""

import random
from copy import deepcopy
from pathlib import Path

import pytest

from gemma2.configs import recipes
from gemma2.core.errors import Gemma2Error
from gemma2.core.yaml_files import read_documents, to_yaml
from gemma2.merging.methods.request_check import check_chosen
from gemma2.merging.recipes.recipe import read_recipe
from gemma2.posttrain.pipelines.compile import compile_pipeline, read_pipeline
from gemma2.posttrain.recipe_files.schema_index import schema_for, with_inputs
from gemma2.posttrain.recipe_files.settings_check import check_file
from gemma2.posttrain.schemas.config import resolve

MERGES = {
    "own": {
        "method": "slerp",
        "models": ["a", {"model": "b"}],
        "base": "c",
        "t": [{"match": "mlp", "value": 0.2}, 0.5],
    },
    "steps": {
        "steps": {
            "one": {"method": "linear", "models": ["a", "b"], "weights": [0.2, 0.8]},
            "two": {"method": "ties", "models": ["one", "b"], "base": "c", "density": 0.5, "dtype": "bfloat16"},
        }
    },
    "mergekit": {
        "merge_method": "ties",
        "base_model": "c",
        "models": [{"model": "a", "parameters": {"weight": 0.5, "density": [0.1, 0.9]}}, {"model": "b"}],
        "parameters": {"normalize": True, "weight": 1.0},
        "dtype": "bfloat16",
    },
}
VALUES = (None, "x", "", 0, -1, 1.5, True, [], {}, [1, "a"], {"a": 1}, "${vars.x}", "${a.out}", "${a.summary.b} < 1")
CASES = {name: read_documents(path)[0] for name, path in recipes().items() if name in ("align", "warp-paper")}
CASES |= {name: read_documents(recipes()[name])[0] for name in ("merge-search", "sft-2b-24gb")}
KINDS = {"align": "pipeline", "merge-search": "pipeline", "warp-paper": "warp", "sft-2b-24gb": "sft"}


def places(value, above=()):
    """The keys of every value inside a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*above, key)
        yield from places(item, (*above, key))


def damaged(document, chance: random.Random):
    """The document with one to three values replaced or taken out, or keys mistyped."""
    found = deepcopy(document)
    for _ in range(chance.randint(1, 3)):
        spots = [*places(found)]
        if not spots:
            break
        *above, key = chance.choice(spots)
        holder = found
        for step in above:
            holder = holder[step]
        what = chance.choice(("replace", "take out", "mistype"))
        if what == "replace":
            holder[key] = deepcopy(chance.choice(VALUES))
        elif what == "take out":
            holder.pop(key)
        elif isinstance(holder, dict) and isinstance(key, str):
            holder[key[1:] or "x"] = holder.pop(key)
    return found


def stops(path: Path, kind: str) -> bool:
    """Whether the command that takes the file would end with an error about it."""
    try:
        if kind == "pipeline":
            for stage in compile_pipeline(read_pipeline(path), Path("out")).stages.values():
                if not stage.deferred:
                    stage.config()
        elif kind == "merge":
            for step in read_recipe(path).steps:
                step.checked(check_chosen(step.request))
        else:
            values = read_documents(path)
            given = with_inputs(schema_for(kind), values[0] if values else {})
            inputs = {key: value for key, value in given.items() if not values or key not in values[0]}
            resolve(schema_for(kind), file=path, flags=inputs)
    except Gemma2Error:
        return True
    return False


@pytest.mark.parametrize("name", [*CASES, *MERGES])
def test_a_damaged_file_has_a_fault_where_the_command_would_stop(name, tmp_path):
    chance, path = random.Random(name), tmp_path / "file.yaml"
    kind, document = KINDS.get(name, "merge"), CASES.get(name) or MERGES[name]
    wrong = 0
    rounds = 10 if kind == "pipeline" else 40  # a pipeline is large
    for _ in range(rounds):
        broken = damaged(document, chance)
        path.write_text(to_yaml(broken) if broken else "", encoding="utf-8")
        try:
            faults = check_file(path, kind).faults
        except Gemma2Error as error:
            faults = (error,)
        assert bool(faults) == stops(path, kind), (broken, faults)
        wrong += bool(faults)
    assert wrong > rounds / 3
