"""What `rloo.py` takes for granted about TRL 1.16 and transformers, and that our gradient is TRL's.

A failure here after an upgrade says which private hook moved.
"""

import copy
import inspect

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl import RLOOConfig, RLOOTrainer
from trl_layout import trl_layout

from gemma2.core.progress import SILENT
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.models.scorer import token_logps
from gemma2.posttrain.rl.guards import Guards
from gemma2.posttrain.rl.rloo import AnchoredRlooTrainer
from gemma2.posttrain.rl.rollout import Rollout, anchored_rewards, leave_one_out
from gemma2.posttrain.schemas import RlhfConfig
from gemma2.posttrain.tiny.networks import random_model, tiny_tokenizer

OVERRIDDEN = {
    RLOOTrainer: {
        "_generate_and_score_completions": ["self", "inputs"],
        "_compute_loss": ["self", "model", "inputs"],
        "_save_checkpoint": ["self", "model", "trial"],
    },
    Trainer: {
        "_save_checkpoint": ["self", "model", "trial"],
        "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    },
}

pytestmark = pytest.mark.filterwarnings("ignore")  # third parties warn at will in a bare trainer


def score(sampled):
    return {"reward": [float(sum(ids) % 5) for ids in sampled.completions]}


def ending_model():
    """An untrained policy whose completions differ in length."""
    model = random_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[107] *= 6
    return model


def arguments(tmp_path, **fields):
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "temperature": 0.8,
        "beta": 0.0,
        "learning_rate": 1e-3,
        "shuffle_dataset": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "save_strategy": "no",
    }
    return RLOOConfig(**(defaults | fields))


def make(tmp_path, **fields):
    policy, tokenizer = ending_model(), tiny_tokenizer()
    config = RlhfConfig(policy=tmp_path, prompts=tmp_path, n=4, max_new_tokens=8, temperature=0.8, prompts_per_step=2)
    prompts = [Prompt("", [{"role": "user", "content": text}]) for text in ("What is 1 plus 2?", "Sort 3 1 2.", "Hi.")]
    chat = ChatFormat(tokenizer, policy.generation_config)
    rollout = Rollout(policy, None, chat, score, config, prompts, torch.Generator().manual_seed(0), 8)
    return AnchoredRlooTrainer(rollout, None, arguments(tmp_path, **fields), Guards(SILENT, None, 50))


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [(owner, name, parameters) for owner, hooks in OVERRIDDEN.items() for name, parameters in hooks.items()],
)
def test_the_hooks_that_are_overridden_exist_with_these_parameters(owner, name, parameters):
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


def test_trl_calls_the_rollout_once_per_optimizer_step_with_every_prompt_n_times(tmp_path, monkeypatch):
    trainer = make(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, steps_per_generation=4)
    calls = []
    generate = AnchoredRlooTrainer._generate_and_score_completions

    def spy(self, inputs):
        calls.append([row["prompt"] for row in inputs])
        return generate(self, inputs)

    monkeypatch.setattr(AnchoredRlooTrainer, "_generate_and_score_completions", spy)
    trainer.train()
    assert len(calls) == 2
    for indices in calls:
        assert len(indices) == 8
        assert all(len(set(indices[i : i + 4])) == 1 for i in (0, 4))
    assert [calls[0][0], calls[0][4], calls[1][0], calls[1][4]] == trainer.train_dataset["prompt"][:]


def test_trl_feeds_the_loss_every_row_of_the_rollout_once(tmp_path, monkeypatch):
    trainer = make(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, steps_per_generation=4)
    produced, consumed = [], []
    generate, loss = AnchoredRlooTrainer._generate_and_score_completions, AnchoredRlooTrainer._compute_loss

    def spy_generate(self, inputs):
        batch = generate(self, inputs)
        produced.extend(zip(batch["ids"].tolist(), batch["advantages"].tolist(), strict=True))
        return batch

    def spy_loss(self, model, inputs):
        consumed.extend(zip(inputs["ids"].tolist(), inputs["advantages"].tolist(), strict=True))
        return loss(self, model, inputs)

    monkeypatch.setattr(AnchoredRlooTrainer, "_generate_and_score_completions", spy_generate)
    monkeypatch.setattr(AnchoredRlooTrainer, "_compute_loss", spy_loss)
    trainer.train()
    assert sorted(produced) == sorted(consumed)
    assert len(produced) == 16


