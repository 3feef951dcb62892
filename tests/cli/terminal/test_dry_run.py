"""`--dry-run` on every command that runs a model or writes: nothing is written, torch is not imported.

The same command lines show that an `--out` without a name is refused by every command, with --dry-run and without.
"""

import re
import shlex

import pytest
from commands import all_commands
from light_model import light_model
from processes import finish, start

from gemma2.cli.main import run
from gemma2.core.outputs.manifest import write_manifest
from gemma2.merging.methods.table import METHODS

# Commands without the flag: they print, from small files, and write nothing.
WITHOUT = {
    "eval": "a group",
    "eval show": "a group",  # prints results, and has its tests with them
    "config": "a group",
    "data": "a group",
    "pipeline": "a group",
    "config check": "config check align",
    "recipes": "a group",
    "recipes list": "recipes list",
    "recipes show": "recipes show align",
    "recipes plan": "recipes plan sft-2b-24gb",
    "help": "help sft",
    "merge plan": "merge plan slerp model b --base model",
    "pipeline status": "pipeline status pipeline.yaml --out runs",
    "pipeline diff": "pipeline diff run run",
    "plan": "plan sft --model 9b",
    "watch": "watch run --once",
}
WRITING = {"--force", "--fix", "--plot", "--write"}
RL = "--reward reward --prompts prompts.jsonl"
LINES = {
    "push": "push there run",
    "pull": "pull run pulled",
    "doctor": "doctor model --deep --fix repaired",
    "quickstart": "quickstart --out quickstart",
    "tiny": "tiny --out tiny",
    "data inspect": "data inspect rows.jsonl",
    "data convert": "data convert rows.jsonl --out converted.jsonl",
    "generate": "generate --teacher model --prompts prompts.jsonl --out generated",
    "filter": "filter rows.jsonl --out filtered",
    "sft": "sft --model model --data rows.jsonl --out sft",
    "distill": "distill --teacher b --model model --prompts prompts.jsonl --out distilled",
    "distill cache": "distill cache --teacher b --data rows.jsonl --out cache",
    "reward": "reward --model model --data pairs.jsonl --out rm",
    "reward probe": "reward probe --model model --data pairs.jsonl --out probe",
    "reward pairs": "reward pairs --model model --prompts prompts.jsonl --judge math:fsum --out pairs",
    "reward score": "reward score reward --data rows.jsonl --out scored",
    "reward eval": "reward eval reward --data pairs.jsonl",
    "rlhf": f"rlhf --policy model {RL} --out policy",
    "warp": f"warp --sft model {RL} --heldout prompts.jsonl --out warp",
    "pipeline run": "pipeline run pipeline.yaml --out runs",
    "pipeline graph": "pipeline graph pipeline.yaml --out runs --write graph.svg",
    "merge": "merge --config merge.yaml --out merged",
    "merge extract-lora": "merge extract-lora b --base model --rank 2 --leave-out --out lora",
    "merge replace-tokenizer": "merge replace-tokenizer model --tokenizer b --out replaced",
    "export": "export model --out exported --anyway",
    "serve": "serve model",
    "merge slerp": "merge slerp model b --base model --out merged",
    "diff": "diff model b --plot angles.svg",
    "inspect": "inspect model",
    "eval policy": f"eval --model b --sft model {RL}",
    "pareto": f"pareto --sft model --policies b {RL} --out front",
    "chat": "chat model --against b -p hello",
    "lineage": "lineage run --out family.svg",
    "verify": "verify run --fix",
    "report": "report run --out report.html",
    "convert": "convert model --out converted",
    "config schema": "config schema sft --out schema.json",
    "recipes copy": "recipes copy align --out copied.yaml",
    "config import": "config import trl.yaml --out recipe.yaml",
}
# Those need results; the forms of eval that are not above have tests of their own rooms.
UNTRIED = {"pick": "needs a measured front: tests/posttrain/evaluation/test_pick.py"}
SCRIPT = """
import shlex
from gemma2.cli.main import run
for line in sys.argv[1:]:
    assert run(shlex.split(line)) == 0, line
    heavy = [name for name in ("torch", "trl", "datasets", "numba") if name in sys.modules]
    assert not heavy, (line, heavy)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    light_model(folder / "model")
    light_model(folder / "b")
    light_model(folder / "reward", kind="Gemma2ForSequenceClassification", num_labels=1)
    (folder / "rows.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n' * 20)
    (folder / "prompts.jsonl").write_text('{"prompt": "Why?"}\n' * 20)
    (folder / "pairs.jsonl").write_text('{"prompt": "Why?", "chosen": "So.", "rejected": "No."}\n' * 20)
    (folder / "merge.yaml").write_text("method: linear\nmodels: [model, b]\n")
    (folder / "trl.yaml").write_text("model_name_or_path: model\ndataset_name: rows.jsonl\nmax_length: 64\n")
    (folder / "pipeline.yaml").write_text("stages: {one: {command: merge linear, options: {models: [model, b]}}}\n")
    (folder / "run").mkdir()
    write_manifest(folder / "run", {"schema_version": 1, "command": "generate", "status": "complete", "config": {}})
    return folder


def contents(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_every_command_that_runs_a_model_or_writes_a_file_has_the_flag():
    flags = {name: {flag for part in command.params for flag in part.opts} for name, command in all_commands()}
    without = {name for name, own in flags.items() if "--dry-run" not in own}
    assert without == set(WITHOUT)
    assert {name for name in without if flags[name] & WRITING} == set()
    untried = set(flags) - without - set(LINES) - {f"merge {method}" for method in METHODS}
    assert {name for name in untried if not name.startswith("eval ")} == set(UNTRIED)


def test_a_dry_run_writes_nothing_and_imports_nothing_heavy(place, monkeypatch):
    monkeypatch.chdir(place)
    before = contents(place)
    lines = [f"{line} --dry-run --quiet" for line in LINES.values()]
    lines += [line for line in WITHOUT.values() if line != "a group"]
    code, _, err = finish(start(SCRIPT, *lines))
    assert (code, err) == (0, "")
    assert contents(place) == before


@pytest.fixture
def tried(place, monkeypatch, capsys):
    """Run a command line in the folder of the inputs; return its exit code and what it says on stderr."""
    monkeypatch.chdir(place)

    def run_line(line):
        code = run([*shlex.split(line), "--quiet"])
        return code, capsys.readouterr().err

    return run_line


EVAL_QA = "eval --model model --qa rows.jsonl --out x"
NAMELESS = {
    name: line
    for name, line in LINES.items()
    if re.search(r"--(out|fix) (?!\S+\.)", line)  # not those that write a single file
}


def test_every_command_that_writes_a_directory_has_a_line_here():
    writing = {name for name, own in all_commands() if any(p.name == "out" and p.metavar == "DIR" for p in own.params)}
    writing -= {name for name in writing if name.startswith(("eval", "merge ")) or name in UNTRIED | WITHOUT}
    assert writing - {"pull"} <= set(NAMELESS)


@pytest.mark.parametrize("out", [".", "", "/", "..", "sub/.."])
@pytest.mark.parametrize("dry", ["", " --dry-run"])
@pytest.mark.parametrize("line", [*NAMELESS.values(), "pull run {}", "eval data --out x", EVAL_QA])
def test_an_out_without_a_name_is_one_line(place, tried, line, dry, out):
    """An unset variable in `--out "$OUT"` is the most frequent way to one."""
    word = shlex.quote(out)
    line = line.format(word) if "{}" in line else re.sub(r"(--out|--fix) \S+", rf"\1 {word}", line)
    before = contents(place)
    code, said = tried(line + dry)
    line = r"error: (--out|--fix|DIR) \S+ does not name a directory; give the name of a new directory\n"
    assert re.fullmatch(rf"(warning: .+\n)*{line}", said)
    assert code == 1
    assert contents(place) == before


# --- what the run refuses, its dry run refuses in the same words ------------------------------------------------------

SFT = "sft --model model --data rows.jsonl"


@pytest.mark.parametrize(
    "line, said",
    [
        ("filter rows.jsonl --language klingon --out x", "--language klingon is not known"),
        ("filter rows.jsonl --phone-region ZZ --out x", "--phone-region ZZ is not known"),
        ("filter rows.jsonl --filters length --out x", "--filters length does nothing by itself"),
        ("filter rows.jsonl --filters contaminated --out x", "--filters contaminated does nothing by itself"),
        (f"{SFT} --out x --resume", "no interrupted run exists for --out x to resume; drop --resume"),
        ("filter rows.jsonl --out begun", "an interrupted run of --out begun exists; continue it with --resume"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(place, tried, line, said):
    journal = place / ".begun.partial" / "checkpoints"
    journal.mkdir(parents=True, exist_ok=True)
    (journal.parent / "run.json").write_text("{}")
    (journal / "state").write_text("x")
    before = contents(place)
    found = [tried(f"{line}{dry}") for dry in (" --dry-run", "")]
    assert found[0] == found[1]
    assert found[0][0] in (1, 2) and said in found[0][1]
    assert contents(place) == before
