"""Models by hub id, and inputs that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_model import write_text_model

from gemma2.core.errors import InputError, UsageError
from gemma2.core.outputs.model_identity import identity_of, parent_record
from gemma2.posttrain.runs.inputs import check_inputs, inputs_of, located, model_name
from gemma2.posttrain.schemas import GenerateConfig, RlhfConfig
from gemma2.posttrain.schemas.config import Config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Settings(Config):
    """Fields named as those of the commands."""

    model: Path | None = None
    reward: tuple[Path, ...] = ()
    policies: tuple[Path, ...] = ()
    data: Path | tuple[Path, ...] | None = None
    judge: str = ""


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """The folder of owner/tiny in a hub cache, with no network behind it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub" / "models--owner--tiny"
    folder = repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (folder / "config.json").write_text("{}")
    write_text_model(folder, "weights")
    return folder


def test_hub_ids_become_directories_and_paths_stay(snapshot, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    config = located(
        Settings(
            model=Path("owner/tiny"),
            reward=(here, Path("owner/tiny")),
            policies=(here, Path("owner/tiny")),
            judge="a/b",
        )
    )
    assert config == Settings(model=snapshot, reward=(here, snapshot), policies=(here, snapshot), judge="a/b")
    check_inputs(Settings(model=config.model))


def test_a_configuration_without_hub_ids_is_the_same_object(tmp_path):
    config = Settings(model=tmp_path, policies=(tmp_path,))
    assert located(config) is config


def test_an_id_that_is_not_in_the_cache_is_named_with_its_flag(snapshot):
    with pytest.raises(InputError, match=r"--model owner/other .* not in the hub's cache"):
        located(Settings(model=Path("owner/other")))


def test_the_record_of_a_parent_from_the_hub_names_id_and_revision(snapshot, tmp_path):
    assert parent_record("model", snapshot, identity_of(snapshot), tmp_path / "out")["hub"] == f"owner/tiny@{COMMIT}"
    (tmp_path / "plain").mkdir()
    write_text_model(tmp_path / "plain", "weights")
    assert "hub" not in parent_record("model", tmp_path / "plain", identity_of(tmp_path / "plain"), tmp_path / "out")


def test_every_reward_model_is_an_input_and_the_missing_one_is_named_with_its_flag(snapshot, tmp_path):
    config = RlhfConfig(policy=snapshot, prompts=tmp_path, reward=(snapshot, tmp_path / "gone"))
    assert list(inputs_of(config)) == ["policy", "reward", "reward-2"]
    with pytest.raises(InputError, match=r"--reward .*gone is not a directory"):
        check_inputs(config)


def test_rl_without_a_reward_is_refused_before_anything_is_loaded(snapshot, tmp_path):
    with pytest.raises(UsageError, match="no reward is given; give --reward RM"):
        check_inputs(RlhfConfig(policy=snapshot, prompts=tmp_path))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    check_inputs(GenerateConfig(teacher=snapshot, prompts=rows))


@pytest.mark.parametrize(("name", "expected"), [("plain", "plain"), ("plain/../plain", "plain")])
def test_a_model_is_called_by_its_hub_id_or_its_directory(snapshot, tmp_path, name, expected):
    (tmp_path / "plain").mkdir()
    assert model_name(tmp_path / name) == expected
    assert model_name(snapshot) == "owner/tiny"


@pytest.mark.parametrize("as_list", [False, True])
def test_missing_data_is_refused(tmp_path, as_list):
    missing = tmp_path / "nowhere.jsonl"
    with pytest.raises(InputError, match=r"nowhere\.jsonl does not exist"):
        check_inputs(Settings(data=(missing,) if as_list else missing))
