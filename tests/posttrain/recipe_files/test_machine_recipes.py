"""Recipes by command, size and machine: each fits by the planner, and says so; each of the others cannot be."""

import re
import shlex

import pytest

from gemma2.configs import machine_recipes
from gemma2.posttrain.recipe_files import machines
from gemma2.posttrain.recipe_files.machines import (
    Cell,
    cell_named,
    cells,
    least_plan,
    no_recipe,
    plan_of,
    run_line,
)
from gemma2.posttrain.recipe_files.recipe_heads import fresh_text

RECIPES = machine_recipes()


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_of_a_recipe_is_its_plan_of_today(name):
    assert RECIPES[name].read_text(encoding="utf-8") == fresh_text(RECIPES[name]), "make recipes"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_machine(name):
    plan = plan_of(cell_named(name))
    assert plan.fits, plan.sum
    assert plan.as_json()["needed"] == pytest.approx(sum(plan.as_json()["parts"].values()))


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_line_of_a_recipe_names_it_and_its_command(name):
    first, line = RECIPES[name].read_text(encoding="utf-8").splitlines()[0], shlex.split(run_line(RECIPES[name]))
    words = line[line.index("gemma2") + 1 :]
    assert first.startswith(f"# gemma2 {words[0]}: ")
    assert name in words and "--out" in words


@pytest.mark.parametrize("cell", [cell for cell in cells() if cell.path is None], ids=lambda cell: cell.name)
def test_where_there_is_no_recipe_none_would_fit_and_the_next_one_does(cell):
    error = no_recipe(cell)
    next_ones = [cell_named(name) for name in re.findall(r"[a-z]+-\w+-[\w-]*\w", error.hint) if cell_named(name)]
    assert next_ones and all(one.path and plan_of(one).fits and one.command == cell.command for one in next_ones)
    alone = Cell(cell.command, cell.size, "80gb")
    if cell.machine in ("8x80gb", "multi-node") and cell.command != "warp" and alone.path:
        assert "one GPU is enough" in error.what and next_ones == [alone]
    else:
        assert not least_plan(cell).fits
        assert f"{least_plan(cell).needed / 1e9:.3g}" in error.what


def test_every_recipe_is_of_one_cell_and_no_cell_is_without_an_answer():
    assert set(RECIPES) <= {cell.name for cell in cells()}
    assert len({cell.name for cell in cells()}) == 5 * 3 * 4


def test_a_gpu_has_to_be_left_free(monkeypatch):
    plan = plan_of(cell_named("rlhf-2b-24gb"))
    monkeypatch.setattr(machines, "FREE", 1 - plan.needed / 24e9 + 0.01)
    assert not plan_of(cell_named("rlhf-2b-24gb")).fits


def test_policies_of_warp_side_by_side_have_a_gpu_each():
    assert plan_of(cell_named("warp-2b-8x80gb")).needed == plan_of(cell_named("warp-2b-80gb")).needed


def test_more_gpus_share_the_prompts_of_a_step():
    one, eight = plan_of(cell_named("rlhf-2b-80gb")), plan_of(cell_named("rlhf-2b-8x80gb"))
    assert (one.place.devices, eight.place.devices) == (1, 8)
    nodes = plan_of(cell_named("rlhf-2b-multi-node")).place
    assert nodes.devices == 16 and not nodes.full_shard  # it fits a GPU, and so each has all of it


def test_what_no_gpu_holds_is_divided_and_the_line_says_how_many_there_are():
    for name in ("sft-27b-8x80gb", "rlhf-9b-8x80gb"):
        plan = plan_of(cell_named(name))
        assert plan.place.full_shard and plan.config.lora_rank == 0
        assert "--gpus 8" in run_line(RECIPES[name])
