"""Measurements against exact enumeration, hand-derived errors and an independent jackknife."""

import itertools
import json
import math

import pytest
import torch

from gemma2.core.errors import InputError
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.evaluation.evaluate import (
    MeasureSettings,
    difference,
    distinct_bigrams,
    estimate,
    measure,
    run_eval,
    sequence_kl,
)
from gemma2.posttrain.models.sampler import SamplingParams
from gemma2.posttrain.rewards.functions import function_score
from gemma2.posttrain.schemas import EvalConfig
from gemma2.posttrain.tiny.networks import random_model, random_reward_model, save_random, tiny_tokenizer

TEXTS = ["What is 2 + 3?", "Who lives in Tolba?", "Sort the letters c, a, b.", "Is 4 larger than 7?", "Say hello."]


@pytest.fixture(scope="module")
def policy():
    return random_model(1)


@pytest.fixture(scope="module")
def reference():
    return random_model(2)


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(tiny_tokenizer())


@pytest.fixture(scope="module")
def rows():
    return [Prompt("", [{"role": "user", "content": text}], {"answer": text[:3]}) for text in TEXTS]


def settings(n=1, batch_size=8, seed=0, temperature=1.0):
    return MeasureSettings(SamplingParams(max_new_tokens=6, temperature=temperature, n=n), batch_size, seed)


def length_score(sampled):
    return {"reward": [float(len(ids)) for ids in sampled.completions]}


# --- KL -------------------------------------------------------------------------------------------------------------


def completions_of_length(limit, vocabulary, stop):
    """Every completion: ends with the stop token, or runs to the limit."""
    for length in range(1, limit + 1):
        for ids in itertools.product(range(vocabulary), repeat=length):
            if stop in ids[:-1] or (length < limit and ids[-1] != stop):
                continue
            yield list(ids)


