"""The sum of several terms: by hand, and independent of what else is in the batch."""

import math

import pytest
import torch
from pydantic import ValidationError

from gemma2.core.errors import GuardStop, InputError, UsageError
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.provenance.named_inputs import named_inputs
from gemma2.posttrain.rewards.functions import Sampled
from gemma2.posttrain.rewards.model import RewardModel
from gemma2.posttrain.rewards.terms import column_means, reward_score, weighted_sum
from gemma2.posttrain.schemas import RewardFields
from gemma2.posttrain.tiny.networks import random_reward_model, save_random, tiny_tokenizer

TURNS = [
    {"role": "user", "content": "Who lives in Tolba?"},
    {"role": "assistant", "content": "Ana."},
    {"role": "user", "content": "And where?"},
]
ASKED = [[{"role": "user", "content": "What is 2 + 3?"}], TURNS, [{"role": "user", "content": "Say hello."}]]
ANSWERS = ["It is 5.", "In the north.", "Hel"]


def four(completions, **_):
    return [4.0] * len(completions)


def letters(completions, **_):
    return [len(text) for text in completions]


def only_sums(prompts, completions, **_):
    return [10.0 if "+" in messages[-1]["content"] else None for messages in prompts]


def graded(completions, **_):
    return [{"reward": 1.0, "accuracy": 0.5} for _ in completions]


def in_the_way(completions, **_):
    return [{"reward": 1.0, "reward_std_in_group": 5.0} for _ in completions]


def half_graded(prompts, completions, **_):
    return [{"reward": 2.0, "accuracy": 1.0} if "+" in messages[-1]["content"] else None for messages in prompts]


def graded_too(completions, **_):
    return [{"reward": 1.0, "accuracy": 0.25} for _ in completions]


