"""Evaluation and generation in several processes: what one process writes, one line for an error, and nothing else."""

import json
import math
import shutil

import pytest
from lines_on_ranks import lines_on_ranks
from miniature_tasks import Miniature
from rl_job import write_job

from gemma2.posttrain.runs.together import SHARED
from gemma2.posttrain.tiny.networks import save_random

pytestmark = pytest.mark.long

DRAWN = "--prompts prompts.jsonl --max-new-tokens 8 --batch-size 2"
WITHOUT_CHECK = "--set doctor=false"
# Their files have the same bytes, whatever the number of processes. batch-size 1: several chunks.
SAME_BYTES = {
    "generate": f"generate --teacher policy {DRAWN} --n 3 --keep-truncated --seed 3",
    "best": "generate --teacher policy --prompts prompts.jsonl --n 3 --best 1 --reward rm --reward-fn judge:judge "
    "--batch-size 1 --max-new-tokens 8 --keep-truncated",
    "turns": f"generate --teacher policy {DRAWN} --turns 2 --keep-truncated",
    "one prompt": f"generate --teacher policy {DRAWN} --limit 1 --keep-truncated",
    "reward score": "reward score rm --data pairs.jsonl --batch-size 2",
    "one row": "reward score rm --data pairs.jsonl --limit 1",
    "eval perplexity": f"eval ./policy --perplexity text.txt --window 32 --overlap 8 --batch-size 2 --against b "
    f"{WITHOUT_CHECK}",
    "eval choices": f"eval ./policy --choices choices.jsonl --shots 1 --batch-size 2 {WITHOUT_CHECK}",
    "eval qa": f"eval ./policy --qa qa.jsonl --batch-size 2 --max-new-tokens 6 {WITHOUT_CHECK}",
    "eval win-rate": f"eval ./policy --win-rate b {DRAWN} --reward rm {WITHOUT_CHECK}",
    "eval suite": "eval ./policy --suite gemma2 --data tasks --tasks mmlu,gsm8k --batch-size 2 --max-new-tokens 4 "
    f"--against b {WITHOUT_CHECK}",
}
# Their figures agree: sums of other batches are rounded otherwise. 9 prompts: the last chunk has one.
SAME_FIGURES = {
    "eval": f"eval --model b --sft policy {DRAWN} --limit 9 --n 2 --reward rm --reward-fn judge:judge --json",
    "reward eval": "reward eval rm --data pairs.jsonl --batch-size 2 --json",
    "on the screen": f"eval ./policy --qa qa.jsonl --batch-size 2 --max-new-tokens 6 --json {WITHOUT_CHECK}",
}
FRONT = f"pareto --sft policy --policies b --merged b --etas 0.5 {DRAWN} --limit 9 --reward rm"
REFUSED = {  # what rank 0 says; the exit code of all
    "a row of one rank": (f"pareto --sft policy --policies b {DRAWN} --reward-fn judge:picky", "one of them", 1),
    "of one rank, no output": (f"eval --model b --sft policy {DRAWN} --reward-fn judge:picky", "one of them", 1),
    "a row of all": ("generate --teacher policy --prompts broken.jsonl", "broken.jsonl:2", 1),
    "a row that is no pair": ("reward score rm --data broken.jsonl", "broken.jsonl:2", 1),
    "an output that exists": ("generate --teacher policy --prompts prompts.jsonl --out policy", "policy", 1),
    "rank 0 at its end": (f"generate --teacher policy {DRAWN} --max-new-tokens 1", "all 12 completions ran into", 3),
    "a server": (
        "generate --teacher name --engine openai --base-url http://127.0.0.1:9/v1 --prompts prompts.jsonl",
        "--engine openai was started with",
        2,
    ),
    "lm-eval": ("eval ./policy --suite gemma2 --data tasks --engine hf", "--engine hf was started with", 2),
    "a command for one": (
        "reward pairs --model policy --prompts prompts.jsonl --judge judge:judge",
        "start it with",
        2,
    ),
}
JUDGE = """

def picky(prompts, completions, **columns):
    if any("3 plus 2" in str(prompt) for prompt in prompts):  # the last prompt: one rank has it
        raise ValueError("one of them")
    return [0.0] * len(prompts)


def fragile(prompts, completions, **columns):
    import os
    if os.path.exists("fault") and any("3 plus 2" in str(prompt) for prompt in prompts):
        raise ValueError("a fault")
    return [float(len(text)) for text in completions]
"""
RESUMED = (
    "generate --teacher policy --prompts prompts.jsonl --n 3 --reward-fn judge:fragile --batch-size 1 "
    "--max-new-tokens 8 --keep-truncated"
)


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = write_job(tmp_path_factory.mktemp("together"))
    save_random(root / "rm", 2, "reward")
    save_random(root / "b", 1)
    (root / "judge.py").write_text((root / "judge.py").read_text() + JUDGE)
    pairs = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "no " * (i % 4) + "!"} for i in range(11)]
    write_lines(root / "pairs.jsonl", pairs)
    write_lines(root / "broken.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": 3}])
    write_lines(root / "qa.jsonl", [{"question": f"What is {i} and {i}?", "answer": str(2 * i)} for i in range(9)])
    choices = [
        {"question": f"Which is {i}?", "choices": [f"it is {i}", "another", "no"], "answer": 1} for i in range(9)
    ]
    write_lines(root / "choices.jsonl", choices)
    (root / "text.txt").write_text(" ".join(f"the number {i} is here and there" for i in range(60)))
    Miniature(rows=5).write(root / "tasks")
    return root


