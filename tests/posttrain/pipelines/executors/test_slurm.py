"""Stages as SLURM jobs, with SLURM's programs as scripts that run the batch scripts for real (tests/fake_slurm.py)."""

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import fake_slurm
import pytest
from processes import MAIN, finish, start
from slurm_jobs import ANY, SLEEP, again, job, outcome_of, running
from waiting import wait_for

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.pipelines.executors import slurm, slurm_commands
from gemma2.posttrain.pipelines.executors.job_process import Mailbox
from gemma2.posttrain.pipelines.executors.slurm import SlurmExecutor
from gemma2.posttrain.schemas import Resources


def given_to(cluster: Path, number: int = 1) -> dict:
    return json.loads((cluster / "jobs" / str(number) / "options.json").read_text())


# --- the script -------------------------------------------------------------------------------------------------------


def test_a_script_asks_for_what_the_stage_reserves_and_is_shell(executor, tmp_path):
    executor.gpus = True
    asked = replace(job(folder="/a b/$c's", command="sft", cpus=6), processes=8, nodes=2)
    text = executor.script(asked, Resources(gpus=8, nodes=2), "gemma2-x")
    lines = text.splitlines()
    wanted = {"--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=6", "--gres=gpu:8", "--no-requeue"}
    wanted |= {"--partition=gpu", "--job-name=gemma2-x", '--output="/a b/$c\'s/logs/a.log"', "--open-mode=append"}
    assert {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")} == wanted
    assert lines[0] == "#!/bin/bash" and "exec srun --kill-on-bad-exit=1 --cpus-per-task=6 " in lines[-1]
    (tmp_path / "s.sh").write_text(text)
    assert subprocess.run(["bash", "-n", "s.sh"], capture_output=True).returncode == 0
    echoed = text.replace("exec srun", "printf '%s\\n' srun").replace("cd -- ", "printf '%s\\n' ")
    said = subprocess.run(["bash", "-c", echoed], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == "/a b/$c's" and said[-1] == "/a b/$c's/logs/a.slurm"  # nothing was expanded


def test_one_machine_needs_no_srun_and_a_command_without_a_network_no_gpu(executor):
    executor.gpus = True
    assert "exec srun" not in executor.script(job(), ANY) and "gres" not in executor.script(job(), ANY)
    assert "--gres=gpu:1\n" in executor.script(job(command="sft"), ANY)
    assert "gres" not in executor.script(job(command="sft"), Resources(gpus=0))
    executor.gpus = False  # the cluster has none
    assert "gres" not in executor.script(job(command="sft"), ANY)


def test_settings_of_the_user_take_the_place_of_ours():
    executor = SlurmExecutor(1, ["gres=gpu:h100:4", "cpus-per-task=16", "exclusive", "time=1-00:00:00"])
    lines = executor.script(job(command="sft", cpus=executor.cpus(None)), ANY).splitlines()
    assert [line for line in lines if "gres" in line] == ["#SBATCH --gres=gpu:h100:4"]
    assert {"#SBATCH --exclusive", "#SBATCH --time=1-00:00:00", "#SBATCH --cpus-per-task=16"} <= {*lines}
    assert executor.cpus(3) == 3 and SlurmExecutor(1).cpus(None) == slurm.CPUS


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("partition=a b", "is not an option of sbatch"),
        ("partition=", "is not an option of sbatch"),
        ("--partition=gpu", "is not an option of sbatch"),
        ("account=x\n#SBATCH --uid=0", "is not an option of sbatch"),
        ("nodes=4", r"is set by the pipeline; give the stage resources: {nodes: N}"),
        ("output=x", "is set by the pipeline; drop it"),
        ("requeue", r"is set by the pipeline; give the stage retries: N"),
    ],
)
def test_what_is_not_a_setting_is_refused(given, said):
    with pytest.raises(UsageError, match=said):
        SlurmExecutor(1, [given])