def test_trl_builds_no_reference_model_and_no_reward_model(tmp_path):
    trainer = make(tmp_path)
    assert trainer.ref_model is None
    assert trainer.reward_funcs == []
    assert trainer.temperature == 0.8
    assert trainer.loss_is_scaled_for_ga is False


def test_the_metrics_of_a_step_reach_the_log(tmp_path):
    trainer = make(tmp_path, logging_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    assert {"reward", "entropy", "length", "truncated", "distinct_2", "grad_norm"} <= row.keys()


def test_the_optimizer_is_adam_without_weight_decay(tmp_path):
    optimizer = make(tmp_path, weight_decay=0.0).create_optimizer()
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_our_gradient_is_trl_s_on_the_same_batch(tmp_path):
    """TRL's clipped importance ratio is 1 on its own samples: its gradient is plain REINFORCE, which we compute."""
    ours = make(tmp_path)
    batch = ours._generate_and_score_completions([{"prompt": i} for i in (0, 0, 0, 0, 1, 1, 1, 1)])
    assert batch["advantages"].abs().max() > 0.1
    assert len(set(batch["mask"].sum(1).tolist())) > 1
    ours._compute_loss(ours.model, batch).backward()
    gradient = {name: p.grad.clone() for name, p in ours.model.named_parameters()}

    theirs = RLOOTrainer(
        model=ending_model(),
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=arguments(tmp_path),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        processing_class=tiny_tokenizer(),
    )
    layout = trl_layout(batch) | {"advantages": batch["advantages"]}
    with torch.no_grad():
        logps, _, _ = theirs._get_per_token_logps_and_entropies(
            theirs.model,
            torch.cat([layout["prompt_ids"], layout["completion_ids"]], 1),
            torch.cat([layout["prompt_mask"], layout["completion_mask"]], 1),
            layout["completion_ids"].shape[1],
        )
    layout["old_logps"] = (logps * layout["completion_mask"]).sum(1)
    theirs._compute_loss(theirs.model, layout).backward()
    for name, parameter in theirs.model.named_parameters():
        assert (gradient[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


def test_the_advantages_of_trl_s_own_training_are_those_that_we_would_form(tmp_path, monkeypatch):
    """Reward less the KL to TRL's reference model, less the mean of the other samples: at every step of a TRL run."""
    ending_model().save_pretrained(tmp_path / "policy")
    tiny_tokenizer().save_pretrained(tmp_path / "policy")
    policy, tokenizer = load_policy(tmp_path / "policy")
    start = copy.deepcopy(policy)
    worth = lambda ids: float(sum(ids) % 5)  # noqa: E731
    apart, moved = [], []
    generate = RLOOTrainer._generate_and_score_completions

    def spy(self, inputs):
        out = generate(self, inputs)
        prompts, completions = (
            [row[mask.bool()].tolist() for row, mask in zip(out[f"{name}_ids"], out[f"{name}_mask"], strict=True)]
            for name in ("prompt", "completion")
        )
        own, other = token_logps(self.model, prompts, completions), token_logps(start, prompts, completions)
        ratios = torch.stack([(a - b).sum() for a, b in zip(own, other, strict=True)])
        rewards = torch.tensor([worth(ids) for ids in completions])
        ours = leave_one_out(anchored_rewards(rewards, ratios, 0.3), 4)
        apart.append((ours - out["advantages"]).abs().max().item())
        moved.append(ratios.abs().max().item())
        return out

    monkeypatch.setattr(RLOOTrainer, "_generate_and_score_completions", spy)
    trainer = RLOOTrainer(
        model=policy,
        reward_funcs=[lambda completion_ids, **_: [worth(ids) for ids in completion_ids]],
        args=arguments(tmp_path, beta=0.3, temperature=1.0, top_k=0, max_steps=3, learning_rate=1e-2),
        train_dataset=Dataset.from_dict({"prompt": ["What is 1 plus 2?", "Sort 3 1 2."]}),
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(apart) == 3
    assert max(apart) < 1e-4
    assert moved[0] == 0 and moved[-1] > 0.1  # the KL has a say
