"""Distillation computes GKD's objective, stops when it should, and resumes bit for bit."""

import inspect
import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from processes import MAIN, finish, start
from safetensors.torch import load_file
from transformers import Trainer
from trl import DistillationConfig as TrlConfig
from trl import DistillationTrainer

from gemma2.cli.app import invoke
from gemma2.merging.errors import GuardStop, InputError, UsageError
from gemma2.merging.progress import SILENT
from gemma2.posttrain import distill, gkd
from gemma2.posttrain.chat import ChatFormat
from gemma2.posttrain.config import resolve
from gemma2.posttrain.data import Prompt
from gemma2.posttrain.distill import ratio, run_distill
from gemma2.posttrain.divergence import Divergence
from gemma2.posttrain.examples import Example
from gemma2.posttrain.gkd import GkdTrainer, Loss, Material, schedule
from gemma2.posttrain.guards import Guards
from gemma2.posttrain.models import load_policy
from gemma2.posttrain.rundir import RunOptions
from gemma2.posttrain.sampler import SamplingParams
from gemma2.posttrain.schemas import DistillCacheConfig, DistillConfig
from gemma2.posttrain.teacher import LiveTeacher, check_head, check_same_tokenizer, common_vocabulary
from gemma2.posttrain.teacher_cache import run_cache
from gemma2.posttrain.tiny import random_model, save_random, tiny_tokenizer

END_OF_TURN = 107
QUESTIONS = [f"What is {a} plus {b}?" for a in range(4) for b in range(3)]

