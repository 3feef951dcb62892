"""`--dtype`: what is not trained is loaded in that precision by every command, what is trained never is."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rl_job import words, write_job
from safetensors.torch import load_file

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.adapters import frozen_base
from gemma2.posttrain.evaluation.trajectory import procedure
from gemma2.posttrain.models import loading, precision
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.models.lora import merged_copy, sharing_copy
from gemma2.posttrain.models.precision import as_loaded, frozen_dtype, trained_weights
from gemma2.posttrain.rewards.model import RewardModel
from gemma2.posttrain.schemas import ParetoConfig, RlhfConfig
from gemma2.posttrain.tiny.networks import save_random

DRAWN = "--max-new-tokens 4 --batch-size 8"
COMMANDS = {
    "generate": (
        "generate --teacher a --prompts p.jsonl --reward rm --best 1 --n 2 --keep-truncated --max-new-tokens 4",
        2,
    ),
    "eval": (f"eval --model b --sft a --prompts p.jsonl --reward rm {DRAWN}", 3),
    "pareto": (f"pareto --sft a --policies b --merged b --etas 0.5 --prompts p.jsonl --reward rm {DRAWN}", 3),
    "reward pairs": (f"reward pairs --model a --prompts p.jsonl --judge fn:score --n 3 {DRAWN}", 1),
    "reward score": ("reward score rm --data pairs.jsonl", 1),
    "reward eval": ("reward eval rm --data pairs.jsonl", 1),
}
WRITES_NOTHING = ("eval", "reward eval")


@pytest.fixture
def world(tmp_path, monkeypatch):
    save_random(tmp_path / "a", 0)
    save_random(tmp_path / "b", 1)
    save_random(tmp_path / "rm", 2, "reward")
    prompts = [{"prompt": f"Say {word}."} for word in ("one", "two", "three", "four")]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    pairs = [row | {"chosen": "yes, it is", "rejected": f"no {i}"} for i, row in enumerate(prompts)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "fn.py").write_text(
        "def score(prompts, completions, **columns):\n    return [len(c) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def loaded(monkeypatch):
    seen = []
    plain = loading._load

    def spy(factory, path, dtype, *rest, **options):
        seen.append((path.name, dtype))
        return plain(factory, path, dtype, *rest, **options)

    monkeypatch.setattr(loading, "_load", spy)
    return seen


def run(line, *more):
    return invoke([*line.split(), *more])


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_every_command_loads_what_it_does_not_train_in_the_precision_asked_for(name, dtype, world, loaded):
    line, least = COMMANDS[name]
    where = () if name in WRITES_NOTHING else ("--out", "out")
    assert run(line, "--dtype", dtype, *where) == 0
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    ends = {("a", torch.float32), ("b", torch.float32)} if name == "pareto" else set()  # of the line, rounded once
    assert len(loaded) >= least
    assert all(kind == expected or (path, kind) in ends for path, kind in loaded)
    assert any(kind == expected for _, kind in loaded)


def test_rlhf_trains_in_fp32_and_judges_in_the_precision_asked_for(world, loaded):
    write_job(world)
    line = words(world, world / "out", "--steps 1 --prompts-per-step 2 --n 2 --reward rm --sft a --dtype bfloat16")
    assert invoke(line) == 0
    assert set(loaded) == {("policy", torch.float32), ("rm", torch.bfloat16), ("a", torch.bfloat16)}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft
def test_on_a_cpu_the_base_of_an_adapter_is_fp32_as_the_adapter_is(world, loaded, monkeypatch):
    """There is no autocast between the two. On an accelerator: tests/simulated."""
    kinds = {}
    from gemma2.posttrain.training.first_steps import FirstSteps

    begin = FirstSteps.on_train_begin

    def spy(self, args, state, control, **given):
        kinds.update({parameter.requires_grad: parameter.dtype for parameter in given["model"].parameters()})
        return begin(self, args, state, control, **given)

    monkeypatch.setattr(FirstSteps, "on_train_begin", spy)
    write_job(world)
    settings = "--steps 1 --prompts-per-step 2 --n 2 --lora-rank 2 --dtype bfloat16"
    assert invoke(words(world, world / "out", settings)) == 0
    assert loaded == [("policy", torch.float32)]
    assert kinds == {True: torch.float32, False: torch.float32}
    base, written = (load_file(world / name / "model.safetensors") for name in ("policy", "out"))
    for name, weight in base.items():
        assert written[name].dtype == torch.float32
        assert torch.linalg.matrix_rank(written[name] - weight, atol=1e-6) <= 2 if "_proj" in name else True
        assert "_proj" in name or torch.equal(written[name], weight)


def test_on_an_accelerator_the_base_of_an_adapter_is_as_asked_for(monkeypatch):
    for module in (frozen_base, precision):
        monkeypatch.setattr(module, "default_device", lambda: torch.device("cuda"))
    rl = {"policy": "p", "prompts": "d", "reward_fn": ["a:b"]}
    for settings, expected in (
        ({}, torch.float32),  # everything is trained
        ({"lora_rank": 2}, torch.bfloat16),
        ({"lora_rank": 2, "dtype": "float32"}, torch.float32),
    ):
        assert frozen_base.base_dtype(RlhfConfig(**rl, **settings)) == expected


def test_the_figures_of_bf16_are_those_of_fp32_up_to_its_rounding(world, capsys):
    line, _ = COMMANDS["eval"]
    figures = {}
    for dtype in ("float32", "bfloat16"):
        run(line, "--n", "8", "--temperature", "0.7", "--dtype", dtype, "--json")
        figures[dtype] = json.loads(capsys.readouterr().out)
    wide, narrow = figures["float32"], figures["bfloat16"]
    for name in ("reward", "kl"):
        assert narrow[name] != wide[name]
        assert narrow[name] == pytest.approx(wide[name], rel=0.2, abs=3 * wide[f"{name}_se"])


def test_a_reward_in_bf16_is_not_rounded_to_bf16(world):
    """The head's product is kept in fp32: rewards near each other stay apart."""
    scores = RewardModel.from_dir(world / "rm", torch.bfloat16).score([[2, 5, 9], [2, 7, 4]], [[11], [12, 13]])
    assert not torch.equal(scores, scores.bfloat16().float())