def logp(model, prompt, completion, temperature):
    """log pi(y|x) in float64 from one plain forward pass over the whole sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double() / temperature
    table = logits.log_softmax(-1)
    return sum(table[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_kl_estimator_has_the_exact_kl_as_its_mean_and_less_variance_than_the_log_ratio(temperature):
    model, other = (random_model(seed, vocab_size=5) for seed in (1, 2))
    prompt, everything = [3, 1], list(completions_of_length(3, 5, stop=0))
    p = [logp(model, prompt, ids, temperature) for ids in everything]
    q = [logp(other, prompt, ids, temperature) for ids in everything]
    weight = torch.tensor(p, dtype=torch.float64).exp()
    assert weight.sum().item() == pytest.approx(1, abs=1e-6)  # the enumeration is complete
    ratio = torch.tensor(p, dtype=torch.float64) - torch.tensor(q, dtype=torch.float64)
    exact = (weight * ratio).sum().item()

    estimates = sequence_kl(model, other, [prompt] * len(everything), everything, temperature, batch_size=7)

    assert exact > 0.05
    assert (weight * estimates).sum().item() == pytest.approx(exact, rel=1e-5)
    assert (estimates >= 0).all()
    variance = (weight * (estimates - exact) ** 2).sum()
    assert variance < 0.5 * (weight * (ratio - exact) ** 2).sum()


def test_the_kl_does_not_depend_on_batching_or_on_the_chunk_of_positions(policy, reference, monkeypatch):
    prompts, completions = [[2, 9, 8], [2, 5], [2, 7, 7, 7, 4]], [[30, 31, 32, 1], [40], [50, 51]]
    whole = sequence_kl(policy, reference, prompts, completions, batch_size=3)
    single = sequence_kl(policy, reference, prompts, completions, batch_size=1)
    monkeypatch.setattr("gemma2.posttrain.evaluation.evaluate.CHUNK", 512)
    chunked = sequence_kl(policy, reference, prompts, completions, batch_size=3)
    torch.testing.assert_close(single, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


def test_the_kl_of_equal_weights_is_zero(policy):
    kl = sequence_kl(policy, random_model(1), [[2, 9]], [[30, 31, 1]])
    assert kl.item() == pytest.approx(0, abs=1e-6)


# --- measuring ------------------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_the_batch_size_and_repeat_with_the_seed(policy, reference, chat, rows):
    small, large, again, other = (
        measure(policy, reference, chat, rows, [length_score], settings(2, batch, seed))
        for batch, seed in ((1, 0), (64, 0), (64, 0), (64, 5))
    )
    texts = [[row["completion"] for row in m.samples] for m in (small, large, again, other)]
    assert texts[0] == texts[1] == texts[2] != texts[3]
    assert small.per_prompt["kl"] == pytest.approx(large.per_prompt["kl"], rel=1e-4)


def test_policies_are_drawn_with_common_random_numbers(reference, chat, rows):
    a, b = (measure(random_model(1), reference, chat, rows, [length_score], settings()) for _ in range(2))
    assert difference(a, b).mean == 0
    assert difference(a, b).se == 0


def test_a_fifth_prompt_leaves_the_samples_of_the_first_four_alone(policy, reference, chat, rows):
    four = measure(policy, reference, chat, rows[:4], [length_score], settings(2))
    five = measure(policy, reference, chat, rows, [length_score], settings(2))
    assert [row["completion"] for row in four.samples] == [row["completion"] for row in five.samples][:4]


def test_errors_are_clustered_by_prompt(policy, reference, chat, rows):
    index = itertools.count()
    values = [1.0, 3.0, 5.0, 5.0, 0.0, 2.0, 4.0, 8.0, 9.0, 9.0]  # prompt means 2, 5, 1, 6, 9

    def score(sampled):
        return {"reward": [values[next(index)] for _ in sampled.texts]}

    measured = measure(policy, reference, chat, rows, [score], settings(n=2))
    assert measured.n == 10
    assert measured.per_prompt["reward"] == [2, 5, 1, 6, 9]
    # mean 23/5 = 4.6; squared deviations 6.76 + .16 + 12.96 + 1.96 + 19.36 = 41.2; sqrt(41.2 / 4 / 5) = 1.4353
    assert measured.estimates["reward"].mean == pytest.approx(4.6)
    assert measured.estimates["reward"].se == pytest.approx(math.sqrt(2.06))
    # 95 % of t with 4 degrees of freedom lie within 2.7764: 4.6 -+ 2.7764 * 1.4353
    columns = measured.columns()
    assert columns["reward_low"] == pytest.approx(0.6151, abs=1e-4)
    assert columns["reward_high"] == pytest.approx(8.5849, abs=1e-4)


def test_length_counts_the_stop_token_and_truncation_is_a_share(policy, reference, chat, rows):
    measured = measure(policy, reference, chat, rows, [length_score], settings(n=2))
    assert measured.per_prompt["length"] == measured.per_prompt["reward"]
    assert all(0 <= share <= 1 for share in measured.per_prompt["truncated"])
    assert {"prompt", "completion", "reward", "kl"} <= measured.samples[0].keys()


def test_dropout_is_off_and_the_training_mode_comes_back(reference, chat, rows):
    policy = random_model(1, attention_dropout=0.5).train()
    first = measure(policy, reference, chat, rows, [length_score], settings())
    assert policy.training
    plain = measure(random_model(1), reference, chat, rows, [length_score], settings()).per_prompt
    for name, values in plain.items():  # a model that has dropout may take another attention kernel
        assert first.per_prompt[name] == pytest.approx(values, abs=1e-5), name


def test_the_error_of_one_prompt_is_unknown_not_zero(policy, reference, chat, rows):
    columns = measure(policy, reference, chat, rows[:1], [length_score], settings()).columns()
    assert columns["kl"] is not None
    assert [columns[f"kl_{part}"] for part in ("se", "low", "high")] == [None] * 3
    json.dumps(columns, allow_nan=False)


def test_two_scores_of_one_name_are_refused(policy, reference, chat, rows):
    with pytest.raises(InputError, match="two scores are named 'reward'"):
        measure(policy, reference, chat, rows, [length_score, length_score], settings())
    with pytest.raises(InputError, match="'kl'"):
        measure(policy, reference, chat, rows, [lambda sampled: {"kl": [0.0] * len(sampled.texts)}], settings())


def test_no_prompt_is_an_input_error(policy, reference, chat):
    with pytest.raises(InputError, match="no held-out prompt"):
        measure(policy, reference, chat, [], [length_score], settings())


# --- diversity ------------------------------------------------------------------------------------------------------


def test_distinct_bigrams_by_hand():
    # bigrams: (1,2)(2,3) | (1,2)(2,1) | (7,8): 4 distinct of 5
    groups = [[[1, 2, 3]], [[1, 2, 1]], [[7, 8]]]
    # leaving out a prompt: {12,21,78} 3 of 3; {12,23,78} 3 of 3; {12,23,21} 3 of 4
    values = [1, 1, 0.75]
    mean = sum(values) / 3
    expected = math.sqrt(2 / 3 * sum((v - mean) ** 2 for v in values))
    assert distinct_bigrams(groups).mean == pytest.approx(0.8)
    assert distinct_bigrams(groups).se == pytest.approx(expected)


def test_distinct_bigrams_of_single_tokens_is_zero():
    assert distinct_bigrams([[[1]], [[2]]]).mean == 0


def test_the_error_of_one_value_is_nan():
    assert math.isnan(estimate([1.0]).se)


# --- scores ---------------------------------------------------------------------------------------------------------


def plain_judge(prompts, completions, answer, **_):
    return [float(len(text) + len(a)) for text, a in zip(completions, answer, strict=True)]


def rich_judge(completions, truncated, **_):
    return [{"judge": 1.0, "accuracy": float(cut)} for cut in truncated]


def hesitant_judge(prompts, completions, **_):
    """No opinion on greetings, and on every second completion of the others."""
    told = [i % 2 == 0 and "Say" not in messages[-1]["content"] for i, messages in enumerate(prompts)]
    return [{"reward": 1.0, "accuracy": 0.5 if known else None} for known in told]


def test_a_score_counts_where_it_applies_and_is_null_where_it_does_not(policy, reference, chat, rows):
    score = function_score(f"{__name__}:hesitant_judge", "--reward-fn", "reward", abstains=True)
    measured = measure(policy, reference, chat, rows, [score], settings(2))
    assert measured.columns()["accuracy"] == 0.5
    assert [row["accuracy"] for row in measured.samples] == [0.5, 0.5, 0.5, 0.5, None]
    nowhere = measure(policy, reference, chat, rows[4:], [score], settings(2)).columns()
    assert [nowhere[f"accuracy{part}"] for part in ("", "_se", "_low", "_high")] == [None] * 4


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    for name, seed in (("sft", 2), ("policy", 1)):
        save_random(root / name, seed)
    random_reward_model(3).save_pretrained(root / "rm")
    tiny_tokenizer().save_pretrained(root / "rm")
    lines = [json.dumps({"prompt": text, "answer": "5"}) for text in TEXTS]
    (root / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


def config(root, **more):
    fields = {"model": root / "policy", "sft": root / "sft", "prompts": root / "prompts.jsonl", "max_new_tokens": 5}
    return EvalConfig(**(fields | more))


def test_eval_reports_reward_kl_and_judge_with_errors(world):
    result = run_eval(config(world, reward=world / "rm", judge_fn=f"{__name__}:rich_judge"))
    for name in ("reward", "kl", "length", "truncated", "judge", "accuracy", "distinct_2"):
        assert isinstance(result[name], float)
        assert result[f"{name}_se"] >= 0
    assert result["kl"] > 0
    json.dumps(result, allow_nan=False)


def test_eval_of_the_sft_policy_has_no_kl(world):
    result = run_eval(config(world, model=world / "sft", reward_fn=f"{__name__}:plain_judge", limit=3))
    assert result["kl"] == result["kl_se"] == 0
    assert result["prompts"] == 3


def test_another_vocabulary_is_refused(world, tmp_path):
    save_random(tmp_path / "other", 1, vocab_size=600)
    with pytest.raises(InputError, match="vocabulary of 600"):
        run_eval(config(world, model=tmp_path / "other", reward_fn=f"{__name__}:plain_judge"))
