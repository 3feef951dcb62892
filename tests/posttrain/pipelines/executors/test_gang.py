"""A stage of several processes: the command line, its steps, its outcome, its end; and which stages may be one."""

import signal
import threading
from dataclasses import replace

import pytest
from stages import compiled
from waiting import wait_for

from gemma2.cli.app import load
from gemma2.core.errors import UsageError
from gemma2.posttrain.pipelines.executors import gang
from gemma2.posttrain.pipelines.executors.gang import command_line, run_gang
from gemma2.posttrain.pipelines.executors.job_values import Job, Outcome
from gemma2.posttrain.pipelines.executors.reservations import runs_as_gang
from gemma2.posttrain.pipelines.scheduler import _launched
from gemma2.posttrain.runs.commands import COMMANDS, spell
from gemma2.posttrain.schemas import Resources, SftConfig
from gemma2.posttrain.schemas.config import resolve

OPTIONS = {"model": "m", "data": ["rows.jsonl"], "learning_rate": 1e-06, "trainer": {"adam_beta2": 0.9}}


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    return Job("a", "sft", OPTIONS, "out/a", "logs/a.log", False, True, str(tmp_path), ("", "mine"), 1, processes=8)


def program(monkeypatch, text):
    """The script that stands for the command; it sees the words of the command line."""
    monkeypatch.setattr(gang, "PROGRAM", ("-c", f"import json, os, sys, time\n{text}"))


def test_the_command_line_parses_and_its_settings_are_those_of_the_job(job):
    job = replace(job, nodes=2)
    settings = gang.Path("logs/a.yaml")
    settings.write_text(gang.to_yaml(OPTIONS))
    words = command_line(job, settings)
    assert words[:2] == ["-m", "gemma2.cli.main"]
    given = load("sft").make_context("sft", words[3:]).params
    assert (given["gpus"], given["nodes"], str(given["out"])) == (8, 2, "out/a")
    assert given["force"] and given["as_json"] and not given["resume"]
    config = resolve(SftConfig, file=gang.Path(given["config"]), flags={"gpus": given["gpus"], "nodes": given["nodes"]})
    assert config == SftConfig(**OPTIONS, gpus=8, nodes=2)


def test_the_steps_of_the_run_are_a_bar_and_the_summary_of_the_output_is_the_outcome(job, monkeypatch):
    monkeypatch.setattr(gang, "LOOK", 0.01)
    program(
        monkeypatch,
        """
os.makedirs("out/.a.partial")
def live(step):
    open("aside", "w").write(json.dumps({"label": "SFT", "step": step, "steps": 3}))
    os.replace("aside", "out/.a.partial/.live.json")
live(1)
while not os.path.exists("seen"):
    time.sleep(0.01)
live(3)
while not os.path.exists("all"):
    time.sleep(0.01)
os.mkdir("out/a")
open("out/a/gemma2.json", "w").write(json.dumps({"status": "complete", "summary": {"loss": 1.5}}))
print(json.dumps({"loss": 1.5, "path": os.environ["PYTHONPATH"]}))
""",
    )
    events = []

    def send(event):
        events.append(event)
        done = sum(event[2] for event in events if event[0] == "advance")
        if done:
            gang.Path("seen" if done == 1 else "all").touch()

    assert run_gang(job, send) == Outcome(0, {"loss": 1.5})
    assert events[0] == ("task", 1, "SFT", 3, "steps") and events[-1] == ("end", 1)
    assert [event[2] for event in events if event[0] == "advance"] == [1, 2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'print(json.dumps({"error": {"kind": "input", "what": "no rows", "fix": "add some"}})); sys.exit(1)',
            Outcome(1, error="no rows; add some"),
        ),
        (
            'print(json.dumps({"error": {"kind": "guard", "what": "KL", "fix": ""}})); sys.exit(3)',
            Outcome(3, error="KL"),
        ),
        ('sys.stderr.write("error: no such flag"); sys.exit(2)', None),
        (
            'print(json.dumps({"error": {"kind": "lost", "what": "another one is gone", "fix": ""}})); sys.exit(1)',
            Outcome(-1, error="another one is gone", kind="lost"),
        ),
        (
            'print(json.dumps({"error": {"kind": "followed", "what": "rank 0 did", "fix": ""}})); sys.exit(3)',
            Outcome(3, error="rank 0 did", kind="followed"),
        ),
        ("os.kill(os.getpid(), 9)", Outcome(-9, error="its command was ended by SIGKILL")),
        (
            'print(json.dumps({"error": {"kind": "system", "what": "rank 3 was killed", "fix": ""}})); sys.exit(137)',
            Outcome(-9, error="rank 3 was killed"),
        ),
    ],
)
def test_an_error_of_the_command_is_that_of_the_stage(job, monkeypatch, capfd, text, expected):
    """A process that was lost has a code below 0: `retries` of the pipeline cover it."""
    program(monkeypatch, text)
    expected = expected or Outcome(2, error="its command ended with exit code 2: no such flag")
    assert run_gang(job, lambda event: None) == expected


