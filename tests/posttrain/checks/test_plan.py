"""The plan of one command: figures by hand, what does not fit, and what is refused before anything is written."""

import json
from contextlib import suppress

import pytest
from light_model import light_model

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, OutputError, UsageError
from gemma2.core.outputs.manifest import write_manifest
from gemma2.posttrain.checks import plan as plans
from gemma2.posttrain.checks.plan import GIB, plan
from gemma2.posttrain.runs import machine
from gemma2.posttrain.runs.machine import Memory
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult
from gemma2.posttrain.schemas import RewardConfig, RlhfConfig, SftConfig, TinyConfig


@pytest.fixture
def place(tmp_path):
    light_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n' * 18 + LONG * 2)
    return tmp_path


LONG = json.dumps({"prompt": "Why?", "completion": "x" * 500}) + "\n"
SHORT_TOKENS = 1 + (1 + 5 + 4 + 1 + 1) + (1 + 6 + 3 + 1) + 1  # <bos>, the user's turn, the model's turn, <eos>


def planned(place, config, **options):
    return plan(config, RunOptions(place / "out", **options))


def sft(place, **options):
    return SftConfig(model=place / "model", data=place / "rows.jsonl", **options)


def test_rows_lengths_and_batches_are_those_of_the_run(place):
    document = planned(place, sft(place, max_length=64, batch_size=4, micro_batch_size=2, epochs=3, eval_fraction=0))
    row = document["data"][0]
    assert (row["rows"], row["checked"], row["over_max_length"]) == (20, 20, 0.1)
    assert row["tokens_median"] == SHORT_TOKENS
    assert row["tokens_max"] == SHORT_TOKENS + 497
    # 18 rows are short enough: 5 batches of 4 in each of three epochs
    batch = document["batch"]
    assert (batch["rows_trained_about"], batch["steps"], batch["micro_batch"]) == (18, 15, 2)
    assert batch["tokens_per_step_about"] == round(SHORT_TOKENS * 4)
    cut = planned(place, sft(place, max_length=64, batch_size=4, epochs=3, eval_fraction=0, on_overlong="truncate"))
    assert cut["batch"]["tokens_per_step_about"] == round((18 * SHORT_TOKENS + 2 * 64) / 20 * 4)
    assert cut["batch"]["rows_trained_about"] == 20


def test_rows_that_are_skipped_are_not_counted_as_trained(place):
    with (place / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "x"}\n' * 4)
    document = planned(place, sft(place, max_length=64, batch_size=4, epochs=3, eval_fraction=0, on_bad_row="skip"))
    assert (document["data"][0]["rows"], document["batch"]["rows_trained_about"]) == (24, 18)
    assert document["batch"]["steps"] == 15


def test_tokens_are_counted_and_time_is_not_guessed(place):
    document = planned(place, sft(place, max_length=64, max_steps=10, batch_size=4, eval_fraction=0))
    assert document["tokens_trained_about"] == 10 * 4 * SHORT_TOKENS
    assert "hours" not in document
    assert document["time"].startswith("not known: ")


def test_a_plan_of_rl_says_how_many_sequences_a_step_has(place):
    (place / "prompts.jsonl").write_text('{"prompt": "Why?"}\n' * 9)
    settings = {"prompts_per_step": 3, "n": 4, "micro_batch_size": 6, "max_new_tokens": 10, "steps": 7}
    config = RlhfConfig(policy=place / "model", prompts=place / "prompts.jsonl", reward_fn="math:fsum", **settings)
    assert planned(place, config)["batch"] == {
        "sequences_per_step": 12, "micro_batch": 6, "new_tokens_per_step_at_most": 120, "steps": 7, "warmup_steps": 1,
    }  # fmt: skip


def test_a_warm_up_that_no_row_can_end_is_refused(place):
    with pytest.raises(UsageError, match=r"warmup_steps 5 of 5 steps .* give --warmup-steps 4 or fewer"):
        planned(place, sft(place, batch_size=4, warmup_steps=5))
    assert planned(place, sft(place, batch_size=4, warmup_steps=4))["batch"]["warmup_steps"] == 4


def test_a_plan_shows_models_and_the_configuration(place):
    config = sft(place, learning_rate=1e-6)
    document = planned(place, config)
    assert document["plan"] == f"sft -> {place / 'out'}, nothing was written"
    assert document["model"] == f"{place / 'model'} (2,408 parameters)"
    assert document["config"] == config.model_dump(mode="json")
    assert "memory_gib" not in planned(place, TinyConfig())


