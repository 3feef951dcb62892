"""Models that cannot be merged are refused before the first stage: on disk, promised by a stage, and as adapters."""

import json
import shlex
from pathlib import Path

import pytest
from light_model import light_model

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError
from gemma2.posttrain.pipelines.check import check_pipeline
from gemma2.posttrain.pipelines.compile import compile_pipeline
from gemma2.posttrain.schemas import PipelineFile

ROWS = {"rows": {"prompt": "x", "completion": "z"}, "pairs": {"prompt": "x", "chosen": "z", "rejected": "y"}}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Policies, reward models and adapters of several forms, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, settings in {
        "policy": {},
        "other": {},
        "headed": {"headed": True, "tie_word_embeddings": False},
        "copied": {"headed": True, "tie_word_embeddings": True},
        "tied": {"tie_word_embeddings": True},
        "deep": {"intermediate_size": 64},
        "thick": {"intermediate_size": 32},
        "rm": {"kind": "Gemma2ForSequenceClassification"},
        "rm-2": {"kind": "Gemma2ForSequenceClassification", "intermediate_size": 32},
        "rm-3": {"kind": "Gemma2ForSequenceClassification", "intermediate_size": 64},
    }.items():
        light_model(tmp_path / name, **settings)
    for name, task in (("adapter", "CAUSAL_LM"), ("rm-adapter", "SEQ_CLS")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"task_type": task}))
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    return tmp_path


def stage(command, **options):
    return {"command": command, "options": options}


MADE = {
    "sft": stage("sft", model="policy", data=["rows.jsonl"]),
    "from-headed": stage("sft", model="headed", data=["rows.jsonl"]),
    "from-copied": stage("sft", model="copied", data=["rows.jsonl"]),
    "from-deep": stage("sft", model="deep", data=["rows.jsonl"]),
    "lora": stage("sft", model="policy", data=["rows.jsonl"], lora_rank=4, lora_output="adapter"),
    "reward": stage("reward", model="policy", data="pairs.jsonl"),
    "reward-2": stage("reward", model="deep", data="pairs.jsonl"),
}


def check(*names, **stages):
    chosen = {name: MADE[name] for name in names}
    return check_pipeline(compile_pipeline(PipelineFile(stages=chosen | stages), Path("out")))


REFUSED = {
    "a policy and a reward model on disk": (
        stage("merge linear", models=["policy", "rm"]),
        r"--models rm is a reward model, --models policy is a policy; merge policies with policies",
    ),
    "a promised reward model": (
        stage("merge linear", models=["${sft.out}", "${reward.out}"]),
        r"--models out/reward is a reward model, --models out/sft is a policy",
    ),
    "a base of another kind": (
        stage("merge slerp", models=["${sft.out}", "policy"], base="${reward.out}"),
        r"--models out/sft is a policy, --base out/reward is a reward model",
    ),
    "a promised adapter of a policy with a reward model": (
        stage("merge linear", models=["${reward.out}", "${lora.out}"]),
        r"--models out/lora is the adapter of a policy, --models out/reward is a reward model",
    ),
    "an adapter of a reward model with a policy": (
        stage("merge linear", models=["policy", "rm-adapter"]),
        r"--models rm-adapter is the adapter of a reward model, --models policy is a policy",
    ),
    "an adapter on a model of another kind": (
        stage("merge linear", models=["policy", "${reward.out}+${lora.out}"]),
        r"out/reward\+out/lora: the model is a reward model, the adapter was trained on a policy; give the model that",
    ),
    "a model in the place of an adapter": (
        stage("merge linear", models=["policy", "policy+${sft.out}"]),
        r"policy\+out/sft: out/sft is a policy; write MODEL\+ADAPTER",
    ),
    "an adapter in the place of its model": (
        stage("merge linear", models=["policy", "${lora.out}+adapter"]),
        r"out/lora\+adapter: out/lora is a LoRA adapter; write MODEL\+ADAPTER",
    ),
    "another width of the layers": (
        stage("merge linear", models=["${from-deep.out}", "thick"]),
        r"intermediate_size differs: 64 in --models out/from-deep, 32 in --models thick",
    ),
    "a separate head and a tied one": (
        stage("merge linear", models=["${sft.out}", "${from-headed.out}"]),
        r"tie_word_embeddings differs: True in --models out/sft, False in --models out/from-headed",
    ),
    "reward models that are averaged": (
        stage("rlhf", policy="policy", prompts="rows.jsonl", reward=["${reward-2.out}", "rm-2"],
              reward_ensemble="warm"),
        r"intermediate_size differs: 64 in --reward out/reward-2, 32 in --reward rm-2",
    ),
    "a line between two architectures": (
        stage("pareto", sft="thick", merged="${from-deep.out}", prompts="rows.jsonl", reward=["rm"]),
        r"intermediate_size differs: 32 in --sft thick, 64 in --merged out/from-deep",
    ),
    "a merge of reward models as policy": (
        {"warm": stage("merge linear", models=["rm-3", "${reward-2.out}"]),
         "use": stage("rlhf", policy="${warm.out}", prompts="rows.jsonl", reward=["rm"])},
        r"--policy out/warm is a reward model; give a policy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_merge_refuses_is_refused_before_the_first_stage(place, name):
    last, said = REFUSED[name]
    with pytest.raises(InputError, match=said):
        check(*MADE, **(last if "command" not in last else {"last": last}))
    assert not (place / "out").exists()


ACCEPTED = {
    "policies": stage("merge linear", models=["${sft.out}", "policy"]),
    "reward models": stage("merge linear", models=["${reward-2.out}", "rm-3"]),
    "an adapter with its model": stage("merge linear", models=["${lora.out}", "policy+${lora.out}"]),
    "an adapter whose task is not recorded": stage("merge linear", models=["rm", "rm+adapter-2"]),
    "trained models of a stored copy": stage("merge linear", models=["${from-copied.out}", "tied"]),
    "separate heads": stage("merge linear", models=["${from-headed.out}", "headed"]),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_a_merge_takes_is_not_refused(place, name):
    (place / "adapter-2").mkdir()
    (place / "adapter-2" / "adapter_config.json").write_text("{}")
    check(*MADE, last=ACCEPTED[name])


def test_a_merge_of_an_adapter_makes_a_policy(place):
    check("lora", made=stage("merge linear", models=["${lora.out}"]),
          more=stage("sft", model="${made.out}", data=["rows.jsonl"]))  # fmt: skip


def test_a_model_stacked_from_slices_may_have_another_depth(place):
    light_model(place / "three", num_hidden_layers=3)
    slices = [
        {"sources": [{"model": "policy", "layers": [0, 2]}]},
        {"sources": [{"model": "three", "layers": [2, 3]}]},
    ]
    check("sft", stacked=stage("merge passthrough", models=["policy", "three"], slices=slices),
          more=stage("merge linear", models=["${stacked.out}", "three"]))  # fmt: skip


def test_the_dry_run_of_a_merge_refuses_it_in_the_same_words(place):
    with pytest.raises(
        InputError, match=r"model 2 rm is a reward model, model 1 policy is a policy; merge policies with"
    ):
        invoke(shlex.split("merge linear policy rm --dry-run"))
