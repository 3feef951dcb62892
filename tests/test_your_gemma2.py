"""docs/your-gemma2.md does what it says: its blocks run as typed on a tiny model in place of the 2B.

Only the sizes of `SMALLER` are changed, in flags that the page gives.
"""

import re
import shlex
import subprocess

import pytest
import torch
from commands import parse
from processes import ROOT
from test_readme import BLOCK, blocks, text_of

from gemma2.cli.app import invoke
from gemma2.core.errors import Gemma2Error

PAGE = ROOT / "docs" / "your-gemma2.md"
SMALLER = {"--steps": 3, "--warmup-steps": 1, "--max-new-tokens": 20, "--prompts-per-step": 4, "--epochs": 1}
HUB_ID = "google/gemma-2-2b-it"
ROWS = 96


def marked() -> list[str]:
    return [text for kind, text in blocks(PAGE) if kind == "tiny"]


def python_blocks() -> list[str]:
    return [block["text"] for block in BLOCK.finditer(text_of(PAGE)) if block["language"] == "python"]


def smaller(words: list[str]) -> list[str]:
    """A command line with the sizes of a test."""
    pairs = zip(words, ["", *words[:-1]], strict=True)
    return [str(min(SMALLER[before], int(word))) if before in SMALLER else word for word, before in pairs]


def run(line: str) -> None:
    """Run one line of a block: gemma2 in this process, another program as the shell would."""
    words = smaller(shlex.split(line, comments=True))
    if words[0] != "gemma2":
        subprocess.run(line, shell=True, check=True)
        return
    assert invoke(words[1:]) == 0, words
    _, parameters = parse(words[1:])
    out = parameters.get("out")
    assert out is None or out.exists() != parameters.get("dry_run", False), words


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the page's CSV file, its judge, and a tiny model where a path has the look of its hub id."""
    from gemma2.posttrain.tiny.networks import random_model, tiny_tokenizer
    from gemma2.posttrain.tiny.tasks import questions

    root = tmp_path_factory.mktemp("yours")
    model = random_model(0)
    with torch.no_grad():
        model.model.embed_tokens.weight[107] *= 6  # so that completions end
    model.save_pretrained(root / HUB_ID)
    tiny_tokenizer().save_pretrained(root / HUB_ID)
    rows = [f'"{row["prompt"]}","{index} is the answer"' for index, row in enumerate(questions("train", ROWS, seed=0))]
    (root / "support.csv").write_text("\n".join(["question,answer", *rows]) + "\n")
    (judge,) = (text for text in python_blocks() if "# judge.py" in text)
    (root / "judge.py").write_text(judge)
    return root


@pytest.fixture(scope="module")
def walked(place):
    """The folder after every marked block was run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(str(place))
        for text in marked():
            for line in text.splitlines():
                run(line)
    return place


def test_the_page_has_marked_blocks_and_every_size_that_is_changed_is_in_one():
    text = "\n".join(marked())
    assert len(marked()) >= 7
    assert {flag for flag in SMALLER if flag not in text} == set()
    assert HUB_ID in text


def test_blocks_that_run_nothing_here_name_directories_that_the_page_makes(walked):
    """`vllm serve DIR` and the like: the directory is there and has what such a program opens."""
    named = re.findall(r"(?:vllm serve|convert_hf_to_gguf.py) (\S+)", text_of(PAGE))
    assert named
    for name in named:
        files = {path.name for path in (walked / name).iterdir()}
        assert files >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}, name


def test_plain_transformers_serves_the_result_as_the_page_says(walked, monkeypatch, capsys):
    monkeypatch.chdir(walked)
    (code,) = (text for text in python_blocks() if "pipeline(" in text)
    exec(compile(code.replace("max_new_tokens=256", "max_new_tokens=4"), str(PAGE), "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


def mistakes() -> list:
    section = text_of(PAGE).partition("## Common mistakes")[2]
    rows = re.findall(r"^\$ (gemma2 .*)\nerror: (.*)$", section, re.MULTILINE)
    return [pytest.param(*row, id=row[0][:60]) for row in rows]


@pytest.mark.parametrize(("typed", "answer"), mistakes())
def test_a_mistake_is_answered_as_the_page_says(walked, monkeypatch, typed, answer):
    monkeypatch.chdir(walked)
    with pytest.raises(Gemma2Error) as error:
        invoke(shlex.split(typed)[1:])
    said = ".*".join(re.escape(part.strip()) for part in answer.split("..."))
    assert re.fullmatch(said, str(error.value)), str(error.value)
    assert not (walked / "x").exists()


def test_the_extras_that_the_page_names_exist():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = set(re.findall(r"'\.\[(\w+)\]'", text_of(PAGE)))
    assert named
    assert named <= project["optional-dependencies"].keys()
