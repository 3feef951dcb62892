"""What a dry run says that a job will ask for, draw and cost."""

from __future__ import annotations

import pytest
from row_reading import plain_reading

from gemma2.core.errors import InputError
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.runs.generation_budget import PromptSource, generate_budget
from gemma2.posttrain.schemas import GenerateConfig


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(to_line({"question": "x" * 400}) + to_line({"question": "y" * 800, "answer": "4"}))
    return path


def budget(prompts, **fields):
    return generate_budget(GenerateConfig(teacher="m", prompts=prompts, **fields))


def test_one_turn_by_hand(prompts):
    figures = budget(prompts, n=3, max_new_tokens=100, engine="openai", price_in=2.0, price_out=10.0)
    assert figures["prompts"] == 2 and figures["completions"] == figures["requests"] == 6
    assert figures["prompt_tokens_about"] == 3 * (105 + 205)  # 4 bytes a token, 5 for a message
    assert figures["drawn_tokens_at_most"] == 600
    assert figures["cost_usd_at_most"] == round((930 * 2 + 600 * 10) / 1e6, 4) == 0.0079


def test_later_turns_read_what_came_before(prompts):
    figures = budget(prompts, limit=1, turns=2, max_new_tokens=100, user_instruction="z" * 40)
    # 105; the user's turn: 15 of instruction, 105 and an answer of 105; the second answer: 105 and two turns of 105
    assert figures["prompt_tokens_about"] == 105 + (15 + 105 + 105) + (105 + 210)
    assert figures["requests"] == 3 and figures["drawn_tokens_at_most"] == 300


def test_no_price_no_cost(prompts):
    assert "cost_usd_at_most" not in budget(prompts)


def test_the_system_text_goes_before_prompts_that_have_none(tmp_path):
    path = tmp_path / "p.jsonl"
    own = [{"role": "system", "content": "theirs"}, {"role": "user", "content": "b"}]
    path.write_bytes(to_line({"prompt": "a", "id": 1}) + to_line({"prompt": own}))
    first, second = PromptSource(path, plain_reading(), system="ours")
    assert [m["content"] for m in first.messages] == ["ours", "a"] and first.extra == {"id": 1}
    assert second.messages == own


def test_a_row_without_the_column_is_named(prompts):
    with pytest.raises(InputError, match=r"--columns: no row of .*prompts\.jsonl has a column 'ask'"):
        generate_budget(GenerateConfig(teacher="m", prompts=prompts, columns=("prompt=ask",)))
