"""Turns, settings, votes and files of a chat."""

import json

import pytest

from gemma2.core.errors import Gemma2Error, InputError
from gemma2.posttrain.chat.talk import DrawSettings, Talk
from gemma2.posttrain.data.sources import iter_rows


def test_messages_undo_and_swap():
    talk = Talk(["a", "b"], system="Be brief.", turns=[("one", ["1a", "1b"]), ("two", ["2a", "2b"])])
    assert talk.messages(1, "three") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1b"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2b"},
        {"role": "user", "content": "three"},
    ]
    talk.swap()
    assert (talk.models, talk.turns[0][1]) == (["b", "a"], ["1b", "1a"])
    assert [talk.undo(), talk.undo()] == ["two", "one"]
    with pytest.raises(InputError, match="nothing to take back"):
        talk.undo()
    with pytest.raises(InputError, match="--against"):
        Talk(["a"]).swap()


def test_settings_change_by_name_and_refuse_the_rest():
    found = DrawSettings().changed("temperature=0.5 top_k=3 seed=7")
    assert (found.temperature, found.top_k, found.seed, found.top_p) == (0.5, 3, 7, 1.0)
    assert DrawSettings().changed("") == DrawSettings()
    for text, message in [
        ("temprature=1", "did you mean 'temperature'"),
        ("temperature=9", "at most 5"),
        ("temperature=nan", "not a value"),
        ("top_p=0", "above 0"),
        ("max_new_tokens=1.5", "not a value"),
        ("max_new_tokens", "not a value"),
    ]:
        with pytest.raises(InputError, match=message):
            DrawSettings().changed(text)


def test_votes_are_pairs_that_the_reward_command_reads(tmp_path):
    talk = Talk(["x", "y"], turns=[("one", ["1x", "1y"])], votes=tmp_path / "votes.jsonl")
    assert talk.vote("b") == "y"
    assert talk.turns == [("one", ["1y", "1y"])]  # both continue from it
    talk.turns.append(("two", ["2x", "2y"]))
    assert talk.vote("a") == "x"
    rows = [row.columns for row in iter_rows(tmp_path / "votes.jsonl")]
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows] == [
        ("1y", "1x"),
        ("2x", "2y"),
    ]
    assert [turn["content"] for turn in rows[1]["prompt"]] == ["one", "1y", "two"]

    from gemma2.posttrain.data.rows import pair_of  # what `gemma2 reward --data` does with a row

    assert all(pair_of(row) for row in iter_rows(tmp_path / "votes.jsonl"))


def test_a_vote_that_would_not_be_a_pair_is_refused(tmp_path):
    talk = Talk(["x", "y"], turns=[("one", ["same", "same"])], votes=tmp_path / "votes.jsonl")
    with pytest.raises(InputError, match="both answers are the same"):
        talk.vote("a")
    talk.turns = [("one", ["1x", "1y"]), ("two", ["2x", "2y"])]
    with pytest.raises(InputError, match="saw different turns"):
        talk.vote("a")
    with pytest.raises(InputError, match="/vote a or /vote b"):
        talk.vote("left")
    assert not talk.votes.exists()
    with pytest.raises(Gemma2Error, match="cannot be written"):
        Talk(["x", "y"], turns=[("one", ["1", "2"])], votes=tmp_path / "no" / "v.jsonl").vote("a")


def test_a_saved_conversation_is_the_same_when_loaded(tmp_path):
    settings = DrawSettings().changed("temperature=0.3 seed=4")
    talk = Talk(["x"], "Be kind.", [("a\nb", ["ä €"])], settings)
    talk.save(tmp_path / "talk.json")
    again = Talk(["another"])
    again.load(tmp_path / "talk.json")
    assert (again.system, again.turns, again.settings) == (talk.system, talk.turns, talk.settings)
    talk.save(tmp_path / "talk.json")  # one of ours is replaced


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"chat": 1}', '{"chat": 1, "turns": [1]}', '{"chat": 1, "turns": [{"user": 1, "answers": []}]}'],
)
def test_another_file_is_neither_loaded_nor_replaced(tmp_path, text):
    path = tmp_path / "notes.json"
    path.write_text(text)
    for act in (Talk(["x"]).load, Talk(["x"]).save):
        with pytest.raises(InputError):
            act(path)
    assert path.read_text() == text


def test_a_conversation_of_two_does_not_load_into_one(tmp_path):
    Talk(["x", "y"], turns=[("q", ["1", "2"])]).save(tmp_path / "talk.json")
    with pytest.raises(InputError, match="2 models, this one has 1"):
        Talk(["x"]).load(tmp_path / "talk.json")
    with pytest.raises(InputError, match="does not exist"):
        Talk(["x"]).load(tmp_path / "nothing.json")
    assert json.loads((tmp_path / "talk.json").read_text())["models"] == ["x", "y"]
