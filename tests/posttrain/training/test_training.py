"""What the training steps share: options by name, checkpoints that prove themselves, the NaN guard, an exact resume."""

import math
from types import SimpleNamespace

import pytest
import torch
from lines import STEPS, Bars, Line, fit, metrics_of, opened, rows
from trl import SFTConfig

from gemma2.core.errors import AlertStop, GuardStop, OutputError, UsageError
from gemma2.posttrain.runs.live import ask_to_end, read_live
from gemma2.posttrain.training import checkpoints, trainer
from gemma2.posttrain.training.checkpoints import is_complete, latest_checkpoint, mark_complete
from gemma2.posttrain.training.trainer import configured, trainer_arguments

# --- trainer options --------------------------------------------------------------------------------------------------


def test_settings_reach_the_trainer_under_its_names(tmp_path):
    with opened(tmp_path, warmup_steps=5, max_grad_norm=0.5, log_every=7) as (config, run):
        arguments = trainer_arguments(SFTConfig, config, run, max_steps=9)
        assert arguments["output_dir"] == str(run.path / "checkpoints")
    expected = {
        "learning_rate": 0.1,
        "warmup_steps": 5,
        "max_grad_norm": 0.5,
        "save_steps": 2,
        "logging_steps": 7,
        "seed": 3,
        "data_seed": 3,
        "max_steps": 9,
        "report_to": "none",
    }
    assert {key: arguments[key] for key in expected} == expected


def test_further_options_are_passed_on_by_name(tmp_path):
    with opened(tmp_path, trainer={"adam_beta1": 0.5, "bf16": True}) as (config, run):
        arguments = trainer_arguments(SFTConfig, config, run)
        assert (arguments["adam_beta1"], arguments["bf16"]) == (0.5, True)


def test_one_of_several_gpus_is_used(tmp_path):
    """transformers counts what is visible, and would wrap the model into nn.DataParallel."""

    class TwoGpus(SFTConfig):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    with opened(tmp_path) as (config, run):
        arguments = configured(TwoGpus, config, trainer_arguments(SFTConfig, config, run, max_steps=9))
        assert arguments.n_gpu == 1
        assert arguments.train_batch_size == arguments.per_device_train_batch_size


@pytest.mark.parametrize(
    "value", [{"accelerator_config": "gone.json"}, {"debug": "x"}, {"accelerator_config": {"a": 1}}]
)
def test_a_value_that_the_library_refuses_is_named_in_one_line(tmp_path, value):
    with opened(tmp_path, trainer=value) as (config, run), pytest.raises(UsageError, match=next(iter(value))) as caught:
        configured(SFTConfig, config, trainer_arguments(SFTConfig, config, run, max_steps=9))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            "fsdp",
            r"'trainer\.fsdp' is not accepted: --strategy decides .*; leave it out, and give --gpus N --strategy fsdp",
        ),
        ("deepspeed", r"'trainer\.deepspeed' is not accepted: --strategy decides"),
        ("adam_beta", r"unknown key 'trainer\.adam_beta'; did you mean 'adam_beta[12]'"),
        ("gradient_checkpointing", r"unknown key 'trainer\.gradient_checkpointing'"),
        ("report_to", r"'trainer\.report_to' is set by an option of this command"),
        ("seed", r"'trainer\.seed' is set by an option of this command"),
        ("max_steps", r"'trainer\.max_steps' is set by an option of this command"),
    ],
)
def test_an_unknown_option_or_one_that_a_flag_sets_is_refused(tmp_path, option, said):
    with (
        opened(tmp_path, trainer={option: 1}) as (config, run),
        pytest.raises(UsageError, match=said),
    ):
        trainer_arguments(SFTConfig, config, run, max_steps=9)


def test_a_further_option_changes_the_result(tmp_path, whole):
    with opened(tmp_path, trainer={"weight_decay": 0.9}) as (config, run):
        assert fit(config, run).norm() < whole[0].norm()


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint-4"
    path.mkdir()
    (path / "weights").write_text("weights")
    (path / "state").write_text("state")
    mark_complete(path)
    return path


