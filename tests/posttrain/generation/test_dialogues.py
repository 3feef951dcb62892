"""Who says what in a conversation that one model writes alone, and where it ends."""

from __future__ import annotations

import pytest

from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.generation.dialogues import Dialogue, DialoguePlan
from gemma2.posttrain.generation.engines import Completion

PLAN = DialoguePlan(n=1, seed=0, turns=3, user_instruction="Play the user.")
SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "u1"}


def dialogue(*texts, prompt=(SYSTEM, ASK), reasons=(), plan=PLAN):
    made = Dialogue(plan, Prompt("p:1", list(prompt)), 4, 0)
    for turn, text in enumerate(texts):
        reason = reasons[turn] if turn < len(reasons) else "stop"
        made.take({(4, 0, turn): Completion((4, 0, turn), text, reason)})
    return made


def told(messages):
    return " ".join(f"{message['role'][0]}:{message['content']}" for message in messages)


def test_the_model_answers_the_prompt_and_then_the_whole_conversation():
    assert told(dialogue().next_prompt()) == "s:Be brief. u:u1"
    assert told(dialogue("a1", "u2").next_prompt()) == "s:Be brief. u:u1 a:a1 u:u2"


def test_as_the_user_it_sees_the_roles_swapped_behind_the_instruction_and_no_system_text():
    assert told(dialogue("a1").next_prompt()) == "u:Play the user. a:u1 u:a1"
    assert told(dialogue("a1", "u2", "a2").next_prompt()) == "u:Play the user. a:u1 u:a1 a:u2 u:a2"


def test_a_seed_conversation_is_swapped_whole():
    seed = [ASK, {"role": "model", "content": "a1"}, {"role": "user", "content": "u2"}]
    assert told(dialogue("a2", prompt=seed).next_prompt()) == "u:Play the user. a:u1 u:a1 a:u2 u:a2"


def test_a_conversation_has_as_many_model_turns_as_were_asked_for():
    made = dialogue("a1", "u2", "a2", "u3", "a3")
    assert made.ended and made.fate == "stop" and len(made.answers) == 3
    assert told(made.messages) == "s:Be brief. u:u1 a:a1 u:u2 a:a2 u:u3 a:a3"
    made.take({made.key: Completion(made.key, "more", "stop")})
    assert len(made.drawn) == 5


@pytest.mark.parametrize(
    ("texts", "reasons", "fate", "messages"),
    [
        (["a1"], ["length"], "length", "s:Be brief. u:u1 a:a1"),
        (["a1", "u2", "a2"], ["stop", "stop", "length"], "length", "s:Be brief. u:u1 a:a1 u:u2 a:a2"),
        (["a1", "u2 cu"], ["stop", "length"], "stop", "s:Be brief. u:u1 a:a1"),
        (["a1", ""], [], "stop", "s:Be brief. u:u1 a:a1"),
        (["a1", "u2", ""], ["stop", "stop", "content_filter"], "stop", "s:Be brief. u:u1 a:a1"),
        (["a1", "u2", ""], ["stop", "stop", "overlong"], "stop", "s:Be brief. u:u1 a:a1"),
    ],
)
def test_it_ends_early_and_counts_up_to_its_last_model_turn(texts, reasons, fate, messages):
    made = dialogue(*texts, reasons=reasons)
    assert made.ended and made.fate == fate and told(made.messages) == messages


@pytest.mark.parametrize("reason", ["overlong", "content_filter"])
def test_without_any_answer_its_fate_says_why(reason):
    made = dialogue("", reasons=[reason])
    assert made.ended and made.fate == reason and made.answers == []


def test_an_empty_answer_ends_a_conversation_and_is_not_in_it():
    first = dialogue("")
    assert first.ended and first.answers == [] and first.fate == "empty"
    third = dialogue("a", "q", "")
    assert third.ended and [turn.text for turn in third.answers] == ["a"] and third.fate == "stop"
    assert told(third.messages) == "s:Be brief. u:u1 a:a"


def test_seeds_differ_by_run_prompt_sample_and_turn():
    seeds = set()
    for seed in range(2):
        for row in range(3):
            for sample in range(3):
                made = Dialogue(DialoguePlan(3, seed, 3, ""), Prompt("p:1", [ASK]), row, sample)
                for turn in range(5):
                    seeds.add(made.turn_seed)
                    assert turn or made.turn_seed == made.seed
                    made.take({made.key: Completion(made.key, "x", "stop")})
    assert len(seeds) == 2 * 3 * 3 * 5