def no_reward(completions, **_):
    return [{"accuracy": 0.5} for _ in completions]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three reward models; the last one has a separate template, so it reads text."""
    root = tmp_path_factory.mktemp("models")
    places = [save_random(root / name, seed, kind="reward") for seed, name in enumerate(("rm", "other", "reader"))]
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("<start_of_turn>", "<start_of_turn>", 1) + "{# another #}"
    other.save_pretrained(places[2])
    return places


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(tiny_tokenizer())


@pytest.fixture(scope="module")
def sampled(chat):
    rows = [Prompt(f"f:{i}", messages) for i, messages in enumerate(ASKED, start=1)]
    completions = [[*chat.tokenizer.encode(text, add_special_tokens=False), 107] for text in ANSWERS]
    completions[2].pop()  # cut
    prompts = [chat.prompt_ids(messages) for messages in ASKED]
    return Sampled(rows, prompts, completions, ANSWERS, [False, False, True])


def fn(*names):
    return tuple(f"{__name__}:{name}" for name in names)


def turned(sampled):
    return Sampled(*(list(getattr(sampled, name))[::-1] for name in sampled.__dataclass_fields__))


# --- by hand --------------------------------------------------------------------------------------------------------


def test_the_weighted_sum_by_hand():
    values = torch.tensor([[1.0, -2.0, math.nan], [4.0, math.nan, math.nan]], dtype=torch.float64)
    weights = torch.tensor([2.0, 0.5], dtype=torch.float64)
    total = weighted_sum(values, weights)
    assert total[:2].tolist() == [2 * 1 + 0.5 * 4, 2 * -2]
    assert total[2].isnan()
    clipped = weighted_sum(values, weights, clip=3.5)
    assert clipped[:2].tolist() == [3.5, -3.5]
    assert clipped[2].isnan()


def test_a_term_of_weight_0_reports_and_has_no_opinion():
    values = torch.tensor([[math.nan, 1.0], [5.0, 5.0]], dtype=torch.float64)
    total = weighted_sum(values, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert total[0].isnan() and total[1] == 1.0


def test_clip_comes_after_the_weights_and_before_the_penalties(chat, sampled):
    config = RewardFields(
        reward_fn=fn("four", "letters"),
        reward_weights=(0.5, -1.0),
        reward_clip=5.0,
        length_penalty=0.25,
        missing_eos_penalty=2.0,
    )
    columns = reward_score(config, chat, 8)(sampled)
    tokens = [len(ids) for ids in sampled.completions]
    # 2 - 8 and 2 - 13 letters are cut to -5; 2 - 3 is not, and the last one was truncated
    assert columns["reward"] == [-5 - tokens[0] / 4, -5 - tokens[1] / 4, -1 - tokens[2] / 4 - 2]
    assert columns["rewards/four"] == [4.0, 4.0, 4.0]
    assert columns["rewards/letters"] == [8.0, 13.0, 3.0]


def test_a_single_term_is_not_repeated_and_its_weight_counts(chat, sampled):
    assert reward_score(RewardFields(reward_fn=fn("four")), chat, 8)(sampled) == {"reward": [4.0] * 3}
    doubled = RewardFields(reward_fn=fn("four"), reward_weights=(2,))
    assert reward_score(doubled, chat, 8)(sampled) == {"reward": [8.0] * 3}


def test_a_term_without_an_opinion_adds_nothing_and_is_left_out_of_its_mean(chat, sampled):
    columns = reward_score(RewardFields(reward_fn=fn("four", "only_sums")), chat, 8)(sampled)
    assert columns["reward"] == [14.0, 4.0, 4.0]
    assert column_means(columns) == {"reward": 22 / 3, "rewards/four": 4.0, "rewards/only_sums": 10.0}
    assert column_means({"a": [math.nan]}) == {"a": None}


def test_a_completion_that_no_term_has_an_opinion_on_is_an_error_that_names_the_row(chat, sampled):
    with pytest.raises(InputError, match=r"no term of the reward has an opinion on 2 of 3 .* f:2"):
        reward_score(RewardFields(reward_fn=fn("only_sums")), chat, 8)(sampled)


def test_further_numbers_of_a_function_keep_their_names(chat, sampled):
    columns = reward_score(RewardFields(reward_fn=fn("four", "graded")), chat, 8)(sampled)
    assert columns["accuracy"] == [0.5] * 3
    assert columns["rewards/graded"] == [1.0] * 3
    with pytest.raises(InputError, match="two terms of the reward return 'accuracy'"):
        reward_score(RewardFields(reward_fn=fn("graded", "graded_too")), chat, 8)(sampled)
    with pytest.raises(InputError, match=r"returned accuracy but no 'reward'"):
        reward_score(RewardFields(reward_fn=fn("no_reward")), chat, 8)(sampled)
    with pytest.raises(InputError, match="returned 'reward_std_in_group', a figure of the run"):
        reward_score(RewardFields(reward_fn=fn("in_the_way")), chat, 8)(sampled)


def test_none_among_mappings_is_no_opinion_on_any_key(chat, sampled):
    columns = reward_score(RewardFields(reward_fn=fn("four", "half_graded")), chat, 8)(sampled)
    assert columns["reward"] == [6.0, 4.0, 4.0]
    assert column_means(columns)["accuracy"] == 1.0


# --- reward models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(models, sampled):
    """Scores of each model by itself: ids for the first two, text for the last."""
    scores = [RewardModel.from_dir(path).score(sampled.prompts, sampled.completions) for path in models[:2]]
    reader = RewardModel.from_dir(models[2])
    return torch.stack([*scores, reader.score_text(ASKED, ANSWERS, sampled.truncated)]).double()


def test_models_come_before_functions_and_are_named_by_their_directories(models, chat, sampled, alone):
    config = RewardFields(reward=models, reward_fn=fn("letters"), reward_weights=(1, 2, 3, 0.5))
    columns = reward_score(config, chat, 8)(sampled)
    assert list(columns) == ["reward", "rewards/rm", "rewards/other", "rewards/reader", "rewards/letters"]
    for name, expected in zip(("rm", "other", "reader"), alone, strict=True):
        assert columns[f"rewards/{name}"] == pytest.approx(expected.tolist(), abs=1e-6)
    letter = torch.tensor([8.0, 13.0, 3.0])
    expected = alone[0] + 2 * alone[1] + 3 * alone[2] + 0.5 * letter
    assert columns["reward"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_each_reward_model_reads_ids_or_text_by_its_own_tokenizer(models, chat, sampled, monkeypatch):
    read = []
    for name in ("score", "score_text"):
        original = getattr(RewardModel, name)
        monkeypatch.setattr(
            RewardModel,
            name,
            lambda self, *args, name=name, original=original: read.append(name) or original(self, *args),
        )
    reward_score(RewardFields(reward=models[1:]), chat, 8)(sampled)
    assert read == ["score", "score_text", "score"]  # the text is rendered, then scored as ids


def test_ids_and_text_of_several_turns_are_scored_alike(models, chat, sampled):
    model = RewardModel.from_dir(models[0])
    ids = model.score(sampled.prompts, sampled.completions)
    text = model.score_text(ASKED, ANSWERS, sampled.truncated)
    assert torch.allclose(ids, text, atol=1e-6)
    first_turn = model.score_text([TURNS[-1:]], ANSWERS[1:2], [False])
    assert abs(first_turn[0] - text[1]) > 1e-4, "the turns before are read"


@pytest.mark.parametrize("how", ["mean", "min"])
def test_an_ensemble_is_one_term_with_its_disagreement(models, chat, sampled, alone, how):
    config = RewardFields(reward=models, reward_ensemble=how)
    columns = reward_score(config, chat, 8)(sampled)
    for i in range(3):
        a, b, c = alone[:, i].tolist()
        mean = (a + b + c) / 3
        spread = math.sqrt(((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2) / 3)
        assert columns["reward"][i] == pytest.approx(mean if how == "mean" else min(a, b, c), abs=1e-6)
        assert columns["reward_disagreement"][i] == pytest.approx(spread, abs=1e-6)
    weighed = RewardFields(reward=models, reward_ensemble=how, reward_fn=fn("four"), reward_weights=(2, 1))
    both = reward_score(weighed, chat, 8)(sampled)
    assert set(both) == {"reward", "rewards/ensemble", "reward_disagreement", "rewards/four"}
    assert both["reward"] == pytest.approx([2 * value + 4 for value in columns["reward"]], abs=1e-5)


@pytest.mark.parametrize("how", [None, "mean", "min", "warm"])
def test_rewards_depend_on_neither_batch_nor_order(models, chat, sampled, how):
    places = models[:2] if how == "warm" else models
    config = RewardFields(reward=places, reward_ensemble=how, reward_fn=fn("letters"), reward_clip=20, length_penalty=1)
    together = reward_score(config, chat, 8)(sampled)
    singly = reward_score(config, chat, 1)(sampled)
    backwards = reward_score(config, chat, 2)(turned(sampled))
    for name, values in together.items():
        assert values == pytest.approx(singly[name], abs=1e-5), name
        assert values == pytest.approx(backwards[name][::-1], abs=1e-5), name


def test_a_reward_model_that_gives_nan_stops_the_run(tmp_path, chat, sampled):
    model = random_reward_model()
    with torch.no_grad():
        model.score.weight.fill_(3e38)  # finite; its products are not
    model.save_pretrained(tmp_path / "rm")
    tiny_tokenizer().save_pretrained(tmp_path / "rm")
    with pytest.raises(GuardStop, match=r"rm is NaN or infinite"):
        reward_score(RewardFields(reward=tmp_path / "rm", reward_fn=fn("four")), chat, 8)(sampled)


# --- configuration --------------------------------------------------------------------------------------------------


def test_repeated_names_are_numbered(tmp_path, models, chat, sampled):
    for folder in ("a", "b", "c"):
        save_random(tmp_path / folder / "letters", kind="reward")
    places = tuple(tmp_path / folder / "letters" for folder in ("a", "b", "c"))
    columns = reward_score(RewardFields(reward=places, reward_fn=fn("letters")), chat, 8)(sampled)
    assert list(columns)[1:] == ["rewards/letters", "rewards/letters-2", "rewards/letters-3", "rewards/letters-4"]


def test_a_single_value_is_read_as_a_list_and_null_as_an_empty_one(tmp_path):
    assert RewardFields(reward=str(tmp_path), reward_fn="m:f") == RewardFields(reward=(tmp_path,), reward_fn=("m:f",))
    assert RewardFields(reward=None, reward_fn=None) == RewardFields()


def test_every_reward_model_is_a_parent(models):
    named = [*named_inputs(RewardFields(reward=models))]
    assert [(one.role, one.path, one.is_model) for one in named] == [("reward", path, True) for path in models]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reward_fn": ("m:f", "m:g"), "reward_weights": (1,)}, r"1 weights for 2 terms \(m:f, m:g\)"),
        (
            {"reward": ("a", "b"), "reward_ensemble": "min", "reward_fn": ("m:g",), "reward_weights": (1, 2, 3)},
            r"3 weights for 2 terms \(min of 2 reward models, m:g\)",
        ),
        ({"reward_weights": (1,)}, "1 weights for 0 terms"),
        ({"reward_fn": ("m:f",), "reward_weights": (0,)}, "all 0"),
        ({"reward": ("a",), "reward_ensemble": "mean"}, "--reward-ensemble mean needs two reward models"),
        ({"reward_fn": ("m:f",), "reward_ensemble": "warm"}, "--reward-ensemble warm needs two"),
        ({"reward": ("a", "a")}, "names a twice"),
        ({"reward_fn": ("m:f",), "reward_clip": 0}, "greater than 0"),
        ({"reward_fn": ("m:f",), "reward_weights": (math.inf,)}, "finite"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ValidationError, match=words):
        RewardFields(**fields)


def test_a_missing_reward_is_refused(chat, tmp_path):
    with pytest.raises(UsageError, match="no reward is given; give --reward RM, --reward-fn"):
        reward_score(RewardFields(), chat, 8)
    with pytest.raises(UsageError, match="--reward-fn 'm_x:f'"):
        reward_score(RewardFields(reward=tmp_path / "gone", reward_fn=("m_x:f",)), chat, 8)
    with pytest.raises(InputError, match="is not a reward model"):
        reward_score(RewardFields(reward=save_random(tmp_path / "policy")), chat, 8)
