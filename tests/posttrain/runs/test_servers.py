"""A file cannot send data or variables to servers that the user did not allow outside of it."""

from __future__ import annotations

import json

import pytest
from chat_server import Server, serving

from gemma2.cli.main import run
from gemma2.core.errors import UsageError
from gemma2.core.permissions import ALLOWED_HOSTS, ALLOWED_KEYS, allow, check_host
from gemma2.core.progress import SILENT
from gemma2.posttrain.pipelines.executors.jobs import Job, execute
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.runs.servers import ADDRESSES, KEY_VARIABLES, check_servers
from gemma2.posttrain.schemas import GenerateConfig, PairsConfig, RlhfConfig

SECRET = "AKIA-not-for-you"
EVIL = "https://evil.example/v1"
GENERATE = {"teacher": "m", "prompts": "p", "engine": "openai"}
PAIRS = {"model": "m", "prompts": "p", "judge": "openai:m"}
RLHF = {"policy": "p", "prompts": "p", "reward": ("r",), "engine": "vllm", "vllm_mode": "server"}


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in (ALLOWED_HOSTS, ALLOWED_KEYS, "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize(
    "config",
    [
        GenerateConfig(**GENERATE, base_url=EVIL),
        PairsConfig(**PAIRS, judge_url=EVIL),
        RlhfConfig(**RLHF, vllm_server_url=EVIL),
    ],
)
def test_a_host_of_a_file_is_named_and_refused_until_it_is_allowed(config):
    with pytest.raises(UsageError, match=r"sends data to evil\.example.*--allow-host evil\.example"):
        check_servers(config)
    allow(hosts=["evil.example"])
    check_servers(config)


@pytest.mark.parametrize(
    "config",
    [
        GenerateConfig(**GENERATE, api_key_env="AWS_SECRET_ACCESS_KEY"),
        PairsConfig(**PAIRS, judge_key_env="AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_a_variable_of_a_file_is_refused_until_it_is_allowed(config):
    with pytest.raises(UsageError, match="--allow-key AWS_SECRET_ACCESS_KEY") as caught:
        check_servers(config)
    assert SECRET not in str(caught.value)
    allow(keys=["AWS_SECRET_ACCESS_KEY"])
    check_servers(config)


@pytest.mark.parametrize(
    "address",
    [
        *("https://API.openai.com/v1", "http://localhost:8000/v1", "http://127.0.0.1/v1", "http://[::1]:80/v1"),
        *("http://gpu1:8000/v1", "https://gpu1/v1", "https://gpu2:8443/v1", "http://[fd00::1]:9/v1"),
    ],
)
def test_hosts_that_may_be_asked(address):
    allow(hosts=["gpu1", "GPU2:8443", "[fd00::1]:9"])
    check_host(address, "--base-url")


@pytest.mark.parametrize(
    "address",
    [
        *("http://api.openai.com/v1", "https://api.openai.com:444/v1", "https://api.openai.com.evil.example/v1"),
        *("http://localhost.evil.example/v1", "http://gpu2:8444/v1", "http://0.0.0.0/v1", "http://10.0.0.1/v1"),
    ],
)
def test_hosts_that_may_not(address):
    allow(hosts=["gpu1", "gpu2:8443", "", ":", "[x", "http://[fd00::1/"])
    with pytest.raises(UsageError, match="--allow-host"):
        check_host(address, "--base-url")


def test_every_field_that_names_a_server_or_a_variable_is_checked():
    """A field with `url` or `_env` in its name that nobody checks is a hole."""
    for schema in (command.schema for command in COMMANDS.values()):
        named = {name for name in schema.model_fields if "url" in name or "_env" in name or "endpoint" in name}
        assert named <= {*ADDRESSES, *KEY_VARIABLES}, schema


def recipe(tmp_path, **fields):
    (tmp_path / "p.jsonl").write_text('{"prompt": "p"}\n')
    given = GENERATE | {"prompts": str(tmp_path / "p.jsonl"), "retries": 0, "timeout": 5.0} | fields
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(given))
    return path


def test_a_recipe_that_would_send_a_secret_makes_no_request(tmp_path, capsys):
    fake = Server()
    with serving(fake) as address:
        file = recipe(tmp_path, base_url=address, api_key_env="AWS_SECRET_ACCESS_KEY")
        words = ["generate", "--config", str(file), "--out", str(tmp_path / "out")]
        assert run(words) == 2
        assert not fake.requests
        said = capsys.readouterr().err
        assert "--allow-key AWS_SECRET_ACCESS_KEY" in said and SECRET not in said
        assert run([*words, "--allow-key", "AWS_SECRET_ACCESS_KEY"]) == 0  # what the error advises leads to a run
    assert len(fake.requests) == 1


def test_a_host_on_the_command_line_is_allowed_by_that(tmp_path, capsys):
    words = ["generate", "--config", str(recipe(tmp_path)), "--out", str(tmp_path / "out"), "--dry-run"]
    assert run([*words, "--base-url", EVIL]) == 0
    assert run([*words, "--set", "base_url=https://other.example/v1"]) == 0
    capsys.readouterr()
    assert run(["generate", "--config", str(recipe(tmp_path, base_url="https://third.example/v1")), *words[3:]]) == 2
    assert "third.example" in capsys.readouterr().err


def test_a_pipeline_is_refused_before_its_first_stage(tmp_path, capsys):
    recipe(tmp_path)
    options = GENERATE | {"prompts": str(tmp_path / "p.jsonl"), "base_url": EVIL}
    stage = {"command": "generate", "options": options}
    (tmp_path / "pipeline.yaml").write_text(json.dumps({"stages": {"answers": stage}}))
    words = ["pipeline", "run", str(tmp_path / "pipeline.yaml"), "--out", str(tmp_path / "out"), "--dry-run"]
    assert run(words) == 2
    assert "--allow-host evil.example" in capsys.readouterr().err
    assert run([*words, "--allow-host", "evil.example"]) == 0


def test_a_stage_has_the_permissions_of_its_pipeline(tmp_path):
    options = {**GENERATE, "prompts": "nowhere.jsonl", "base_url": EVIL}
    job = Job("a", "generate", options, "out", "a.log", False, False, str(tmp_path), (), 1)
    assert "evil.example" in execute(job, SILENT.note).error
    allowed = Job(**{**vars(job), "permissions": {ALLOWED_HOSTS: "evil.example"}})
    assert "nowhere.jsonl" in execute(allowed, SILENT.note).error
