"""`gemma2 serve`: vLLM's command line, and what is refused before vLLM starts."""

import json
import os
import shutil
import sys

import fake_vllm
import pytest
from processes import finish, start

from gemma2.cli import main
from gemma2.core.errors import InputError, UsageError
from gemma2.core.progress import SILENT
from gemma2.posttrain.data.chat import GEMMA_TEMPLATE
from gemma2.posttrain.export.vllm_command import check_serving, vllm_words
from gemma2.posttrain.schemas.config import resolve
from gemma2.posttrain.schemas.delivery.serve import ServeConfig


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config(model, **given):
    return resolve(ServeConfig, flags={"model": model, **given})


def flags(words):
    """The values of vLLM's flags."""
    return {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}


def test_a_sound_model_needs_dtype_and_context_only(models):
    words = vllm_words(config(models / "policy", port=9000, devices=2), ["--seed", "1"])
    assert words[:3] == ["vllm", "serve", str(models / "policy")]
    assert words[-2:] == ["--seed", "1"]
    found = flags(words)
    assert (found["--dtype"], found["--max-model-len"]) == ("bfloat16", "8192")
    assert (found["--port"], found["--tensor-parallel-size"]) == ("9000", "2")
    assert (found["--host"], found["--served-model-name"]) == ("127.0.0.1", "policy")
    assert not {"--chat-template", "--generation-config", "--enable-lora"} & found.keys()


def test_a_missing_template_and_missing_stop_tokens_are_given(models, tmp_path):
    model = shutil.copytree(models / "policy", tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 1, "temperature": 0.5}))
    found = flags(vllm_words(config(model)))
    with open(found["--chat-template"]) as file:
        assert file.read() == GEMMA_TEMPLATE
    with open(os.path.join(found["--generation-config"], "generation_config.json")) as file:
        written = json.load(file)
    assert (written["eos_token_id"], written["temperature"]) == ([1, 107], 0.5)


def test_an_adapter_is_served_on_its_base(models, tmp_path):
    words = vllm_words(config(models / "adapter"))
    assert words[2] == str(models / "policy")
    assert flags(words)["--max-lora-rank"] == "8"
    assert flags(words)["--lora-modules"] == f"adapter={models / 'adapter'}"
    lost = shutil.copytree(models / "adapter", tmp_path / "lost")
    settings = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/nowhere"}))
    with pytest.raises(InputError, match=r"name it: MODEL\+"):
        vllm_words(config(lost))


def test_a_reward_model_is_sent_to_its_handler(models):
    with pytest.raises(UsageError, match="--endpoint"):
        vllm_words(config(models / "reward"))


def test_print_shows_the_command_alone_and_the_process_becomes_vllm(models, tmp_path, capsys):
    assert main.run(["serve", str(models / "policy"), "--print", "--", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("vllm serve ") and printed.rstrip().endswith("--seed 1")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").write_text(f"#!{sys.executable}\nimport os, sys\nprint(os.getpid(), *sys.argv[1:])\n")
    (tmp_path / "bin" / "vllm").chmod(0o755)
    script = """
import os, sys
from gemma2.cli import main
model, out, *words = sys.argv[1:]
assert main.run(["export", model, "--push", "a/b", "--dry-run", "--quiet"]) == 0
assert main.run(["export", model, "--dtype", "bfloat16", "--out", out, "--quiet"]) == 0
assert "torch" not in sys.modules, "exporting and serving need no torch"
print(os.getpid(), flush=True)
main.run(["serve", model, *words])
"""
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    words = [models / "policy", tmp_path / "out", "--", "--seed", "1"]
    code, out, err = finish(start(script, *words, env={**os.environ, "PATH": path}))
    *_, before, after = out.splitlines()
    assert code == 0, err
    assert after == f"{before} {printed.strip().removeprefix('vllm ')}"
    assert "was not compared" in err


def test_without_vllm_the_extra_is_named(models, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert main.run(["serve", str(models / "policy")]) == 2
    assert "pip install 'gemma2[vllm]'" in capsys.readouterr().err


def test_what_doctor_refuses_is_not_served(models, tmp_path, monkeypatch):
    model = shutil.copytree(models / "policy", tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "attn_logit_softcapping": None}))
    with pytest.raises(InputError, match="soft-caps"):
        check_serving(config(model), SILENT)

    def without_cap(network):
        for layer in network.model.layers:
            layer.self_attn.attn_logit_softcapping = None

    monkeypatch.setitem(sys.modules, "vllm", fake_vllm.module())
    sys.modules["vllm"].__spec__ = object()
    check_serving(config(models / "policy"), SILENT)
    monkeypatch.setattr(fake_vllm.LLM, "drops", staticmethod(without_cap))
    sys.modules["vllm"].__version__ = "0.30.0"
    with pytest.raises(InputError, match=r"without the soft cap of attention: log-probs are 0\.\d+"):
        check_serving(config(models / "policy"), SILENT)
