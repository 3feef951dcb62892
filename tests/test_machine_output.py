"""What scripts read: every JSON, JSONL and CSV that a command writes or prints with --json holds numbers as numbers.

A number has a name and, where it needs one, a unit in the name or next to it; its error and its interval are
separate entries. No text stands for a number (`4.00 ± 0.10`, `12 %`, `3.1 GB`), no NaN or Infinity, no low > high.
"""

import csv
import json
import math
import re

import pytest
import torch
from stages import Inline

from gemma2.cli.app import invoke
from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.audit.recorded import outputs_in
from gemma2.posttrain.audit.remake import recorded_config
from gemma2.posttrain.pipelines import warp
from gemma2.posttrain.provenance.output_state import output_state
from gemma2.posttrain.runs.commands import COMMANDS as STAGES
from gemma2.posttrain.tiny.networks import random_model, tiny_tokenizer
from gemma2.posttrain.tiny.tasks import questions

pytestmark = pytest.mark.long

# A text that is a number, or a number with an error, a percent sign, or a unit.
NUMBER = r"[-+−]?\d[\d,]*(?:\.\d+)?(?:[eE][-+−]?\d+)?"
FORMATTED = re.compile(
    rf"^\s*[~<>≤≥]?\s*{NUMBER}\s*(?:±.*|%|°|(?:[kKMGT]i?)?B(?:/s)?|s|ms|min|h|nats|tokens|ppm|\(.*\))?\s*$"
)
# Rows are texts of people and models: an answer may be `12`.
TEXTS = {
    *("prompt", "completion", "content", "text", "answer", "chosen", "rejected", "messages", "rendered", "question"),
    *("samples", "examples", "tokens", "pieces", "reference"),
}
LIBRARY = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"}
LIBRARY |= {"special_tokens_map.json", "model.safetensors.index.json", "adapter_config.json"}  # transformers and peft
VERSIONS = {"versions", "revision", "package", "machine"}


def refuse(token):
    raise ValueError(f"{token} is not JSON")


