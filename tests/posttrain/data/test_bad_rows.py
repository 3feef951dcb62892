"""`--on-bad-row skip` of the training commands: what is left out is counted and listed, and the rest is learned."""

from __future__ import annotations

import json

import pytest

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError
from gemma2.posttrain.data.reading import SKIPPED
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.tiny.networks import save_random

pytestmark = pytest.mark.long

USER, MODEL = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CONVERSATIONS = [{"prompt": letter, "completion": letter} for letter in "abcdef"]
PAIRS = [{"prompt": letter, "chosen": "yes", "rejected": "no"} for letter in "abcdef"]
PROMPTS = [{"prompt": letter} for letter in "abcdef"]
UNREADABLE, OUT_OF_ORDER = b"{'prompt': 1}\n", {"messages": [MODEL, USER, MODEL]}

COMMANDS = {
    "sft": ("--data", [*CONVERSATIONS, OUT_OF_ORDER], "--max-steps 1 --max-length 64"),
    "reward": ("--data", [*PAIRS, {"prompt": [USER, USER], "chosen": "x", "rejected": "y"}], "--max-steps 1"),
    "rlhf": (
        "--prompts",
        [*PROMPTS, {"prompt": [USER, MODEL]}],
        "--steps 1 --prompts-per-step 2 --n 2 --max-new-tokens 16 --warmup-steps 0",
    ),
    "distill": (
        "--prompts",
        [*PROMPTS, {"prompt": [USER, MODEL]}],
        "--steps 1 --batch-size 2 --max-new-tokens 4 --warmup-steps 0",
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_random(root / "policy", seed=0)
    save_random(root / "reward", seed=1, kind="reward")
    settings = root / "policy" / "generation_config.json"  # a fourth of the vocabulary ends a turn
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": [1, 107, *range(260, 400)]}))
    return root


def words(command: str, models) -> list[str]:
    policy = str(models / "policy")
    more = {
        "rlhf": ["--policy", policy, "--reward", str(models / "reward")],
        "distill": ["--model", policy, "--teacher", policy],
    }
    return [command, *more.get(command, ["--model", policy])]


@pytest.mark.parametrize("command", COMMANDS)
def test_rows_that_cannot_be_read_or_rendered_are_left_out_and_listed(command, models, tmp_path, capsys):
    flag, rows, options = COMMANDS[command]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_bytes(b"".join(map(to_line, rows)) + UNREADABLE)
    line = [*words(command, models), flag, str(data), *options.split(), "--quiet", "--out", str(out)]
    with pytest.raises(InputError, match=r":[78]: "):
        invoke(line)
    assert not out.exists()
    assert invoke([*line, "--on-bad-row", "skip"]) == 0
    warning = f"warning: rows left out: 2 (all in {SKIPPED}), the first: {data}:8: not JSON"
    assert warning in capsys.readouterr().err
    listed = [json.loads(row) for row in (out / SKIPPED).read_text().splitlines()]
    assert [row["error"].partition(": ")[0] for row in listed] == [f"{data}:8", f"{data}:7"]
    assert all(row["fix"] for row in listed) and listed[0]["row"] == {"line": "{'prompt': 1}"}
    assert json.loads((out / "gemma2.json").read_text())["summary"]["skipped_rows"] == 2