def test_a_checkpoint_with_its_mark_and_every_digest_is_complete(checkpoint):
    assert is_complete(checkpoint)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "weights").write_text("weightz"),
        lambda path: (path / "weights").unlink(),
        lambda path: (path / "complete.json").unlink(),
        lambda path: (path / "complete.json").write_bytes(b'{"files": {"\xff'),
        lambda path: (path / "complete.json").write_text("{}"),
    ],
)
def test_a_damaged_checkpoint_is_not_complete(checkpoint, damage):
    damage(checkpoint)
    assert not is_complete(checkpoint)


def test_the_newest_complete_checkpoint_is_found_and_torn_ones_removed(tmp_path):
    with opened(tmp_path) as (_, run):
        for step in (2, 9, 10, 11):
            path = run.checkpoints / f"checkpoint-{step}"
            path.mkdir(parents=True)
            (path / "weights").write_text(f"{step}")
            mark_complete(path)
        (run.checkpoints / "checkpoint-11" / "weights").write_text("torn")
        (run.checkpoints / "checkpoint-12").mkdir()
        assert latest_checkpoint(run) == (run.checkpoints / "checkpoint-10", 10)
        assert sorted(path.name for path in run.checkpoints.iterdir()) == [
            "checkpoint-10",
            "checkpoint-2",
            "checkpoint-9",
        ]