def test_a_machine_without_slurm_and_a_partition_that_does_not_exist_are_one_line(cluster, monkeypatch):
    with pytest.raises(InputError, match="partition=missing does not exist here; see `sinfo`"):
        SlurmExecutor(1, ["partition=missing"]).prepare([])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match=r"needs sbatch, which is not on PATH; start gemma2 on a login node"):
        SlurmExecutor().prepare([])


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_a_stage_is_a_job_whose_messages_and_outcome_come_through_files(cluster, executor):
    (cluster / "gres").write_text("gpu:8\n")
    assert executor.has_room("filter", ANY)
    executor.start(job(), ANY)
    executor.start(job(stage="b", log="logs/b.log", out="out/b", options={"data": "gone.jsonl"}), ANY)
    assert not executor.has_room("filter", ANY)
    seen = []
    first = outcome_of(executor, seen=seen)
    second = outcome_of(executor, "b", seen) if "b" in executor.running else None
    assert first.code == 0 and first.summary["kept"] == 4
    assert Path("out/a/gemma2.json").is_file()
    assert ("a", ("note", f"job 1 of SLURM; its log is {Path.cwd() / 'logs/a.log'}")) in seen
    assert any(stage == "a" and event[0] == "task" for stage, event in seen)
    assert (executor.gpus, given_to(cluster)["partition"]) == (True, "gpu")
    assert second is None or (second.code == 1 and "gone.jsonl" in second.error)
    assert not Path("logs/a.slurm", slurm.SUBMITTED).exists()


@pytest.mark.parametrize("accounting", [True, False], ids=["sacct", "squeue"])
@pytest.mark.parametrize("state", ["TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"])
def test_a_job_that_slurm_ends_is_one_line_with_the_end_of_its_log(cluster, executor, state, accounting):
    """`retries` cover a code below 0. Without accounting the state of a job that is gone is not known."""
    (cluster / "instead").write_text(SLEEP)
    if not accounting:
        (cluster / "no-accounting").touch()
    executor.start(job(), ANY)
    place = running(cluster)
    wait_for(lambda: "at work" in Path("logs/a.log").read_text())
    fake_slurm.end(place, state, signal.SIGKILL)
    found = outcome_of(executor)
    assert found.code == -1
    how = f"job 1 of SLURM ended ({state}): " if accounting else "job 1 of SLURM is not known any more, and left no"
    assert found.error.startswith(how)
    assert "(its log: at work)" in found.error
    if accounting:
        assert slurm_commands.LOST[state].partition("; ")[2] in found.error


def test_a_job_that_somebody_cancels_is_not_tried_again(cluster, executor):
    (cluster / "instead").write_text(SLEEP)
    executor.start(job(), ANY)
    fake_slurm.end(running(cluster), "CANCELLED", signal.SIGKILL)
    found = outcome_of(executor)
    assert found.code == 1 and "somebody cancelled it" in found.error


def test_a_job_that_sbatch_refuses_is_the_error_of_its_stage(cluster):
    executor = SlurmExecutor(1, ["partition=nowhere"])
    executor.start(job(), ANY)
    assert not executor.has_room("filter", ANY)
    found = outcome_of(executor)
    assert (found.code, found.error) == (
        1,
        "sbatch does not take it: invalid partition specified: nowhere; change --slurm",
    )


def test_a_controller_that_does_not_answer_is_asked_again(cluster, executor):
    (cluster / "instead").write_text(SLEEP)
    executor.start(job(), ANY)
    running(cluster)
    (cluster / "down").touch()
    seen = []
    wait_for(lambda: seen.extend(executor.poll(0.05)[0]) or executor.silent)
    for _ in range(3):
        events, ended = executor.poll(0.1)
        assert ended == {}
        seen += events
    assert [event[1] for _, event in seen if event[0] == "warn"] == [
        "SLURM does not answer; its jobs go on, and it is asked again"
    ]
    (cluster / "down").unlink()
    fake_slurm.end(cluster / "jobs" / "1", "TIMEOUT", signal.SIGKILL)
    assert "(TIMEOUT)" in outcome_of(executor).error


def test_a_submission_whose_answer_is_lost_is_one_job(cluster, executor):
    (cluster / "lost-answer").touch()
    (cluster / "instead").write_text(SLEEP)
    executor.start(job(), ANY)
    assert executor.running["a"].number == "1"
    assert len(list((cluster / "jobs").iterdir())) == 1


# --- a pipeline that ends ---------------------------------------------------------------------------------------------


def test_an_interrupt_cancels_the_jobs_and_waits_for_their_end(cluster, executor):
    (cluster / "instead").write_text("trap 'touch cleaned; exit 143' TERM; touch begun; sleep 600 & wait\n")
    executor.start(job(), ANY)
    running(cluster)
    wait_for(Path("begun").exists)
    executor.stop()
    assert Path("cleaned").exists()
    assert fake_slurm.state(cluster / "jobs" / "1") == "CANCELLED"
    assert not executor.running and not Path("logs/a.slurm", slurm.SUBMITTED).exists()


