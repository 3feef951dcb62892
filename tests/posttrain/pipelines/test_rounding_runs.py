"""Commands with a learning rate that moves nothing say so; with one that does they say nothing."""

import json

import pytest
import torch

from gemma2.cli.app import invoke
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.rounding import SAME_AS_START, STILL
from gemma2.posttrain.tiny.networks import random_model, tiny_tokenizer

pytestmark = pytest.mark.long


def length(completions, **_):
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    for seed, name in enumerate(("m", "t")):
        model = random_model(seed)
        with torch.no_grad():
            model.model.embed_tokens.weight[107] *= 6  # so that completions end
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    prompts = [f"What is {i} + {i}?" for i in range(24)]
    rows = {
        "prompts": [{"prompt": text} for text in prompts],
        "rows": [{"prompt": text, "completion": f"It is {2 * i}."} for i, text in enumerate(prompts)],
        "pairs": [{"prompt": text, "chosen": f"It is {2 * i}.", "rejected": "No."} for i, text in enumerate(prompts)],
    }
    for name, lines in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


RL = "--reward-fn test_rounding_runs:length --prompts-per-step 4 --n 2 --max-new-tokens 24 --eval-prompts 8 --prompts"
COMMANDS = {
    "sft": "sft --model {r}/m --data {r}/rows.jsonl --max-steps 2 --batch-size 2",
    "sft-lora": "sft --model {r}/m --data {r}/rows.jsonl --max-steps 2 --batch-size 2 --lora-rank 2",
    "sft-best": "sft --model {r}/m --data {r}/rows.jsonl --max-steps 2 --batch-size 2 --eval-every 1 --keep best",
    "reward": "reward --model {r}/m --data {r}/pairs.jsonl --max-steps 2 --batch-size 2",
    "distill": "distill --model {r}/m --teacher {r}/t --prompts {r}/prompts.jsonl --steps 2 --batch-size 2 "
    "--max-new-tokens 24 --eval-prompts 8",
    "rlhf": "rlhf --policy {r}/m --steps 2 " + RL + " {r}/prompts.jsonl",
    "rlhf-lora": "rlhf --policy {r}/m --steps 2 --lora-rank 2 " + RL + " {r}/prompts.jsonl",
}


def run(command, inputs, out, rate, capsys):
    words = [*command.format(r=inputs).split(), "--learning-rate", rate, "--out", str(out)]
    assert invoke(words) == 0, words
    return capsys.readouterr().err, read_manifest(out)["summary"]


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_rate_that_moves_nothing_is_reported_and_a_real_one_is_not(command, inputs, tmp_path, capsys):
    said, summary = run(command, inputs, tmp_path / "still", "1e-12", capsys)
    lines = [line for line in said.splitlines() if "less than rounding" in line]
    assert len(lines) == 1
    assert "does not differ from its start; raise --learning-rate" in lines[0]
    assert summary["weights_moved"] < STILL
    assert 0 <= summary["clipped"] <= 1
    said, summary = run(command, inputs, tmp_path / "moved", "1e-2", capsys)
    assert "less than rounding" not in said
    assert summary["weights_moved"] > STILL


@pytest.mark.slow
def test_warp_at_such_a_rate_names_no_best_policy(inputs, tmp_path, capsys):
    command = "warp --sft {r}/m --heldout {r}/prompts.jsonl --policies 1 --iterations 1 --steps 1 " + RL
    said, summary = run(command + " {r}/prompts.jsonl", inputs, tmp_path / "warp", "1e-12", capsys)
    assert SAME_AS_START in said
    assert summary["differs"] is False
    assert not any(key.startswith("best_policy") for key in summary)
    page = (tmp_path / "warp" / "report.html").read_text()
    assert SAME_AS_START.capitalize() in page
    assert "best point within" not in page
