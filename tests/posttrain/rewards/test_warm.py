"""The weight average of reward models, against float64 arithmetic on their files and against `merge linear`."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma2.core.errors import InputError
from gemma2.posttrain.pipelines.merge_stage import run_merge
from gemma2.posttrain.rewards.model import RewardModel
from gemma2.posttrain.rewards.warm import averaged_reward_model
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import MergeConfig
from gemma2.posttrain.tiny.networks import random_reward_model, save_random, tiny_tokenizer

PROMPTS, COMPLETIONS = [[2, 9, 8], [2, 5], [2, 7, 7, 7, 4]], [[30, 31, 32, 1], [40], [50, 51]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [save_random(root / f"rm-{seed}", seed, kind="reward") for seed in range(3)]


def test_the_score_is_that_of_the_mean_of_the_weights(models):
    files = [load_file(path / "model.safetensors") for path in models]
    mean = {name: sum(file[name].double() for file in files) / 3 for name in files[0]}
    expected = random_reward_model(0)
    expected.load_state_dict(mean)
    theirs = RewardModel(expected, tiny_tokenizer()).score(PROMPTS, COMPLETIONS)
    ours = averaged_reward_model(models).score(PROMPTS, COMPLETIONS)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    of_scores = sum(RewardModel.from_dir(path).score(PROMPTS, COMPLETIONS) for path in models) / 3
    assert (ours - of_scores).abs().max() > 1e-3, "not the mean of the scores"


def test_merge_linear_writes_the_same_model(models, tmp_path):
    run_merge(MergeConfig(method="linear", models=tuple(models)), RunOptions(tmp_path / "merged"))
    merged = RewardModel.from_dir(tmp_path / "merged").score(PROMPTS, COMPLETIONS)
    assert torch.allclose(averaged_reward_model(models).score(PROMPTS, COMPLETIONS), merged, rtol=0, atol=1e-6)


def test_half_precision_files_are_averaged_in_fp32(models, tmp_path):
    places = []
    for path in models[:2]:
        place = tmp_path / path.name
        RewardModel.from_dir(path).model.to(torch.bfloat16).save_pretrained(place)
        tiny_tokenizer().save_pretrained(place)
        places.append(place)
    files = [load_file(place / "model.safetensors") for place in places]
    found = dict(averaged_reward_model(places).model.named_parameters())
    for name, parameter in found.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, (files[0][name].float() + files[1][name].float()) / 2)


def changed_config(path, **fields):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def test_models_that_cannot_be_averaged_are_refused_with_the_difference(models, tmp_path):
    wider = save_random(tmp_path / "wider", kind="reward", intermediate_size=48)
    with pytest.raises(InputError, match=r"intermediate_size differs: .* in --reward .*rm-0, 48 in --reward .*wider"):
        averaged_reward_model([models[0], wider])

    capped = save_random(tmp_path / "capped", kind="reward")
    changed_config(capped, attn_logit_softcapping=7.0)
    with pytest.raises(InputError, match="attn_logit_softcapping differs"):
        averaged_reward_model([models[0], capped])

    more = save_random(tmp_path / "more", kind="reward")
    tensors = load_file(more / "model.safetensors")
    save_file(tensors | {"extra": torch.zeros(2)}, more / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="has extra"):
        averaged_reward_model([models[0], more])

    renamed = save_random(tmp_path / "renamed", kind="reward")
    text = (renamed / "tokenizer.json").read_text()
    (renamed / "tokenizer.json").write_text(text.replace('"<unused0>"', '"<unused_x>"').replace('"A"', '"À"'))
    with pytest.raises(InputError, match=r"tokenizers of .* differ"):
        averaged_reward_model([models[0], renamed])

    rendered = save_random(tmp_path / "rendered", kind="reward")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{# another #}"
    tokenizer.save_pretrained(rendered)
    with pytest.raises(InputError, match=r"chat templates of .* differ"):
        averaged_reward_model([models[0], rendered])
