"""Two processes are one: sharded models, trainings on shares of each batch, checkpoints. One start of torchrun."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from shard_probes import PROBES
from sharded_job import outcomes, run_job, settings, start_jobs, write_material

pytestmark = pytest.mark.long

# name -> command, what differs from the shared settings; each also runs in one process
TRAININGS = {
    "sft-fsdp": ("sft", {"strategy": "fsdp", "keep": "best"}),
    "sft-fsdp-adapter": (
        "sft",
        {"strategy": "fsdp", "lora_rank": 4, "lora_output": "adapter", "micro_batch_size": 2, "patience": 1},
    ),
    "sft-ddp-passes": ("sft", {"strategy": "ddp", "micro_batch_size": 2}),
    "reward-fsdp": ("reward", {"strategy": "fsdp"}),
    "reward-ddp-lora": ("reward", {"strategy": "ddp", "lora_rank": 4}),
    "distill-fsdp-lora": ("distill", {"strategy": "fsdp", "lora_rank": 4}),
    "distill-ddp": ("distill", {"strategy": "ddp"}),
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of a job list that two processes have worked off."""
    root = write_material(tmp_path_factory.mktemp("two"))

    def job(name, command, more, **how):
        return {"name": name, "command": command, "config": settings(root, command, **more), **how}

    jobs = [{"name": f"probe-{name}", "probe": name} for name in PROBES]
    jobs += [job(name, command, more) for name, (command, more) in TRAININGS.items()]
    # Checkpoints after steps 2 and 4 of 6. A file of one process is cut in the second: the first is taken.
    sharded, whole = {"strategy": "fsdp", "keep": "best"}, {"strategy": "ddp"}
    jobs += [
        job("stopped", "sft", sharded, stop=5),
        job("stopped", "sft", sharded | whole, resume=True),
        {"name": "tear", "tear": ".stopped.partial/checkpoints/checkpoint-4/state/__1_0.distcp"},
        job("stopped", "sft", sharded, resume=True),
        job("fewer", "sft", sharded, stop=5),
        job("fewer-ddp", "sft", whole, stop=5),
        job("nan", "sft", {"strategy": "fsdp"}, poison=3),
        job("seven", "sft", {"strategy": "fsdp", "batch_size": 7}),
        job("tokens", "sft", {"strategy": "fsdp", "micro_batch_tokens": 64}),
        job("half", "sft", {"strategy": "fsdp", "trainer": {"bf16": False}}),
    ]
    process = start_jobs(root, jobs, 2)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-4000:]
    return root


def facts_of(root, name):
    """What a probe found on both processes."""
    return [outcomes(root, rank)[f"probe-{name}"][0] for rank in range(2)]


def test_a_model_is_divided_and_made_whole_again(root):
    for facts in facts_of(root, "weights"):
        assert facts.pop("class") == "Gemma2ForCausalLM"
        assert 0.4 < facts.pop("halves") < 0.6
        assert all(all(value) if isinstance(value, list) else value for value in facts.values()), facts


def test_a_sharded_model_is_written_as_save_pretrained_writes_it(root):
    facts, _ = facts_of(root, "files")
    assert facts["names"] and facts["values"] and facts["dtypes"]
    assert facts["settings"] == [True, True]


def test_a_state_is_restored_bit_for_bit_with_its_moments(root):
    for facts in facts_of(root, "states"):
        assert facts == {"weights": True, "further": True, "the step after": True}


def test_every_process_refuses_weights_that_are_not_those_of_the_model(root):
    first, second = facts_of(root, "refused")
    assert first == second
    name = "model.layers.1.mlp.up_proj.weight"
    assert first["missing"] == f"/broken-missing lacks tensor {name}; check that the weights belong to its config.json"
    assert first["unknown"].startswith("/broken-unknown has the unknown tensor model.stranger")
    assert f"{name} has the shape" in first["shape"]
    assert first["nan"].startswith(f"/broken-nan: {name} holds NaN or Inf")


def test_forward_passes_in_step_are_as_many_on_each_process(root):
    assert facts_of(root, "steps") == [
        {"uneven": [1, 2, 3], "none": [1, 2]},
        {"uneven": [1, None, None], "none": [None, None]},
    ]


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def weights_of(directory):
    (file,) = directory.glob("*model.safetensors")
    return load_file(file)