def test_a_front_of_another_precision_is_not_reused(world):
    line, _ = COMMANDS["pareto"]
    run(line, "--out", "first")
    with pytest.raises(InputError, match="dtype 'auto', here 'bfloat16'"):
        run(line, "--dtype", "bfloat16", "--fronts", "first", "--out", "second")
    manifest = json.loads((world / "first" / "gemma2.json").read_text())
    assert manifest["config"]["dtype"] == "auto"


def test_the_digest_of_a_procedure_knows_the_precision(world):
    shutil.copytree(world / "a", world / "sft")
    made = {
        dtype: procedure(
            ParetoConfig(sft="sft", policies=("b",), prompts="p.jsonl", reward=("rm",), dtype=dtype),
            *(world / "sft", world / "p.jsonl", 1, 0),
            frozen_dtype(dtype),
        )
        for dtype in ("auto", "float32", "bfloat16")
    }
    assert made["auto"] == made["float32"] != made["bfloat16"]


def test_a_trained_model_is_measured_as_it_will_be_loaded(world):
    """Bit for bit: weights rounded once, buffers as they are, ties kept; in its own precision it is itself."""
    ids = torch.tensor([[2, 5, 9, 11, 40, 41, 42]])
    trained, narrow = load_policy(world / "a")[0], load_policy(world / "a", torch.bfloat16)[0]
    with as_loaded(trained, torch.bfloat16) as measured, torch.no_grad():
        assert torch.equal(measured(ids).logits, narrow(ids).logits)
        assert measured.get_output_embeddings().weight is measured.get_input_embeddings().weight
        assert not any(weight.requires_grad for weight in measured.parameters())
    assert trained.dtype == torch.float32
    with as_loaded(trained, torch.float32) as measured:
        assert measured is trained


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_adapters_are_added_before_the_weights_are_rounded(world):
    policy = load_policy(world / "a")[0]
    base = sharing_copy(policy)
    trained = get_peft_model(policy, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    merged_copy(base, policy).save_pretrained(world / "merged")
    shutil.copy(world / "a" / "tokenizer.json", world / "merged")
    shutil.copy(world / "a" / "tokenizer_config.json", world / "merged")
    ids = torch.tensor([[2, 5, 9, 11, 40, 41, 42]])
    with trained_weights(policy, base, torch.bfloat16) as measured, torch.no_grad():
        assert torch.equal(measured(ids).logits, load_policy(world / "merged", torch.bfloat16)[0](ids).logits)


def test_a_server_decides_its_own_precision(world):
    line = "generate --teacher name --engine openai --base-url http://127.0.0.1:9/v1 --prompts p.jsonl --out out"
    with pytest.raises(UsageError, match="--dtype bfloat16 has no effect"):
        run(line, "--dtype", "bfloat16")


def test_auto_is_bf16_where_there_is_an_accelerator(monkeypatch):
    from gemma2.posttrain.models import precision

    assert frozen_dtype("auto") == torch.float32
    monkeypatch.setattr(precision, "default_device", lambda: torch.device("cuda"))
    assert frozen_dtype("auto") == torch.bfloat16
    assert frozen_dtype("float32") == torch.float32
