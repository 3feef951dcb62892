"""A reward is that of the sequence alone, whatever else is in the batch."""

import pytest
import torch

from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.rewards.model import RewardModel, shaped_rewards
from gemma2.posttrain.tiny.networks import random_reward_model, save_random, tiny_tokenizer


@pytest.fixture(scope="module")
def reward_model():
    return RewardModel(random_reward_model(pad_token_id=0), tiny_tokenizer())


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(0)
    lengths = [(5, 7), (12, 1), (3, 20), (9, 4), (1, 9)]
    draw = [torch.randint(4, 100, (a + b,), generator=generator).tolist() for a, b in lengths]
    return [ids[:a] for ids, (a, _) in zip(draw, lengths, strict=True)], [
        ids[a:] for ids, (a, _) in zip(draw, lengths, strict=True)
    ]


def test_a_reward_is_the_head_at_the_last_token(reward_model, pairs):
    prompts, completions = pairs
    scores = reward_model.score(prompts, completions)
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        with torch.no_grad():
            expected = reward_model.model(torch.tensor([prompt + completion])).logits[0, 0]
        assert score.item() == pytest.approx(expected.item(), abs=1e-5)


def test_rewards_depend_on_neither_batch_nor_order_nor_padding_side(reward_model, pairs):
    prompts, completions = pairs
    scores = reward_model.score(prompts, completions)
    assert torch.allclose(scores, reward_model.score(prompts, completions, batch_size=1), atol=1e-5)
    turned = reward_model.score(prompts[::-1], completions[::-1], batch_size=2)
    assert torch.allclose(scores, turned.flip(0), atol=1e-5)
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    left = torch.tensor([[0] * (width - len(p) - len(c)) + p + c for p, c in zip(prompts, completions, strict=True)])
    with torch.no_grad():
        padded = reward_model.model(left, attention_mask=(left != 0).long()).logits[:, 0]
    assert torch.allclose(scores, padded, atol=1e-5)


def test_text_is_scored_like_its_ids_and_a_truncated_turn_stays_open(reward_model):
    chat = ChatFormat(tiny_tokenizer())
    messages = [{"role": "user", "content": "What is 1 plus 2?"}]
    prompt, answer = chat.prompt_ids(messages), "It is 3."
    answer_ids = chat.tokenizer.encode(answer, add_special_tokens=False)
    ids = reward_model.score([prompt, prompt], [[*answer_ids, 107], answer_ids])
    text = reward_model.score_text([messages, messages], [answer, answer], [False, True])
    assert torch.allclose(ids, text, atol=1e-6)
    assert ids[0] != ids[1]


def test_tokenizers_with_another_vocabulary_or_template_are_distinguished(reward_model):
    assert reward_model.reads(tiny_tokenizer())
    other = tiny_tokenizer()
    other.chat_template = "{{ messages[0]['content'] }}"
    assert not reward_model.reads(other)
    larger = tiny_tokenizer()
    larger.add_tokens(["xyz"])
    assert not reward_model.reads(larger)


def test_a_reward_model_is_read_from_its_directory(tmp_path):
    saved = RewardModel.from_dir(save_random(tmp_path / "rm", kind="reward"))
    fresh = RewardModel(random_reward_model(), tiny_tokenizer())
    assert torch.equal(saved.score([[5, 6]], [[7]]), fresh.score([[5, 6]], [[7]]))


def test_length_and_missing_eos_penalties_by_hand():
    rewards = shaped_rewards(
        torch.tensor([1.0, 2.0]), torch.tensor([100, 40]), torch.tensor([True, False]), 0.0005, 0.25
    )
    # 1 - 0.0005 * 100 - 0.25 = 0.7 and 2 - 0.0005 * 40 = 1.98
    assert torch.allclose(rewards, torch.tensor([0.7, 1.98]))
