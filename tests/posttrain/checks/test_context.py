"""`--max-length` and the context of a model: no advice goes beyond it, and no run does."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import tokenization_utils_base

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.examples import context_of, longer_hint
from gemma2.posttrain.data.load_tokenizer import load_light_tokenizer
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.tiny.networks import save_random

pytestmark = pytest.mark.long
CONTEXT = 120


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_random(Path("m"), seed=0, max_position_embeddings=CONTEXT)
    save_random(Path("rm"), seed=1, kind="reward", max_position_embeddings=CONTEXT)
    for path in ("m", "rm"):
        settings = Path(path, "tokenizer_config.json")  # what the library would warn of
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": CONTEXT}))
    return tmp_path


def written(name: str, *words: int) -> None:
    rows = ({"prompt": f"{number} go", "completion": "a " * count} for number, count in enumerate(words))
    Path(name).write_bytes(b"".join(to_line(row) for row in rows))


COMMANDS = {
    "sft": "sft --model m --data rows.jsonl",
    "reward": "reward --model m --data pairs.jsonl",
    "probe": "reward probe --model m --data pairs.jsonl",
    "score": "reward score --model rm --data rows.jsonl",
    "eval": "reward eval rm --data pairs.jsonl",
    "cache": "distill cache --teacher m --data rows.jsonl",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_limit_above_the_context_is_refused_and_the_advised_one_is_not(place, command):
    written("rows.jsonl", 2, 3, 4)
    Path("pairs.jsonl").write_bytes(
        b"".join(to_line({"prompt": f"{i}", "chosen": "a b", "rejected": "c"}) for i in range(4))
    )
    out = [] if command == "eval" else ["--out", "o"]
    line = [*shlex.split(COMMANDS[command]), *out, "--dry-run", "--quiet"]
    with pytest.raises(InputError, match=rf"--max-length {CONTEXT + 1} .*context of r?m: {CONTEXT} ") as caught:
        invoke([*line, "--max-length", str(CONTEXT + 1)])
    advised = re.search(r"lower it: (--max-length \d+)", str(caught.value))
    assert advised and invoke([*line, *advised[1].split()]) == 0


def test_the_advice_for_long_rows_leads_to_a_run_and_counts_what_it_says(place, capfd):
    line = shlex.split("sft --model m --data rows.jsonl --eval-data held.jsonl --max-steps 1 --batch-size 1 --out o")
    written("held.jsonl", 1)
    written("rows.jsonl", 40, 50, 500)
    with pytest.raises(InputError, match="--max-length 24") as caught:
        invoke([*line, "--max-length", "24"])
    advised = re.search(r"raise it: --max-length (\d+)", str(caught.value))
    assert advised and 24 < int(advised[1]) <= CONTEXT
    assert invoke([*line, "--max-length", advised[1]]) == 0
    assert "1 of 3 rows" in capfd.readouterr().err


def test_the_library_does_not_warn_of_a_row_whose_length_is_checked(place, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda text, *rest: said.append(text))
    tokenizer = load_light_tokenizer(place / "m")
    assert tokenizer is not None and tokenizer.model_max_length == CONTEXT
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 2 * CONTEXT}]
    assert len(ChatFormat(tokenizer).example(messages)[0]) > CONTEXT
    assert said == []
    tokenizer("b " * 2 * CONTEXT)  # which it does of others
    assert len(said) == 1


def test_rows_that_no_context_holds_are_to_be_shortened(place):
    written("rows.jsonl", 500, 600)
    written("held.jsonl", 1)
    line = shlex.split("sft --model m --data rows.jsonl --eval-data held.jsonl --max-length 24 --out o")
    with pytest.raises(InputError, match=f"shorten the rows: the model's context is {CONTEXT}"):
        invoke(line)
    with pytest.raises(InputError, match=f"shorten the rows: .* {CONTEXT}, or choose --on-overlong drop"):
        invoke([*line, "--on-overlong", "error"])


def test_training_rows_are_called_so_where_others_are_held_out(place):
    """The check of all rows passes, for one fits; the split holds that one out."""
    for short in range(2):
        written("rows.jsonl", *((2, 40) if short == 0 else (40, 2)))
        line = f"sft --model m --data rows.jsonl --max-length 24 --max-steps 1 --batch-size 1 --out o{short}"
        try:
            invoke(shlex.split(line))
        except InputError as error:
            assert str(error).startswith("all 1 training rows are longer than --max-length 24; raise it: --max-length ")
            return
    raise AssertionError("the split held out the longer row twice")


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ('{"max_position_embeddings": 64}', 64),
        ('{"text_config": {"max_position_embeddings": 32}}', 32),
        ("{}", None),
        ("[]", None),
        ("{", None),
    ],
)
def test_the_context_is_what_config_json_says(tmp_path, config, context):
    (tmp_path / "config.json").write_text(config)
    assert context_of(tmp_path) == context
    assert context_of(tmp_path / "missing") is None


def test_the_longest_row_that_fits_is_advised():
    assert longer_hint([30, 50, 70], 60) == "raise it: --max-length 50"
    assert longer_hint([30, 70], None) == "raise it: --max-length 70"
