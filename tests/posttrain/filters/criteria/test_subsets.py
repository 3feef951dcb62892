"""Attribution, hedging, refusals and disclaimers; which filters a kept subset overrides; the cap on refusals."""

import math

import numpy as np
import pytest
from samples import row, said

from gemma2.core.errors import UsageError
from gemma2.posttrain.data.sources import Row
from gemma2.posttrain.filters.criteria.refusals import disclaimer, is_refusal
from gemma2.posttrain.filters.criteria.subsets import Subsets
from gemma2.posttrain.filters.decide import surplus_refusals
from gemma2.posttrain.filters.scan import STAYS, Scanner, code_of
from gemma2.posttrain.schemas import FilterConfig

ATTRIBUTION = [
    "According to the report, sales fell.",
    "As stated in the text, he left.",
    "Based on the passage, the answer is 3.",
    "The article says that it rained.",
    "From the document: rates are up.",
    "The author notes a decline.",
    "The study reports 12 cases.",
    "As reported by Reuters, it fell.",
    "It rose by 3 % (source: Eurostat).",
    "According to NASA, it is 4.5 billion years old.",
]
HEDGING = [
    "I'm not sure, but I think it is Oslo.",
    "I am not entirely certain about that.",
    "I could be wrong, but it was 1987.",
    "To the best of my knowledge, yes.",
    "As far as I know, it is still open.",
    "I’m unsure about the date.",
    "It is possible that it was moved.",
    "I can't say for sure.",
    "It's unclear who wrote it.",
    "I believe it was Tolstoy.",
]
HONEST = [
    "I don't know.",
    "I do not have information about that person.",
    "I don't have access to real-time data.",
    "I'm not aware of any such law.",
    "I cannot verify that claim.",
    "I am unable to browse the web.",
    "I don't have any details on this.",
    "Sorry, I can't recall.",
    "I'm not familiar with that book.",
    "I don't have personal opinions.",
]
PLAIN = [
    "The capital of Norway is Oslo.",
    "According to me, it is fine.",
    "I am sure that it is 7.",
    "Now you know.",
    "Certainly! Here is a poem.",
    "The document is long.",
    "You can verify this yourself.",
    "They have access to the data.",
    "He did not know it.",
    "From the top of the hill one sees the sea.",
]


@pytest.mark.parametrize(
    ("name", "texts"),
    [("attribution", ATTRIBUTION), ("hedging", HEDGING), ("refusal", HONEST)],
    ids=lambda v: str(v)[:9],
)
def test_a_subset_is_found_and_plain_answers_belong_to_none(name, texts):
    subsets = Subsets([name], {})
    assert [text for text in texts if subsets.of(said(text)) != [name]] == []
    assert [text for text in PLAIN if subsets.of(said(text))] == []


def test_custom_patterns_are_subsets():
    subsets = Subsets(["hedging"], {"citing": r"\[\d+\]"})
    assert subsets.of(said("I'm not sure [3].")) == ["hedging", "citing"]
    with pytest.raises(UsageError, match=r"keep_patterns\.bad is not a regular expression"):
        Subsets([], {"bad": "("})
    with pytest.raises(UsageError, match=r"keep_patterns\.hedging is also a subset"):
        Subsets(["hedging"], {"hedging": "x"})


REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I cannot assist with this request.",
    "I'm unable to provide that information.",
    "Sorry, I must decline.",
    "As an AI, I cannot provide medical advice.",
    "I won't write that.",
    "I’m not comfortable answering this.",
    "I don't have access to your files.",
    "I refuse to answer.",
    "I'd rather not say.",
    "It is not appropriate for me to comment.",
    "I'm afraid I can't do that.",
]
ANSWERS = [
    *PLAIN[:1],
    "I'm sorry to hear that. Try resting.",
    "You can't divide by zero.",
    "He said that he cannot help.",
    "The server refused the connection.",
    "Sorry for the delay! Here it is: 7.",
    "I can help with that.",
    "They were unable to come.",
    "Here is how to decline an invitation politely.",
    "I'm happy to answer.",
    "x " * 150 + "I cannot help with that.",
]


def test_refusals_are_those_that_open_an_answer():
    assert [text for text in REFUSALS if not is_refusal(said(text))] == []
    assert [text for text in ANSWERS if is_refusal(said(text))] == []
    assert not is_refusal(said("Certainly.", question="I can't help with that."))


# The words of a refusal in a letter, a story, a quotation, praise, a proof, code.
NOT_REFUSALS = [
    "First I must create a class, then a method.",
    "I must support my claim with a proof by induction.",
    "I can't help but admire the last stanza.",
    "I can't help laughing at this joke.",
    "I can't provide a better example than the Rosetta Stone.",
    "I'm sorry your manager won't give you leave. Here is a letter.",
    "Hi Sam, I'm not able to come tonight, sorry!",
    "Dear Mr. Bell, I can't help with the move on Friday. Kind regards, Ann",
    "I won't help you, said the knight, and drew his sword.",
    '"I can\'t help you," whispered the ferryman.',
    "print(\"I'm sorry, I can't help with that\")",
    "I don't know about you, but I would start with x.",
    "I'm not going to lie: this integral is hard.",
    "Es tut mir leid, dass du krank bist.",
    "对不起，我刚才算错了，答案是14。",
]
MORE_REFUSALS = [
    "Sorry, but that's not something I can help with.",
    "It goes against my guidelines to produce this.",
    "I apologise, but I can't write that story.",
    "I'd prefer not to answer that.",
    "Providing such details would be unsafe, so I won't.",
    "Es tut mir leid, aber dabei kann ich nicht helfen.",
    "Je ne peux pas répondre à cette demande.",
    "Lo siento, pero no puedo ayudarte con eso.",
    "Извините, но я не могу помочь с этим.",
    "抱歉，我无法提供这方面的信息。",
]


