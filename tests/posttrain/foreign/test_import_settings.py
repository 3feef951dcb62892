"""`gemma2 config import`: what a file of another tool says becomes what one would set by hand, and no key gets lost."""

import json

import pytest
import torch
import yaml

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, OutputError, UsageError
from gemma2.posttrain.foreign.counterparts import converted
from gemma2.posttrain.foreign.settings.imports import SCHEMAS, import_file
from gemma2.posttrain.schemas import RewardConfig, RlhfConfig, SftConfig
from gemma2.posttrain.schemas.config import resolve

AXOLOTL = """
base_model: google/gemma-2-2b
model_type: AutoModelForCausalLM
tokenizer_type: AutoTokenizer
load_in_4bit: false
chat_template: gemma
datasets:
  - path: rows.jsonl
    ds_type: json
    type: chat_template
    field_messages: talk
    message_property_mappings: {role: from, content: value}
  - path: org/more
    type: alpaca
    split: extra
val_set_size: 0.1
output_dir: out
adapter: lora
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 2048
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 2e-4
warmup_steps: 10
eval_steps: 20
save_steps: 100
logging_steps: 5
weight_decay: 0.01
bf16: auto
gradient_checkpointing: true
wandb_project:
seed: 7
"""
LLAMAFACTORY = """
model_name_or_path: google/gemma-2-2b
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
dataset: own, hub_set
template: gemma2
cutoff_len: 1024
overwrite_output_dir: true
preprocessing_num_workers: 16
output_dir: saves/x
logging_steps: 10
save_steps: 500
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_steps: 20
bf16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""
INFO = {
    "own": {"file_name": "own.json", "columns": {"prompt": "ask", "query": "about", "response": "reply"}},
    "hub_set": {"hf_hub_url": "org/set", "split": "train"},
    "talks": {
        "file_name": "talks.json",
        "formatting": "sharegpt",
        "columns": {"messages": "talk"},
        "tags": {"role_tag": "role", "content_tag": "content"},
    },
    "odd": {"file_name": "odd.json", "formatting": "sharegpt", "tags": {"role_tag": "speaker"}},
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "good", "rejected": "bad"},
    },
}
TRL = """
model_name_or_path: google/gemma-2-2b
dataset_name: org/chat
dataset_config: en
dataset_train_split: train_sft
use_peft: true
lora_r: 8
lora_alpha: 16
lora_target_modules: [q_proj, k_proj]
max_length: 512
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
num_train_epochs: 2
learning_rate: 1.0e-4
warmup_steps: 5
report_to: [tensorboard]
gradient_checkpointing: true
bf16: true
output_dir: out
"""
# (tool, file, our settings by hand). What the file leaves to the tool's defaults is written out.
SFT = [
    (
        "axolotl",
        AXOLOTL,
        {
            "model": "google/gemma-2-2b",
            "data": ["rows.jsonl", "org/more@extra"],
            "columns": ["messages=talk"],
            "eval_fraction": 0.1,
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "max_length": 2048,
            "on_overlong": "drop",
            "batch_size": 8,
            "micro_batch_size": 2,
            "epochs": 3,
            "trainer": {"lr_scheduler_type": "cosine", "weight_decay": 0.01},
            "learning_rate": 2e-4,
            "warmup_steps": 10,
            "eval_every": 20,
            "save_every": 100,
            "log_every": 5,
            "seed": 7,
        },
    ),
    (
        "llamafactory",
        LLAMAFACTORY,
        {
            "model": "google/gemma-2-2b",
            "data": ["data/own.json", "org/set"],
            "columns": ["instruction=ask", "input=about", "output=reply"],
            "lora_rank": 8,
            "lora_alpha": 16,
            "lora_dropout": 0,
            "lora_targets": ["q_proj", "v_proj"],
            "max_length": 1024,
            "on_overlong": "truncate",
            "save_every": 500,
            "log_every": 10,
            "batch_size": 8,
            "micro_batch_size": 1,
            "learning_rate": 1e-4,
            "epochs": 3,
            "trainer": {"lr_scheduler_type": "cosine"},
            "warmup_steps": 20,
            "eval_fraction": 0.1,
            "eval_every": 500,
            "seed": 42,
        },
    ),
    (
        "trl",
        TRL,
        {
            "model": "google/gemma-2-2b",
            "data": ["org/chat:en@train_sft"],
            "lora_rank": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "lora_targets": ["q_proj", "k_proj"],
            "max_length": 512,
            "on_overlong": "truncate",
            "batch_size": 8,
            "micro_batch_size": 4,
            "epochs": 2,
            "learning_rate": 1e-4,
            "warmup_steps": 5,
            "eval_fraction": 0,
            "report_to": ["tensorboard"],
            "seed": 42,
        },
    ),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with dataset_info.json where LLaMA-Factory has it; the function writes a file there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))

    def write(text, name="theirs.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def changed(text, **values):
    """A file with some keys set, or left out where the value is None."""
    document = {key: value for key, value in (yaml.safe_load(text) | values).items() if values.get(key, 0) is not None}
    return yaml.safe_dump(document)


def without_warmup_ratio(config):
    """A file without a ratio has none; a command whose default is one gets 0."""
    return config.model_copy(update={"warmup_ratio": 0}) if "warmup_ratio" in type(config).model_fields else config


@pytest.mark.parametrize(("tool", "text", "by_hand"), SFT, ids=[tool for tool, *_ in SFT])
def test_a_recipe_equals_what_is_set_by_hand(place, capsys, tool, text, by_hand):
    assert invoke(["config", "import", str(place(text)), "--out", "recipe.yaml"]) == 0
    assert "0 without a counterpart" in capsys.readouterr().out
    (place("").parent / "hand.yaml").write_text(yaml.safe_dump(by_hand))
    config, hand = (resolve(SftConfig, file=place("").parent / name) for name in ("recipe.yaml", "hand.yaml"))
    assert config == hand
    assert import_file(place(text)).form == tool


@pytest.mark.parametrize("text", [AXOLOTL, LLAMAFACTORY, TRL])
def test_every_key_of_a_file_is_in_the_account(place, text):
    extra = changed(text, no_such_key=3, wandb_entity="me", gptq=True)
    rows = import_file(place(extra)).rows
    keys = [row.key.partition(".")[0] for row in rows if row.verdict != "implied"]
    assert set(keys) >= yaml.safe_load(extra).keys()
    lacking = {row.key for row in rows if row.verdict == "missing" and row.decides}
    assert lacking == {"no_such_key", "gptq"}


@pytest.mark.parametrize("text", [AXOLOTL, LLAMAFACTORY, TRL])
def test_a_file_without_one_of_its_keys_is_read_or_refused_in_our_words(place, text):
    document = yaml.safe_load(text)
    for key in document:
        try:
            found = import_file(place(changed(text, **{key: None})))
        except (UsageError, InputError) as error:
            needed = ("base_model", "model_name_or_path", "datasets", "dataset", "dataset_name")
            assert key in needed or (key == "lora_r" and "without --lora-rank" in str(error)), error
        else:
            assert resolve(SCHEMAS[found.kind], sets=(), flags=found.settings)


@pytest.mark.parametrize(
    ("text", "values", "ours"),
    [
        (AXOLOTL, {"adapter": None}, {"lora_rank": 0}),
        (AXOLOTL, {"adapter": "qlora", "load_in_4bit": True}, {"lora_rank": 16, "base_bits": 4}),
        (AXOLOTL, {"adapter": "qlora"}, {"base_bits": 4}),
        (AXOLOTL, {"load_in_8bit": True}, {"base_bits": 8}),
        (LLAMAFACTORY, {"quantization_bit": 8}, {"base_bits": 8}),
        (TRL, {"load_in_4bit": True}, {"base_bits": 4}),
        (AXOLOTL, {"lora_r": 16, "peft_use_rslora": True}, {"lora_alpha": 128.0}),
        (AXOLOTL, {"excess_length_strategy": "raise"}, {"on_overlong": "error"}),
        (AXOLOTL, {"max_steps": 50}, {"max_steps": 50}),
        (AXOLOTL, {"attn_implementation": "flash_attention_2", "sample_packing": True}, {"packing": True}),
        (AXOLOTL, {"flash_attention": True, "sample_packing": True}, {"attention": "flash_attention_2"}),
        (AXOLOTL, {"bf16": False}, {"trainer": {"lr_scheduler_type": "cosine", "weight_decay": 0.01, "bf16": False}}),
        (AXOLOTL, {"wandb_project": "p", "use_tensorboard": True}, {"report_to": ("wandb", "tensorboard")}),
        (AXOLOTL, {"early_stopping_patience": 2}, {"patience": 2, "eval_every": 20}),
        (AXOLOTL, {"num_epochs": None, "sequence_len": None}, {"epochs": 1.0, "max_length": 512}),
        (LLAMAFACTORY, {"lora_target": "all"}, {"lora_targets": ()}),
        (LLAMAFACTORY, {"lora_target": "q_proj"}, {"lora_targets": ("q_proj",)}),
        (LLAMAFACTORY, {"finetuning_type": "full"}, {"lora_rank": 0}),
        (AXOLOTL, {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_rope": True}, {"lora_rank": 16}),
        (AXOLOTL, {"special_tokens": {"pad_token": "<pad>"}, "dp_shard_size": 2}, {"lora_rank": 16}),
        (LLAMAFACTORY, {"finetuning_type": None, "lora_rank": None}, {"lora_rank": 8, "lora_alpha": 16.0}),
        (LLAMAFACTORY, {"interleave_probs": "0.3,0.7"}, {"weights": (0.3, 0.7)}),
        (LLAMAFACTORY, {"dataset": "talks"}, {"columns": ("messages=talk",)}),
        (LLAMAFACTORY, {"lr_scheduler_type": None}, {"trainer": {}}),
        (TRL, {"use_peft": None}, {"lora_rank": 0, "lora_targets": ()}),
        (TRL, {"learning_rate": None, "num_train_epochs": None}, {"learning_rate": 2e-5, "epochs": 3.0}),
        (TRL, {"per_device_train_batch_size": None, "gradient_accumulation_steps": None}, {"batch_size": 8}),
        (TRL, {"gradient_checkpointing": False}, {"trainer": {"activation_checkpointing": False}}),
        (TRL, {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}, {"keep": "best"}),
        (TRL, {"datasets": [{"path": "json", "data_files": ["a.jsonl"]}], "dataset_name": None}, {"epochs": 2.0}),
    ],
    ids=lambda value: str(value)[:40].strip(),
)
def test_values_are_converted(place, text, values, ours):
    found = import_file(place(changed(text, **values)))
    config = resolve(SftConfig, flags=found.settings)
    assert {key: getattr(config, key) for key in ours} == ours
    assert found.deciding == []


@pytest.mark.parametrize(
    ("text", "values", "key"),
    [
        (AXOLOTL, {"gptq": True}, "gptq"),
        (AXOLOTL, {"sample_packing": True}, "sample_packing"),
        (AXOLOTL, {"train_on_inputs": True}, "train_on_inputs"),
        (AXOLOTL, {"datasets": [{"path": "x.jsonl", "type": "completion"}]}, "datasets.type"),
        (AXOLOTL, {"datasets": [{"path": "x.jsonl", "shards": 10}]}, "datasets.shards"),
        (AXOLOTL, {"datasets": [{"path": "x.jsonl", "split": "train[:10%]"}]}, "datasets.split"),
        (AXOLOTL, {"learning_rate": None}, "learning_rate"),
        (AXOLOTL, {"plugins": ["my.Plugin"]}, "plugins"),
        (AXOLOTL, {"special_tokens": {"eos_token": "<x>"}}, "special_tokens"),
        (AXOLOTL, {"lora_target_modules": "model.layers.[0-9]+.(q|v)_proj"}, "lora_target_modules"),
        (AXOLOTL, {"datasets": [{"path": "x.jsonl"}, {"path": "x.jsonl"}]}, "datasets.path"),
        (LLAMAFACTORY, {"quantization_bit": 3}, "quantization_bit"),
        (LLAMAFACTORY, {"quantization_bit": 4, "finetuning_type": "full"}, "quantization_bit"),
        (LLAMAFACTORY, {"max_samples": 1000}, "max_samples"),
        (LLAMAFACTORY, {"dataset": "odd"}, "dataset.role_tag"),
        (LLAMAFACTORY, {"finetuning_type": "freeze"}, "finetuning_type"),
        (LLAMAFACTORY, {"use_dora": True}, "use_dora"),
        (LLAMAFACTORY, {"load_best_model_at_end": True, "eval_steps": None}, "load_best_model_at_end"),
        (TRL, {"packing": True}, "packing"),
        (TRL, {"model_revision": "abc"}, "model_revision"),
    ],
    ids=lambda value: str(value)[:40].strip(),
)
def test_what_has_no_counterpart_is_counted_and_strict_refuses_it(place, capsys, text, values, key):
    file = place(changed(text, **values))
    assert [row.key for row in import_file(file).deciding] == [key]
    assert invoke(["config", "import", str(file), "--out", "r.yaml"]) == 0
    assert f"NO COUNTERPART: {key}" in capsys.readouterr().out
    assert f"# no counterpart: {key}" in (file.parent / "r.yaml").read_text()
    with pytest.raises(InputError, match=key):
        invoke(["config", "import", str(file), "--out", "strict.yaml", "--strict"])
    assert not (file.parent / "strict.yaml").exists()


def test_eight_bit_optimizers_cost_memory_and_decide_nothing(place):
    found = import_file(place(changed(AXOLOTL, optimizer="adamw_bnb_8bit")))
    assert [row.key for row in found.lacking] == ["optimizer"]
    assert found.deciding == []


def test_pairs_become_reward_models_and_the_account_says_how_to_go_on(place, capsys):
    values = {"stage": "dpo", "dataset": "pairs", "pref_beta": 0.1, "pref_loss": "sigmoid", "eval_steps": None}
    file = place(changed(LLAMAFACTORY, **values))
    found = import_file(file)
    config = resolve(RewardConfig, flags=found.settings)
    assert (str(config.data), config.columns) == ("data/pairs.json", ("chosen=good", "rejected=bad"))
    ours = RewardConfig(model="m", data="d", lora_rank=config.lora_rank).learning_rate
    assert config.learning_rate == ours, "a rate for DPO is another one"
    assert {row.key for row in found.deciding} == {"stage", "pref_beta", "pref_loss", "learning_rate"}
    assert invoke(["config", "import", str(file), "--out", "r.yaml"]) == 0
    assert "gemma2 rlhf --policy google/gemma-2-2b --reward reward" in capsys.readouterr().out
    rm = import_file(place(changed(LLAMAFACTORY, stage="rm", dataset="pairs")))
    assert (rm.command, rm.settings["learning_rate"], rm.deciding) == ("reward", 1e-4, [])


def test_reward_models_of_axolotl_and_trl(place):
    rows = [{"path": "org/pairs", "type": "bradley_terry.chat_template"}]
    found = import_file(place(changed(AXOLOTL, reward_model=True, datasets=rows)))
    assert (found.command, found.settings["columns"], found.deciding) == ("reward", ["prompt=input"], [])
    found = import_file(place(changed(TRL, center_rewards_coefficient=0.01)))
    assert (found.command, found.settings["center_coefficient"]) == ("reward", 0.01)
    assert import_file(place(TRL), "trl", "reward").command == "reward"
    assert import_file(place(changed(TRL, beta=0.1))).kind == "dpo"
    as_json = place(json.dumps(yaml.safe_load(TRL)), "arguments.json")
    assert import_file(as_json).settings == import_file(place(TRL)).settings


def test_ppo_becomes_rlhf(place):
    values = {"stage": "ppo", "reward_model": "rm", "dataset": "hub_set", "max_new_tokens": 64, "val_size": None}
    values |= {"eval_strategy": None, "eval_steps": None, "cutoff_len": None, "max_steps": 30}
    found = import_file(place(changed(LLAMAFACTORY, **values)))
    config = resolve(RlhfConfig, flags=found.settings)
    assert (config.steps, config.prompts_per_step, config.n, config.micro_batch_size) == (30, 2, 4, 1)
    assert (str(config.policy), str(config.prompts), config.max_new_tokens) == ("google/gemma-2-2b", "org/set", 64)


def test_a_share_of_the_steps_is_a_warm_up(place):
    found = import_file(place(changed(TRL, warmup_steps=None, warmup_ratio=0.1, max_steps=30)))
    ratio = "warmup_ratio" in SftConfig.model_fields
    assert found.settings.get("warmup_ratio" if ratio else "warmup_steps") == (0.1 if ratio else 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(TRL, learning_rate="high"), r"theirs.yaml:\d+:\d+ is not a number"),
        ("learning_rate: 7.0\n" + TRL.replace("learning_rate", "lr_was"), r"theirs.yaml:1:16: 'learning_rate'"),
        (changed(LLAMAFACTORY, stage="kto"), r"'kto' in .*theirs.yaml:\d+:\d+ is not read"),
        (changed(LLAMAFACTORY, stage="pt"), "pre-training"),
        (changed(LLAMAFACTORY, dataset="owm"), "did you mean 'own'"),
        (changed(AXOLOTL, datasets=[{"type": "alpaca"}]), r"datasets\[0\].*has no path"),
        ("model: {_component_: torchtune.models.gemma2}\n", "torchtune"),
        ("model: m\ndata: d\n", "a recipe of ours already; gemma2 sft --config"),
        ("seed: 3\nzoo: 4\n", "give --format"),
        ("- 1\n", "not KEY: VALUE lines"),
        ("a: [1\n", "theirs.yaml"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(place, text, message):
    with pytest.raises((UsageError, InputError), match=message):
        import_file(place(text))


def test_an_output_that_exists_is_kept(place):
    place("mine", "recipe.yaml")
    with pytest.raises(OutputError, match="--force"):
        invoke(["config", "import", str(place(TRL)), "--out", "recipe.yaml"])
    assert invoke(["config", "import", str(place(TRL)), "--out", "recipe.yaml", "--force"]) == 0


def test_without_out_the_recipe_is_all_of_stdout_and_json_is_one_document(place, capsys):
    assert invoke(["config", "import", str(place(TRL))]) == 0
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out) == import_file(place(TRL)).settings
    assert "taken: dataset_name org/chat" in printed.err
    assert invoke(["config", "import", str(place(TRL)), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["format"], document["command"], document["without_counterpart"]) == ("trl", "sft", 0)


def test_an_imported_recipe_trains(place, capsys):
    """The plan is the one of the same settings as flags, and the command takes the recipe as it is."""
    from gemma2.posttrain.tiny.networks import random_model, tiny_tokenizer
    from gemma2.posttrain.tiny.tasks import questions

    root = place("").parent
    torch.manual_seed(0)
    random_model(0).save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    rows = [{"question": str(row["prompt"]), "answer": "3 4"} for row in questions("train", 12, seed=0)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"base_model: {root}/model\ndatasets: [{{path: {root}/rows.jsonl, type: alpaca}}]\nlearning_rate: 1e-3\n"
    text += (
        "num_epochs: 1\nmicro_batch_size: 4\ngradient_accumulation_steps: 1\nwarmup_steps: 0\nlr_scheduler: linear\n"
    )
    assert invoke(["config", "import", str(place(text)), "--out", "recipe.yaml"]) == 0
    flags = f"--model {root}/model --data {root}/rows.jsonl --learning-rate 1e-3 --batch-size 4 --max-length 512"
    flags += " --eval-fraction 0 --seed 42 --warmup-steps 0"
    plans = []
    for words in (["--config", "recipe.yaml"], flags.split()):
        capsys.readouterr()
        assert invoke(["sft", *words, "--out", "out", "--dry-run", "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    for plan in plans:
        plan.pop("disk_free_gib")
        plan.pop("memory_free_gib")
    assert plans[0] == plans[1]
    assert invoke(["sft", "--config", "recipe.yaml", "--out", "out"]) == 0
    assert (root / "out" / "gemma2.json").is_file()


@pytest.mark.parametrize("text", [AXOLOTL, LLAMAFACTORY, TRL])
def test_a_command_that_gets_a_file_of_another_tool_names_the_import(place, text):
    with pytest.raises(UsageError) as error:
        resolve(SftConfig, file=place(text))
    assert error.value.hint.startswith(f"gemma2 config import {place(text)} --out recipe.yaml")
    assert invoke(["config", "import", str(place(text)), "--out", "recipe.yaml"]) == 0


def test_a_reward_function_of_trl_is_written_as_ours():
    assert converted("reward_funcs", "reward_fn", "good.brief", {}) == {"reward_fn": "good:brief"}
    assert converted("reward_funcs", "reward_fn", "a.b.c d:e", {}) == {"reward_fn": ["a.b:c", "d:e"]}
    assert converted("reward_funcs", "reward_fn", "think_format_reward", {}) is None
