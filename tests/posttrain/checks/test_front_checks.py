"""What a front or a choice from it would refuse after hours is refused before the first stage."""

import json
from pathlib import Path

import pytest
from light_model import light_model

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, UsageError
from gemma2.core.outputs.manifest import write_manifest
from gemma2.posttrain.pipelines.check import check_pipeline
from gemma2.posttrain.pipelines.compile import compile_pipeline
from gemma2.posttrain.schemas import ParetoConfig, PipelineFile
from gemma2.posttrain.schemas.evaluate import measured_settings

FUNCTION = "gemma2.posttrain.tiny.tasks:judge_reward"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two policies, prompts, and a finished front without a line."""
    monkeypatch.chdir(tmp_path)
    for name in ("sft", "rl"):
        light_model(tmp_path / name)
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    front = tmp_path / "front"
    front.mkdir()
    made = ParetoConfig(sft=Path("sft"), prompts=Path("p.jsonl"), reward_fn=(FUNCTION,), temperature=0.5)
    settings = json.loads(json.dumps(measured_settings(made)))
    points = [{"name": "SFT", "kind": "sft"}]
    (front / "front.json").write_text(json.dumps({"settings": settings, "points": points}))
    (front / "gemma2.json").write_text(json.dumps({"command": "pareto", "status": "complete"}))
    return tmp_path


def front(**options):
    return {"command": "pareto", "options": {"sft": "sft", "prompts": "p.jsonl", "reward_fn": [FUNCTION], **options}}


def pick(front, pick):
    return {"command": "pick", "options": {"front": front, "pick": pick}}


def check(**stages):
    return check_pipeline(compile_pipeline(PipelineFile(stages=stages), Path("out")))


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            {"a": front(temperature=0.7), "b": front(fronts=["${a.out}"])},
            r"stages\.b: --fronts out/a was measured with temperature 0\.7, here 1\.0; measure both alike",
        ),
        ({"a": front(seed=3, n=2), "b": front(fronts=["${a.out}"])}, r"n 2, here 1; seed 3, here 0"),
        ({"b": front(fronts=["front"])}, r"--fronts front was measured with temperature 0\.5, here 1\.0"),
        (
            {"a": front(policies=["rl"]), "m": pick("${a.out}", "eta=0.3")},
            r"--pick eta=0\.3: the front out/a has no line",
        ),
        (
            {"a": front(), "b": front(fronts=["${a.out}"]), "m": pick("${b.out}", "eta=0.3")},
            r"the front out/b has no line",
        ),
        ({"m": pick("front", "eta=0.3")}, r"the front front has no line from init to merge; use best-reward or kl<=X"),
    ],
)
def test_a_front_that_does_not_fit_is_refused_before_the_first_stage(place, stages, said):
    with pytest.raises(InputError, match=said):
        check(**stages)
    assert not (place / "out").exists()


def test_a_place_beyond_the_line_is_refused_by_the_schema(place):
    with pytest.raises(UsageError, match=r"eta is not in 0 \.\. 1; the line goes from 0"):
        check(a=front(merged="rl"), m=pick("${a.out}", "eta=1.5"))


def test_fronts_that_fit_are_not_refused(place):
    check(
        a=front(merged="rl"),
        b=front(fronts=["${a.out}"], policies=["rl"]),
        c=front(fronts=["front"], temperature=0.5),
        m=pick("${b.out}", "eta=0.3"),
        n=pick("${c.out}", "kl<=2"),
    )


def test_an_edited_front_is_refused_before_the_first_stage(place):
    own = json.loads((place / "front" / "gemma2.json").read_text())
    write_manifest(place / "front", own)
    check(m=pick("front", "kl<=2"))
    text = (place / "front" / "front.json").read_text()
    (place / "front" / "front.json").write_text(text.replace("SFT", "sft"))
    for stage in (pick("front", "kl<=2"), front(fronts=["front"], temperature=0.5)):
        with pytest.raises(
            InputError, match=r"stages\.m: front/front\.json was changed after it was written: .* --force"
        ):
            check(m=stage)


def test_the_dry_run_refuses_it_in_the_same_words(place):
    with pytest.raises(InputError, match=r"--fronts front was measured with temperature 0\.5, here 1\.0"):
        invoke(f"pareto --sft sft --prompts p.jsonl --reward-fn {FUNCTION} --fronts front --out o --dry-run".split())
    with pytest.raises(InputError, match="the front front has no line"):
        invoke(["pick", "front", "--pick", "eta=0.3", "--out", "o", "--dry-run"])
