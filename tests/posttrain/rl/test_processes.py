"""RL in several processes is RL in one: the same prompts, draws, gradients, anchor and figures."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import torch
from processes import BARE_CHECKOUT, MAIN, finish, start
from rl_job import environment, words, write_job
from safetensors.torch import load_file
from waiting import wait_for

from gemma2.core.errors import InputError, UsageError
from gemma2.core.ranks import Failure, Ranks
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.evaluation.evaluate import MeasureSettings, measure
from gemma2.posttrain.models.sampler import SamplingParams
from gemma2.posttrain.rl.rlhf import local_rows
from gemma2.posttrain.rl.rollout import Rollout
from gemma2.posttrain.runs.live import ask_to_end
from gemma2.posttrain.runs.run_directory import RunOptions, open_run
from gemma2.posttrain.schemas import RlhfConfig
from gemma2.posttrain.tiny.networks import random_model, tiny_tokenizer

# --- one process at a time --------------------------------------------------------------------------------------------


class Told(Ranks):
    """A rank whose neighbours are told by hand: what they hold, by gather."""

    heard: ClassVar[list] = []

    def gather(self, value):
        self.heard.append(value)
        return self.heard if len(self.heard) == self.size else [value]


def make_rollout(policy, ranks):
    config = RlhfConfig(policy=Path("p"), prompts=Path("p"), n=3, max_new_tokens=6, temperature=1.0)
    prompts = [Prompt("", [{"role": "user", "content": f"What is {a} plus 3?"}]) for a in range(4)]
    score = lambda sampled: {"reward": [float(sum(ids) % 7) for ids in sampled.completions]}  # noqa: E731
    chat = ChatFormat(tiny_tokenizer(), policy.generation_config)
    return Rollout(policy, None, chat, score, config, prompts, torch.Generator().manual_seed(3), 6, ranks)


def test_every_rank_draws_its_share_of_what_one_process_would_draw():
    policy = random_model()
    whole, figures = make_rollout(policy, Ranks())([0, 1, 2, 3])
    Told.heard.clear()
    parts = [make_rollout(policy, Told(rank, 2))([[0, 1], [2, 3]][rank]) for rank in range(2)]
    rows = [row[mask].tolist() for batch, _ in parts for row, mask in zip(batch.ids, batch.mask, strict=True)]
    assert rows == [row[mask].tolist() for row, mask in zip(whole.ids, whole.mask, strict=True)]
    assert torch.equal(torch.cat([batch.advantages for batch, _ in parts]), whole.advantages)
    # The last rank has heard everything: its figures are those of the whole batch.
    assert parts[1][1] == figures


def test_an_evaluation_is_shared_and_each_rank_has_the_whole_of_it():
    policy, reference = random_model(), random_model(1)
    chat = ChatFormat(tiny_tokenizer(), policy.generation_config)
    rows = [Prompt("", [{"role": "user", "content": f"What is {a} plus 3?"}]) for a in range(5)]
    score = lambda sampled: {"reward": [float(sum(ids) % 7) for ids in sampled.completions]}  # noqa: E731

    def measured(ranks, batch_size=1):  # several chunks, the last one smaller than the number of ranks
        settings = MeasureSettings(SamplingParams(6, n=2), batch_size, seed=4, ranks=ranks)
        return measure(policy, reference, chat, rows, [score], settings)

    whole = measured(Ranks())
    Told.heard.clear()
    measured(Told(0, 2))
    last = measured(Told(1, 2))
    assert last.samples == whole.samples
    assert last.columns() == pytest.approx(whole.columns(), rel=1e-5)
    assert [Ranks(rank, 3).share(5) for rank in range(3)] == [slice(0, 1), slice(1, 3), slice(3, 5)]


def test_ranks_share_the_prompts_of_a_step_evenly():
    config = RlhfConfig(policy=Path("p"), prompts=Path("p"), prompts_per_step=6, n=4)
    assert local_rows(config, Ranks(1, 3)) == (8, 8)
    with pytest.raises(UsageError, match="4 processes"):
        local_rows(config, Ranks(0, 4))
    with pytest.raises(UsageError, match="of each process"):
        local_rows(config.model_copy(update={"micro_batch_size": 3}), Ranks(0, 3))


def test_a_command_for_one_process_refuses_to_be_several(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = RlhfConfig(policy=tmp_path, prompts=tmp_path)
    with (
        pytest.raises(UsageError, match="sft was started with 2 processes"),
        open_run("sft", config, RunOptions(tmp_path / "out")),
    ):
        pass
    assert not (tmp_path / "out").exists()


def test_an_error_of_rank_0_ends_the_others_with_its_exit_code_and_no_words(monkeypatch):
    def broken():
        raise InputError("what", "mend")

    monkeypatch.setattr(
        Ranks, "_every", lambda self, value: [value if self.is_main else Failure("InputError", "", "", "", 1)]
    )
    with pytest.raises(InputError):
        Ranks(0, 2).on_main(broken)
    with pytest.raises(SystemExit) as ended:
        Ranks(1, 2).on_main(broken)
    assert ended.value.code == 1


# --- two processes, started by torchrun -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with a policy, prompts, a judge and a script that is `gemma2`."""
    root = write_job(tmp_path_factory.mktemp("job"))
    (root / "gemma2_script.py").write_text(BARE_CHECKOUT + MAIN, encoding="utf-8")
    return root