OVERRIDDEN = {
    DistillationTrainer: {
        "_generate_and_score_completions": ["self", "inputs"],
        "_compute_loss": ["self", "unwrapped_student", "inputs", "num_items_in_batch"],
        "_save_checkpoint": ["self", "model", "trial"],
    },
    Trainer: {
        "_save_checkpoint": ["self", "model", "trial"],
        "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    },
}


def ending_model(seed=0, **overrides):
    """An untrained model that ends its turns often enough to be sampled from."""
    model = random_model(seed, **overrides)
    with torch.no_grad():
        model.model.embed_tokens.weight[END_OF_TURN] *= 12
    return model


def near(model, seed):
    """A teacher for it: the same weights, a little moved, so that a student keeps ending its turns."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def save(model, path: Path) -> Path:
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


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
        "eval_fraction": 0.2,
    }
    if "teacher_cache" in fields:
        defaults |= {"teacher": None, "prompts": None, "heldout": None}
    if fields.get("on_policy_fraction", 1.0) < 1:
        defaults |= {"data": root / "data.jsonl"}
    return DistillConfig(**(defaults | fields))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def steps_of(path: Path) -> list[dict]:
    return [row for row in lines(path / "metrics.jsonl") if "loss" in row]


def arguments(tmp_path, **fields):
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "shuffle_dataset": False,
        "disable_dropout": True,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "save_strategy": "no",
    }
    return TrlConfig(**(defaults | fields))


def material(student, examples=(), n=1):
    chat = ChatFormat(tiny_tokenizer(), student.generation_config)
    prompts = [Prompt("", [{"role": "user", "content": question}]) for question in QUESTIONS]
    return Material(chat, SamplingParams(8, 1.0, n), prompts, examples, [-1] * len(examples))


def make(tmp_path, student=None, teacher=None, divergence=None, n=1, **fields):
    student = student or ending_model(0)
    teacher = (teacher or ending_model(1)).requires_grad_(False)
    args = arguments(tmp_path, **fields)
    rows = material(student, n=n)
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    plan = schedule(args.max_steps, size, n, rows, 1.0, args.seed)
    loss = Loss(LiveTeacher(teacher, divergence or Divergence("reverse-kl"), 1.0, None), 1.0, None)
    return GkdTrainer(student, loss, rows, plan, args, Guards(SILENT, None, 1))


# --- what is taken for granted about TRL ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [(owner, name, parameters) for owner, hooks in OVERRIDDEN.items() for name, parameters in hooks.items()],
)
def test_the_hooks_that_are_overridden_exist_with_these_parameters(owner, name, parameters):
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


@pytest.mark.filterwarnings("ignore")  # third parties warn at will in a bare trainer
def test_trl_asks_for_a_batch_once_per_step_and_feeds_the_loss_every_row_of_it_once(tmp_path, monkeypatch):
    trainer = make(tmp_path, n=2, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    asked, produced, consumed = [], [], []
    generate, loss = GkdTrainer._generate_and_score_completions, GkdTrainer._compute_loss

    def spy_generate(self, inputs):
        asked.append([row["prompt"] for row in inputs])
        batch = generate(self, inputs)
        produced.extend(batch["ids"].tolist())
        return batch

    def spy_loss(self, student, inputs, count):
        consumed.extend(inputs["ids"].tolist())
        assert count == inputs["num_items_in_batch"]
        return loss(self, student, inputs, count)

    monkeypatch.setattr(GkdTrainer, "_generate_and_score_completions", spy_generate)
    monkeypatch.setattr(GkdTrainer, "_compute_loss", spy_loss)
    trainer.train()
    assert [len(indices) for indices in asked] == [8, 8]
    assert [i for indices in asked for i in indices] == trainer.train_dataset["prompt"][:]
    assert sorted(produced) == sorted(consumed)
    assert trainer.loss_is_scaled_for_ga is True
    assert trainer.teacher_model is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("divergence", "beta"), [("forward-kl", 0.0), ("reverse-kl", 1.0), ("jsd", 0.3)])
def test_our_loss_and_gradient_are_trl_s_on_the_same_batch(tmp_path, divergence, beta):
    """TRL's beta runs from forward KL at 0 to reverse KL at 1, with the teacher's weight in between, as ours."""
    ours = make(tmp_path, divergence=Divergence(divergence, beta))
    batch = ours._generate_and_score_completions([{"prompt": i, "on_policy": 1} for i in (0, 1, 2, 3)])
    assert len(set(batch["mask"].sum(1).tolist())) > 1
    loss, entropy, count = ours._compute_loss(ours.model, batch, batch["num_items_in_batch"])
    loss.backward()
    theirs = DistillationTrainer(
        model=ending_model(0),
        teacher_model=ending_model(1),
        args=arguments(tmp_path, beta=beta),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        processing_class=tiny_tokenizer(),
    )
    expected, entropies, tokens = theirs._compute_loss(theirs.model, trl_layout(batch), batch["num_items_in_batch"])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy / count, entropies / tokens, rtol=1e-5, atol=1e-6)
    gradients = {name: parameter.grad for name, parameter in ours.model.named_parameters()}
    for name, parameter in theirs.model.named_parameters():
        assert (gradients[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name


def trl_layout(batch):
    """Our right-padded rows as TRL lays them out: prompts padded on the left, completions on the right."""
    rows = []
    for ids, mask in zip(batch["ids"], batch["mask"], strict=True):
        begin, end = int(mask.nonzero()[0]), int(mask.nonzero()[-1]) + 1
        rows.append((ids[:begin], ids[begin:end]))
    left, right = max(len(p) for p, _ in rows), max(len(c) for _, c in rows)
    pad = torch.nn.functional.pad
    return {
        "prompt_ids": torch.stack([pad(p, (left - len(p), 0)) for p, _ in rows]),
        "prompt_mask": torch.stack([pad(torch.ones_like(p), (left - len(p), 0)) for p, _ in rows]),
        "completion_ids": torch.stack([pad(c, (0, right - len(c))) for _, c in rows]),
        "completion_mask": torch.stack([pad(torch.ones_like(c), (0, right - len(c))) for _, c in rows]),
    }


# --- the schedule -----------------------------------------------------------------------------------------------------


def plan(steps, fraction, seed=0, n=2, batch_size=4):
    rows = material(ending_model(), [Example([2, 5, 6], [False, True, True])] * 5)
    found = schedule(steps, batch_size, n, rows, fraction, seed)
    return [
        (set(found["on_policy"][i : i + batch_size]), found["prompt"][i : i + batch_size])
        for i in range(0, steps * batch_size, batch_size)
    ]


def test_a_step_is_wholly_on_policy_or_wholly_on_fixed_data_in_the_given_share():
    steps = plan(2000, 0.3)
    assert all(len(kinds) == 1 for kinds, _ in steps)
    share = sum(kinds == {1} for kinds, _ in steps) / 2000
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert all(kinds == {1} for kinds, _ in plan(50, 1.0))
    assert all(kinds == {0} for kinds, _ in plan(50, 0.0))


def test_a_prompt_stands_in_its_step_n_times_and_every_one_is_met_before_any_is_met_again():
    answered = [indices for kinds, indices in plan(200, 0.5) if kinds == {1}]
    assert all(indices[0] == indices[1] and indices[2] == indices[3] for indices in answered)
    order = [i for indices in answered for i in indices[::2]]
    assert all(sorted(order[i : i + 12]) == list(range(12)) for i in range(0, len(order) - 12, 12))


def test_the_schedule_follows_from_the_seed():
    assert plan(30, 0.5) == plan(30, 0.5)
    assert plan(30, 0.5) != plan(30, 0.5, seed=1)


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
    setup = distill.prepare(config, None, SILENT)
    plan = schedule(1, config.batch_size, config.n, setup.material, 1.0, config.seed)
    args = arguments(tmp_path, max_steps=1, seed=config.seed, per_device_train_batch_size=config.batch_size)
    trainer = GkdTrainer(setup.student, setup.loss, setup.material, plan, args, Guards(SILENT, None, 1))
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


def test_a_teacher_with_other_tokens_or_another_template_is_refused():
    ours, theirs = tiny_tokenizer(), tiny_tokenizer()
    check_same_tokenizer(theirs, ours, "teacher", "student")
    theirs.add_tokens(["zebra"])
    with pytest.raises(InputError, match="'zebra' is 512 in the teacher and missing in the student"):
        check_same_tokenizer(theirs, ours, "teacher", "student")
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("user", "human").replace("'human'", "'user'")
    with pytest.raises(InputError, match="chat templates"):
        check_same_tokenizer(other, ours, "teacher", "student")
    bare = tiny_tokenizer()
    bare.chat_template = None
    check_same_tokenizer(bare, ours, "teacher", "student")


def test_tokenizers_are_compared_before_a_model_is_loaded(inputs, tmp_path, monkeypatch):
    teacher = tiny_tokenizer()
    teacher.add_tokens(["zebra"])
    random_model(1).save_pretrained(tmp_path / "teacher")
    teacher.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(distill, "load_policy", None)
    with pytest.raises(InputError, match="zebra"):
        run_distill(configure(inputs, teacher=tmp_path / "teacher"), RunOptions(tmp_path / "out"))


def test_heads_that_lack_a_token_are_refused():
    assert common_vocabulary(512, 512, 512) is None
    assert common_vocabulary(600, 512, 512) == 512
    with pytest.raises(InputError, match="600 and 500 rows for 512 tokens"):
        common_vocabulary(600, 500, 512)


def test_a_head_that_is_more_than_a_product_and_a_cap_is_refused():
    model = random_model()
    check_head(model, "model")
    model.lm_head.bias = torch.nn.Parameter(torch.full((512,), 0.5).index_fill(0, torch.tensor([3]), 5.0))
    with pytest.raises(InputError, match="computes its logits"):
        check_head(model, "model")


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


def test_steps_in_which_every_completion_is_cut_stop_the_run(inputs, tmp_path, monkeypatch):
    save_random(tmp_path / "endless", seed=0)
    config = configure(inputs, model=tmp_path / "endless", steps=9, max_new_tokens=2)
    monkeypatch.setattr(distill.Evaluation, "measure", lambda self, step: None)
    with pytest.raises(GuardStop, match="every completion was cut") as caught:
        run_distill(config, RunOptions(tmp_path / "out"))
    assert caught.value.exit_code == 3
    monkeypatch.undo()
    with pytest.raises(GuardStop, match="every held-out completion"):
        run_distill(config, RunOptions(tmp_path / "out"))


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
    assert finish(start(MAIN, *words, tmp_path / "whole"), 120)[0] == 0
    dice, out = random.Random(int(share * 10)), tmp_path / "parts"
    seen = -1
    for attempt in range(3):
        process = start(MAIN, *words, out, *(["--resume"] if attempt else []))
        metrics, until = tmp_path / ".parts.partial" / "metrics.jsonl", seen + dice.randint(4, 12)
        while seen < until and process.poll() is None:
            time.sleep(0.02)
            seen = max([seen, *(row["step"] for row in torn_lines(metrics))])
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert finish(start(MAIN, *words, out, "--resume"), 120)[0] == 0
    for name in ("model.safetensors", "metrics.jsonl", "samples.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


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
