"""What is refused before anything is loaded: every check in the dry run and in the real run, without torch, by name."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from light_model import light_model
from processes import finish, start

from gemma2.cli.app import invoke
from gemma2.core.errors import Gemma2Error, InputError, UsageError
from gemma2.posttrain.checks.of_command import CommandChecks
from gemma2.posttrain.schemas import RlhfConfig, SftConfig

ROWS = {
    "prompts": {"prompt": "Why?"},
    "rows": {"prompt": "Why?", "completion": "So."},
    "pairs": {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Models of all kinds and good data of all kinds, in the working directory."""
    monkeypatch.chdir(tmp_path)
    light_model(tmp_path / "policy")
    light_model(tmp_path / "other", swapped=("a", "b"))
    light_model(tmp_path / "rm", kind="Gemma2ForSequenceClassification")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for name, row in ROWS.items():
        lines = [json.dumps({key: f"{value} {number}" for key, value in row.items()}) + "\n" for number in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


FINE = {
    "sft": "--model policy --data rows.jsonl --out o",
    "distill": "--model policy --teacher policy --prompts prompts.jsonl --data rows.jsonl --lambda 0.5 --out o",
    "distill cache": "--teacher policy --data rows.jsonl --out o",
    "generate": "--teacher policy --prompts prompts.jsonl --out o",
    "reward": "--model policy --data pairs.jsonl --out o",
    "reward probe": "--model policy --data pairs.jsonl --out o",
    "reward score": "rm --data pairs.jsonl --out o",
    "reward eval": "rm --data pairs.jsonl",
    "reward pairs": "--model policy --prompts prompts.jsonl --judge rm --out o",
    "rlhf": "--policy policy --reward rm --prompts prompts.jsonl --out o",
    "warp": "--sft policy --reward rm --prompts prompts.jsonl --heldout prompts.jsonl --out o",
    "eval": "--model policy --sft policy --reward rm --prompts prompts.jsonl",
    "pareto": "--sft policy --policies policy --reward rm --prompts prompts.jsonl --out o",
}


def line(command: str, old: str = "", new: str = "") -> list[str]:
    assert old in FINE[command]
    return [*command.split(), *shlex.split(FINE[command].replace(old, new))]


@pytest.mark.parametrize("command", FINE)
def test_every_command_has_a_plan_of_its_data_and_writes_nothing(command, place, capsys):
    before = sorted(place.rglob("*"))
    assert invoke([*line(command), "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    data = [word for word in line(command) if word.endswith(".jsonl")]
    assert [row["data"].split()[-1] for row in document["data"]] == data
    assert all(row["rows"] == row["checked"] or command in ("rlhf", "distill") for row in document["data"])
    assert all(0 < row["tokens_median"] <= row["tokens_95"] <= row["tokens_max"] for row in document["data"])
    assert "<start_of_turn>user\nWhy? 0<end_of_turn>" in document["first_row"]["text"]
    assert sorted(place.rglob("*")) == before


# command, what is changed in its line, by what, what is said, and the line that the fix leads to (with its changes)
WRONG = {
    "prompts as rows to learn": ("sft", "rows.jsonl", "prompts.jsonl", r"prompts\.jsonl:1: "),
    "pairs as rows to learn": ("sft", "rows.jsonl", "pairs.jsonl", r"pairs\.jsonl:1: "),
    "rows as pairs": ("reward", "pairs.jsonl", "rows.jsonl", r"rows\.jsonl:1: "),
    "rows as pairs of a probe": ("reward probe", "pairs.jsonl", "rows.jsonl", r"rows\.jsonl:1: "),
    "rows as pairs of an evaluation": ("reward eval", "pairs.jsonl", "rows.jsonl", r"rows\.jsonl:1: "),
    "prompts to be scored": ("reward score", "pairs.jsonl", "prompts.jsonl", r"prompts\.jsonl:1: "),
    "a reward model as policy": ("rlhf", "--policy policy", "--policy rm", "--policy rm is a reward model; give a pol"),
    "a policy as reward model": ("rlhf", "--reward rm", "--reward policy", "--reward policy is a policy; give a rew"),
    "a reward model as teacher": ("distill", "--teacher policy", "--teacher rm", "--teacher rm is a reward model"),
    "a reward model that generates": ("generate", "policy", "rm", "--teacher rm is a reward model; give a policy"),
    "a policy as judge": ("reward pairs", "--judge rm", "--judge policy", "--judge policy is a policy; give a reward"),
    "a policy that scores": ("reward score", "rm", "policy", "--model policy is a policy; give a reward model"),
    "a policy in an evaluation": ("reward eval", "rm", "policy", "--models policy is a policy; give a reward model"),
    "an adapter as policy": (
        "rlhf",
        "--policy policy",
        "--policy adapter",
        "--policy adapter is a LoRA adapter, not a mod",
    ),
    "a teacher with exchanged ids": ("distill", "--teacher policy", "--teacher other", "differ: '[ab]' is"),
    "a reference with exchanged ids": ("rlhf", "--policy policy", "--policy policy --sft other", "differ: '[ab]' is"),
    "policies with exchanged ids": ("pareto", "--policies policy", "--policies other", "differ: '[ab]' is"),
    "a model with exchanged ids": ("eval", "--model policy", "--model other", "differ: '[ab]' is"),
    "a key that TRL lacks": ("sft", "--out o", "--out o --set trainer.optm=x", "trainer.optm'.* did you mean 'optim'"),
    "a key that is a flag": ("reward", "--out o", "--out o --set trainer.seed=1", "'trainer.seed' is set by an option"),
    "a key without effect": ("rlhf", "--out o", "--out o --set trainer.epsilon=1", "'trainer.epsilon' has no effect"),
    "a key of WARP": ("warp", "--out o", "--out o --set trainer.optm=x", "trainer.optm'.* did you mean 'optim'"),
    "an optimizer that is not known": (
        "reward",
        "--out o",
        "--out o --set trainer.optim=adamm",
        "transformers does not know.* did you mean",
    ),
    "a schedule that is not known": (
        "sft",
        "--out o",
        "--out o --set trainer.lr_scheduler_type=cosin",
        "mean 'cosine'",
    ),
    "a text as a number": (
        "sft",
        "--out o",
        "--out o --set trainer.weight_decay=abc",
        "'abc'.* give a value of type",
    ),
    "a file as a module": ("rlhf", "--reward rm", "--reward-fn mine.py:length", "names a file, .*; write mine:length"),
    "a function that is not there": (
        "rlhf",
        "--reward rm",
        "--reward-fn mine:lenght",
        "mine has no 'lenght'; did yo",
    ),
    "a module that is not there": ("eval", "--reward rm", "--reward-fn mien:length", "No module named 'mien'"),
    "a judge whose module fails": ("pareto", "--reward rm", "--reward rm --judge-fn bad:f", r"NameError.*bad\.py:2\)"),
    "a judge of pairs that is not there": ("reward pairs", "--judge rm", "--judge mine:no", "mine has no 'no'"),
    "every row too long": ("sft", "--out o", "--max-length 8 --out o", "longer than --max-length 8, the shortest has"),
    "a row too long": (
        "sft",
        "--out o",
        "--max-length 8 --on-overlong error --out o",
        r"rows\.jsonl:1: \d+ tokens",
    ),
    "a column that no row has": ("sft", "--out o", "--columns prompt=question --out o", "no row .* has a column 'q"),
}


@pytest.fixture
def functions(place, monkeypatch):
    """Modules with a good function, and with a fault in their second line."""
    (place / "mine.py").write_text("def length(**columns):\n    return [1.0]\n")
    (place / "bad.py").write_text("import math\nmeth.pi\n\ndef f(**columns):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(str(place))


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_what_would_stop_the_run_later_stops_it_first(name, dry, place, functions):
    command, old, new, said = WRONG[name]
    with pytest.raises((InputError, UsageError), match=said):
        invoke([*line(command, old, new), *(["--dry-run"] if dry else [])])
    assert not (place / "o").exists()


@pytest.mark.parametrize(
    ("command", "old", "new", "advice", "fixed"),
    [
        ("sft", "--out o", "--max-length 8 --out o", r"raise it: (--max-length \d+)", "{} --out o"),
        ("sft", "--out o", "--max-length 8 --on-overlong error --out o", "choose (--on-overlong drop)", "{} --out o"),
        ("sft", "--out o", "--set trainer.optm=sgd --out o", "did you mean '(optim)'", "--set trainer.{}=sgd --out o"),
        ("rlhf", "--reward rm", "--reward-fn mine:lenght", "did you mean '(length)'", "--reward-fn mine:{}"),
        ("sft", "--out o", "--columns prompt=promt --out o", "did you mean '(prompt)'", "--columns prompt={} --out o"),
    ],
)
def test_the_advice_of_an_error_followed_literally_leads_to_a_plan(command, old, new, advice, fixed, place, functions):
    with pytest.raises(Gemma2Error) as refused:
        invoke([*line(command, old, new), "--dry-run"])
    found = re.search(advice, refused.value.hint)
    assert found, refused.value.hint
    assert invoke([*line(command, old, fixed.format(found[1])), "--dry-run"]) == 0


def test_a_bad_row_can_be_left_out_as_its_error_says(place, capsys):
    (place / "mixed.jsonl").write_text((place / "rows.jsonl").read_text() + '{"prompt": "x"}\n')
    with pytest.raises(InputError, match=r"mixed\.jsonl:21: .*"):
        invoke([*line("sft", "rows.jsonl", "mixed.jsonl"), "--dry-run"])
    assert invoke([*line("sft", "rows.jsonl", "mixed.jsonl"), "--dry-run", "--json", "--on-bad-row", "skip"]) == 0
    assert json.loads(capsys.readouterr().out)["data"][0]["bad_rows_skipped"] == 1


def test_a_plan_of_filter_reads_its_rows(place, capsys):
    assert invoke(["filter", "rows.jsonl", "--out", "o", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"][0]["rows"] == 20
    (place / "bad.csv").write_text("prompt,completion\na,b\nc,d,e\n")
    with pytest.raises(InputError, match=r"bad\.csv:3: 3 fields"):
        invoke(["filter", "bad.csv", "--out", "o", "--dry-run"])


def test_rows_behind_the_limit_are_not_read(place):
    text = (place / "prompts.jsonl").read_text()
    (place / "mixed.jsonl").write_text(text + '{"no": "prompt"}\n')
    words = line("generate", "prompts.jsonl", "mixed.jsonl")
    assert invoke([*words, "--limit", "20", "--dry-run"]) == 0
    with pytest.raises(InputError, match=r":21: "):
        invoke([*words, "--limit", "21", "--dry-run"])


def test_nothing_heavy_is_imported_for_a_plan(place):
    script = """
import shlex
from gemma2.cli.main import run
for line in sys.argv[1:]:
    assert run(shlex.split(line)) == 0, line
    heavy = [name for name in ("torch", "trl", "datasets", "numba") if name in sys.modules]
    assert not heavy, (line, heavy)
"""
    lines = [shlex.join([*line(command), "--dry-run", "--quiet"]) for command in ("sft", "rlhf", "pareto")]
    code, _, err = finish(start(script, *lines))
    assert (code, err) == (0, "")


def test_the_module_of_a_function_stays_in_the_child(place, functions, monkeypatch):
    (place / "loud.py").write_text("print('loading')\n\ndef f(**columns):\n    return [1.0]\n")
    config = RlhfConfig(policy=Path("policy"), prompts=Path("prompts.jsonl"), reward_fn="loud:f")
    CommandChecks(isolated=True).of(config)
    assert "loud" not in sys.modules
    (place / "fatal.py").write_text("import os\nos._exit(7)\n")
    with pytest.raises(InputError, match=r"importing its module ended Python \(exit code 7\)"):
        CommandChecks(isolated=True).of(config.model_copy(update={"reward_fn": ("fatal:f",)}))


def test_stages_that_read_the_same_rows_read_them_once(place, monkeypatch):
    from gemma2.posttrain.checks import of_command

    read = []
    known = of_command.read_rows
    monkeypatch.setattr(of_command, "read_rows", lambda task, *rest: read.append(task.path) or known(task, *rest))
    checks = CommandChecks()
    for seed in (1, 2):
        checks.of(SftConfig(model=Path("policy"), data=Path("rows.jsonl"), seed=seed))
    assert read == [Path("rows.jsonl")]
    checks.of(SftConfig(model=Path("policy"), data=Path("rows.jsonl"), max_length=64))
    assert len(read) == 2, "another limit is another reading"
