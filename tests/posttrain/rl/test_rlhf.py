"""The RL stage computes what Algorithm 1 of WARP says, stops when it should, and resumes bit for bit."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gemma2.core.errors import GuardStop, InputError, UsageError
from gemma2.core.progress import SILENT
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.evaluation import evaluate
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.models.lora import adapted_weights
from gemma2.posttrain.models.sampler import SamplingParams, sample
from gemma2.posttrain.models.scorer import correlation, token_logps
from gemma2.posttrain.provenance.origin import settings_of
from gemma2.posttrain.rl import rlhf, rollout
from gemma2.posttrain.rl.ema import EmaAnchor
from gemma2.posttrain.rl.guards import Guards
from gemma2.posttrain.rl.objective import policy_loss
from gemma2.posttrain.rl.rlhf import run_rlhf
from gemma2.posttrain.rl.rloo import AnchoredRlooTrainer, AnchorUpdate, prompt_order
from gemma2.posttrain.rl.rollout import Rollout, anchored_rewards, leave_one_out, padded
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import RlhfConfig
from gemma2.posttrain.tiny.networks import random_model, save_random, tiny_tokenizer
from gemma2.posttrain.training.trainer import RunCallback

pytestmark = pytest.mark.long

END_OF_TURN = 107
QUESTIONS = [f"What is {a} plus {b}?" for a in range(4) for b in range(3)]


# --- reward functions, named as users name theirs ---------------------------------------------------------------------


def spread(prompts, completions, **columns):
    """Varies with the text, for runs that only need some signal."""
    return [float(sum(map(ord, text)) % 17) / 17 for text in completions]


def brief(prompts, completions, truncated, **columns):
    return [-len(text) / 20 - float(cut) for text, cut in zip(completions, truncated, strict=True)]


def constant(prompts, completions, **columns):
    return [1.0] * len(completions)


def too_few(prompts, completions, **columns):
    return [1.0]


def not_a_number(prompts, completions, **columns):
    return [float("nan")] * len(completions)


def fragile(prompts, completions, **columns):
    """Fails at the call of that number."""
    if "FRAGILE" in os.environ:
        left = int(os.environ["FRAGILE"]) - 1
        os.environ["FRAGILE"] = str(left)
        if left == 0:
            raise ValueError("no more")
    return spread(prompts, completions)


def broken(prompts, completions, **columns):
    raise KeyError("answer")


# --- what the tests share ---------------------------------------------------------------------------------------------


def ending_model(seed=0, **overrides):
    """An untrained policy that ends its turns often enough to be sampled from."""
    model = random_model(seed, **overrides)
    with torch.no_grad():
        model.model.embed_tokens.weight[END_OF_TURN] *= 6
    return model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    ending_model().save_pretrained(root / "policy")
    tiny_tokenizer().save_pretrained(root / "policy")
    save_random(root / "reward", seed=1, kind="reward")
    rows = [json.dumps({"prompt": question}) for question in QUESTIONS]
    (root / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return root


def configure(root: Path, **fields) -> RlhfConfig:
    defaults = {
        "policy": root / "policy",
        "reward_fn": "test_rlhf:spread",
        "prompts": root / "prompts.jsonl",
        "heldout": root / "prompts.jsonl",
        "steps": 3,
        "prompts_per_step": 2,
        "n": 3,
        "max_new_tokens": 10,
        "temperature": 1.0,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "mu": 0.3,
        "eval_every": 100,
        "eval_prompts": 8,
        "save_every": 100,
    }
    if "reward" in fields:
        defaults["reward_fn"] = None
    if fields.get("anchor", "ema") != "ema":
        del defaults["mu"]  # refused: nothing is averaged
    return RlhfConfig(**(defaults | fields))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def make_rollout(policy, anchor, **fields):
    config = configure(Path("."), **fields)
    prompts = [Prompt("", [{"role": "user", "content": question}]) for question in QUESTIONS]
    score = lambda sampled: {"reward": spread(None, sampled.texts)}  # noqa: E731
    chat = ChatFormat(tiny_tokenizer(), policy.generation_config)
    return Rollout(policy, anchor, chat, score, config, prompts, torch.Generator().manual_seed(0), 6)


# --- the objective ----------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand():
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    # 1 - (2+6)/2, 2 - (1+6)/2, 6 - (1+2)/2;  0 - 3/2, 0 - 3/2, 3 - 0
    assert leave_one_out(rewards, 3).tolist() == [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]


def test_the_anchored_reward_by_hand_carries_no_gradient():
    rewards = torch.tensor([1.0, 2.0], requires_grad=True)
    ratios = torch.tensor([0.5, -1.0], requires_grad=True)
    anchored = anchored_rewards(rewards, ratios, 0.1)
    assert anchored.tolist() == pytest.approx([0.95, 2.1])
    assert not anchored.requires_grad


def test_log_ratios_are_sums_over_the_completion_at_the_sampling_temperature():
    policy, other = ending_model(), ending_model(3)
    roll = make_rollout(policy, EmaAnchor(other).model, temperature=0.7)
    prompts = [roll.chat.prompt_ids(p.messages) for p in roll.prompts[:3]]
    drawn = roll.draw(prompts)
    pairs = [prompts[i] for i in drawn.prompt_index]
    for prompt, ids, ratio in zip(pairs, drawn.ids, roll.log_ratios(pairs, drawn), strict=True):
        sides = []
        for model in (policy, other):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double() / 0.7
            sides.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).sum())
        assert ratio.item() == pytest.approx((sides[0] - sides[1]).item(), abs=1e-3)
        assert abs(ratio) > 0.01


def test_the_kl_to_an_anchor_that_equals_the_policy_is_zero():
    policy = ending_model()
    _, metrics = make_rollout(policy, EmaAnchor(policy).model)(range(4))
    assert abs(metrics["kl_anchor"]) < 1e-5


def test_advantages_are_those_of_reward_less_beta_times_kl():
    policy, anchor = ending_model(), EmaAnchor(ending_model(3)).model
    free, bound = (make_rollout(policy, anchor, beta=beta) for beta in (0.0, 0.5))
    (without, _), (with_kl, metrics) = free([0, 1]), bound([0, 1])
    assert torch.equal(without.ids, with_kl.ids)
    ratios = []
    for ids, mask in zip(bound_rows(with_kl.ids, with_kl.mask), with_kl.mask, strict=True):
        start = int(mask.nonzero()[0])
        own, other = (token_logps(model, [ids[:start]], [ids[start:]])[0].double().sum() for model in (policy, anchor))
        ratios.append(own - other)
    ratios = torch.stack(ratios)
    expected = without.advantages.double() - 0.5 * leave_one_out(ratios, 3)
    assert torch.allclose(with_kl.advantages.double(), expected, atol=1e-4)
    assert metrics["kl_anchor"] == pytest.approx(ratios.mean().item(), abs=1e-4)


def bound_rows(ids, mask):
    """Rows without their padding."""
    return [row[: int(m.nonzero()[-1]) + 1].tolist() for row, m in zip(ids, mask, strict=True)]


def test_the_mask_covers_the_completion_and_nothing_else():
    batch = padded([[5, 6, 7], [8]], [[9], [10, 11]], torch.zeros(2))
    assert batch.ids.tolist() == [[5, 6, 7, 9], [8, 10, 11, 0]]
    assert batch.mask.tolist() == [[False, False, False, True], [False, True, True, False]]


def test_neither_prompt_nor_padding_enters_the_loss():
    policy = ending_model()
    batch, _ = make_rollout(policy, None)(range(4))
    count = len(batch.ids)
    chosen = torch.eye(count) * -count  # an advantage for one row alone: the loss is its log-prob
    logps = [policy_loss(policy, batch.ids, batch.mask, one, 1.0)[0].item() for one in chosen]
    for row, (ids, mask) in enumerate(zip(bound_rows(batch.ids, batch.mask), batch.mask, strict=True)):
        start = int(mask.nonzero()[0])
        (alone,) = token_logps(policy, [ids[:start]], [ids[start:]])
        assert logps[row] == pytest.approx(alone.sum().item(), abs=1e-4)
    ends = torch.tensor([len(row) for row in bound_rows(batch.ids, batch.mask)])
    repadded = batch.ids.masked_fill(torch.arange(batch.ids.shape[1]) >= ends[:, None], 9)
    assert not torch.equal(repadded, batch.ids)
    again = [policy_loss(policy, repadded, batch.mask, one, 1.0)[0].item() for one in chosen]
    assert again == pytest.approx(logps, abs=1e-5)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_named():
    policy = ending_model(max_position_embeddings=20)
    with pytest.raises(InputError, match="exceed the policy's context of 20"):
        make_rollout(policy, None, max_new_tokens=10)([0])


def test_the_prompt_order_is_a_row_of_permutations_that_the_seed_decides():
    order = prompt_order(5, 12, seed=1)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order == prompt_order(5, 12, seed=1) != prompt_order(5, 12, seed=2)
    assert prompt_order(5, 20, seed=1)[:12] == order


def test_correlation_by_hand_and_undefined():
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])) == pytest.approx(1.0)
    assert correlation(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 5.0])) is None


# --- the anchor, through the real trainer -----------------------------------------------------------------------------


def test_the_anchor_follows_a_float64_recursion_through_the_trainer(inputs, tmp_path, monkeypatch):
    mu, path = 0.3, []
    update = AnchorUpdate.on_optimizer_step

    def record(self, args, state, control, **kwargs):
        path.append({name: p.detach().double() for name, p in kwargs["model"].named_parameters()})
        update(self, args, state, control, **kwargs)

    monkeypatch.setattr(AnchorUpdate, "on_optimizer_step", record)
    run_rlhf(configure(inputs, mu=mu, steps=5), RunOptions(tmp_path / "out"))
    expected = {name: tensor.double() for name, tensor in weights(inputs / "policy").items()}
    for theta in path:
        expected = {name: (1 - mu) * expected[name] + mu * theta[name] for name in expected}
    saved = weights(tmp_path / "out" / "ema")
    assert len(path) == 5
    for name, tensor in expected.items():
        assert torch.allclose(saved[name].double(), tensor, atol=1e-6)
        # The output is the policy itself, not its average.
        assert torch.equal(weights(tmp_path / "out")[name].double(), path[-1][name])
        assert not torch.equal(weights(tmp_path / "out")[name], saved[name])


def test_mu_zero_keeps_the_anchor_and_mu_one_makes_it_the_policy(inputs, tmp_path):
    for mu in (0.0, 1.0):
        run_rlhf(configure(inputs, mu=mu), RunOptions(tmp_path / f"mu{mu}"))
    start, still = weights(inputs / "policy"), weights(tmp_path / "mu0.0" / "ema")
    assert all(torch.equal(still[name], start[name]) for name in start)
    policy, mirror = weights(tmp_path / "mu1.0"), weights(tmp_path / "mu1.0" / "ema")
    assert all(torch.equal(mirror[name], policy[name]) for name in start)
    assert not all(torch.equal(policy[name], start[name]) for name in start)


def test_mu_and_beta_change_the_policy(inputs, tmp_path):
    results = []
    for index, fields in enumerate([{}, {"mu": 0.9}, {"beta": 0.0}, {"anchor": "none"}]):
        run_rlhf(configure(inputs, **fields), RunOptions(tmp_path / str(index)))
        results.append(weights(tmp_path / str(index))["model.embed_tokens.weight"])
    base, other_mu, free, none = results
    assert not torch.equal(base, other_mu)
    assert not torch.equal(base, free)
    assert torch.equal(free, none)


def test_the_anchor_scores_and_never_generates(inputs, tmp_path, monkeypatch):
    anchors, sampled = [], []
    make = EmaAnchor.__init__

    def remember(self, policy, memory):
        make(self, policy, memory)
        anchors.append(self.model)

    def spy(model, *args, **kwargs):
        sampled.append(model)
        return sample(model, *args, **kwargs)

    monkeypatch.setattr(EmaAnchor, "__init__", remember)
    monkeypatch.setattr(rollout, "sample", spy)
    monkeypatch.setattr(evaluate, "sample", spy)
    run_rlhf(configure(inputs), RunOptions(tmp_path / "out"))
    assert len(anchors) == 1
    assert len(sampled) == 5  # three steps, the evaluation before them and the one after
    assert all(model is not anchors[0] for model in sampled)


def test_kl_is_zero_before_the_first_step_and_grows(inputs, tmp_path):
    run_rlhf(configure(inputs, eval_every=2), RunOptions(tmp_path / "out"))
    rows = lines(tmp_path / "out" / "metrics.jsonl")
    points = {row["step"]: row for row in rows if row.get("kind") == "eval"}
    steps = {row["step"]: row for row in rows if "kind" not in row}
    assert sorted(points) == [0, 2, 3]
    assert points[0]["kl"] == 0.0
    assert points[2]["kl"] > 0
    assert abs(steps[1]["kl_anchor"]) < 1e-4
    assert {"reward", "reward_se", "kl", "kl_se", "length", "truncated"} <= points[3].keys()
    assert {"reward", "reward_std", "entropy", "length", "truncated", "distinct_2", "gradient_norm"} <= steps[3].keys()


def test_kl_is_measured_to_the_sft_policy_that_is_named(inputs, tmp_path):
    ending_model(5).save_pretrained(tmp_path / "sft")
    tiny_tokenizer().save_pretrained(tmp_path / "sft")
    run_rlhf(configure(inputs, sft=tmp_path / "sft", steps=1), RunOptions(tmp_path / "out"))
    assert lines(tmp_path / "out" / "metrics.jsonl")[0]["kl"] > 0.1


def test_a_lora_policy_moves_its_dense_anchor_through_the_trainer(inputs, tmp_path, monkeypatch):
    """ema + mu (theta - ema), with theta the merged policy of every step; everything that is not adapted stays."""
    mu, path = 0.3, []
    update = AnchorUpdate.on_optimizer_step

    def record(self, args, state, control, **kwargs):
        path.append({name: weight.double() for name, weight in adapted_weights(self.policy)})
        update(self, args, state, control, **kwargs)

    monkeypatch.setattr(AnchorUpdate, "on_optimizer_step", record)
    run_rlhf(configure(inputs, mu=mu, lora_rank=2, learning_rate=1e-2), RunOptions(tmp_path / "out"))
    start = weights(inputs / "policy")
    expected = {name: tensor.double() for name, tensor in start.items()}
    for theta in path:
        expected |= {name: (1 - mu) * expected[name] + mu * value for name, value in theta.items()}
    saved, policy = weights(tmp_path / "out" / "ema"), weights(tmp_path / "out")
    assert len(path) == 3
    assert saved.keys() == start.keys()
    for name, tensor in expected.items():
        assert torch.allclose(saved[name].double(), tensor, atol=1e-6)
        if name in path[-1]:
            assert torch.allclose(policy[name].double(), path[-1][name], atol=1e-6)
            assert not torch.equal(policy[name], start[name])
        else:
            assert torch.equal(policy[name], start[name])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft 0.21 asks for what transformers 5 renamed
def test_an_adapter_alone_is_the_policy_once_it_is_merged(inputs, tmp_path):
    for output in ("merged", "adapter"):
        config = configure(inputs, lora_rank=2, learning_rate=1e-2, lora_output=output, steps=2)
        run_rlhf(config, RunOptions(tmp_path / output))
    base = AutoModelForCausalLM.from_pretrained(inputs / "policy", dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    saved = weights(tmp_path / "merged")
    assert all(torch.allclose(p, saved[name], atol=1e-6) for name, p in merged.named_parameters())


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"lora_rank": 2, "lora_dropout": 0.1}, "lora_dropout"),
        ({"anchor": "sft", "anchor_memory": "cpu"}, "anchor_memory"),
        ({"lora_anchor": "factors"}, "lora_rank"),
        ({"lora_rank": 2, "anchor": "sft", "lora_anchor": "factors"}, "anchor=ema"),
        ({"lora_output": "adapter"}, "lora_rank"),
    ],
)
def test_options_that_would_do_nothing_or_harm_are_refused(inputs, fields, what):
    with pytest.raises(ValidationError, match=what):
        configure(inputs, **fields)


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("use_transformers_continuous_batching", True, "soft cap"),
        ("top_p", 0.5, "no effect"),
        ("eval_strategy", "steps", "no effect"),
        ("neftune_noise_alpha", 5, "no effect"),
        ("beta", 0.1, "option"),
        ("save_only_model", True, "fresh optimizer"),
        ("optim", "nonsense", "'trainer' .optim.: .*nonsense"),
    ],
)
def test_options_of_trl_that_would_do_nothing_or_harm_are_refused(inputs, tmp_path, key, value, what):
    with pytest.raises(UsageError, match=what):
        run_rlhf(configure(inputs, trainer={key: value}), RunOptions(tmp_path / "out"))


def test_a_run_in_bf16_may_round_its_first_kl(inputs, tmp_path):
    run_rlhf(configure(inputs, steps=1, trainer={"bf16": True}), RunOptions(tmp_path / "out"))


class Elsewhere:
    """Stands for vLLM: draws with our sampler, counts how often it is given the weights."""

    def __init__(self, rollout):
        self.rollout = rollout
        self.mismatch = 0.01
        self.calls = []

    def sync(self):
        self.calls.append("sync")

    def draw(self, prompts, n):
        self.calls.append("draw")
        params = SamplingParams(self.rollout.config.max_new_tokens, 1.0, n)
        return sample(self.rollout.policy, prompts, params, self.rollout.chat.stop_ids, 0, self.rollout.generator)

    def close(self):
        self.calls.append("close")


def test_an_engine_draws_from_the_weights_of_every_step_and_is_closed(inputs, tmp_path, monkeypatch):
    made = []

    def start(config, policy, accelerator, chat, generator, batch_size, ranks):
        made.append(Elsewhere(rollouts[-1]))
        assert policy is made[0].rollout.policy
        return made[0]

    rollouts = []
    make = Rollout.__init__
    monkeypatch.setattr(Rollout, "__init__", lambda self, *a, **k: (make(self, *a, **k), rollouts.append(self))[0])
    monkeypatch.setattr(rlhf, "check_usable", lambda *arguments: None)
    monkeypatch.setattr(rlhf, "compare_attention", lambda *arguments: None)
    monkeypatch.setattr(rlhf.VllmSampler, "start", start)
    run_rlhf(configure(inputs), RunOptions(tmp_path / "ours"))
    run_rlhf(configure(inputs, engine="vllm"), RunOptions(tmp_path / "theirs"))
    assert made[0].calls == ["sync", "draw"] * 3 + ["close"]
    steps = [row for row in lines(tmp_path / "theirs" / "metrics.jsonl") if "kind" not in row]
    assert [row["vllm_mismatch"] for row in steps] == [0.01] * 3
    ours, theirs = (weights(tmp_path / name) for name in ("ours", "theirs"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # the same draws, so the same run


# --- learning ---------------------------------------------------------------------------------------------------------


def test_the_gradients_of_a_run_are_those_of_a_plain_forward(inputs, tmp_path, monkeypatch):
    """Before every optimizer step: autograd through transformers' own forward, row by row, with advantages by hand."""
    start = load_policy(inputs / "policy")[0]
    config = configure(inputs, anchor="sft", beta=0.5, max_new_tokens=12, micro_batch_size=None)
    seen, cosines = {}, []
    generate, step = AnchoredRlooTrainer._generate_and_score_completions, RunCallback.on_pre_optimizer_step

    def remember(self, rows):
        seen["batch"] = generate(self, rows)
        seen["policy"] = load_policy(inputs / "policy")[0]
        seen["policy"].load_state_dict(self.model.state_dict())
        return seen["batch"]

    def compare(self, args, state, control, **kwargs):
        step(self, args, state, control, **kwargs)
        logps, ratios, rewards = [], [], []
        for ids, mask in zip(seen["batch"]["ids"], seen["batch"]["mask"], strict=True):
            places = mask.nonzero()[:, 0]
            row = ids[: int(places[-1]) + 1][None]
            own, other = (
                torch.log_softmax(model(row).logits[0].float(), -1)[places - 1, ids[places]].sum()
                for model in (seen["policy"], start)
            )
            logps.append(own)
            ratios.append((own - other).item())
            rewards.append(spread(None, [chat.decode(ids[places].tolist())])[0])
        worth = [reward - 0.5 * ratio for reward, ratio in zip(rewards, ratios, strict=True)]
        groups = [worth[i // 3 * 3 : i // 3 * 3 + 3] for i in range(len(worth))]
        advantages = [own - (sum(group) - own) / 2 for own, group in zip(worth, groups, strict=True)]
        loss = -sum(a * logp for a, logp in zip(advantages, logps, strict=True)) / len(worth)
        loss.backward()
        ours, theirs = (
            torch.cat([p.grad.flatten().double() for p in model.parameters()])
            for model in (kwargs["model"], seen["policy"])
        )
        assert ours.norm().item() == pytest.approx(min(1.0, theirs.norm().item()), rel=1e-3)  # clipped at 1
        cosines.append(torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item())

    chat = ChatFormat(tiny_tokenizer(), start.generation_config)
    monkeypatch.setattr(AnchoredRlooTrainer, "_generate_and_score_completions", remember)
    monkeypatch.setattr(RunCallback, "on_pre_optimizer_step", compare)
    run_rlhf(config, RunOptions(tmp_path / "out"))
    assert len(cosines) == 3
    assert min(cosines) > 1 - 1e-6


def test_the_reward_rises(inputs, tmp_path):
    config = configure(
        inputs, reward_fn="test_rlhf:brief", steps=25, n=6, beta=0.01, learning_rate=2e-2, eval_prompts=12
    )
    run_rlhf(config, RunOptions(tmp_path / "out"))
    points = [row for row in lines(tmp_path / "out" / "metrics.jsonl") if row.get("kind") == "eval"]
    assert points[-1]["reward"] > points[0]["reward"] + 2 * (points[0]["reward_se"] + points[-1]["reward_se"])


def test_a_reward_model_is_scored_on_the_sampled_ids(inputs, tmp_path):
    result = run_rlhf(configure(inputs, reward=inputs / "reward", steps=1), RunOptions(tmp_path / "out"))
    assert result.summary["reward"] is not None


def test_rounding_is_no_difference_in_reward():
    watched = guards(max_dead_steps=2)
    watched.observe(1, metrics(reward=40.0, reward_std_in_group=1e-4))
    with pytest.raises(GuardStop, match="no difference in reward"):
        watched.observe(2, metrics(reward=40.0, reward_std_in_group=1e-4))


def test_micro_batches_give_the_step_of_the_whole_batch(inputs, tmp_path):
    for micro in (None, 2):
        run_rlhf(configure(inputs, micro_batch_size=micro, steps=1), RunOptions(tmp_path / str(micro)))
    logged = (lines(tmp_path / name / "metrics.jsonl") for name in ("None", "2"))
    once, twice = (next(row["entropy"] for row in rows if "entropy" in row) for rows in logged)
    assert once == pytest.approx(twice, rel=1e-4)
    whole, parts = weights(tmp_path / "None"), weights(tmp_path / "2")
    start = weights(inputs / "policy")
    for name, tensor in whole.items():
        assert torch.allclose(tensor, parts[name], atol=1e-5)
    assert any((whole[name] - start[name]).abs().max() > 1e-3 for name in start)


# --- guards -----------------------------------------------------------------------------------------------------------


def metrics(**fields):
    return {"reward": 0.5, "reward_std_in_group": 1.0, "truncated": 0.0, "kl_anchor": 0.0, "length": 10.0} | fields


def guards(**fields):
    return Guards(SILENT, **({"max_kl": 5.0, "max_dead_steps": 3, "tolerance": 1e-4} | fields))


def test_a_run_without_reward_variance_stops_after_so_many_steps():
    watch = guards()
    for step in (1, 2):
        watch.observe(step, metrics(reward_std_in_group=0.0))
    watch.observe(3, metrics())
    watch.observe(4, metrics(reward_std_in_group=0.0))
    watch.observe(5, metrics(reward_std_in_group=0.0))
    with pytest.raises(GuardStop, match="no difference in reward"):
        watch.observe(6, metrics(reward_std_in_group=0.0))


def test_a_mismatch_with_vllm_is_warned_of_once_from_a_twentieth_of_a_nat():
    class Warned:
        def __init__(self):
            self.lines = []

        def warn(self, text):
            self.lines.append(text)

    heard = Warned()
    watch = Guards(heard, None, 50)
    watch.observe(2, metrics(vllm_mismatch=0.049))
    watch.observe(3, metrics(vllm_mismatch=None))
    assert heard.lines == []
    watch.observe(4, metrics(vllm_mismatch=-0.05))
    watch.observe(5, metrics(vllm_mismatch=0.3))
    (line,) = heard.lines
    assert line.startswith("step 4: vLLM's log-probs differ from the policy's by 0.05 nats per token")


def test_steps_in_which_every_completion_is_cut_stop_the_run():
    watch = guards()
    watch.observe(1, metrics(truncated=1.0))
    watch.observe(2, metrics(truncated=1.0))
    with pytest.raises(GuardStop, match="every completion was cut"):
        watch.observe(3, metrics(truncated=1.0))


def test_the_kl_limit_stops_the_run_at_the_limit():
    guards().measured(10, 4.99, 0.5)
    guards(max_kl=None).measured(10, 1e9, 0.5)
    for kl in (5.0, float("nan")):
        with pytest.raises(GuardStop, match="KL to the SFT policy"):
            guards().measured(10, kl, 0.5)
    with pytest.raises(GuardStop, match="every held-out completion"):
        guards().measured(10, 0.0, 1.0)


def test_a_first_step_with_kl_is_a_bug():
    guards().observe(1, metrics(kl_anchor=1e-4))
    guards(tolerance=None).observe(1, metrics(kl_anchor=3.0))
    with pytest.raises(RuntimeError, match="not 0"):
        guards().observe(1, metrics(kl_anchor=0.1))


def test_guards_go_on_counting_after_a_resume():
    before, after = guards(), guards()
    before.observe(1, metrics(reward_std_in_group=0.0))
    before.observe(2, metrics(reward_std_in_group=0.0))
    after.restore(before.state())
    with pytest.raises(GuardStop):
        after.observe(3, metrics(reward_std_in_group=0.0))


def test_the_kl_guard_ends_a_run_with_exit_code_three_and_nothing_in_its_place(inputs, tmp_path):
    with pytest.raises(GuardStop) as caught:
        run_rlhf(configure(inputs, max_kl=1e-6, eval_every=1), RunOptions(tmp_path / "out"))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_update(inputs, tmp_path, monkeypatch):
    def poisoned(rewards, n):
        return torch.full_like(rewards, float("inf"))

    monkeypatch.setattr(rollout, "leave_one_out", poisoned)
    with pytest.raises(GuardStop, match="NaN or infinite"):
        run_rlhf(configure(inputs), RunOptions(tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("too_few", "returned 1 values"), ("not_a_number", "NaN"), ("broken", "failed with KeyError")],
)
def test_a_bad_reward_function_is_named_in_one_line(inputs, tmp_path, name, message):
    with pytest.raises(InputError, match=message) as caught:
        run_rlhf(configure(inputs, reward_fn=f"test_rlhf:{name}"), RunOptions(tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_a_reward_function_that_fails_later_keeps_the_checkpoint(inputs, tmp_path, monkeypatch):
    config = configure(inputs, reward_fn="test_rlhf:fragile", steps=4, save_every=2)
    run_rlhf(config, RunOptions(tmp_path / "whole"))
    monkeypatch.setenv("FRAGILE", "4")  # the evaluation before the first step, and three steps
    with pytest.raises(InputError, match="failed with ValueError: no more"):
        run_rlhf(config, RunOptions(tmp_path / "parts"))
    assert [path.name for path in (tmp_path / ".parts.partial" / "checkpoints").iterdir()] == ["checkpoint-2"]
    monkeypatch.delenv("FRAGILE")
    run_rlhf(config, RunOptions(tmp_path / "parts", resume=True))
    for name in ("model.safetensors", "ema/model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_constant_reward_stops_a_run_that_cannot_learn(inputs, tmp_path):
    config = configure(inputs, reward_fn="test_rlhf:constant", max_dead_steps=2)
    with pytest.raises(GuardStop, match="no difference in reward"):
        run_rlhf(config, RunOptions(tmp_path / "out"))


def test_samples_that_do_not_fill_micro_batches_are_refused(inputs, tmp_path):
    with pytest.raises(UsageError, match="micro-batch-size"):
        run_rlhf(configure(inputs, micro_batch_size=4), RunOptions(tmp_path / "out"))


def test_a_reward_is_needed(inputs, tmp_path):
    with pytest.raises(UsageError, match="no reward is given"):
        run_rlhf(configure(inputs, reward_fn=None), RunOptions(tmp_path / "out"))


# --- resume -----------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for a kill in the middle of a step."""


def killed_run(monkeypatch, config, out, died_at):
    """A run that is killed in the middle of step `died_at`."""
    observe = Guards.observe

    def die(self, step, metrics):
        if step == died_at:
            raise Killed
        observe(self, step, metrics)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Guards, "observe", die)
        run_rlhf(config, RunOptions(out))


LORA = {"lora_rank": 2, "learning_rate": 1e-2}
KINDS = [
    ({"anchor": "ema"}, 4),
    ({"anchor": "sft"}, 5),
    ({"anchor": "none"}, 4),
    ({"anchor_memory": "cpu"}, 3),
    (LORA, 5),
    (LORA | {"lora_anchor": "factors"}, 4),
    (LORA | {"anchor_memory": "cpu"}, 4),
]


@pytest.mark.parametrize(
    ("fields", "died_at"), [KINDS[0], *(pytest.param(*kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
)
def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(inputs, tmp_path, monkeypatch, fields, died_at):
    config = configure(inputs, **({"steps": 5, "save_every": 2, "eval_every": 3, "micro_batch_size": 3} | fields))
    run_rlhf(config, RunOptions(tmp_path / "whole"))
    killed_run(monkeypatch, config, tmp_path / "parts", died_at)
    assert not (tmp_path / "parts").exists()
    run_rlhf(config, RunOptions(tmp_path / "parts", resume=True))
    names = ["model.safetensors", "metrics.jsonl", "samples.jsonl"]
    for name in [*names, "ema/model.safetensors"] if config.anchor == "ema" else names:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_lines_that_stand_for_several_steps_survive_a_resume(inputs, tmp_path, monkeypatch):
    """A checkpoint between two lines: what was gathered before it is in a line of its own."""
    config = configure(inputs, steps=6, save_every=3, log_every=2)
    run_rlhf(config, RunOptions(tmp_path / "whole"))
    killed_run(monkeypatch, config, tmp_path / "parts", 5)
    run_rlhf(config, RunOptions(tmp_path / "parts", resume=True))
    whole, parts = (tmp_path / name / "metrics.jsonl" for name in ("whole", "parts"))
    assert parts.read_bytes() == whole.read_bytes()
    assert [row["step"] for row in lines(whole) if "kind" not in row] == [2, 3, 4, 6]


def test_a_run_killed_while_its_result_is_written_keeps_its_figures(inputs, tmp_path, monkeypatch):
    whole = run_rlhf(configure(inputs), RunOptions(tmp_path / "whole"))

    def killed(*given):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(rlhf, "save", killed)
        run_rlhf(configure(inputs, save_every=3), RunOptions(tmp_path / "parts"))
    resumed = run_rlhf(configure(inputs, save_every=3), RunOptions(tmp_path / "parts", resume=True))
    assert resumed.summary == whole.summary
    assert resumed.summary["reward"] is not None


def test_what_decides_no_result_may_change_on_resume(inputs):
    """Where figures are reported, and what vLLM takes: said by two of the classes that the schema is made of."""
    settings = settings_of(configure(inputs))
    assert "beta" in settings
    assert not {"report_to", "vllm_memory", "vllm_server_url"} & settings.keys()


def test_a_resume_without_the_saved_anchor_would_differ(inputs, tmp_path, monkeypatch):
    """The comparison above would notice an anchor that restarts from the resumed policy."""
    config = configure(inputs, steps=4, save_every=2, beta=1.0)
    run_rlhf(config, RunOptions(tmp_path / "whole"))
    killed_run(monkeypatch, config, tmp_path / "parts", 4)
    monkeypatch.setattr(EmaAnchor, "load", lambda self, path: None)
    run_rlhf(config, RunOptions(tmp_path / "parts", resume=True))
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() != (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_a_resume_against_another_configuration_is_refused(inputs, tmp_path, monkeypatch):
    killed_run(monkeypatch, configure(inputs, steps=4, save_every=1), tmp_path / "out", 3)
    with pytest.raises(InputError, match="beta"):
        run_rlhf(configure(inputs, steps=4, save_every=1, beta=0.2), RunOptions(tmp_path / "out", resume=True))
