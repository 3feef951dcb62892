"""Distillation computes GKD's objective, stops when it should, and resumes bit for bit."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from distilling import END_OF_TURN, QUESTIONS, arguments, ending_model, near, save
from processes import MAIN, finish, start
from safetensors.torch import load_file
from waiting import wait_for

from gemma2.cli.app import invoke
from gemma2.core.errors import GuardStop, InputError, UsageError
from gemma2.core.progress import SILENT
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.distillation import distill, gkd
from gemma2.posttrain.distillation.distill import ratio, run_distill
from gemma2.posttrain.distillation.gkd import GkdTrainer, schedule
from gemma2.posttrain.distillation.teacher_cache import run_cache
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import DistillCacheConfig, DistillConfig
from gemma2.posttrain.schemas.config import resolve
from gemma2.posttrain.tiny.networks import random_model, save_random, tiny_tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    save(ending_model(0), root / "student")
    save(near(ending_model(0), 1), root / "teacher")
    rows = [{"prompt": question} for question in QUESTIONS]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (root / "heldout.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    answers = [{**row, "completion": f"{i}" * (1 + i % 3)} for i, row in enumerate(rows)]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, answers)), encoding="utf-8")
    run_cache(
        DistillCacheConfig(teacher=root / "teacher", data=root / "data.jsonl", top_k=16), RunOptions(root / "cache")
    )
    return root


def configure(root: Path, **fields) -> DistillConfig:
    defaults = {
        "model": root / "student",
        "teacher": root / "teacher",
        "prompts": root / "prompts.jsonl",
        "heldout": root / "heldout.jsonl",
        "steps": 2,
        "batch_size": 4,
        "max_new_tokens": 10,
        "learning_rate": 1e-3,
        "eval_every": 100,
    }
    if "teacher_cache" in fields:
        defaults |= {"teacher": None, "prompts": None, "heldout": None}
        del defaults["max_new_tokens"]  # the completions are there
    if fields.get("on_policy_fraction", 1.0) < 1:
        defaults |= {"data": root / "data.jsonl"}
    if {"data", "teacher_cache"} & {*defaults, *fields}:
        defaults |= {"eval_fraction": 0.2}
    return DistillConfig(**(defaults | fields))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def steps_of(path: Path) -> list[dict]:
    return [row for row in lines(path / "metrics.jsonl") if "loss" in row]


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "out"
    run_distill(configure(inputs, micro_batch_size=1, learning_rate=3e-3), RunOptions(out))
    return out


def test_micro_batches_change_nothing(inputs, trained, tmp_path):
    run_distill(configure(inputs, learning_rate=3e-3), RunOptions(tmp_path / "whole"))
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(trained)[name], tensor, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(steps_of(trained), steps_of(tmp_path / "whole"), strict=True):
        for name in ("loss", "entropy", "length", "truncated", "gradient_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_metrics_and_samples_of_a_run(inputs, trained):
    assert {"loss", "entropy", "length", "truncated", "on_policy", "gradient_norm"} <= steps_of(trained)[0].keys()
    evaluations = [row for row in lines(trained / "metrics.jsonl") if row.get("kind") == "eval"]
    assert [row["step"] for row in evaluations] == [0, 2]
    summary = json.loads((trained / "gemma2.json").read_text(encoding="utf-8"))["summary"]
    assert summary["divergence_before"] == evaluations[0]["divergence"]
    assert summary["divergence"] == evaluations[1]["divergence"]
    assert {row["step"] for row in lines(trained / "samples.jsonl")} == {0, 2}
    model, tokenizer = load_policy(trained)
    assert model.generation_config.eos_token_id == [1, END_OF_TURN]
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_a_student_that_is_its_teacher_stays_as_it_is(inputs, tmp_path):
    run_distill(configure(inputs, teacher=inputs / "student", learning_rate=0.1), RunOptions(tmp_path / "out"))
    assert all(row["loss"] == 0 and row["gradient_norm"] == 0 for row in steps_of(tmp_path / "out"))
    before = weights(inputs / "student")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "out").items())


@pytest.mark.slow
def test_the_student_comes_nearer_to_the_teacher(inputs, tmp_path):
    config = configure(inputs, steps=30, batch_size=8, learning_rate=3e-3, divergence="jsd", beta=0.5)
    summary = run_distill(config, RunOptions(tmp_path / "out")).summary
    assert summary["divergence"] < 0.8 * summary["divergence_before"]


def first_step(config, tmp_path):
    """The loss of the first batch, and the gradient of the embedding."""
    setup = distill.prepare(config, None, Reading(config), SILENT)
    plan = schedule(1, config.batch_size, config.n, setup.material, 1.0, config.seed)
    args = arguments(tmp_path, max_steps=1, seed=config.seed, per_device_train_batch_size=config.batch_size)
    trainer = GkdTrainer(setup.student, setup.loss, setup.material, plan, args)
    batch = trainer._generate_and_score_completions([{"prompt": i, "on_policy": 1} for i in plan["prompt"]])
    loss, _, _ = trainer._compute_loss(trainer.model, batch, batch["num_items_in_batch"])
    return torch.autograd.grad(loss, trainer.model.model.embed_tokens.weight)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"divergence": "forward-kl"},
        {"divergence": "jsd"},
        {"divergence": "jsd", "beta": 0.9},
        {"distill_temperature": 2.0},
        {"temperature": 0.5},
        {"n": 2},
        {"teacher_dtype": "bfloat16"},
        {"seed": 1},
    ],
)
def test_every_option_of_the_objective_changes_the_gradient(inputs, tmp_path, change):
    base = {"divergence": "jsd"} if "beta" in change else {}
    before, after = (first_step(configure(inputs, **fields), tmp_path) for fields in (base, change))
    assert (before - after).norm() > 1e-4 * before.norm()


def test_heads_padded_to_another_size_compare_the_rows_that_both_have(inputs, tmp_path):
    """The same teacher with 88 more rows in its head, which would take most of its mass."""
    padded = ending_model(0, vocab_size=600)
    with torch.no_grad():
        for name, tensor in near(ending_model(0), 1).named_parameters():
            target = dict(padded.named_parameters())[name]
            target[: len(tensor)] = tensor
        padded.model.embed_tokens.weight[512:] = 10 * padded.model.embed_tokens.weight[END_OF_TURN]
    save(padded, tmp_path / "padded")
    same, other = (
        first_step(configure(inputs, teacher=teacher), tmp_path)
        for teacher in (inputs / "teacher", tmp_path / "padded")
    )
    torch.testing.assert_close(same, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_fixed_data_alone_learns_the_rows_and_reports_their_held_out_loss(inputs, tmp_path):
    config = configure(inputs, steps=3, on_policy_fraction=0.0)
    summary = run_distill(config, RunOptions(tmp_path / "out")).summary
    assert [row["on_policy"] for row in steps_of(tmp_path / "out")] == [0, 0, 0]
    assert "length" not in steps_of(tmp_path / "out")[0]
    assert summary["heldout_loss"] != summary["heldout_loss_before"]


@pytest.mark.slow
def test_an_adapter_is_trained_and_merged(inputs, tmp_path):
    run_distill(configure(inputs, lora_rank=2, learning_rate=0.1), RunOptions(tmp_path / "out"))
    before, after = weights(inputs / "student"), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}


def test_a_cache_replaces_teacher_and_prompts(inputs, tmp_path):
    config = configure(inputs, teacher_cache=inputs / "cache", steps=10, divergence="forward-kl", learning_rate=1e-3)
    summary = run_distill(config, RunOptions(tmp_path / "out")).summary
    assert summary["divergence"] < 0.95 * summary["divergence_before"]
    manifest = json.loads((tmp_path / "out" / "gemma2.json").read_text(encoding="utf-8"))
    assert any(Path(source["path"]).name == "cache.json" for source in manifest["data"])


# --- the estimate -----------------------------------------------------------------------------------------------------


def test_ratio_and_its_error_by_hand():
    """Sums 2, 6 over 1, 3 tokens: 2 per token without spread. Sums 1, 3 over 1, 1: 2, residuals -1 and 1, error 1."""
    assert ratio(torch.tensor([2.0, 6.0]), torch.tensor([1.0, 3.0])) == (2.0, 0.0)
    assert ratio(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])) == (2.0, 1.0)
    assert ratio(torch.tensor([3.0]), torch.tensor([2.0])) == (1.5, None)


# --- refusals and guards ----------------------------------------------------------------------------------------------


def test_tokenizers_are_compared_before_a_model_is_loaded(inputs, tmp_path, monkeypatch):
    teacher = tiny_tokenizer()
    teacher.add_tokens(["zebra"])
    random_model(1).save_pretrained(tmp_path / "teacher")
    teacher.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(distill, "load_trained", None)
    with pytest.raises(InputError, match="zebra"):
        run_distill(configure(inputs, teacher=tmp_path / "teacher"), RunOptions(tmp_path / "out"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": None}, "one of them"),
        ({"teacher_cache": "c"}, "one of them"),
        ({"prompts": None}, "needs prompts"),
        ({"on_policy_fraction": 0.5}, "0.5 needs fixed data"),
        ({"beta": 0.5}, "divergence=jsd"),
        ({"n": 3}, "multiple of n 3"),
        ({"micro_batch_size": 3}, "multiple of micro_batch_size 3"),
        ({"teacher": None, "teacher_cache": "c"}, "leave out prompts"),
        ({"teacher": None, "prompts": None, "teacher_cache": "c", "on_policy_fraction": 1.0}, "must be 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(fields, message):
    given = {"model": "m", "teacher": "t", "prompts": "p", "batch_size": 4} | fields
    with pytest.raises(UsageError, match=message):
        resolve(DistillConfig, flags=given)


def test_recipes_may_call_the_share_lambda_as_gkd_does():
    config = resolve(DistillConfig, sets=["model=m", "teacher=t", "prompts=p", "data=d", "lambda=0.25"])
    assert config.fraction == 0.25
    flag = resolve(
        DistillConfig, sets=["model=m", "teacher=t", "prompts=p", "lambda=0.25"], flags={"on_policy_fraction": 1.0}
    )
    assert flag.fraction == 1
    assert resolve(DistillConfig, flags=config.model_dump()) == config


def test_the_share_of_on_policy_steps_is_all_or_from_a_cache_none():
    assert DistillConfig(model="m", teacher="t", prompts="p").fraction == 1
    assert DistillConfig(model="m", teacher="t", prompts="p", data="d", on_policy_fraction=0.25).fraction == 0.25
    assert DistillConfig(model="m", teacher_cache="c").fraction == 0


def test_steps_in_which_every_completion_is_cut_are_learned_from_with_one_warning(inputs, tmp_path, interrupting):
    save_random(tmp_path / "endless", seed=0)
    progress = interrupting()
    config = configure(inputs, model=tmp_path / "endless", steps=7, max_new_tokens=2)
    summary = run_distill(config, RunOptions(tmp_path / "out"), progress).summary
    assert summary["truncated"] == 1 and summary["divergence"] < summary["divergence_before"]
    (warning,) = progress.warnings
    assert "every completion of 3 steps running was cut" in warning


def test_a_gradient_that_is_not_finite_stops_before_the_update(inputs, tmp_path, monkeypatch):
    measured = gkd.divergence_loss

    def poisoned(*given):
        found = measured(*given)
        return type(found)(found.loss * float("nan"), found.values, found.entropies)

    monkeypatch.setattr(gkd, "divergence_loss", poisoned)
    with pytest.raises(GuardStop, match="NaN or infinite"):
        run_distill(configure(inputs), RunOptions(tmp_path / "out"))


# --- resume -----------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for a kill in the middle of a step."""