def command(job, out, *more):
    settings = "--steps 5 --prompts-per-step 4 --n 3 --save-every 2 --eval-every 3 --json"
    return [*words(job, job / out, settings), *more]


def torchrun(job, out, *more):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [*launcher, "--", job / "gemma2_script.py", *command(job, out, *more)]
    return subprocess.Popen(
        list(map(str, line)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(job),
    )


@pytest.mark.slow
def test_two_processes_are_one_and_resume_bit_for_bit(job):
    code, _, err = finish(start(MAIN, *command(job, "one"), env=environment(job)))
    assert code == 0, err
    code, out, err = finish(torchrun(job, "two"))
    assert code == 0, err
    assert json.loads(out)["steps"] == 5  # one document: rank 1 is silent
    for folder in ("", "ema"):
        alone, both = (load_file(job / name / folder / "model.safetensors") for name in ("one", "two"))
        assert all(torch.allclose(alone[name], both[name], atol=2e-5) for name in alone)
    lines = [(job / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    for alone, both in zip(*(map(json.loads, rows) for rows in lines), strict=True):
        assert alone.keys() == both.keys()
        assert all(alone[key] == pytest.approx(both[key], rel=1e-3, abs=1e-4) for key in alone if key != "kind")

    killed = torchrun(job, "again")
    checkpoint = job / ".again.partial" / "checkpoints" / "checkpoint-2" / "complete.json"
    wait_for(lambda: checkpoint.exists() or killed.poll() is not None)
    for process in [*psutil.Process(killed.pid).children(recursive=True), killed]:
        process.kill()  # torchrun starts its workers in sessions of their own
    killed.communicate()
    assert checkpoint.exists()
    code, _, err = finish(start(MAIN, *command(job, "again", "--resume"), env=environment(job)))
    assert code == 1
    assert "processes (2 -> 1)" in err
    code, _, err = finish(torchrun(job, "again", "--resume"))
    assert code == 0, err
    for file in ("model.safetensors", "ema/model.safetensors", "metrics.jsonl", "samples.jsonl"):
        assert (job / "again" / file).read_bytes() == (job / "two" / file).read_bytes(), file


@pytest.fixture(scope="module")
def whole(job):
    """A complete run."""
    code, _, err = finish(start(MAIN, *command(job, "whole"), env=environment(job)))
    assert code == 0, err
    return job / "whole"


@pytest.mark.slow
@pytest.mark.parametrize(("moved", "how"), [(False, "--force"), (False, "--resume"), (True, "--force")])
def test_two_processes_publish_what_was_complete_when_they_were_killed(job, whole, moved, how):
    name = f"finished-{moved}{how}"
    wanted = {file.name: file.read_bytes() for file in whole.iterdir() if file.is_file()}
    found = shutil.copytree(whole, job / (name if moved else f".{name}.partial"))
    (found / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (found / "run.json").write_bytes(wanted["gemma2.json"])
    code, out, err = finish(torchrun(job, name, how))
    assert code == 0, err
    assert err.count("nothing is computed again") == 1
    assert json.loads(out)["steps"] == 5
    assert {file.name: file.read_bytes() for file in (job / name).iterdir() if file.is_file()} == wanted
    assert not (job / name / "checkpoints").exists()
    assert not list(job.glob(f".{name}.partial"))


@pytest.mark.slow
def test_an_error_of_the_whole_job_is_said_once_and_leaves_nothing(job):
    process = torchrun(job, "broken", "--set", "trainer.top_p=0.5")
    code, out, err = finish(process)
    assert code != 0
    assert out == ""
    assert err.count("'trainer.top_p' has no effect here") == 2  # each rank says what it has found
    assert err.count("error: ") == 1
    assert not list(job.glob("*broken*"))


@pytest.mark.slow
def test_an_alert_ends_every_process_at_the_same_step(job):
    process = torchrun(job, "alerted", "--steps", "2000")
    partial = job / ".alerted.partial"
    wait_for(lambda: (partial / "checkpoints/checkpoint-2/complete.json").exists() or process.poll() is not None)
    ask_to_end(partial, "kl 21.3 > 20")
    code, _, err = finish(process)
    assert code != 0
    assert err.count("error: step ") == 1 and err.count("ended by an alert: kl 21.3 > 20") == 1
    assert not (partial / ".alert.json").exists()
