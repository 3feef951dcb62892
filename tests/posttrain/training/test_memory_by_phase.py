"""Memory that is exhausted in any phase of a training: one line, with what was asked and what was resident."""

import re
import shlex
from importlib import import_module

import pytest
import torch
from rl_job import write_job

from gemma2.core.errors import OutOfMemory
from gemma2.core.outputs.staging import partial_path
from gemma2.posttrain.rl import rlhf, rloo, rollout
from gemma2.posttrain.rl.rlhf import run_rlhf
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import RlhfConfig, SftConfig
from gemma2.posttrain.sft import sft_trainer
from gemma2.posttrain.sft.sft import run_sft
from gemma2.posttrain.tiny.networks import save_random
from gemma2.posttrain.training import heldout

ADAM = import_module("torch.optim.adam")
ON_HOST = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes. Error code 12"


def fails(*args, **kwargs):
    raise RuntimeError(ON_HOST)


# Phase -> what fails in it (a module or class, and a name), whether step 1 is over before.
RLHF = {
    "sampling": (rollout, "random_numbers"),
    "scoring by the reward": (rollout, "Sampled"),
    "scoring by the anchor": (rollout, "token_logps"),
    "loss": (rloo, "policy_loss"),
    "backward pass": (torch.Tensor, "backward"),
    "optimizer step": (ADAM, "adam"),
    "evaluation": (rlhf, "measure"),
}
SFT = {
    "loss": (sft_trainer, "summed_cross_entropy"),
    "backward pass": (torch.Tensor, "backward"),
    "optimizer step": (ADAM, "adam"),
    "evaluation": (heldout, "heldout_loss"),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = write_job(tmp_path_factory.mktemp("memory"))
    save_random(root / "rm", 2, "reward")
    (root / "rows.jsonl").write_text("\n".join(f'{{"prompt": "Say {i}.", "completion": "{i}"}}' for i in range(8)))
    return root


def started(job, command, out, resume=False):
    options = RunOptions(out, resume=resume)
    if command == "sft":
        config = SftConfig(
            model=job / "policy", data=job / "rows.jsonl", eval_data=job / "rows.jsonl", eval_every=1, save_every=1,
            max_steps=2, batch_size=4, warmup_steps=0, learning_rate=1e-4,
        )  # fmt: skip
        return lambda: run_sft(config, options), config
    config = RlhfConfig(
        policy=job / "policy", prompts=job / "prompts.jsonl", heldout=job / "prompts.jsonl", reward=(job / "rm",),
        steps=2, save_every=1, prompts_per_step=2, n=2, max_new_tokens=8, eval_prompts=2, eval_every=1, warmup_steps=0,
        learning_rate=1e-4,
    )  # fmt: skip
    return lambda: run_rlhf(config, options), config


def at_second_step(monkeypatch, place, name):
    """Fail in the second step, when there is a checkpoint to keep and the optimizer has its moments."""
    from transformers import Trainer

    training_step = Trainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 1:
            monkeypatch.setattr(place, name, fails)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step)


@pytest.mark.parametrize(
    ("command", "phase"), [*(("rlhf", phase) for phase in RLHF), *(("sft", phase) for phase in SFT)]
)
def test_a_shortage_in_any_phase_is_one_line_and_the_checkpoint_stays(job, tmp_path, monkeypatch, command, phase):
    work, _ = started(job, command, tmp_path / "out")
    with monkeypatch.context() as planted, pytest.raises(OutOfMemory) as caught:
        at_second_step(planted, *(RLHF if command == "rlhf" else SFT)[phase])
        work()
    line = str(caught.value)
    label = "RL" if command == "rlhf" else "SFT"
    assert line.startswith(f"step 2 of {label}, {phase}: memory is exhausted, 3221225472 bytes more were asked for; ")
    assert "\n" not in line and caught.value.exit_code == 1
    parts = dict(
        re.findall(r"(?:were|,) ([a-z ]+?) ([\d.]+ [kMG]B)", line.partition("in memory ")[2].partition(";")[0])
    )
    others = {"anchor", "reference", "reward models"} if command == "rlhf" else set()
    assert parts.keys() - {"gradients"} == {"weights", "optimizer"} | others
    assert parts["weights"] == "51.8 kB"  # 12,944 in fp32, the tied head once
    assert parts["optimizer"] == "104 kB"  # two moments of each, and a step of each tensor
    assert ("gradients" in parts) == (phase == "optimizer step")  # the others come before there are any
    assert (partial_path(tmp_path / "out") / "checkpoints" / "checkpoint-1").is_dir()
    assert "continue with --resume" in line


def test_its_advice_leads_to_a_run(job, tmp_path, monkeypatch):
    work, config = started(job, "sft", tmp_path / "out")
    with monkeypatch.context() as planted, pytest.raises(OutOfMemory) as caught:
        at_second_step(planted, ADAM, "adam")
        work()
    found = re.search(r"or start over with --force (--.*?) \((\S+ \S+) by the plan, not (\S+ \S+)\)", str(caught.value))
    given = shlex.split(found[1])
    changed = config.model_copy(
        update={
            key.removeprefix("--").replace("-", "_"): int(value)
            for key, value in zip(given[::2], given[1::2], strict=True)
        }
    )
    assert changed != config
    run_sft(changed, RunOptions(tmp_path / "out", force=True))
    again, _ = started(job, "sft", tmp_path / "resumed")
    with monkeypatch.context() as planted, pytest.raises(OutOfMemory):
        at_second_step(planted, ADAM, "adam")
        again()
    started(job, "sft", tmp_path / "resumed", resume=True)[0]()
    assert (tmp_path / "resumed" / "config.json").is_file()
