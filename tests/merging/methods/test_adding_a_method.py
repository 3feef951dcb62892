"""docs/adding-a-merge-method.md, executed: the file that it shows makes a method out of nothing."""

import json
import re

import numpy as np
import pytest
from processes import MAIN, ROOT, finish, start
from safetensors.numpy import load_file, save_file

PAGE = (ROOT / "docs" / "adding-a-merge-method.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LINES = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
# The package finds a file of a second folder as if it were the file that the page says to write.
WITH_THE_FILE = """
import sys
from gemma2.merging import methods
methods.__path__.append(sys.argv.pop(1))
"""
NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight",
         "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight")  # fmt: skip
# Task vectors of norm 1 and 3 at right angles.
VECTORS = {"base": (0.0, 0.0), "a": (1.0, 0.0), "b": (0.0, 3.0)}


@pytest.fixture
def place(tmp_path):
    """The file of the page in a second folder, the models that its commands name, and its merge file."""
    (tmp_path / "more").mkdir()
    ((_, code),) = [block for block in BLOCKS if block[0] == "python"]
    (tmp_path / "more" / "norm_methods.py").write_text(code, encoding="utf-8")
    ((_, recipe),) = [block for block in BLOCKS if block[0] == "yaml"]
    (tmp_path / "merge.yaml").write_text(recipe, encoding="utf-8")
    for name, values in VECTORS.items():
        (tmp_path / name).mkdir()
        config = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "num_hidden_layers": 2}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file({key: np.array([values], np.float32) for key in NAMES}, tmp_path / name / "model.safetensors")
    return tmp_path


# Runs the command lines that follow, one after the other; prints (exit code, stdout, stderr) of each.
EVERY_LINE = """
import contextlib, io, json
from gemma2.cli.main import main
answers = []
for line in sys.argv[1:]:
    sys.argv[1:] = line.partition("  #")[0].split()[1:]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as end:
            code = end.code
    answers.append([code, out.getvalue(), err.getvalue()])
json.dump(answers, sys.stdout)
"""


def call(place, line):
    """Exit code, stdout and stderr of one line of the page."""
    words = line.partition("  #")[0].split()[1:]
    return finish(start(WITH_THE_FILE + MAIN, place / "more", *words, cwd=place))


def merged(out):
    return {key: value[0].tolist() for key, value in load_file(out / "model.safetensors").items()}


def test_every_line_of_the_page_does_what_it_says(place):
    code, printed, err = finish(start(WITH_THE_FILE + EVERY_LINE, place / "more", *LINES, cwd=place))
    assert (code, err) == (0, "")
    for line, (code, out, err) in zip(LINES, json.loads(printed), strict=True):
        refused = line.partition("# error: ")[2]
        assert (code, refused in err) == ((2, True) if refused else (0, True)), (line, err)
        if "--help" in line:
            assert "--power FLOAT" in out and "default 1]" in " ".join(out.split())  # at any width
    # Norms 1 and 3: power 1 gives the weights 3/4 and 1/4, power 0 halves, power 2 gives 9/10 and 1/10.
    even, squared = [0.5, 1.5], pytest.approx([0.9, 0.3])
    assert all(value == pytest.approx([0.75, 0.75]) for value in merged(place / "merged").values())
    by_depth, by_name = merged(place / "by-depth"), merged(place / "by-name")
    assert [by_depth[name] for name in NAMES] == [even, even, squared, squared]
    assert [by_name[name] for name in NAMES] == [even, squared, even, squared]
    assert not (place / "refused").exists()


STAGE = """
from gemma2.posttrain.schemas import MergeConfig
config = MergeConfig(method="inverse-norm", models=("a", "b"), base="base", power={"layers": [0, 2]})
print(config.recorded()["power"])
"""


def test_a_stage_of_a_pipeline_takes_it_too(place):
    code, out, err = finish(start(WITH_THE_FILE + STAGE, place / "more", cwd=place))
    assert (code, err) == (0, "")
    assert "'points': [0.0, 2.0]" in out


def test_a_module_that_repeats_a_name_is_an_error(place):
    (place / "more" / "norm_methods.py").write_text("METHODS = {'slerp': None}\n")
    code, _, err = call(place, "gemma2 merge --help")
    assert code == 1 and "two modules have a merge method slerp" in err
