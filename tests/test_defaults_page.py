"""docs/defaults.md: the column "ours" is what the schemas have, and no number that trains a model is missing."""

import re

import pytest
from processes import ROOT

from gemma2.posttrain import schemas

PAGE = (ROOT / "docs" / "defaults.md").read_text(encoding="utf-8")
TRAINING = ("SftConfig", "RewardConfig", "DistillConfig", "RlhfConfig", "WarpConfig")
SECTIONS = {
    "Every training command": TRAINING,
    "sft": ("SftConfig",),
    "reward": ("RewardConfig",),
    "distill": ("DistillConfig",),
    "rlhf and warp": ("RlhfConfig", "WarpConfig"),
    "generate, eval, pareto": ("GenerateConfig", "EvalConfig", "ParetoConfig"),
}
WORDS = {"none": None, "twice the rank": None}
# Numbers of what is saved, shown or measured, those that are off at their default, and those that a sentence names.
OTHERS = {
    *("save_every", "log_every", "seed", "eval_every", "eval_prompts", "eval_fraction", "eval_n", "steps"),
    *("length_penalty", "missing_eos_penalty", "dropout", "vllm_memory", "vllm_tensor_parallel", "max_dead_steps"),
    *("policies", "iterations", "patience", "jobs", "nodes", "distill_temperature", "reward_timeout"),
}


def rows(section: str) -> list[tuple[str, str]]:
    """(field, our default as it is written) of the table of a section."""
    text = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    body = next(part for part in text if part.splitlines()[0] == section)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line[:3] == "| `"]
    assert all(len(line) == 7 for line in lines), section
    return [(line[0].strip("`").removeprefix("--").replace("-", "_"), line[1]) for line in lines]


LINES = [(section, *row) for section in SECTIONS for row in rows(section)]


@pytest.mark.parametrize(("section", "field", "written"), LINES)
def test_our_column_is_what_the_schemas_have(section, field, written):
    kinds = [getattr(schemas, name) for name in SECTIONS[section]]
    found = [kind.model_fields[field].default for kind in kinds if field in kind.model_fields]
    assert found, f"no schema of {section} has {field}"
    expected = WORDS[written] if written in WORDS else float(written)
    assert set(found) == {expected}


@pytest.mark.parametrize("name", TRAINING)
def test_every_number_that_trains_a_model_is_on_the_page(name):
    listed = {field for section, field, _ in LINES if name in SECTIONS[section]}
    numbers = {
        field
        for field, info in getattr(schemas, name).model_fields.items()
        if isinstance(info.default, int | float) and not isinstance(info.default, bool)
    }
    assert numbers - listed - OTHERS == set()
