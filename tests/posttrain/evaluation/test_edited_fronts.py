"""A front that was edited by hand is not believed against its manifest; the fix that the error gives leads to a run."""

import json
import re
import shlex
import shutil

import pytest
from policies import Said, pareto_config, points_of

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError
from gemma2.core.outputs.manifest import read_manifest, write_manifest
from gemma2.posttrain.evaluation.front_files import read_front
from gemma2.posttrain.evaluation.pareto import run_pareto
from gemma2.posttrain.evaluation.pick import run_pick
from gemma2.posttrain.pipelines import quickstart, warp
from gemma2.posttrain.provenance.recorded_files import changed_files
from gemma2.posttrain.reports.collect import collect
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import PickConfig


@pytest.fixture
def run(iterations, tmp_path):
    """A copy of the run that may be changed."""
    return shutil.copytree(iterations, tmp_path / "run")


def edited(front, name="front.json"):
    """The front with a better reward in one of its files."""
    file = front / name
    text = file.read_text()
    changed = re.sub(r'("reward": ?)(\[?)([\d.]+)', r"\g<1>\g<2>9\g<3>", text, count=1)
    assert changed != text
    file.write_text(changed)
    return front


READERS = {
    "pick": lambda run, front, out: run_pick(PickConfig(front=front), RunOptions(out)),
    "--fronts": lambda run, front, out: run_pareto(pareto_config(run, fronts=(front,)), RunOptions(out)),
    "warp": lambda run, front, out: warp.summarise(front.parent),
    "quickstart": lambda run, front, out: quickstart._summary(front.parent.parent),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_command_that_believes_a_front_refuses_an_edited_one(run, tmp_path, reader):
    place = tmp_path / "q" / "warp"
    front = edited(shutil.copytree(run / "iteration-1" / "front", place / "front"))
    with pytest.raises(InputError, match=r"front\.json was changed after it was written") as caught:
        READERS[reader](run, front, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["prompts.json", "samples.jsonl"])
def test_a_front_that_takes_over_values_refuses_edited_ones(run, tmp_path, name):
    front = edited(run / "iteration-1" / "front", name)
    with pytest.raises(InputError, match=f"{name} was changed after it was written"):
        run_pareto(pareto_config(run, fronts=(front,)), RunOptions(tmp_path / "new"))


def test_the_fix_makes_the_front_again_with_its_own_settings(run, tmp_path):
    front = run / "iteration-1" / "front"
    whole = (front / "front.json").read_bytes()
    # the settings name the folder of the original run: measure once more in this one
    run_pareto(pareto_config(run, 1), RunOptions(front, force=True))
    assert (front / "front.json").read_bytes() == whole
    edited(front)
    with pytest.raises(InputError) as caught:
        read_front(front, "--front")
    command = str(caught.value).partition("make it again: ")[2]
    assert invoke([*shlex.split(command)[1:], "--quiet"]) == 0
    assert (front / "front.json").read_bytes() == whole
    run_pick(PickConfig(front=front), RunOptions(tmp_path / "model"))


def test_a_front_that_was_copied_or_moved_still_reads(run, tmp_path):
    moved = shutil.move(run, tmp_path / "elsewhere")
    front = moved / "iteration-1" / "front"
    assert changed_files(front, ["front.json", "prompts.json", "samples.jsonl"]) == []
    run_pareto(pareto_config(moved, fronts=(front,)), RunOptions(tmp_path / "new"))


def test_a_report_shows_no_edited_front_and_says_so(run):
    second = edited(run / "iteration-2" / "front")
    found = collect(run)
    (gap,) = [gap for gap in found.gaps if "was changed" in gap]
    assert gap.startswith("iteration-2/front/front.json was changed after it was measured and is not shown; ")
    assert f"gemma2 pareto --config {second} --out {second} --force" in gap
    assert found.front.name == "iteration-1/front"


def test_edited_evaluations_of_a_run_are_not_on_the_front(run, tmp_path):
    policy = run / "iteration-1" / "policy-1"
    own = read_manifest(policy)
    write_manifest(policy, {key: own[key] for key in own if key != "files"})

    said = Said()
    config = pareto_config(run, policies=(policy,))
    run_pareto(config, RunOptions(tmp_path / "whole"), said)
    assert "policy-1 step 2" in points_of(tmp_path / "whole")
    assert not [line for line in said.warnings if "evaluations" in line]
    lines = [json.loads(line) for line in (policy / "evaluations.jsonl").read_text().splitlines()]
    lines[0]["values"]["reward"][0] = -50.0
    (policy / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_pareto(config, RunOptions(tmp_path / "edited"), said)
    assert "policy-1 step 2" not in points_of(tmp_path / "edited")
    assert [line for line in said.warnings if "evaluations.jsonl is not the file that its run wrote" in line]
