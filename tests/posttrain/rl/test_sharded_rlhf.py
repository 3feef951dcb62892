"""RL with every model divided over processes: the figures and weights of one process, checkpoints, resumes, kills."""

import json

import pytest
from rl_processes import apart, furthest, line, metrics, run_lines, write_sharded_job

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
    "sft": "--anchor sft --sft {job}/reward-1-policy",
    "none": "--anchor none",
    "ensemble": "--reward {job}/reward-1 --reward {job}/reward-2 --reward-ensemble mean",
    "average": "--reward {job}/reward-1 --reward {job}/reward-2 --reward-ensemble warm",
    "accumulated": "--micro-batch-size 3",
}
OUTPUTS = ("model.safetensors", "ema/model.safetensors", "metrics.jsonl", "samples.jsonl")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Runs of one process, and of two that divide every model; one of them interrupted in its last step and resumed."""
    root = write_sharded_job(tmp_path_factory.mktemp("job"))
    settings = {name: text.format(job=root) for name, text in KINDS.items()}
    assert run_lines(root, 1, [line(root, f"{name}-1", text) for name, text in settings.items()]) == [0, 0, 0]
    stopped = settings["full"].replace("judge:judge", "judge:failing")
    lines = [line(root, f"{name}-2", f"{text} --strategy fsdp") for name, text in settings.items()]
    interrupted = [text.replace("judge:judge", "judge:failing") for text in line(root, "stopped", stopped)]
    lines += [[*interrupted, "--strategy", "fsdp"], [*interrupted, "--strategy", "fsdp", "--resume"]]
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