def assert_same_run(one, several, size=2, apart=None):
    """The figures of two runs agree to TOLERANCE, so do their weights, relative to the largest of each tensor.

    apart: another tolerance of the weights.
    """
    assert len(lines(one)) == len(lines(several))
    for alone, both in zip(lines(one), lines(several), strict=True):
        assert alone.keys() == both.keys()
        for key, value in alone.items():
            near = TOLERANCE if any(part in key for part in ("margin", "correlation", "reward")) else 0.0  # cross zero
            # torch adds the squares of a large tensor in fp32 one by one: in parts the sum is nearer to the truth.
            far = 3e-5 if key == "gradient_norm" else TOLERANCE
            number = isinstance(value, float)
            assert both[key] == (pytest.approx(value, rel=far, abs=near) if number else value), key
    ours, theirs = weights_of(one), weights_of(several)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=0, atol=(apart or TOLERANCE) * float(value.abs().max())), name
    assert json.loads((several / "gemma2.json").read_text())["processes"] == size


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_on_two_processes_is_the_one_of_one_process(root, tmp_path, name):
    assert [outcomes(root, rank)[name] for rank in range(2)] == [["done"], ["done"]]
    command, more = TRAININGS[name]
    passes = {"micro_batch_size": 2 * more["micro_batch_size"]} if "micro_batch_size" in more else {}
    config = settings(root, command, **more) | {"strategy": "auto"} | passes
    assert run_job(tmp_path, {"name": name, "command": command, "config": config}) == "done"
    assert_same_run(tmp_path / name, root / name)
    written = {file.name for file in (tmp_path / name).iterdir()}
    assert {file.name for file in (root / name).iterdir()} == written
    for file in written & {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}:
        assert (root / name / file).read_bytes() == (tmp_path / name / file).read_bytes(), file
    if "adapter_config.json" in written:
        read = [json.loads((at / name / "adapter_config.json").read_text()) for at in (root, tmp_path)]
        targets = [sorted(found.pop("target_modules")) for found in read]  # a set, in the order of its hashes
        assert (targets[0], read[0]) == (targets[1], read[1])
    manifests = [json.loads((at / name / "gemma2.json").read_text()) for at in (tmp_path, root)]
    assert manifests[1]["strategy"] == more["strategy"]
    alone, both = (manifest["summary"] for manifest in manifests)
    assert alone.keys() == both.keys()
    for key, value in alone.items():
        near = 1e-4 if isinstance(value, float) else 0.0
        assert both[key] == (pytest.approx(value, rel=near, abs=near) if near else value), key


def test_a_run_with_a_torn_state_goes_on_from_the_checkpoint_before_bit_for_bit(root):
    for rank in range(2):
        stopped, refused, resumed = outcomes(root, rank)["stopped"]
        assert (stopped, resumed) == ("stopped", "done")
        if rank == 0:
            assert "changed since it began: strategy (fsdp -> ddp); give --strategy fsdp" in refused
        else:
            assert refused == "ends with rank 0: 1"
    for file in ("model.safetensors", "metrics.jsonl"):
        assert (root / "stopped" / file).read_bytes() == (root / "sft-fsdp" / file).read_bytes()


def test_a_sharded_run_goes_on_in_one_process_and_says_so(root, monkeypatch):
    config = settings(root, "sft", strategy="fsdp", keep="best")
    try:
        assert run_job(root, {"name": "fewer", "command": "sft", "config": config, "resume": True}) == "done"
    finally:
        torch.distributed.destroy_process_group()
    manifest = json.loads((root / "fewer/gemma2.json").read_text())
    assert (manifest["processes"], manifest["processes_by_step"]) == (1, "2, from step 4: 1")
    monkeypatch.setitem(globals(), "TOLERANCE", 1e-6)
    assert_same_run(root / "sft-fsdp", root / "fewer", 1)


def test_a_run_with_whole_weights_stays_on_its_number_of_processes(root):
    config = settings(root, "sft", strategy="ddp")
    found = run_job(root, {"name": "fewer-ddp", "command": "sft", "config": config, "resume": True})
    assert "processes (2 -> 1), strategy (ddp -> one); start it on 2 processes with --strategy ddp" in found


def test_processes_end_with_the_same_error(root):
    first, second = outcomes(root, 0), outcomes(root, 1)
    for name, said in (
        ("nan", "step 4 of SFT: the gradient is NaN or infinite, nothing was updated"),
        ("seven", "--batch-size 7 is not a multiple of the 2 processes; give --batch-size 8, or --batch-size 6"),
        ("half", "'trainer.bf16' has no effect with --strategy fsdp"),
        ("tokens", "--micro-batch-tokens is for one process, there are 2; give --micro-batch-size instead"),
    ):
        assert first[name] == second[name]
        assert said in first[name][0]
        assert not list(root.glob(f"*{name}*/gemma2.json"))
    assert os.environ.get("WORLD_SIZE", "1") == "1"  # all of it ran elsewhere
