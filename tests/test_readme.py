"""The README and the pages do what they say: every command parses, every link leads somewhere, marked blocks run."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from commands import all_commands, parse
from processes import ROOT

from gemma2.cli.app import invoke
from gemma2.cli.evaluation.eval_group import EvalGroup
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.rounding import STILL
from gemma2.merging.inspect.difference import diff_models

pytestmark = pytest.mark.long

PAGES = [path for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]]
BLOCK = re.compile(
    r"^(?:<!-- test: (?P<kind>\w+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)
SHELL = ("sh", "bash", "shell", "console")
SMALLER = {"--steps": 2, "--max-new-tokens": 12, "--limit": 16}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def commands_in(text: str, program: str) -> list[list[str]]:
    """The lines of a shell block that start a program, without comments, continuation lines joined."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [words[1:] for words in lines if words[:1] == [program]]


def blocks(path: Path) -> list[tuple[str, str]]:
    """(mark, text) of every shell block of a page."""
    found = BLOCK.finditer(text_of(path))
    return [(block["kind"] or "", block["text"]) for block in found if block["language"] in SHELL]


def lines_of(program: str) -> list:
    return [
        pytest.param(words, id=f"{path.name}: {program} {' '.join(words)[:60]}")
        for path in PAGES
        if path.name != "adding-a-merge-method.md"  # its method exists in its own test only
        for _, text in blocks(path)
        for words in commands_in(text, program)
    ]


def test_the_readme_has_blocks_and_one_of_them_is_run():
    if not text_of(ROOT / "README.md"):
        pytest.skip("nothing is written yet")
    kinds = [kind for kind, text in blocks(ROOT / "README.md")]
    assert len(kinds) >= 2
    assert "tiny" in kinds
    assert set(kinds) <= {"", "tiny"}, "a mark that no test knows"


def test_the_two_commands_for_a_bare_machine_are_the_first_block():
    if text_of(ROOT / "README.md"):
        _, first = blocks(ROOT / "README.md")[0]
        assert [words[0] for words in commands_in(first, "make")] == ["quickstart", "test"]


@pytest.mark.parametrize("words", lines_of("gemma2"))
def test_every_command_of_a_page_is_one_that_gemma2_takes(words):
    _, parameters = parse(words)
    assert parameters


@pytest.mark.parametrize("words", lines_of("make"))
def test_every_make_target_of_a_page_exists(words):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert [word for word in words if "=" not in word and word not in targets] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_and_flag_named_in_a_sentence_exists(path):
    known = dict(all_commands())
    for line in re.findall(r"`gemma2 ([a-z][^`]*)`", text_of(path)):
        words = line.split()
        if words[0] == "eval":
            words = ["eval", *EvalGroup.routed(words[1:])]
        name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
        assert name in known, line
        flags = {flag for parameter in known[name].params for flag in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= {*flags, "--help"}, line


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_to_one(path):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text_of(path))
    missing = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert missing == []


# --- marked blocks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory like the one after `make quickstart`, with models that trained for a sixteenth of the time."""
    from gemma2.posttrain.tiny.networks import tiny_tokenizer
    from gemma2.posttrain.tiny.pretrain import RECIPES, pretrain
    from gemma2.posttrain.tiny.tasks import questions

    root = tmp_path_factory.mktemp("readme")
    models = root / "quickstart" / "models"
    for name, recipe in RECIPES.items():
        pretrain(replace(recipe, steps=recipe.steps // 16)).save_pretrained(models / name)
        tiny_tokenizer().save_pretrained(models / name)
    for split, name, count in (("train", "prompts", 200), ("heldout", "heldout", 32)):
        rows = questions(split, count, seed=0)
        (models / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def untrained(tmp_path):
    """The same with models that nobody trained, whose completions end, and with few prompts."""
    import torch

    from gemma2.posttrain.tiny.networks import random_model, tiny_tokenizer
    from gemma2.posttrain.tiny.tasks import questions

    models = tmp_path / "quickstart" / "models"
    for seed, name in enumerate(("student", "teacher")):
        model = random_model(seed)
        with torch.no_grad():
            model.model.embed_tokens.weight[107] *= 6
        model.save_pretrained(models / name)
        tiny_tokenizer().save_pretrained(models / name)
    for split, name in (("train", "prompts"), ("heldout", "heldout")):
        rows = questions(split, 24, seed=0)
        (models / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def smaller(words: list[str]) -> list[str]:
    """A command line with the sizes of a test, and with four prompts in each step of RL."""
    pairs = zip(words, ["", *words[:-1]], strict=True)
    found = [str(min(SMALLER[before], int(word))) if before in SMALLER else word for word, before in pairs]
    return found + (["--prompts-per-step", "4", "--warmup-steps", "1"] if "rlhf" in words else [])


def run_block(lines: list[list[str]], capsys: pytest.CaptureFixture) -> None:
    for words in lines:
        assert invoke(words) == 0, words
        _, parameters = parse(words)
        assert parameters.get("out") is None or parameters["out"].exists(), words
        assert capsys.readouterr().out, words


def evaluations(run: Path) -> list[dict]:
    """The measurements of an RL run on held-out prompts, from the start to the end."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row.get("kind") == "eval"]


def relative(a: Path, b: Path) -> float:
    """|b - a| / |a| over all weights."""
    found = diff_models(a, b).total.relative
    return found or 0.0


def check_that_training_trained(root: Path) -> None:
    """README's policies left their start, gained reward, and differ from each other; so does every trained model."""
    for name in ("policy-1", "policy-2"):
        first, *_, last = evaluations(root / name)
        assert last["kl"] > 0.05, name
        assert last["reward"] > first["reward"], name
    trained = [("quickstart/models/student", "sft"), ("sft", "distilled"), ("distilled", "policy-1")]
    for before, after in [*trained, ("distilled", "policy-2"), ("policy-1", "policy-2"), ("policy-1", "slerp")]:
        assert relative(root / before, root / after) > 10 * STILL, (before, after)
    for name in ("sft", "distilled", "reward", "policy-1", "policy-2"):
        assert read_manifest(root / name)["summary"]["weights_moved"] > 10 * STILL, name
    assert read_manifest(root / "front")["summary"]["differs"]
    angle = diff_models(root / "policy-1", root / "policy-2", base=root / "distilled").total.task_angle
    assert angle is not None
    assert 5 < angle < 175


def marked() -> list[str]:
    return [text for kind, text in blocks(ROOT / "README.md") if kind == "tiny"]


def test_the_first_marked_block_runs_with_smaller_numbers(untrained, monkeypatch, capsys):
    monkeypatch.chdir(untrained)
    run_block([smaller(words) for words in commands_in(marked()[0], "gemma2")], capsys)


@pytest.mark.slow
def test_the_first_marked_block_runs_as_it_stands(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    run_block(commands_in(marked()[0], "gemma2"), capsys)
    check_that_training_trained(place)


@pytest.mark.slow
def test_the_marked_blocks_run_one_after_the_other(place, monkeypatch, capsys):
    (place / "all").mkdir()
    (place / "all" / "quickstart").symlink_to(place / "quickstart")
    monkeypatch.chdir(place / "all")
    for text in marked():
        run_block(commands_in(text, "gemma2"), capsys)
    assert read_manifest(place / "all" / "warp")["summary"]["differs"]
