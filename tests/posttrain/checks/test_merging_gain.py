"""The expected angle between policies, its figures by hand, and the warning of `gemma2 warp` on either side of it."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from light_model import light_model

from gemma2.cli.app import invoke
from gemma2.configs import recipes
from gemma2.core.yaml_files import read_documents
from gemma2.posttrain.checks.merging_gain import PolicyAngle, angle_of_runs, is_embedded, low_gain, measured_angle
from gemma2.posttrain.checks.noise_scale import (
    completions_for,
    expected_angle,
    mean_norm,
    noise_scale_of,
    noise_share,
)
from gemma2.posttrain.schemas import WarpConfig


def warp(**settings: object) -> WarpConfig:
    return WarpConfig(sft=Path("sft"), reward=(Path("r"),), prompts=Path("p"), heldout=Path("h"), **settings)


def advised(config: WarpConfig, line: str) -> WarpConfig:
    """The configuration with the flags of the line's advice."""
    found = re.search(r"; give (--.*?) for about", line)
    assert found is not None, line
    words = shlex.split(found[1])
    values = {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    changes = {key: [int(v) for v in text.split(",")] if key == "steps" else int(text) for key, text in values.items()}
    return WarpConfig.model_validate(config.model_dump() | changes)


# --- the formula ------------------------------------------------------------------------------------------------------


def test_the_angles_of_the_table_in_docs_warp():
    assert expected_angle(1411, 1920) == pytest.approx(54.8, abs=0.05)  # cos = 1 / (1 + 0.7349) = 0.5764
    assert expected_angle(1411, 480) == pytest.approx(75.3, abs=0.05)  # cos = 1 / (1 + 2.9396) = 0.2538
    assert expected_angle(1000, 480) == pytest.approx(71.1, abs=0.05)  # cos = 1 / (1 + 2.0833) = 0.3243
    assert expected_angle(250, 250) == pytest.approx(60)  # cos = 1 / 2, which is how the flag describes it


def test_a_measured_angle_gives_the_noise_scale_that_predicts_it():
    assert noise_scale_of(60, 480) == pytest.approx(480)
    assert noise_scale_of(54.8, 1920) == pytest.approx(1411, rel=1e-3)
    assert completions_for(60, 480) == pytest.approx(480)
    assert completions_for(45, 1000) == pytest.approx(1000 / (math.sqrt(2) - 1))  # cos / (1 - cos) = 1 / (sqrt 2 - 1)
    assert noise_scale_of(90, 480) == noise_scale_of(100, 480) == math.inf


def test_what_an_angle_leaves_to_merging():
    assert noise_share(60) == pytest.approx(0.5)
    assert noise_share(90) == pytest.approx(1.0)
    assert mean_norm(90, 2) == pytest.approx(1 / math.sqrt(2))  # the paper's 0.707
    assert mean_norm(0, 5) == pytest.approx(1.0)
    assert mean_norm(60, 4) == pytest.approx(math.sqrt(2.5 / 4))  # |a + b + c + d|^2 = 4 + 12 / 2 = 10, over 16


# --- before a run -----------------------------------------------------------------------------------------------------


def test_a_run_is_warned_below_55_degrees_and_not_above():
    narrow = warp(noise_scale=1411, steps=(60,), prompts_per_step=8, n=4)  # 1,920 completions: 54.8
    line = low_gain(narrow, embedded=False)
    assert line is not None and line.startswith("task vectors of iteration 1 are expected 54.8 degrees apart (1,920 ")
    assert "42% of a task vector's square is noise" in line  # 1 - 0.5764
    assert "average of 2 keeps 0.89 of its norm" in line  # sqrt((1 + 0.5764) / 2) = 0.8878
    assert low_gain(warp(noise_scale=1411, steps=(59,), prompts_per_step=8, n=4), embedded=False) is None  # 1,888: 55.1
    assert low_gain(warp(noise_scale=1000, steps=(120,), prompts_per_step=2, n=2), embedded=False) is None  # 480: 71.1


def test_the_iteration_with_the_most_completions_decides():
    line = low_gain(warp(noise_scale=1000, steps=(10, 60), prompts_per_step=8, n=4), embedded=False)
    assert line is not None and line.startswith("task vectors of iteration 2 are expected 48.9 ")  # cos = 1 / 1.5208


def test_an_unknown_noise_scale_gives_no_warning():
    assert low_gain(warp(steps=(9000,), prompts_per_step=32, n=4), embedded=False) is None
    for name, path in recipes().items():  # the paper's settings, and every recipe for a real model
        if name.startswith("warp") and "stages" not in read_documents(path)[0]:
            config = WarpConfig.model_validate({**warp().model_dump(), **read_documents(path)[0]})
            assert low_gain(config, embedded=False) is None


def test_the_noise_scale_of_the_embedded_networks_is_known_and_a_given_one_goes_before_it():
    settings = {"steps": (60,), "prompts_per_step": 8, "n": 4}
    line = low_gain(warp(**settings), embedded=True)
    assert line is not None and "a noise scale of 1,000, known for models of gemma2 tiny" in line
    assert low_gain(warp(**settings, noise_scale=1e6), embedded=True) is None


def test_one_policy_has_nothing_to_merge():
    assert low_gain(warp(noise_scale=10, policies=1), embedded=True) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": (60,), "prompts_per_step": 8, "n": 4},
        {"steps": (60,), "prompts_per_step": 1, "n": 64},
        {"steps": (500, 400), "prompts_per_step": 16, "n": 4, "warmup_steps": 300},
        {"steps": (300, 100), "prompts_per_step": 16, "n": 4, "warmup_steps": 20},
        {"steps": (9000, 7000), "prompts_per_step": 32, "n": 4, "gpus_per_policy": 4},
        {"steps": (200,), "prompts_per_step": 16, "n": 2, "gpus_per_policy": 2, "nodes": 2, "executor": "slurm"},
    ],
)
@pytest.mark.parametrize("noise", [120.0, 1000.0, 1411.0])
def test_the_advice_followed_literally_gives_a_run_without_the_warning(settings, noise):
    config = warp(noise_scale=noise, iterations=3, **settings)
    line = low_gain(config, embedded=False)
    assert line is not None
    better = advised(config, line)  # validated: its warm-up fits its steps
    assert low_gain(better, embedded=False) is None
    most = max(better.steps) * better.prompts_per_step * better.n
    said = re.search(r"for about (\d+) degrees", line)
    assert said is not None and int(said[1]) == round(math.degrees(math.acos(1 / (1 + noise / most)))) >= 70
    assert better.prompts_per_step % ((config.gpus_per_policy or 1) * config.nodes) == 0


