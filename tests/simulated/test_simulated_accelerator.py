"""Every command that runs a model, on an accelerator that is simulated: no tensor is left on the wrong device."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rl_job import write_job

from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.tiny.networks import save_random

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
DRAWN = "--max-new-tokens 8"
TRAINED = "--max-steps 2 --batch-size 4 --warmup-steps 0"
ROLLED = (
    "--prompts prompts.jsonl --reward rm --steps 2 --prompts-per-step 2 --n 2 --max-new-tokens 48 --warmup-steps 0 "
    "--eval-prompts 12 --learning-rate 1e-4"
)
SEEN = """import gc, json, torch
from transformers import Gemma2ForCausalLM

def judge(prompts, completions, **columns):
    models = [model for model in gc.get_objects() if type(model) is Gemma2ForCausalLM]
    places = sorted({id(weight): f"{model.device.type} {weight.dtype}" for model in models
                     for weight in [next(model.parameters())]}.values())
    with open("seen.jsonl", "a") as file:
        autocast = torch.is_autocast_enabled("sim")
        file.write(json.dumps({"autocast": autocast, "models": places, "texts": len(completions)}) + "\\n")
    return [float(len(text) % 7) for text in completions]
"""
WATCHED = (
    "--policy policy --prompts prompts.jsonl --heldout prompts.jsonl --reward-fn watching:judge --steps 2 "
    "--prompts-per-step 2 --n 3 --max-new-tokens 32 --warmup-steps 0 --eval-prompts 4 --eval-every 1 "
    "--learning-rate 1e-3 --temperature 1 --eval-seed 0 --out watched"
)
COMMANDS = {
    "generate": f"generate --teacher policy --prompts prompts.jsonl --keep-truncated --out data {DRAWN}",
    "sft": f"sft --model policy --data rows.jsonl --out sft {TRAINED}",
    "sft, LoRA": f"sft --model policy --data rows.jsonl --out sft-lora --lora-rank 2 {TRAINED}",
    "sft, 8 bits": f"sft --model policy --data rows.jsonl --out sft-8 --lora-rank 2 --base-bits 8 {TRAINED}",
    "distill": f"distill --model policy --teacher b --prompts prompts.jsonl --steps 2 --batch-size 2 --warmup-steps 0 "
    f"{DRAWN} --out distilled",
    "distill cache": "distill cache --teacher b --data rows.jsonl --out cache",
    "distill, cached": "distill --model policy --teacher-cache cache --divergence forward-kl --steps 2 --batch-size 2 "
    "--warmup-steps 0 --out distilled-cache",
    "reward pairs": f"reward pairs --model policy --prompts prompts.jsonl --judge judge:judge --n 3 {DRAWN} --out p",
    "reward": f"reward --model policy --data pairs.jsonl --out reward {TRAINED}",
    "reward, 8 bits": f"reward --model policy --data pairs.jsonl --out reward-8 --lora-rank 2 --base-bits 8 {TRAINED}",
    "reward probe": "reward probe --model policy --data pairs.jsonl --out probe",
    "reward score": "reward score rm --data pairs.jsonl --out scored",
    "reward eval": "reward eval rm --data pairs.jsonl",
    "rlhf": f"rlhf --policy policy {ROLLED} --out rl",
    "rlhf, anchor on the host": f"rlhf --policy policy {ROLLED} --anchor-memory cpu --out rl-host",
    "rlhf, fixed anchor": f"rlhf --policy policy {ROLLED} --anchor sft --out rl-fixed",
    "rlhf, LoRA": f"rlhf --policy policy {ROLLED} --lora-rank 2 --out rl-lora",
    "rlhf, factors": f"rlhf --policy policy {ROLLED} --lora-rank 2 --lora-anchor factors --out rl-factors",
    "rlhf, 8 bits": f"rlhf --policy policy {ROLLED} --lora-rank 2 --base-bits 8 --out rl-8",
    "rlhf, 8 bits, dense": f"rlhf --policy policy {ROLLED} --lora-rank 2 --base-bits 8 --lora-anchor dense --out rl-8d",
    "eval": f"eval --model b --sft policy --prompts prompts.jsonl --reward rm {DRAWN}",
    "eval, fp32": f"eval --model b --sft policy --prompts prompts.jsonl --reward rm --dtype float32 {DRAWN}",
    "pareto": f"pareto --sft policy --policies b --merged b --etas 0.5 --prompts prompts.jsonl --reward rm {DRAWN} "
    "--out front",
    "rlhf, watched": f"rlhf {WATCHED}",
    "pareto, watched": "pareto --sft policy --policies watched --prompts prompts.jsonl --limit 4 --temperature 1 "
    "--reward-fn watching:judge --max-new-tokens 32 --out watched-front",
    "chat": "chat policy -p hello --seed 0",
    "doctor": "doctor --deep policy --only loss,attention",
}


def run(world, lines, **environment):
    """What became of command lines in one process with a simulated accelerator."""
    given = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{world}", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, str(HERE / "run_commands.py")],
        input=json.dumps({name: line.split() for name, line in lines.items()}),
        capture_output=True,
        text=True,
        cwd=world,
        env=given,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = write_job(tmp_path_factory.mktemp("simulated"))
    save_random(root / "rm", 2, "reward")
    save_random(root / "b", 1)
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(12)]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in rows]
    (root / "watching.py").write_text(SEEN)
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return root


@pytest.fixture(scope="module")
def found(world):
    return run(world, COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_on_an_accelerator(name, found):
    assert found[name]["code"] == (1 if name == "doctor" else 0), found[name]["said"]  # it sees untrained weights
    assert found[name]["operations"] > 300  # it was the device that computed


def test_one_of_two_devices_is_used_and_said(found):
    assert "2 GPUs are visible, one is used" in found["sft"]["said"]
    assert "GPUs are visible" not in found["eval"]["said"]


def test_longer_answers_wait_for_the_device_every_eighth_token(world):
    """64 more tokens: eight looks more, each of which reads the rows and what has ended."""
    line = "generate --teacher b --prompts prompts.jsonl --keep-truncated --out {} --max-new-tokens {}"
    found = run(world, {"short": line.format("short", 8), "long": line.format("long", 72)})
    assert [one["code"] for one in found.values()] == [0, 0], found
    assert found["long"]["operations"] > 2 * found["short"]["operations"]
    assert 0 < found["long"]["waits"] - found["short"]["waits"] <= 8 * 2 + 4  # and rows that leave the batch


def test_users_code_runs_outside_autocast_and_the_reference_is_off_the_device_while_training(world, found):
    assert found["rlhf, watched"]["code"] == 0
    calls = [json.loads(line) for line in (world / "seen.jsonl").read_text().splitlines()]
    rollouts = [call for call in calls if call["texts"] == 6]
    evaluations = [call for call in calls if call["texts"] == 4]
    assert len(rollouts) == 2 and len(evaluations) >= 3
    assert not any(call["autocast"] for call in calls)
    trained = ["sim torch.float32", "sim torch.float32"]  # policy and anchor
    host = ["cpu torch.bfloat16"]  # the reference
    assert all(call["models"] == host + trained for call in rollouts)
    assert all(call["models"] == host + ["sim torch.bfloat16"] * 2 + trained for call in evaluations[:3])


def test_a_trajectory_is_on_the_front_in_the_precision_of_its_points(world, found):
    assert found["pareto, watched"]["code"] == 0
    values = json.loads((world / "watched-front" / "prompts.json").read_text())["points"]
    lines = [json.loads(line) for line in (world / "watched" / "evaluations.jsonl").read_text().splitlines()]
    assert lines[-1]["values"] == {name: values["watched"][name] for name in ("reward", "kl")}
    assert "watched step 1" in values
    manifest = json.loads((world / "watched" / "gemma2.json").read_text())
    assert manifest["hardware"]["device"] == "sim"
    expected = {"trained": "float32", "products": "bfloat16", "frozen": "bfloat16", "heads": "float32"}
    assert manifest["precision"] == expected
    assert json.loads((world / "watched-front" / "front.json").read_text())["weights_in"] == "bfloat16"


def test_a_tensor_that_was_left_on_the_host_is_noticed(world):
    line = f"generate --teacher policy --prompts prompts.jsonl --keep-truncated --out planted {DRAWN}"
    planted = run(world, {"planted": line}, GEMMA2_PLANTED="1")["planted"]
    assert planted["code"] == -1
    assert "Expected all tensors to be on the same device" in planted["said"]


# --- attention kernels ------------------------------------------------------------------------------------------------

KERNELS = ("sft", "reward", "reward score", "distill", "rlhf", "pareto")


def kernels_of(out):
    """What a manifest says about attention: the kernels of its models, and their checks."""
    models = (read_manifest(out) or {})["attention"]["models"].values()
    return {record["kernel"] for record in models}, [check for record in models for check in record["checks"]]


def moved(name, folder, more=""):
    """A command line of above whose output is elsewhere."""
    return re.sub(r"--out \S+", f"--out {folder}/{name.replace(' ', '-')}", COMMANDS[name]) + more


@pytest.fixture(scope="module")
def with_flex(world):
    return run(world, {name: moved(name, "flex") for name in KERNELS}, GEMMA2_KERNEL="flex")


@pytest.mark.parametrize("name", KERNELS)
def test_a_command_takes_flex_attention_where_it_is_right(name, world, with_flex):
    assert with_flex[name]["code"] == 0, with_flex[name]["said"]
    kernels, checks = kernels_of(world / "flex" / name.replace(" ", "-"))
    assert kernels == {"flex_attention"}
    assert all(check["states"] <= check["limit"] for check in checks)


def test_the_check_is_said_once_in_a_process(with_flex):
    """The commands share a process here: what was decided for an architecture stays."""
    assert "attention: flex_attention, off eager attention by" in with_flex["sft"]["said"]


def test_a_kernel_that_lost_the_soft_cap_is_not_taken_and_not_run(world):
    lines = {"auto": moved("sft", "uncapped"), "asked": moved("sft", "asked", " --attention flex_attention")}
    done = run(world, lines, GEMMA2_KERNEL="uncapped")
    said = {name: " ".join(one["said"].split()) for name, one in done.items()}
    assert (done["auto"]["code"], done["asked"]["code"]) == (0, 2), said
    assert "attention: eager; flex_attention is off eager attention" in said["auto"]
    assert kernels_of(world / "uncapped" / "sft")[0] == {"eager"}
    assert "computes other attention than this model's" in said["asked"]
    assert "without the soft cap; use --attention eager" in said["asked"]
    assert not (world / "asked" / "sft").exists()