def test_a_bug_keeps_its_traceback_and_the_log_has_what_was_said(job, monkeypatch, capfd):
    program(
        monkeypatch,
        'print(json.dumps({"error": {"kind": "bug", "what": "ZeroDivisionError", "fix": ""}}), flush=True); 1 / 0',
    )
    outcome = run_gang(job, lambda event: None)
    assert outcome.code == 1 and not outcome.error
    assert outcome.traceback.startswith("Traceback") and "ZeroDivisionError" in outcome.traceback
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_an_interrupt_reaches_the_command_and_waits_for_its_end(job, monkeypatch):
    program(
        monkeypatch,
        """
import signal
def end(number, frame):
    open("cleaned", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
open("begun", "w").close()
time.sleep(600)
""",
    )
    main = threading.get_ident()

    def interrupt():
        wait_for(gang.Path("begun").exists)
        signal.pthread_kill(main, signal.SIGUSR1)

    def raised(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, raised)
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_gang(job, lambda event: None)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert gang.Path("cleaned").exists()


def test_the_machines_that_ray_has_found_meet_by_the_variables_of_torchrun(job):
    from gemma2.posttrain.launch.nodes import Meeting, meeting_of

    environment = gang._environment(replace(job, nodes=2, node=1, head="10.0.0.7:4321"))
    assert meeting_of(2, [], environment) == Meeting(2, 1, "10.0.0.7", 4321)
    assert environment["PYTHONPATH"] == "mine"


# --- which stages may be one ------------------------------------------------------------------------------------------


def pipeline(tmp_path, resources, command="sft", **options):
    stage = {"command": command, "options": options, "resources": resources}
    return compiled({"a": stage}, tmp_path).stages["a"]


def test_training_measuring_and_sampling_may_be_gangs_and_merges_may_not():
    gangs = {name for name in COMMANDS if name != "make" and runs_as_gang(name)}
    assert {"sft", "distill", "reward", "rlhf", "pareto", "generate", "eval suite", "reward score"} <= gangs
    assert not {"warp", "filter", "pick", "merge slerp", "convert", "reward probe"} & gangs


def test_a_stage_reserves_gpus_and_nodes_and_its_options_do_not(tmp_path):
    stage = pipeline(tmp_path, {"gpus": 8, "nodes": 2}, model="m", data=["d"])
    assert (stage.resources, stage.resources.is_gang) == (Resources(gpus=8, nodes=2), True)
    assert not Resources(gpus=1, nodes=1).is_gang
    advice = r"stages\.a: stages\.a\.options\.gpus is what the stage reserves; write resources: {gpus: 8} in its place"
    with pytest.raises(UsageError, match=advice.replace(r"stages\.a: ", "")):
        pipeline(tmp_path, {}, model="m", data=["d"], gpus=8)
    assert pipeline(tmp_path, {"gpus": 8}, model="m", data=["d"]).resources.gpus == 8  # the advice, followed


def test_a_stage_is_shown_with_its_gang(tmp_path):
    stage = pipeline(tmp_path, {"gpus": 8, "nodes": 2}, model="m", data=["d"])
    shown = spell("sft", _launched(stage, stage.config()), stage.out)
    assert "--gpus 8 --nodes 2" in shown
    alone = pipeline(tmp_path, {"gpus": 1}, model="m", data=["d"])
    assert "--gpus" not in spell("sft", _launched(alone, alone.config()), alone.out)


@pytest.mark.parametrize(("asked", "named"), [({"gpus": 2}, "gpus = 2"), ({"nodes": 3}, "nodes = 3")])
def test_a_command_in_one_process_cannot_be_a_gang(tmp_path, asked, named):
    with pytest.raises(UsageError, match=rf"resources\.{named}: merge linear runs in one process; give \w+: 1"):
        pipeline(tmp_path, asked, "merge linear", models=["a", "b"])
    assert pipeline(tmp_path, dict.fromkeys(asked, 1), "merge linear", models=["a", "b"]).resources


def test_shared_resources_are_for_the_stages_that_can_use_them(tmp_path):
    stages = {
        "a": {"command": "sft", "options": {"model": "m", "data": ["d"]}},
        "b": {"command": "merge linear", "options": {"models": ["${a.out}", "m"]}},
    }
    made = compiled(stages, tmp_path, resources={"gpus": 4, "cpus": 2}).stages
    assert made["a"].resources == Resources(gpus=4, cpus=2)
    assert made["b"].resources == Resources(cpus=2)


def test_the_gang_of_a_warp_stage_is_that_of_its_rl_runs(tmp_path):
    options = {"sft": "m", "prompts": "p", "heldout": "h", "reward_fn": ["r:f"], "iterations": 1}
    made = compiled({"w": {"command": "warp", "options": options, "resources": {"gpus": 4}}}, tmp_path).stages
    assert {stage.command for stage in made.values() if stage.resources.gpus == 4} == {"rlhf"}
    assert all(stage.resources.gpus in (4, None) for stage in made.values())