# --- the embedded networks --------------------------------------------------------------------------------------------


def manifest(place: Path, command: str, *ancestors: str, **config: object) -> Path:
    place.mkdir()
    parents = [{"role": "model", "path": path, "weights": "x"} for path in ancestors]
    content = {"schema_version": 1, "command": command, "config": config, "parents": parents, "status": "complete"}
    (place / "gemma2.json").write_text(json.dumps(content))
    return place


def test_a_model_is_embedded_if_its_ancestor_is_the_student_of_tiny_in_its_default_width(tmp_path):
    student = manifest(tmp_path / "student", "tiny", size="student", width=96)
    sft = manifest(tmp_path / "sft", "sft", "../student")
    manifest(tmp_path / "teacher", "tiny", size="teacher", width=160)
    distilled = manifest(tmp_path / "distilled", "distill", "../teacher", "../sft")
    assert is_embedded(student) and is_embedded(sft) and is_embedded(distilled)
    assert not is_embedded(manifest(tmp_path / "taught", "sft", "../teacher"))
    assert not is_embedded(manifest(tmp_path / "wide", "tiny", size="student", width=192))
    assert not is_embedded(manifest(tmp_path / "other", "sft", "../nothing-there"))
    assert not is_embedded(tmp_path)


# --- after the first merge --------------------------------------------------------------------------------------------