def test_an_interrupt_while_a_job_is_submitted_cancels_it_too(cluster, executor, monkeypatch):
    (cluster / "instead").write_text(SLEEP)

    def interrupted(script):
        slurm_commands.submit(script)
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        executor.start(job(), ANY)
    executor.stop()
    assert fake_slurm.state(cluster / "jobs" / "1") == "CANCELLED"


def test_a_pipeline_that_is_started_again_finds_its_jobs(cluster, executor):
    (cluster / "instead").write_text(SLEEP)
    executor.start(job(), ANY)
    running(cluster)
    second = again(executor)
    second.start(job(resume=True, force=True), ANY)  # what the kill has left decides these two
    assert second.running["a"].number == "1"
    assert second.poll(0.01)[0] == [("a", ("note", "goes on with job 1 of SLURM"))]
    second.running.clear()


def test_a_job_whose_number_a_kill_has_lost_is_found_by_its_name(cluster, executor):
    (cluster / "instead").write_text(SLEEP)
    executor.start(job(), ANY)
    running(cluster)
    path = Path("logs/a.slurm", slurm.SUBMITTED)
    record = json.loads(path.read_text())
    del record["job"]
    path.write_text(json.dumps(record))
    second = again(executor)
    second.start(job(), ANY)
    assert second.running["a"].number == "1" and len(list((cluster / "jobs").iterdir())) == 1
    second.running.clear()


def test_a_job_of_something_else_ends_before_another_one_begins(cluster, executor):
    (cluster / "instead").write_text(SLEEP)
    executor.start(job(), ANY)
    running(cluster)
    second = again(executor)
    second.start(job(options={"data": "rows.jsonl", "min_words": 3}), ANY)
    assert fake_slurm.state(cluster / "jobs" / "1") == "CANCELLED"
    assert second.running["a"].number == "2"
    running(cluster, 2)  # the fake scancel misses a job that is just about to begin
    second.stop()


def test_an_outcome_that_came_in_between_counts_only_with_its_output(cluster, executor):
    executor.start(job(), ANY)
    wait_for(Path("logs/a.slurm/outcome.json").exists)
    second = again(executor)
    second.start(job(), ANY)
    assert outcome_of(second).code == 0 and len(list((cluster / "jobs").iterdir())) == 1
    executor.start(job(force=True), ANY)  # to be made again
    assert executor.running["a"].number == "2"
    assert outcome_of(executor).code == 0


def test_a_line_that_is_not_whole_yet_comes_later(tmp_path):
    box = Mailbox(tmp_path)
    box.tell(("note", "one"))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('["note", "t')
    assert box.events() == [("note", "one")] and box.events() == []
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('wo"]\n')
    assert box.events() == [("note", "two")]


# --- the command ------------------------------------------------------------------------------------------------------

PIPELINE = """
stages:
  a: {command: filter, options: {data: rows.jsonl, workers: 1}}
  b: {command: filter, retries: 1, options: {data: "${a.out}", workers: 1, min_words: 1}}
"""


def words(*more: str) -> list[str]:
    Path("p.yaml").write_text(PIPELINE)
    return ["pipeline", "run", "p.yaml", "--out", "out", "--executor", "slurm", "--slurm", "partition=gpu", *more]


def test_a_plan_prints_the_scripts_and_submits_nothing(cluster, capsys):
    assert invoke(words("--dry-run", "--json")) == 0
    scripts = json.loads(capsys.readouterr().out)["scripts"]
    assert scripts.keys() == {"a", "b"} and all("#SBATCH --partition=gpu" in text for text in scripts.values())
    assert invoke(words("--dry-run")) == 0
    assert scripts["b"] in capsys.readouterr().out
    assert not list((cluster / "jobs").iterdir()) and not Path("out").exists()
    with pytest.raises(UsageError, match="--slurm is for --executor slurm; give that too, or drop it"):
        invoke(["pipeline", "run", "p.yaml", "--out", "out", "--slurm", "partition=gpu"])


@pytest.mark.slow
def test_a_pipeline_whose_process_is_killed_goes_on_with_its_job(cluster):
    (cluster / "hold").touch()
    first = start(MAIN, *words(), start_new_session=True)
    # A kill before that would end the fake sbatch too, whose real one has a daemon behind it.
    record = Path("out/logs/a.slurm", slurm.SUBMITTED)
    wait_for(lambda: (record.exists() and '"job"' in record.read_text()) or first.poll() is not None)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    (cluster / "hold").unlink()
    code, out, err = finish(start(MAIN, *words("--json")))
    assert code == 0, err
    assert json.loads(out)["complete"] == 2
    assert len(list((cluster / "jobs").iterdir())) == 2  # one for each stage
