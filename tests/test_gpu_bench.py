"""bench/gpu.sh runs to its end, every part, on a CPU: the first minutes of a GPU are not spent on a typo."""

import argparse
import json
import os
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from processes import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import gpu_card
import gpu_parts
import gpu_wheels


def gpu_sh(*words, **environment):
    line = ["bash", str(ROOT / "bench" / "gpu.sh"), "--python", sys.executable, *map(str, words)]
    return subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_part_has_figures_of_every_contender(tmp_path):
    done = gpu_sh("--size", "tiny", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + "".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
    found = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in gpu_parts.PARTS}
    rows = {part: {row["what"]: row for row in one["rows"]} for part, one in found.items()}
    assert all(one["complete"] for one in found.values())
    for part, lines in rows.items():
        for what, row in lines.items():
            assert "failed" not in row, (part, what, row)
            assert row["card"] == gpu_card.WALK and row["load"] >= 0
    assert len(rows["a"]) == 2 and all(row["tokens_per_second"] > 0 for row in rows["a"].values())
    assert {what.split(", ")[1] for what in rows["b"]} == {"gemma2", "trl"}
    assert len(rows["c"]) == 12 and all(row["ms_per_position"] > 0 for row in rows["c"].values())
    assert len(rows["d"]) == 2 and {"host", "cp + fsync", "slerp"} == rows["e"].keys()
    assert len(rows["f"]) == 3 and all(0.5 < row["planned_over_measured"] < 3 for row in rows["f"].values())


def test_the_limits_of_the_parts_leave_ten_minutes():
    text = (ROOT / "bench" / "gpu.sh").read_text()
    line = next(line for line in text.splitlines() if line.startswith("limit()"))
    limits = [int(word) for word in line.replace(";", " ").split() if word.isdigit()]
    assert len(limits) == len(gpu_parts.PARTS)
    assert sum(limits) <= 600


@pytest.mark.parametrize("words", [["--speed", "2"], ["--size"]])
def test_a_wrong_option_is_one_line(words):
    done = gpu_sh(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_figures_are_whole_after_every_line(tmp_path, capsys):
    figures = gpu_card.Figures(tmp_path / "a.json", "a", {"name": "H200"})
    figures.add("SFT", tokens_per_second=12345.678, peak_gb={"allocated": 1.5})
    row = json.loads((tmp_path / "a.json").read_text())["rows"][0]
    assert row["tokens_per_second"] == 12345.678 and row["card"] == "H200"
    assert capsys.readouterr().out == "a  SFT [H200]: tokens_per_second 1.235e+04, peak_gb {allocated 1.5}\n"
    assert "complete" not in json.loads((tmp_path / "a.json").read_text())


def test_the_bytes_of_a_position_are_the_weights_and_half_of_the_cache():
    """Two layers, one KV head of 4: 2 (k, v) x 2 bytes x 2 x 4 = 32 bytes a column; 256 prompts, half of 256 drawn."""
    config = argparse.Namespace(num_hidden_layers=2, num_key_value_heads=1, head_dim=4)
    weight = argparse.Namespace(numel=lambda: 1000)
    model = argparse.Namespace(parameters=lambda: [weight], config=config)
    options = argparse.Namespace(tiny=False, card={"nominal_bandwidth": 1e6, "measured_bandwidth": 5e5})
    found = gpu_parts._sampling(options, model, 3, 2.56)  # 256 positions of 10 ms
    assert found["ms_per_position"] == pytest.approx(10)
    assert found["tokens_per_second"] == pytest.approx(300)
    assert found["bandwidth_nominal"] == pytest.approx((2000 + 32 * 3 * (64 + 128)) / 0.01 / 1e6)
    assert found["bandwidth_measured"] == pytest.approx(2 * found["bandwidth_nominal"])


def test_a_package_travels_if_the_host_has_none_or_an_older_one(monkeypatch):
    monkeypatch.setattr(gpu_wheels, "HOST", {"old": "1.0", "unknown": None})
    newer = [Requirement("old>=0.5"), Requirement("old>=2")]
    assert gpu_wheels.lacks("old", newer)
    assert not gpu_wheels.lacks("old", newer[:1])
    assert not gpu_wheels.lacks("unknown", [Requirement("unknown>=7")])
    assert gpu_wheels.lacks("absent", [])


def test_the_list_of_wheels_holds_what_a_host_with_pytorch_lacks():
    needed = gpu_wheels.wanted()
    assert {"trl", "datasets", "pydantic", "pydantic-core", "blake3", "transformers"} <= needed.keys()
    assert not {"torch", "numpy", "pyarrow", "nvidia-nccl-cu13"} & needed.keys()