def test_without_a_complete_checkpoint_none_is_found(tmp_path):
    with opened(tmp_path) as (_, run):
        assert latest_checkpoint(run) is None
        (run.checkpoints / "checkpoint-1").mkdir(parents=True)
        assert latest_checkpoint(run) is None


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (weights, metrics, the recorded progress)."""
    bars = Bars()
    with opened(tmp_path_factory.mktemp("whole")) as (config, run):
        weights = fit(config, run, bars)
        return weights, metrics_of(run), bars


def test_each_step_is_logged_once_without_wall_clock_figures(whole):
    _, metrics, _ = whole
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert set(metrics[0]) == {"step", "loss", "gradient_norm", "clipped", "learning_rate", "epoch"}


def test_the_first_loss_is_the_one_by_hand(whole):
    _, metrics, _ = whole
    losses = [row["y"] ** 2 for row in rows()]
    pairs = [float(a + b) / 2 for i, a in enumerate(losses) for b in losses[i + 1 :]]
    assert min(abs(metrics[0]["loss"] - loss) for loss in pairs) < 1e-4, "w = 0: the mean of two squared targets"


def test_the_bar_counts_optimizer_steps_and_is_closed(whole):
    _, _, bars = whole
    assert bars.reported[0] == ("a line", STEPS, "steps")
    assert bars.done == STEPS
    assert bars.open == 0
    assert bars.reported[-1][1]["loss"] > 0


@pytest.mark.parametrize("stop", [1, 5])
def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path, whole, stop):
    bars = Bars(stop)
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as (config, run):
        fit(config, run, bars)
    assert bars.open == 0, "the bar is closed"
    kept = (tmp_path / ".out.partial").exists()
    assert kept == (stop > 2), "the first checkpoint is that of step 2"
    with opened(tmp_path, resume=kept) as (config, run):
        again = Bars()
        weights = fit(config, run, again)
        metrics = metrics_of(run)
    assert torch.equal(weights, whole[0])
    assert metrics == whole[1]
    assert again.reported[1] == ((stop - 1) // 2 * 2, {}), "the bar begins at the checkpoint"


@pytest.mark.parametrize("step", [2, 4])
def test_a_checkpoint_that_the_disk_has_no_room_for_is_refused_before_it_is_written(tmp_path, whole, monkeypatch, step):
    asked = []

    def usage(directory):
        asked.append(directory)
        return SimpleNamespace(free=0 if len(asked) == step // 2 else 10**9)

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", usage)
    then = "start again" if step == 2 else "continue with --resume"
    message = rf"step {step}: its checkpoint needs .* has 0 B free; free some space, then {then}"
    with pytest.raises(OutputError, match=message), opened(tmp_path) as (config, run):
        fit(config, run)
    kept = tmp_path / ".out.partial" / "checkpoints"
    left = [path.name for path in kept.iterdir()] if kept.exists() else []
    assert left == (["checkpoint-2"] if step == 4 else [])
    with opened(tmp_path, resume=bool(left)) as (config, run):
        assert torch.equal(fit(config, run), whole[0])


def test_the_size_of_the_first_checkpoint_is_a_lower_bound(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(trainer, "check_room", lambda directory, needed, step: seen.append(needed))
    with opened(tmp_path) as (config, run):
        fit(config, run)
        written = sum(path.stat().st_size for path in (run.checkpoints / "checkpoint-4").iterdir())
    assert 3 * 4 <= seen[0] <= written
    assert seen[1] == pytest.approx(written, rel=0.2)


def test_a_resume_ignores_a_torn_checkpoint(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as (config, run):
        fit(config, run, Bars(5))
    (tmp_path / ".out.partial" / "checkpoints" / "checkpoint-4" / "optimizer.pt").write_bytes(b"torn")
    with opened(tmp_path, resume=True) as (config, run):
        assert torch.equal(fit(config, run), whole[0])
        assert metrics_of(run) == whole[1]


@pytest.mark.parametrize(("torn", "step"), [((), 4), (("checkpoint-4",), 2), (("checkpoint-2", "checkpoint-4"), 0)])
def test_a_resumed_run_records_from_which_step_on_its_processes_are_those_of_now(tmp_path, monkeypatch, torn, step):
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as (config, run):
        fit(config, run, Bars(5))
    for name in torn:
        (tmp_path / ".out.partial" / "checkpoints" / name / "optimizer.pt").write_bytes(b"torn")
    recorded = []
    with opened(tmp_path, resume=True) as (config, run):
        monkeypatch.setattr(run, "goes_on_at", recorded.append)
        fit(config, run)
    assert recorded == [step]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_the_update_and_before_a_save(tmp_path, bad):
    broken = [{"x": row["x"], "y": torch.tensor(bad)} for row in rows()]
    model = Line()
    stopped = pytest.raises(GuardStop, match="step 1 of a line: the gradient is NaN or infinite")
    with stopped, opened(tmp_path, save_every=1) as (config, run):
        fit(config, run, data=broken, model=model)
    assert torch.equal(model.w.detach(), torch.zeros(3)), "nothing was updated"
    assert not (tmp_path / ".out.partial").exists(), "nothing was saved"


# --- a watcher --------------------------------------------------------------------------------------------------------


class Asking(Bars):
    """A watcher that wants the run to end once `at` steps have passed."""

    def __init__(self, partial, at):
        super().__init__()
        self.partial, self.at = partial, at

    def advance(self, amount=1, **fields):
        super().advance(amount, **fields)
        if self.done == self.at:
            ask_to_end(self.partial, "kl 21.3 > 20")


def test_an_alert_ends_the_run_before_its_next_step_and_a_resume_ends_with_the_same_bytes(tmp_path, whole):
    partial = tmp_path / ".out.partial"
    stopped = pytest.raises(AlertStop, match=r"step 4 of a line: ended by an alert: kl 21\.3 > 20; --resume continues")
    with stopped as caught, opened(tmp_path) as (config, run):
        fit(config, run, Asking(partial, 3))
    assert caught.value.exit_code == 4
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3]
    assert (read_live(partial)["step"], read_live(partial)["exit_code"]) == (3, 4)
    assert not (partial / ".alert.json").exists()
    with opened(tmp_path, resume=True) as (config, run):
        assert read_live(partial) == {}
        weights = fit(config, run)
        assert metrics_of(run) == whole[1]
        run.finish({})
    assert torch.equal(weights, whole[0])
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_an_alert_that_nobody_heard_does_not_end_the_resumed_run(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as (config, run):
        fit(config, run, Bars(5))
    ask_to_end(tmp_path / ".out.partial", "of the run before")
    with opened(tmp_path, resume=True) as (config, run):
        assert torch.equal(fit(config, run), whole[0])


def test_an_alert_of_another_run_is_not_heard(tmp_path, whole):
    (tmp_path / ".other.partial").mkdir()
    with opened(tmp_path) as (config, run):
        assert torch.equal(fit(config, run, Asking(tmp_path / ".other.partial", 2)), whole[0])


def test_the_record_follows_the_steps(tmp_path):
    with opened(tmp_path) as (config, run):
        fit(config, run)
        found = read_live(run.path)
    assert (found["label"], found["step"], found["steps"], found["error"]) == ("a line", STEPS, STEPS, None)
    assert found["times"][0][1] == 0 and found["times"][-1][1] == STEPS