def test_a_refusal_is_the_models_own_and_may_be_in_another_language():
    assert [text for text in NOT_REFUSALS if is_refusal(said(text))] == []
    assert [text for text in MORE_REFUSALS if not is_refusal(said(text))] == []


DISCLAIMERS = [
    "As an AI language model, I have no body.",
    "As a large language model, I learn from text.",
    "I'm just an AI, but here goes.",
    "I am an artificial intelligence.",
    "My knowledge cutoff is 2021.",
    "As of my last update, it was open.",
    "As an AI, I have no feelings.",
    "I’m only a language model.",
    "Since my last knowledge update, this may have changed.",
    "My training data ends in 2023.",
]
NO_DISCLAIMERS = [
    *PLAIN,
    "AI is a field of computer science.",
    "A language model predicts words.",
    "As an aide, she wrote speeches.",
    "I am an aikido teacher.",
    "As an AI student, you should learn linear algebra.",
    "Split the training data before you scale the features.",
    "The knowledge cutoff of a model is the date of its last document.",
]


def test_disclaimers_of_assistants_are_found():
    assert [text for text in DISCLAIMERS if disclaimer(said(text)) is None] == []
    assert [text for text in NO_DISCLAIMERS if disclaimer(said(text))] == []


def reason(text, **settings):
    config = FilterConfig(data="d", drop_disclaimers=True, min_words=5, unsafe_words=("general",), **settings)
    found = Scanner(config, None).scan([Row("f:1", row(text))])
    return None if found.codes[0] == STAYS else found.reasons[0][0][0]


def test_a_kept_subset_overrides_filters_on_style_only():
    assert reason("I don't know.") == "length"
    assert reason("I don't know.", keep=("refusal",)) is None
    assert reason("I don't know.", keep=("hedging",)) == "length"
    long = "As an AI language model, I'm not sure about the date of that."
    assert reason(long) == "disclaimer"
    assert reason(long, keep=("hedging",)) is None
    for text, stays_dropped in [
        ("I'm not sure, write to jane.doe@gmail.com about it.", "personal"),
        ("I'm not sure, you stupid bitch, go away.", "unsafe"),
        ("I'm not sure, for I am ChatGPT and no expert.", "identity"),
        ("I'm not sure. " * 30, "repetition"),
    ]:
        assert reason(text, keep=("hedging",)) == stays_dropped


def test_the_first_reason_in_the_order_counts_and_all_can_be_listed():
    text = "I am ChatGPT, write to jane.doe@gmail.com"
    assert reason(text) == "personal"
    config = FilterConfig(data="d", all_reasons=True, min_words=50)
    found = Scanner(config, None).scan([Row("f:1", row(text))])
    assert [name for name, _ in found.reasons[0]] == ["length", "personal", "identity"]
    assert found.codes[0] == code_of("length")


# --- the cap ----------------------------------------------------------------------------------------------------------


def flags(*values):
    return np.array(values, dtype=bool)


def test_the_cap_by_hand():
    # 6 answers and 4 refusals: at 25 % two may stay (2 / 8), so two go.
    refuses = flags(0, 1, 0, 1, 0, 1, 0, 1, 0, 0)
    none = np.zeros(10, dtype=bool)
    gone = surplus_refusals(refuses, none, 0.25, seed=0)
    assert len(gone) == 2 and refuses[gone].all()
    assert len(surplus_refusals(refuses, none, 0.0, seed=0)) == 4
    assert len(surplus_refusals(refuses, none, 0.4, seed=0)) == 0
    assert len(surplus_refusals(refuses, none, 0.39, seed=0)) == 1  # 3 / 9 = 0.333, 4 / 10 = 0.4


def test_protected_refusals_stay_and_count():
    refuses = flags(0, 1, 0, 1, 0, 1, 0, 1, 0, 0)
    protected = flags(0, 1, 0, 1, 0, 1, 0, 0, 0, 0)
    assert surplus_refusals(refuses, protected, 0.25, seed=0).tolist() == [7]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.7])
def test_the_share_is_met_and_no_refusal_more_than_needed_goes(share):
    refuses = np.random.default_rng(1).random(200) < 0.5
    gone = surplus_refusals(refuses, np.zeros(200, dtype=bool), share, seed=3)
    left, answers = refuses.sum() - len(gone), (~refuses).sum()
    assert left / (left + answers) <= share + 1e-12
    assert len(gone) == 0 or math.ceil(left + 1) / (left + 1 + answers) > share


def test_the_choice_follows_the_seed():
    refuses = np.ones(50, dtype=bool)
    refuses[:25] = False
    choose = [surplus_refusals(refuses, ~refuses & False, 0.1, seed).tolist() for seed in (0, 0, 1)]
    assert choose[0] == choose[1] != choose[2]
