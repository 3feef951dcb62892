"""RL with every model divided over processes: the figures and weights of one process, checkpoints, resumes, kills."""

import json
import random
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from rl_processes import apart, furthest, kill_one, line, metrics, run_lines, write_sharded_job

FIGURES = ("loss", "gradient_norm", "reward", "kl_anchor", "entropy", "length")
LORA = "--lora-rank 2 --learning-rate 1e-2"
# Reward models that are divided as well; the average of two; a reference that is not the start.
KINDS = {
    "full": "--reward {job}/reward-1",
    "dense": f"{LORA} --ema-every 2",
    "factors": f"{LORA} --lora-anchor factors",
}
MORE = {
    "adapter": f"{LORA} --lora-output adapter",
    "sft": "--anchor sft --sft {job}/other",
    "none": "--anchor none",
    "ensemble": "--reward {job}/reward-1,{job}/reward-2 --reward-ensemble mean",
    "average": "--reward {job}/reward-1,{job}/reward-2 --reward-ensemble warm",
    "accumulated": "--micro-batch-size 3",
}
WIDE = "--prompts-per-step 12 --n 2"
OUTPUTS = ("model.safetensors", "ema/model.safetensors", "metrics.jsonl", "samples.jsonl")


def failing(words):
    """A command line whose reward function fails once, after the checkpoint of step 4."""
    return [text.replace("judge:judge", "judge:failing") for text in words]


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Runs of one process, and of two that divide every model; one of them interrupted in its last step and resumed."""
    root = write_sharded_job(tmp_path_factory.mktemp("job"))
    settings = {name: text.format(job=root) for name, text in KINDS.items()}
    assert run_lines(root, 1, [line(root, f"{name}-1", text) for name, text in settings.items()]) == [0, 0, 0]
    lines = [line(root, f"{name}-2", f"{text} --strategy fsdp") for name, text in settings.items()]
    interrupted = failing(line(root, "stopped", f"{settings['full']} --strategy fsdp"))
    lines += [interrupted, [*interrupted, "--resume"]]
    assert run_lines(root, 2, lines) == [0, 0, 0, 1, 0]
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_a_half_of_each_model_compute_what_one_does(job, kind):
    one, two = job / f"{kind}-1", job / f"{kind}-2"
    assert furthest(one, two, FIGURES) <= 1e-5
    assert apart(one / "model.safetensors", two / "model.safetensors") <= 1e-5
    assert apart(one / "ema/model.safetensors", two / "ema/model.safetensors") <= 1e-5
    written = {file.relative_to(one) for file in one.rglob("*")}
    assert {file.relative_to(two) for file in two.rglob("*")} == written
    assert json.loads((one / "config.json").read_text()) == json.loads((two / "config.json").read_text())
    assert json.loads((two / "gemma2.json").read_text())["strategy"] == "fsdp"
    assert len(metrics(two)) > 5


def test_an_interrupted_run_on_two_processes_ends_with_the_bytes_of_one_left_alone(job):
    for name in OUTPUTS:
        found = (job / "stopped" / name).read_bytes().replace(b"rewards/failing", b"rewards/judge")
        assert found == (job / "full-2" / name).read_bytes(), name


# --- slow: more processes, more kinds, another number of processes, kills --------------------------------------------


@pytest.fixture(scope="module")
def alone(job):
    """One process, whole: every kind of run, twelve prompts a step so that 1, 2, 3 and 4 processes share them."""
    settings = {name: f"{text} {WIDE}".format(job=job) for name, text in (KINDS | MORE).items()}
    lines = [line(job, f"{name}-alone", text) for name, text in settings.items()]
    assert run_lines(job, 1, lines) == [0] * len(lines)
    return settings


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "strategy"), [(1, "fsdp"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")])
def test_more_processes_and_kinds_compute_what_one_process_does(job, alone, processes, strategy):
    names = {name: f"{name}-{strategy}-{processes}" for name in alone}
    lines = [line(job, names[name], f"{text} --strategy {strategy}") for name, text in alone.items()]
    assert run_lines(job, processes, lines) == [0] * len(lines)
    for name, out in names.items():
        one, other = job / f"{name}-alone", job / out
        assert furthest(one, other, FIGURES) <= 1e-5, name
        for file in ("model.safetensors", "ema/model.safetensors"):
            assert (one / file).exists() == (other / file).exists()
            assert not (one / file).exists() or apart(one / file, other / file) <= 1e-5, (name, file)
        assert (one / "adapter_model.safetensors").exists() == (other / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_two_processes_goes_on_with_one_three_or_four(job, kind):
    settings = f"{KINDS[kind]} {WIDE} --strategy fsdp".format(job=job)
    begun = failing(line(job, f"{kind}-begun", settings))
    assert run_lines(job, 2, [line(job, f"{kind}-whole", settings), begun]) == [0, 1]
    for processes in (1, 3, 4):
        out = f"{kind}-on-{processes}"
        shutil.copytree(job / f".{kind}-begun.partial", job / f".{out}.partial")
        again = [*failing(line(job, out, settings)), "--resume"]
        assert run_lines(job, processes, [again]) == [0]
        for file in ("model.safetensors", "ema/model.safetensors"):
            assert apart(job / f"{kind}-whole" / file, job / out / file) <= 1e-6
        record = json.loads((job / out / "gemma2.json").read_text())
        assert record["processes_by_step"] == f"2, from step 4: {processes}"


@pytest.mark.slow
def test_another_strategy_is_refused_on_resume_and_the_advice_of_the_error_leads_to_a_run(job):
    settings = f"{KINDS['full']} --strategy fsdp".format(job=job)
    assert run_lines(job, 2, [failing(line(job, "refused", settings))]) == [1]
    again = [*failing(line(job, "refused", settings)), "--resume"]
    whole = [text.replace("fsdp", "ddp") for text in again]
    assert run_lines(job, 2, [whole, again]) == [1, 0]


@pytest.mark.slow
def test_a_state_that_is_torn_on_one_process_is_noticed_and_the_checkpoint_before_it_is_taken(job):
    settings = f"{KINDS['dense']} --strategy fsdp".format(job=job)
    assert run_lines(job, 2, [line(job, "untorn", settings), failing(line(job, "torn", settings))]) == [0, 1]
    parts = sorted((job / ".torn.partial/checkpoints/checkpoint-4/state").glob("__1_*.distcp"))
    assert parts
    with parts[0].open("r+b") as file:
        file.truncate(parts[0].stat().st_size // 2)
    assert run_lines(job, 2, [[*failing(line(job, "torn", settings)), "--resume"]]) == [0]
    for name in OUTPUTS:
        found = (job / "torn" / name).read_bytes().replace(b"rewards/failing", b"rewards/judge")
        assert found == (job / "untorn" / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_process_killed_at_a_random_step_costs_nothing_but_time(job, kind):
    settings = f"{KINDS[kind]} --strategy fsdp --steps 12".format(job=job)
    assert run_lines(job, 2, [line(job, f"{kind}-unkilled", settings)]) == [0]
    killed = line(job, f"{kind}-killed", settings)
    step = random.randint(3, 8)  # a new one every time, named where it fails
    kill_one(job, 2, killed, job / f".{kind}-killed.partial", step)
    assert run_lines(job, 2, [[*killed, "--resume"]]) == [0]
    for name in OUTPUTS:
        same = (job / f"{kind}-killed" / name).read_bytes() == (job / f"{kind}-unkilled" / name).read_bytes()
        assert same, f"{name}, killed in step {step}"


@pytest.mark.slow
def test_two_machines_with_a_copy_each_compute_what_one_process_does(job, alone):
    out = "full-machines"
    port = free_port()
    meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "job"]
    text = line(job, out, f"{alone['full']} --strategy fsdp")
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda _: run_lines(job, 2, [text], meet), range(2)))
    assert codes == [[0], [0]]
    assert furthest(job / "full-alone", job / out, FIGURES) <= 1e-5
    assert apart(job / "full-alone/ema/model.safetensors", job / out / "ema/model.safetensors") <= 1e-5
