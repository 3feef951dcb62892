"""A speaker draws what the sampler draws, and computes nothing twice."""

import pytest
import torch

from gemma2.core.errors import InputError
from gemma2.posttrain.chat.speaker import Speaker
from gemma2.posttrain.models.sampler import SamplingParams, random_numbers, sample
from gemma2.posttrain.tiny.networks import random_model, tiny_tokenizer

ASK = [{"role": "user", "content": "What is 2 plus 3? Say it in many words, please."}]  # longer than the window of 8


@pytest.fixture
def speaker():
    model = random_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[107] *= 4  # it ends its turns now and then
    return Speaker(model, tiny_tokenizer(), "tiny")


def said(speaker, messages, params, seed=0):
    pieces = list(speaker.answer(messages, params, seed))
    assert [one.end for one in pieces[:-1]] == [""] * (len(pieces) - 1)
    return "".join(one.text for one in pieces), pieces[-1].end


def drawn(speaker, messages, params, seed=0):
    """The same answer by the sampler: one prefill, no cache from before."""
    numbers = random_numbers(1, params, torch.Generator().manual_seed(seed))
    found = sample(
        speaker.model, [speaker.form.prompt_ids(messages)], params, speaker.form.stop_ids, 0, uniforms=numbers
    )
    ids = found.ids[0] if found.truncated[0] else found.ids[0][:-1]
    return speaker.form.decode(ids), "length" if found.truncated[0] else "stop"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fast", [True, False], ids=["own decoder", "transformers"])
def test_the_answers_of_several_turns_are_those_of_the_sampler(speaker, temperature, fast):
    assert speaker.decoder is not None
    speaker.decoder = speaker.decoder if fast else None
    params = SamplingParams(12, temperature)
    messages, ends = list(ASK), set()
    for turn in range(8):
        found = said(speaker, messages, params, seed=turn)
        assert found == drawn(speaker, messages, params, seed=turn)
        ends.add(found[1])
        messages += [
            {"role": "assistant", "content": found[0].strip() or "."},
            {"role": "user", "content": f"And {turn}?"},
        ]
    assert temperature == 0 or ends == {"stop", "length"}


def test_what_the_cache_holds_is_not_computed_again(speaker):
    params = SamplingParams(8, 0.0)
    answer, _ = said(speaker, ASK, params)
    before, held = speaker.computed, list(speaker.cached)
    longer = [*ASK, {"role": "assistant", "content": answer.strip()}, {"role": "user", "content": "Why?"}]
    ids = speaker.form.prompt_ids(longer)
    same = next((i for i, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b), len(held))
    assert same >= len(speaker.form.prompt_ids(ASK))
    list(speaker.answer(longer, SamplingParams(1, 0.0), 0))
    assert speaker.computed - before == len(ids) - same


def test_an_answer_that_was_left_and_a_question_that_was_changed(speaker):
    params = SamplingParams(24, 1.0)
    stream = speaker.answer(ASK, params, 3)
    next(stream), next(stream)
    stream.close()
    other = [{"role": "user", "content": "What is 2 plus 4?"}]
    assert said(speaker, other, params, 5) == drawn(speaker, other, params, 5)
    assert said(speaker, ASK, params, 3) == drawn(speaker, ASK, params, 3)


def test_a_full_context_ends_an_answer_and_refuses_a_question(speaker):
    speaker.context = len(speaker.form.prompt_ids(ASK)) + 3
    _, end = said(speaker, ASK, SamplingParams(500, 1.0), 1)
    assert end in ("context", "stop") and len(speaker.cached) <= speaker.context
    speaker.context = 4
    with pytest.raises(InputError, match="the context 4"):
        speaker.prompt(ASK)


def test_half_a_character_waits_for_the_rest(speaker, monkeypatch):
    """A character of three byte tokens appears once, whole."""
    texts = iter(["a", "a�", "a�", "a€", "a€b"])
    monkeypatch.setattr(speaker, "_text", lambda ids: next(texts))
    pieces = [one.text for one in speaker.answer(ASK, SamplingParams(5, 0.0), 0)]
    assert [text for text in pieces if text] == ["a", "€", "b"]