def problems(value, place=""):
    """Every fault in a document, with its place."""
    if isinstance(value, dict):
        for key in value:
            low, high = value.get(f"{key}_low"), value.get(f"{key}_high")
            if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
                yield f"{place}/{key}: {low} > {high}"
            if key not in TEXTS | VERSIONS:
                yield from problems(value[key], f"{place}/{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from problems(item, f"{place}/{i}")
    elif isinstance(value, str) and FORMATTED.match(value):
        yield f"{place}: {value!r}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place}: {value}"


def problems_of_file(path):
    """Every fault in a JSON, JSONL or CSV file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        for row in csv.DictReader(text.splitlines()):
            numbers = {}
            for key, cell in row.items():
                try:
                    numbers[key] = float(cell)
                except ValueError:
                    if FORMATTED.match(cell):
                        yield f"{path.name}/{key}: {cell!r}"
            yield from problems(numbers, path.name)
        return
    documents = text.splitlines() if path.suffix == ".jsonl" else [text]
    for document in filter(str.strip, documents):
        yield from problems(json.loads(document, parse_constant=refuse), path.name)


@pytest.mark.parametrize(
    "value",
    [
        "4.00 ± 0.10",
        "12",
        "-3.5e-4",
        "12 %",
        "0.5%",
        "3.1 GB",
        "5 s",
        "2 nats",
        "0.8 (0.7 to 0.9)",
        float("nan"),
        float("inf"),
    ],
)
def test_the_walk_refuses_what_it_should(value):
    assert list(problems({"a": [{"b": value}]}))
    assert list(problems({"x": 1.0, "x_low": 2.0, "x_high": 1.0}))


@pytest.mark.parametrize(
    "value", ["SLERP 2", "eta 0.3", "kl<=2", "2.13.0", "2026-11-29", "policy-1", "", None, 3, 0.5, True]
)
def test_the_walk_passes_words_and_numbers(value):
    assert not list(problems({"a": [{"b": value}], "x": 1.0, "x_low": 0.5, "x_high": 1.5}))


COMMANDS = """
generate --teacher models/teacher --prompts models/prompts.jsonl --limit 24 --max-new-tokens 20 --out data
data inspect data
filter data --out clean
sft --model models/student --data clean --learning-rate 1e-3 --max-steps 2 --warmup-steps 0 --out sft
distill --teacher models/teacher --model sft --prompts models/prompts.jsonl --steps 2 --warmup-steps 0 \
    --max-new-tokens 20 --out distilled
reward pairs --model distilled --prompts models/prompts.jsonl --limit 24 --max-new-tokens 20 --judge \
    gemma2.posttrain.tiny.tasks:judge_reward --out pairs
reward --model distilled --data pairs --max-steps 2 --warmup-steps 0 --out reward
reward eval reward --data pairs
rlhf --policy distilled --reward reward --prompts models/prompts.jsonl --heldout models/heldout.jsonl \
    --eval-prompts 12 --steps 2 --warmup-steps 0 --max-new-tokens 20 --prompts-per-step 2 --learning-rate 1e-3 \
    --eval-every 1 --out policy
merge slerp policy distilled --base sft --out slerp
eval --model slerp --sft distilled --reward reward --prompts models/heldout.jsonl --max-new-tokens 20 --limit 4
warp --sft distilled --reward reward --prompts models/prompts.jsonl --heldout models/heldout.jsonl --eval-limit \
    12 --eval-prompts 12 --steps 1 --warmup-steps 0 --prompts-per-step 2 --iterations 1 --etas 0,1 --max-new-tokens \
    20 --learning-rate 1e-3 --judge-fn gemma2.posttrain.tiny.tasks:judge_scores --out warp
pareto --sft distilled --reward reward --prompts models/heldout.jsonl --limit 12 --max-new-tokens 20 --policies \
    policy --merged slerp --etas 0,1 --out front
pick front --out chosen
lineage chosen
inspect chosen
diff policy distilled --base sft
verify warp chosen sft
report warp --out report.html
"""  # fmt: skip


def test_every_document_of_every_command_holds_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Here, where the libraries are imported.
    monkeypatch.setattr(warp, "executor_of", lambda name, jobs, **more: Inline(jobs))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    for seed, name in enumerate(("student", "teacher")):
        model = random_model(seed)
        with torch.no_grad():
            model.model.embed_tokens.weight[107] *= 6  # so that completions end
        model.save_pretrained(tmp_path / "models" / name)
        tiny_tokenizer().save_pretrained(tmp_path / "models" / name)
    for split, name, count in (("train", "prompts", 32), ("heldout", "heldout", 12)):
        rows = "".join(json.dumps(row) + "\n" for row in questions(split, count, seed=0))
        (tmp_path / "models" / f"{name}.jsonl").write_text(rows)
    found = []
    for line in COMMANDS.strip().splitlines():
        capsys.readouterr()
        assert invoke([*line.split(), "--json"]) == 0, line
        printed = capsys.readouterr().out
        found += [f"{line.split(' -')[0]}: {one}" for one in problems(json.loads(printed, parse_constant=refuse))]
    files = [
        path for kind in ("json", "jsonl", "csv") for path in tmp_path.rglob(f"*.{kind}") if path.name not in LIBRARY
    ]
    assert {
        "front.json",
        "front.csv",
        "hypervolume.csv",
        "metrics.jsonl",
        "evaluations.jsonl",
        "gemma2.json",
        "prompts.json",
    } <= {path.name for path in files}
    for path in files:
        if path.parent.name != "models":
            found += [f"{path.relative_to(tmp_path)}: {one}" for one in problems_of_file(path)]
    assert found == []
    assert changed_at_once(tmp_path) == {}


def changed_at_once(folder):
    """What differs between the record of each output and the same command now: nothing, as nothing has changed."""
    outputs = {path: read_manifest(path) for path in outputs_in(folder)}
    made = {path: manifest for path, manifest in outputs.items() if manifest["command"] in STAGES}
    commands = {manifest["command"] for manifest in made.values()}
    assert {"rlhf", "pareto", "pick", "merge slerp", "warp", "reward pairs"} <= commands
    found = {}
    for path, manifest in made.items():
        config, _ = recorded_config(path, manifest, manifest["command"], STAGES[manifest["command"]])
        state = output_state(manifest["command"], config, path)
        if state.state != "complete":
            found[path.relative_to(folder).as_posix()] = [*map(str, state.why)]
    return found


def test_the_summary_of_the_quickstart_holds_numbers_with_units(tmp_path):
    from gemma2.posttrain.pipelines.quickstart import UNITS, _row, shown_rows
    from gemma2.posttrain.reports.headline import rows_of

    columns = {f"{name}{part}": 0.5 for name in UNITS for part in ("", "_se", "_low", "_high")}
    points = [{"name": "SFT", "kind": "sft", "iteration": None, "eta": None, **columns}]
    summary = {"units": UNITS, "rows": [_row(row) for row in rows_of(points, None)]}
    assert not list(problems(summary))
    assert set(UNITS) <= set(summary["rows"][0])
    assert shown_rows(summary)[0]["reward"] == "0.5 ± 0.5"  # the table for people is made from the numbers