CASES = {
    "on-policy": {"n": 2, "micro_batch_size": 2},
    "half": {"on_policy_fraction": 0.5, "micro_batch_size": 2},
    "adapter": {"lora_rank": 2},
    "cache": {"teacher_cache": "cache"},
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "half" else pytest.mark.slow) for case in CASES]
)
def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(inputs, tmp_path, monkeypatch, case):
    fields = dict(CASES[case])
    if "teacher_cache" in fields:
        fields["teacher_cache"] = inputs / "cache"
    config = configure(inputs, steps=4, save_every=2, eval_every=3, **fields)
    run_distill(config, RunOptions(tmp_path / "whole"))
    compute = GkdTrainer._compute_loss

    def die(self, *given):
        if self.state.global_step == 3:
            raise Killed
        return compute(self, *given)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(GkdTrainer, "_compute_loss", die)
        run_distill(config, RunOptions(tmp_path / "parts"))
    assert not (tmp_path / "parts").exists()
    run_distill(config, RunOptions(tmp_path / "parts", resume=True))
    for name in ("model.safetensors", "metrics.jsonl", *(("samples.jsonl",) if case != "cache" else ())):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_a_resume_against_another_teacher_is_refused(inputs, tmp_path, monkeypatch):
    save(ending_model(2), tmp_path / "teacher")
    config = configure(inputs, teacher=tmp_path / "teacher", steps=3, save_every=1)
    compute = GkdTrainer._compute_loss

    def die(self, *given):
        if self.state.global_step == 2:
            raise Killed
        return compute(self, *given)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(GkdTrainer, "_compute_loss", die)
        run_distill(config, RunOptions(tmp_path / "out"))
    save(ending_model(3), tmp_path / "teacher")
    with pytest.raises(InputError, match="weights of teacher"):
        run_distill(config, RunOptions(tmp_path / "out", resume=True))


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_command_killed_again_and_again_ends_with_the_bytes_of_one_that_was_not(inputs, tmp_path, share):
    """kill -9 at three random moments of training, through the command."""
    words = ["distill", "--model", inputs / "student", "--teacher", inputs / "teacher"]
    words += ["--prompts", inputs / "prompts.jsonl", "--heldout", inputs / "heldout.jsonl", "--lambda", share]
    words += [] if share == 1 else ["--data", inputs / "data.jsonl"]
    words += ["--steps", 40, "--batch-size", 4, "--micro-batch-size", 2, "--n", 2, "--max-new-tokens", 10]
    words += ["--save-every", 3, "--eval-every", 10, "--learning-rate", "1e-3", "--quiet", "--out"]
    assert finish(start(MAIN, *words, tmp_path / "whole"))[0] == 0
    dice, out = random.Random(int(share * 10)), tmp_path / "parts"
    seen = -1
    for attempt in range(3):
        process = start(MAIN, *words, out, *(["--resume"] if attempt else []))
        metrics, until = tmp_path / ".parts.partial" / "metrics.jsonl", seen + dice.randint(4, 12)
        wait_for(lambda: newest(metrics) >= until or process.poll() is not None)  # noqa: B023
        seen = max(seen, newest(metrics))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if out.exists():  # it was quicker than the look at its metrics
            break
    assert attempt > 0
    assert out.exists() or finish(start(MAIN, *words, out, "--resume"))[0] == 0
    for name in ("model.safetensors", "metrics.jsonl", "samples.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def newest(path: Path) -> int:
    """The last step of a file of metrics."""
    return max((row["step"] for row in torn_lines(path)), default=-1)


def torn_lines(path: Path) -> list[dict]:
    """The whole lines of a file that another process is writing."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--lambda", "--on-policy-fraction"])
def test_the_share_of_on_policy_steps_has_gkd_s_name_and_a_plain_one(inputs, tmp_path, flag, capsys):
    words = ["distill", "--model", inputs / "student", "--teacher", inputs / "teacher"]
    words += ["--prompts", inputs / "prompts.jsonl", flag, 0.5, "--out", tmp_path / "out"]
    with pytest.raises(UsageError, match=r"lambda .* 0.5 needs fixed data"):
        invoke([str(word) for word in words])


def test_the_cache_is_a_command_of_its_own(inputs, tmp_path, capsys):
    words = ["distill", "cache", "--teacher", inputs / "teacher", "--data", inputs / "data.jsonl", "--top-k", 4]
    assert invoke([str(word) for word in [*words, "--dry-run", "--json", "--out", tmp_path / "cache"]]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["top_k"] == 4
    assert not list(tmp_path.iterdir())
