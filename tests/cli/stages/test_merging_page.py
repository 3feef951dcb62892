"""docs/merging.md: its files and its commands, run in their order on small models."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT
from safetensors.numpy import save_file

from gemma2.cli.main import run

PAGE = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(?P<kind>sh|yaml)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
MODELS = ("sft", "rl-1", "rl-2", "rl-3", "math", "code")
LAYERS = 3
CONFIG = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "num_hidden_layers": LAYERS}


def arrays(seed, scale):
    generator = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (16, 8)}
    for layer in range(LAYERS):
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (12, 8)
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (8, 8)
    shapes["model.norm.weight"] = (8,)
    return {name: (generator.standard_normal(shape) * scale).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The models that the page names, and an adapter of the first."""
    root = tmp_path_factory.mktemp("page")
    base = arrays(0, 1.0)
    for seed, name in enumerate(MODELS):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(CONFIG))
        tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}
        (root / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        (root / name / "chat_template.jinja").write_text("{{ messages[0].content }}")
        (root / name / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
        step = arrays(seed, 0.1 if seed else 0.0)
        save_file({key: base[key] + step[key] for key in base}, root / name / "model.safetensors")
    (root / "lora").mkdir()
    (root / "lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    pair = {f"{stem}A.weight": base["model.norm.weight"] * np.ones((2, 1), np.float32)}
    pair[f"{stem}B.weight"] = np.ones((8, 2), np.float32)
    save_file(pair, root / "lora/adapter_model.safetensors")
    return root


def steps():
    """What the page tells a reader to write (name, text) or to run (words)."""
    for block in BLOCK.finditer(PAGE):
        if block["kind"] == "yaml":
            name, _, text = block["text"].partition("\n")
            yield name.removeprefix("# "), text
        else:
            yield from (shlex.split(line) for line in block["text"].splitlines())


def test_everything_on_the_page_runs_in_its_order(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    written = 0
    for step in steps():
        if isinstance(step, tuple):
            Path(step[0]).write_text(step[1])
            continue
        assert run(step[1:]) == 0, (step, capsys.readouterr().err)
        assert capsys.readouterr().out, step
        if "--out" in step and "--dry-run" not in step:
            written += 1
            manifests = list(Path(step[step.index("--out") + 1]).rglob("gemma2.json"))
            assert manifests, step
            assert {json.loads(file.read_text())["status"] for file in manifests} == {"complete"}
    assert written >= 15


def test_every_method_is_in_the_table_of_which_merge_when():
    from gemma2.merging.methods.table import METHODS

    table = PAGE[PAGE.index("## Which merge") : PAGE.index("## Plain calls")]
    assert {name for name in METHODS if f"`{name}`" not in table} == set()


def test_the_page_names_every_method_of_mergekit():
    from gemma2.merging.recipes.mergekit import NAMES

    table = PAGE[PAGE.index("## All methods") : PAGE.index("## Coming from")]
    assert {name for name in NAMES if f"`{name}`" not in table} == set()
