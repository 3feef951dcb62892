"""Commands with `--base-bits`, from the command line to the output."""

import json

import pytest
import torch
from rl_job import words, write_job
from safetensors.torch import load_file

from gemma2.cli.app import invoke
from gemma2.cli.main import run
from gemma2.posttrain.models.loading import load_policy, load_reward_model
from gemma2.posttrain.schemas import RlhfConfig, SftConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft
RL = "--steps 2 --prompts-per-step 2 --n 2 --lora-rank 2"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = write_job(tmp_path_factory.mktemp("commands"))
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(12)]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in rows]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return root


@pytest.fixture(autouse=True)
def _inside(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(str(world))


def summary(out):
    return json.loads((out / "gemma2.json").read_text())["summary"]


TRAINED = "--max-steps 2 --batch-size 4 --warmup-steps 0 --lora-rank 2"
COMMANDS = {
    "sft": f"sft --model policy --data rows.jsonl {TRAINED}",
    "reward": f"reward --model policy --data pairs.jsonl {TRAINED}",
    "distill": "distill --model policy --teacher policy --prompts prompts.jsonl --steps 2 --batch-size 2 "
    "--warmup-steps 0 --max-new-tokens 8 --lora-rank 2",
    "rlhf": None,
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_trains_on_a_quantised_base_and_writes_a_plain_model(name, bits, world, capfd):
    out = world / f"{name}-{bits}"
    line = words(world, out, RL) if name == "rlhf" else [*COMMANDS[name].split(), "--out", str(out)]
    assert invoke([*line, "--base-bits", str(bits)]) == 0
    said = capfd.readouterr().err
    assert f"14 matrices in {bits} bits: relative error 0.0" in said
    assert "the adapter on the unquantised base" in said
    found = summary(out)
    assert {key for key in found if key.startswith("merged_")} == (
        {"merged_score_difference"} if name == "reward" else {"merged_kl", "merged_logit_difference"}
    )
    base, written = load_file(world / "policy/model.safetensors"), load_file(out / "model.safetensors")
    assert set(written) - set(base) == ({"score.weight"} if name == "reward" else set())
    for key, weight in base.items():
        assert written[key].dtype == torch.float32
        if "_proj" in key:  # a product of rank 2 and no error of quantising, which has full rank
            assert torch.linalg.matrix_rank(written[key] - weight, atol=1e-6) <= 2
        else:
            assert torch.equal(written[key], weight)
    (load_reward_model if name == "reward" else load_policy)(out)


def test_an_adapter_names_the_base_that_is_not_quantised(world):
    out = world / "adapter"
    line = f"sft --model policy --data rows.jsonl {TRAINED} --base-bits 8 --lora-output adapter --out {out}"
    assert invoke(line.split()) == 0
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"].endswith("policy")
    assert invoke(f"sft --model policy --data rows.jsonl {TRAINED} --base-bits 8 --out {world / 'whole'}".split()) == 0
    base, whole = (load_file(world / name / "model.safetensors") for name in ("policy", "whole"))
    factors = load_file(out / "adapter_model.safetensors")
    for name in (name for name in base if "_proj" in name):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        product = 2 * factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
        assert (base[name] + product - whole[name]).abs().max() < 1e-7


@pytest.mark.parametrize("anchor", ["factors", "dense"])
def test_the_kl_begins_at_zero_and_the_anchor_is_written_on_the_unquantised_base(anchor, world):
    out = world / f"anchor-{anchor}"
    line = words(world, out, f"{RL} --base-bits 4 --lora-anchor {anchor} --eval-every 1")
    assert invoke(line) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in lines if row.get("kind") == "eval")
    assert first["step"] == 0
    assert abs(first["kl"]) < 1e-6
    assert not (out / "evaluations.jsonl").exists()  # for a front, whose points are outputs: not the same model
    assert abs(next(row["kl_anchor"] for row in lines if "kl_anchor" in row)) < 1e-4
    base, ema = load_file(world / "policy/model.safetensors"), load_file(out / "ema/model.safetensors")
    for name, weight in base.items():
        # An average of two products of rank 2 has rank 4 at most; an error of quantising would have full rank.
        assert torch.linalg.matrix_rank(ema[name] - weight, atol=1e-6) <= 4 if "_proj" in name else True
    assert any(not torch.equal(ema[name], weight) for name, weight in base.items())


def test_a_quantised_run_resumes_bit_for_bit(world, monkeypatch):
    whole, parts = world / "whole-run", world / "parts-run"
    settings = "--steps 3 --prompts-per-step 2 --n 2 --lora-rank 2 --base-bits 4 --save-every 1"
    assert invoke(words(world, whole, settings)) == 0
    from gemma2.posttrain.rl.rloo import AnchoredRlooTrainer

    loss = AnchoredRlooTrainer._compute_loss

    def stopped(self, model, inputs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return loss(self, model, inputs)

    monkeypatch.setattr(AnchoredRlooTrainer, "_compute_loss", stopped)
    assert run(words(world, parts, settings)) != 0
    assert not parts.exists()
    monkeypatch.setattr(AnchoredRlooTrainer, "_compute_loss", loss)
    assert invoke([*words(world, parts, settings), "--resume"]) == 0
    for file in ("model.safetensors", "ema/model.safetensors"):
        ours, theirs = load_file(parts / file), load_file(whole / file)
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_few_bits_without_an_adapter_are_one_line_that_leads_to_a_run(world, capfd):
    line = ["sft", "--model", "policy", "--data", "rows.jsonl", "--max-steps", "1", "--batch-size", "4"]
    assert run([*line, "--base-bits", "8", "--out", "no"]) == 2
    said = capfd.readouterr().err.strip()
    assert "\n" not in said
    assert "is for the frozen base of an adapter; give --lora-rank as well, or drop --base-bits" in said
    assert run([*line, "--base-bits", "8", "--lora-rank", "2", "--out", "yes"]) == 0
    assert run([*line, "--base-bits", "3", "--lora-rank", "2", "--out", "no"]) == 2
    assert not (world / "no").exists()


def test_without_bitsandbytes_nothing_is_written(world, capfd, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    line = f"sft --model policy --data rows.jsonl {TRAINED} --base-bits 4 --out absent"
    assert run(line.split()) == 2
    assert "needs bitsandbytes, which is not installed; pip install 'gemma2[quant]'" in capfd.readouterr().err
    assert not list(world.glob("*absent*"))


def test_the_anchor_of_few_bits_is_small_unless_it_is_chosen():
    given = {"policy": "p", "prompts": "d", "reward_fn": ["a:b"], "lora_rank": 4}
    assert RlhfConfig(**given).lora_anchor == "dense"
    assert RlhfConfig(**given, base_bits=4).lora_anchor == "factors"
    assert RlhfConfig(**given, base_bits=4, lora_anchor="dense").lora_anchor == "dense"
    assert RlhfConfig(**given, base_bits=4, anchor="sft").lora_anchor == "dense"  # nothing is averaged
    assert RlhfConfig(**given, base_bits=4, anchor_memory="cpu").lora_anchor == "dense"  # only that fits there
    with pytest.raises(ValueError, match="frozen base"):
        SftConfig(model="m", data="d", base_bits=4)