def out_of(name, count):
    return f"{name.replace(' ', '-')}-{count}"


def lines_of(count):
    """Every command line, with outputs of that number of processes."""
    written = SAME_BYTES | {"pareto": FRONT}
    lines = {name: [*line.split(), "--out", out_of(name, count)] for name, line in written.items()}
    return lines | {name: line.split() for name, line in SAME_FIGURES.items()}


def refused(count):
    lines = {}
    for name, (line, *_) in REFUSED.items():
        words = line.split()
        writes = "--out" not in words and not (words[0] == "eval" and "--model" in words)
        lines[name] = [*words, "--out", out_of(name, count)] if writes else words
    return lines


@pytest.fixture(scope="module")
def alone(world):
    """One process: every command, and a job up to a fault."""
    (world / "fault").touch()
    lines = lines_of(1) | {"stopped": [*RESUMED.split(), "--out", "resumed"]}
    found = lines_on_ranks(1, world, lines)
    assert found["stopped"][0].code == 1
    (world / "fault").unlink()
    return found


@pytest.fixture(scope="module")
def two(world, alone):
    """Two processes: the same, what is refused, and a job that one process began."""
    journal = world / ".resumed.partial" / "checkpoints" / "answers.jsonl"
    kept = journal.read_text().splitlines(keepends=True)
    assert len(kept) == 36
    shutil.copytree(world / ".resumed.partial", world / ".torn.partial")
    (world / ".torn.partial" / "checkpoints" / "answers.jsonl").write_text("".join(kept[:21]))  # inside a chunk
    (world / ".torn.partial" / "checkpoints" / "scores.jsonl").unlink()
    again = {name: [*RESUMED.split(), "--resume", "--out", name] for name in ("resumed", "torn")}
    fresh = {"fresh": [*RESUMED.split(), "--out", "fresh"]}
    return lines_on_ranks(2, world, lines_of(2) | refused(2) | again | fresh)


@pytest.fixture(scope="module")
def three(world, alone):
    return lines_on_ranks(3, world, lines_of(3))


@pytest.fixture(scope="module")
def four(world, alone):
    return lines_on_ranks(4, world, lines_of(4) | refused(4))


COUNTS = [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]


def of_processes(request, count):
    return request.getfixturevalue({2: "two", 3: "three", 4: "four"}[count])


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "gemma2.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_close(one, other, place=""):
    """Two documents with the same texts, and numbers within 1e-6."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_close(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), place
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_close(left, right, f"{place}[{i}]")
    elif isinstance(one, float):
        assert math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6), (place, one, other)
    else:
        assert one == other, place


def summary(folder):
    manifest = json.loads((folder / "gemma2.json").read_text())
    assert manifest["status"] == "complete"
    return manifest["summary"]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", SAME_BYTES)
def test_files_are_those_of_one_process(name, count, world, alone, request):
    found = of_processes(request, count)[name]
    assert [one.code for one in [*alone[name], *found]] == [0] * (count + 1), found
    one, several = (world / out_of(name, of) for of in (1, count))
    assert contents(several) == contents(one)
    assert summary(several) == summary(one)
    assert json.loads((several / "gemma2.json").read_text())["processes"] == count
    assert [(one.out, one.err) for one in found[1:]] == [("", "")] * (count - 1)


@pytest.mark.parametrize("count", COUNTS)
def test_figures_are_those_of_one_process(count, world, alone, request):
    found = of_processes(request, count)
    for name in SAME_FIGURES:
        assert [one.code for one in [*alone[name], *found[name]]] == [0] * (count + 1), found[name]
        assert_close(json.loads(alone[name][0].out), json.loads(found[name][0].out), name)
        assert [(one.out, one.err) for one in found[name][1:]] == [("", "")] * (count - 1)
    assert [one.code for one in found["pareto"]] == [0] * count, found["pareto"]
    fronts = [json.loads((world / out_of("pareto", of) / "front.json").read_text()) for of in (1, count)]
    assert_close(*fronts)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", REFUSED)
def test_an_error_is_one_line_and_the_exit_code_of_all(name, count, world, request):
    _, words, code = REFUSED[name]
    first, *others = of_processes(request, count)[name]
    assert [one.code for one in (first, *others)] == [code] * count, (first, others)
    errors = [line for line in first.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and words in errors[0]
    if name != "a command for one":  # it does not meet the others: each says what it has found
        assert [(one.out, one.err) for one in others] == [("", "")] * (count - 1)
    assert not (world / out_of(name, count)).exists()


@pytest.mark.parametrize("name", ["resumed", "torn"])
def test_a_job_goes_on_with_another_number_of_processes(name, world, two):
    assert [one.code for one in two[name]] == [0, 0], two[name]
    assert contents(world / name) == contents(world / "fresh")
    assert summary(world / name) == summary(world / "fresh")


def test_every_command_that_shares_its_rows_is_run_here():
    tried = {*SAME_BYTES, "pareto", *SAME_FIGURES}
    assert set(SHARED.values()) <= tried