def test_a_plan_refuses_what_the_run_would_refuse(place):
    (place / "out").mkdir()
    (place / "out" / "file").write_text("x")
    with pytest.raises(OutputError, match="exists"):
        planned(place, sft(place))
    with pytest.raises(OutputError, match=r"it has no gemma2\.json"):
        planned(place, sft(place), force=True)
    write_manifest(place / "out", {"status": "complete"})
    planned(place, sft(place), force=True)
    (place / "rows.jsonl").write_text("")
    with pytest.raises(InputError, match="has no rows"):
        planned(place, sft(place), force=True)
    with pytest.raises(InputError, match=r"--policy .* is not a directory"):
        planned(place, RlhfConfig(policy=place / "gone", prompts=place / "rows.jsonl"))
    with pytest.raises(OutputError, match="overlap"):
        plan(sft(place), RunOptions(place / "model" / "out"))


def test_what_does_not_fit_is_a_line_of_the_plan_and_not_its_end(place, monkeypatch, capsys):
    monkeypatch.setattr(plans, "free_disk", lambda path: 1000.0)
    monkeypatch.setattr(plans, "free_memory", lambda: Memory(2000.0, "main memory"))
    words = ["sft", "--model", str(place / "model"), "--data", str(place / "rows.jsonl"), "--out", str(place / "out")]
    assert invoke([*words, "--dry-run", "--json"]) == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["data"][0]["rows"] == 20
    memory, disk = document["problems"]
    assert "2.00 kB of main memory are free" in memory
    assert memory.endswith("use a smaller model, or a machine with more")
    assert "free some space, or choose another disk" in disk
    assert err.count("warning: ") == 2
    assert not (place / "out").exists()
    (place / "p.yaml").write_text(f"""
stages:
  sft: {{command: sft, options: {{model: {place}/model, data: [{place}/rows.jsonl]}}}}
""")
    monkeypatch.setattr(machine, "free_memory", lambda: Memory(2000.0, "main memory"))
    pipeline = ["pipeline", "run", str(place / "p.yaml"), "--out", str(place / "runs"), "--dry-run", "--json"]
    assert invoke(pipeline) == 1
    [problem] = json.loads(capsys.readouterr().out)["problems"]
    assert problem.startswith("stages.sft: memory: about ")
    monkeypatch.undo()
    assert invoke([*words, "--dry-run", "--json"]) == 0


def test_a_run_that_may_lack_memory_warns_and_begins(place, monkeypatch, capsys):
    monkeypatch.setattr(plans, "free_memory", lambda: Memory(2000.0, "main memory"))
    begun = []
    monkeypatch.setattr("gemma2.posttrain.sft.sft.run_sft", lambda *given: begun.append(given) or RunResult(place))
    words = ["sft", "--model", str(place / "model"), "--data", str(place / "rows.jsonl"), "--out", str(place / "out")]
    with suppress(OutputError):  # the output that is not written
        invoke([*words])
    assert len(begun) == 1
    assert "warning: memory: about" in capsys.readouterr().err


def test_pairs_have_two_sides(place):
    (place / "pairs.jsonl").write_text('{"prompt": "Why?", "chosen": "So.", "rejected": "No, no."}\n' * 4)
    config = RewardConfig(model=place / "model", data=place / "pairs.jsonl", batch_size=2, eval_fraction=0)
    document = planned(place, config)
    longer = SHORT_TOKENS + 4 - 1  # without <eos>
    assert document["data"][0]["tokens_max"] == longer
    assert document["batch"]["tokens_per_step_about"] == 2 * 2 * longer


# --- the machine ------------------------------------------------------------------------------------------------------


def test_the_gpu_with_most_free_memory_counts(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'NVIDIA A, 100\\nNVIDIA B, 81000\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.free_memory() == Memory(81000 * 2.0**20, "NVIDIA B")
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML'; exit 9\n")
    assert machine.free_memory().where == "main memory"


def test_a_container_may_have_less_than_its_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    whole = machine.free_memory().free
    (tmp_path / "memory.max").write_text(f"{GIB / 2**10:.0f}\n")
    (tmp_path / "memory.current").write_text("24\n")
    assert machine.free_memory().free == GIB / 2**10 - 24 < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory().free > GIB / 2**10


# --- commands that only print -----------------------------------------------------------------------------------------


def test_a_diff_is_planned_from_headers(place, capsys):
    light_model(place / "b")
    light_model(place / "wide", hidden=12)
    assert invoke(["diff", str(place / "model"), str(place / "b"), "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["tensors"], document["parameters"], document["bytes_to_read"]) == (2, 2408, 2 * 4 * 2408)
    with pytest.raises(InputError, match="wide"):
        invoke(["diff", str(place / "model"), str(place / "wide"), "--dry-run"])


def test_a_report_is_planned_without_its_page(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    (place / "run").mkdir()
    write_manifest(place / "run", {"schema_version": 1, "command": "generate", "status": "complete", "config": {}})
    assert invoke(["report", "run", "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["stages"], document["fronts"], document["curves"]) == (1, 0, 0)
    assert not (place / "report.html").exists()
    with pytest.raises(InputError, match="no output of a gemma2 command"):
        invoke(["report", "model", "--dry-run"])
