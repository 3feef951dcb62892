"""The built-in forms of `gemma2 eval` as typed: routed by their flag, printed or written, planned, refused."""

from __future__ import annotations

import json

import pytest

from gemma2.cli.main import run
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.progress import SILENT
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.tiny.networks import save_random


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    save_random(folder / "model", 1)
    save_random(folder / "other", 2)
    save_random(folder / "rm", 3, "reward")
    (folder / "text.txt").write_text("The sun rises in the east.\n" * 4)
    rows = [{"question": f"Q{i}?", "answer": i, "choices": ["zero", "one"]} for i in range(2)]
    (folder / "rows.jsonl").write_bytes(b"".join(map(to_line, rows)))
    return folder


@pytest.fixture
def typed(inputs, capsys):
    """Run `gemma2 eval ...`; (exit code, stdout, stderr). A word `{name}` is a file of the inputs."""

    def call(line):
        words = [word.replace("{", f"{inputs}/").replace("}", "") for word in line.split()]
        code = run(["eval", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


LINES = {
    "perplexity": "{model} --perplexity {text.txt} --window 20",
    "qa": "{model} --qa {rows.jsonl} --max-new-tokens 2",
    "choices": "{model} --choices {rows.jsonl}",
    "win-rate": "{model} --win-rate {other} --prompts {rows.jsonl} --reward {rm} --max-new-tokens 2",
}


@pytest.mark.parametrize("form", LINES)
def test_a_form_is_selected_by_its_flag_and_gives_one_document(typed, form):
    code, out, _ = typed(f"{LINES[form]} --json -q")
    again, same, _ = typed(f"{form} {LINES[form]} --json -q")
    assert (code, again) == (0, 0)
    assert json.loads(out) == json.loads(same)
    (task,) = json.loads(out)["tasks"].values()
    assert task["metrics"]


@pytest.mark.parametrize("form", LINES)
def test_what_is_written_is_what_is_printed_and_a_plan_writes_nothing(typed, form, tmp_path):
    code, out, _ = typed(f"{LINES[form]} --out {tmp_path}/out --dry-run")
    assert code == 0 and not (tmp_path / "out").exists()
    assert "memory gib" in out and "rows" in out
    code, out, _ = typed(f"{LINES[form]} --out {tmp_path}/out --json -q")
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert code == 0 and json.loads(out) == {"out": f"{tmp_path}/out"} | document
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()
    assert read_manifest(tmp_path / "out")["command"] == f"eval {form}"
    table, figures = typed(f"{LINES[form]} -q")[1], next(iter(document["tasks"].values()))["metrics"]
    assert all(name.replace("_", " ") in table for name in figures)


def test_a_form_is_a_stage_with_its_own_keys(inputs, tmp_path):
    command = COMMANDS["eval choices"]
    config = command.schema(model=inputs / "model", choices=inputs / "rows.jsonl")
    result = command.run(config, RunOptions(tmp_path / "out"), SILENT)
    assert set(result.summary) == {"acc", "acc_norm"}


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("{model} --qa {rows.jsonl} --resume", 2, "--resume is given without --out"),
        ("{model} --qa {rows.jsonl} --perplexity {text.txt}", 2, "are two measurements"),
        ("{model} --qa {missing.jsonl}", 1, "does not exist"),
        ("{rm} --qa {rows.jsonl}", 1, "is a reward model"),
        ("{model} --win-rate {rm} --prompts {rows.jsonl} --reward {rm}", 1, "is a reward model"),
        ("{model} --win-rate {other} --prompts {rows.jsonl} --reward {other}", 1, "is a policy"),
        ("{model} --choices {text.txt}", 1, "no 'choices'"),
        ("{model} --perplexity {text.txt} --window 8 --overlap 7", 2, "leaves no token to count"),
        ("{model} --qa {rows.jsonl} --extract (", 2, "not a regular expression"),
        ("{model} --qa {rows.jsonl} --shots 2", 1, "too few for --shots 2"),
    ],
)
def test_a_wrong_line_is_answered_in_one_line(typed, line, code, said):
    found, out, err = typed(line)
    assert (found, out) == (code, "")
    (message,) = [text for text in err.splitlines() if text.startswith("error: ")]
    assert said in message