def test_the_measured_angle_is_that_of_the_blocks():
    merge = {
        "groups": [
            {"group": "embed_tokens", "angle": 10.0},
            {"group": "layers.0", "angle": 50.0},
            {"group": "layers.1", "angle": 70.0},
            {"group": "layers.2", "angle": None},
            {"group": "norm", "angle": 5.0},
        ]
    }
    config = warp(steps=(60, 10), prompts_per_step=2, n=2)
    found = measured_angle(config, merge)
    assert found == PolicyAngle(60.0, 240)
    assert found.as_dict() == {"angle": 60.0, "angle_completions": 240, "noise_scale": 240.0}
    assert found.statement().endswith("a noise scale of 240; give the next run --noise-scale 240")
    assert measured_angle(config, {"groups": merge["groups"][:1]}) is None


def test_a_measured_angle_is_warned_of_below_55_degrees_with_advice_that_holds():
    config = warp(steps=(60,), prompts_per_step=8, n=4)
    assert PolicyAngle(55.0, 1920).warning(config) is None
    narrow = PolicyAngle(50.0, 1920)
    line = narrow.warning(config)
    assert line is not None and line.startswith("task vectors are 50.0 degrees apart: ")
    better = advised(config, line)
    assert low_gain(better.model_copy(update={"noise_scale": float(narrow.flag)}), embedded=False) is None


def test_a_right_angle_has_no_noise_scale():
    found = PolicyAngle(91.0, 240)
    assert found.as_dict()["noise_scale"] is None
    assert "--noise-scale" not in found.statement()
    assert found.warning(warp()) is None


def rl_run(place: Path, base: str, steps: int = 60) -> Path:
    manifest(place, "rlhf", steps=steps, prompts_per_step=2, n=2)
    path = place / "gemma2.json"
    content = json.loads(path.read_text()) | {"parents": [{"role": "policy", "path": base, "weights": "x"}]}
    path.write_text(json.dumps(content))
    return place


def test_two_models_have_a_noise_scale_only_as_rl_runs_from_the_base_with_equal_completions(tmp_path):
    sft = manifest(tmp_path / "sft", "sft")
    a, b = rl_run(tmp_path / "a", "../sft"), rl_run(tmp_path / "b", "../sft")
    groups = [SimpleNamespace(group=name, task_angle=angle) for name, angle in (("layers.0", 60.0), ("norm", 9.0))]
    assert angle_of_runs(a, b, sft, groups) == PolicyAngle(60.0, 240)
    assert angle_of_runs(a, rl_run(tmp_path / "longer", "../sft", 61), sft, groups) is None
    assert angle_of_runs(a, rl_run(tmp_path / "elsewhere", "../a"), sft, groups) is None
    assert angle_of_runs(a, sft, sft, groups) is None
    assert angle_of_runs(a, b, sft, groups[1:]) is None
    (b / "gemma2.json").write_text("{")
    assert angle_of_runs(a, b, sft, groups) is None


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_dry_run_has_the_warning_on_stderr_and_in_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    light_model(tmp_path / "policy")
    light_model(tmp_path / "rm", kind="Gemma2ForSequenceClassification")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "Why? {i}"}}\n' for i in range(20)))
    command = "warp --sft policy --reward rm --prompts prompts.jsonl --heldout prompts.jsonl --out o --dry-run"
    assert invoke([*command.split(), "--noise-scale", "1000", "--json"]) == 0  # 100 steps of 16 x 4
    said = capsys.readouterr()
    (line,) = json.loads(said.out)["warnings"]
    assert line.startswith("task vectors of iteration 1 are expected 30.1 degrees apart (6,400 ")  # cos = 1 / 1.15625
    assert invoke([*command.split(), "--noise-scale", "1000"]) == 0
    assert " ".join(capsys.readouterr().err.split()).count("expected 30.1 degrees apart") == 1
    assert invoke([*command.split(), "--json"]) == 0
    assert "warnings" not in json.loads(capsys.readouterr().out)
    assert not (tmp_path / "o").exists()
