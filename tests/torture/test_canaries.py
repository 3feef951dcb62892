"""No code of a model, a data set, a template, a YAML file or the working folder is ever run."""

from __future__ import annotations

import json
import pickle
import shutil
from contextlib import suppress

import pytest
from canaries import PICKLES, Canary, Nest
from every_command import EVERY, TRAINING, run_all, split, write_inputs
from ledger import recorded
from light_model import light_model

from gemma2.core.errors import Gemma2Error
from gemma2.core.yaml_files import read_documents
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.load_tokenizer import load_light_tokenizer
from gemma2.posttrain.data.sources import iter_rows


def test_a_canary_leaves_a_file_where_its_code_runs(tmp_path):
    nest = Nest(tmp_path / "nest")
    nest.plant(tmp_path)
    exec((tmp_path / "modeling_own.py").read_text())
    pickle.loads((tmp_path / PICKLES[0]).read_bytes()).close()
    assert len(nest.left()) == 2 and nest.planted > 30


def claiming(nest, folder):
    """Commands on a model that asks for its code, on templates, on YAML tags; each is refused or does not run it."""
    shutil.copytree(folder / "a", folder / "claims")
    nest.claim(folder / "claims")
    (folder / "canary_module.py").write_text(nest.code("canary_module"))
    lines = [
        "inspect claims",
        "merge linear claims a --out out/merged",
        "diff claims a",
        f"sft --model claims --data rows.jsonl --max-steps 1 {TRAINING} --out out/claims",
        "generate --teacher claims --prompts rows.jsonl --limit 1 --max-new-tokens 2 --out out/claims-answers",
        "reward eval claims --data pairs.jsonl",
        "data inspect data.py",
        "data inspect a",
        "sft --model a --data data.py --max-steps 1 --out out/script",
        "sft --model a --data dataset.pkl --max-steps 1 --out out/pickle",
        "sft --model pickles --data rows.jsonl --max-steps 1 --out out/pickles",
        "merge linear pickles a --out out/pickles-merged",
        "rlhf --policy a --reward pickles --prompts rows.jsonl --steps 1 --out out/rl",
        f"sft --model a --data evil.jsonl --max-steps 1 --max-length 64 {TRAINING} --out out/rows",
        "filter evil.jsonl --workers 1 --out out/filtered-rows",
        "data convert evil.jsonl --out out/evil.jsonl",
    ]
    (folder / "evil.jsonl").write_text(nest.rows())
    pickles = folder / "pickles"
    shutil.copytree(folder / "a", pickles)
    (pickles / "model.safetensors").unlink()
    for number, template in enumerate(nest.templates()):
        model = folder / f"template-{number}"
        shutil.copytree(folder / "claims", model, ignore=shutil.ignore_patterns("*.bin", "*.pt*", "chat_template*"))
        shutil.copy(folder / "a" / "config.json", model)
        settings = json.loads((folder / "a" / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        lines.append(f"data inspect rows.jsonl --model template-{number}")
    for number, document in enumerate(nest.documents()):
        (folder / f"tag-{number}.yaml").write_text(document)
        lines += [
            f"{what} tag-{number}.yaml --out out/tag" for what in ("sft --config", "pipeline run", "merge --config")
        ]
    return split(lines)


@pytest.mark.torture
def test_no_canary_of_an_input_is_run(tmp_path):
    with recorded("canaries in models, data, templates, YAML and the working folder, all commands") as figures:
        folder, nest = write_inputs(tmp_path / "work"), Nest(tmp_path / "nest")
        for place in (folder / "a", folder / "b", folder / "reward"):
            nest.plant(place)
        (folder / "dataset").mkdir()
        shutil.copy(folder / "rows.jsonl", folder / "dataset" / "train.jsonl")
        nest.plant(folder / "dataset")
        (folder / "data.py").write_text(nest.code("dataset script"))
        (folder / "dataset.pkl").write_bytes(pickle.dumps(Canary(nest.new("dataset.pkl"))))
        refused = claiming(nest, folder)
        resumed = ["sft", "--model", "a", "--data", "dataset", "--max-steps", "1", "--max-length", "64", "--resume"]
        partial = folder / "out" / ".foreign.partial" / "checkpoints" / "checkpoint-1"
        partial.mkdir(parents=True)
        nest.plant(partial)
        (partial.parents[1] / "run.json").write_text(json.dumps({"command": "sft", "config": {}}))
        own = split([line for line in EVERY if not line.startswith(("config", "--version", "pipeline", "watch"))])
        own = [words for words in own if "out/pipeline" not in words and "judge:judge" not in words]
        nest.plant(folder)  # the working folder: code only for who names a function in it
        codes, printed = run_all(
            [*own, *refused, [*resumed, "--out", "out/foreign"]], folder, tmp_path / "home", {"PYTHONPATH": ""}
        )
        assert nest.left() == []
        assert codes[: len(own)] == [0] * len(own), printed
        bugs = [line for line in printed.splitlines() if line.startswith("Traceback")]
        assert "traceback" not in codes and bugs == [], printed[-3000:]
        copied = [path for path in (folder / "out").rglob("*") if path.name in PICKLES and "foreign" not in str(path)]
        assert copied == []  # an output does not bring them to the next
        figures |= {"canaries": nest.planted, "commands": len(codes), "refused": sum(code != 0 for code in codes)}
        figures["ran"] = 0


def test_reading_runs_no_canary(tmp_path):
    """The short form, without torch: configurations, tokenizers, templates, YAML, rows."""
    nest, model = Nest(tmp_path / "nest"), light_model(tmp_path / "model")
    nest.plant(model)
    assert ChatFormat(load_light_tokenizer(model))
    for number, template in enumerate(nest.templates()):
        other = light_model(tmp_path / f"template-{number}")
        settings = json.loads((other / "tokenizer_config.json").read_text())
        (other / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        with suppress(Gemma2Error):
            ChatFormat(load_light_tokenizer(other)).prompt_ids([{"role": "user", "content": "p"}])
    nest.claim(model)
    with pytest.raises(Gemma2Error, match="requires its own code"):
        load_light_tokenizer(model)
    for document in nest.documents():
        (tmp_path / "tag.yaml").write_text(document)
        with pytest.raises(Gemma2Error):
            read_documents(tmp_path / "tag.yaml")
    (tmp_path / "evil.jsonl").write_text(nest.rows())
    assert sum(1 for _ in iter_rows(tmp_path / "evil.jsonl")) == 6
    for name in ("dataset.pkl", "data.py"):
        (tmp_path / name).write_bytes(pickle.dumps(Canary(nest.new(name))))
        with pytest.raises(Gemma2Error):
            list(iter_rows(tmp_path / name))
    assert nest.planted > 50 and nest.left() == []
