"""The code of a user's function: its module and everything of the user's that it imports, without running any of it."""

import sys

import pytest

from gemma2.posttrain.provenance.code import code_of, modules_of
from gemma2.posttrain.schemas import RewardFields

SOURCES = {
    "rewards_here.py": "import json\nimport helper_here\nfrom package_here import inner\nraise SystemExit('it ran')\n",
    "helper_here.py": "from deeper_here.words import WORDS\n",
    "deeper_here/words.py": "WORDS = []\n",
    "package_here/__init__.py": "from .sibling import X\n",
    "package_here/inner.py": "from . import other\nfrom ..outside import nothing\n",
    "package_here/sibling.py": "X = 1\n",
    "package_here/other.py": "def late():\n    import lazily_here\n",
    "lazily_here.py": "import importlib\nimportlib.import_module('by_name_here')\n",
    "by_name_here.py": "import rewards_here  # a circle\n",
    "unused_here.py": "",
}
USED = {
    "rewards_here", "helper_here", "deeper_here.words", "package_here", "package_here.inner", "package_here.sibling",
    "package_here.other", "lazily_here", "by_name_here",
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def code(name="rewards_here:score"):
    return code_of(RewardFields(reward_fn=(name,)))


def test_every_module_of_the_user_s_that_is_imported_counts_and_none_of_them_runs(place):
    assert set(modules_of("rewards_here")) == USED
    assert set(code()["rewards_here:score"]) == USED


@pytest.mark.parametrize("name", sorted(USED))
def test_a_change_in_any_of_them_is_a_change(place, name):
    before = code()
    path = place / f"{name.replace('.', '/')}.py"
    path = path if path.exists() else place / name / "__init__.py"
    path.write_text(path.read_text() + "# changed\n")
    assert {
        key for key, digest in code()["rewards_here:score"].items() if before["rewards_here:score"][key] != digest
    } == {name}


def test_what_is_not_imported_does_not_count(place):
    before = code()
    (place / "unused_here.py").write_text("X = 2\n")
    assert code() == before


def test_an_installed_package_counts_by_its_own_file_alone_and_a_missing_one_not_at_all(place):
    assert list(modules_of("numpy.linalg")) == ["numpy.linalg"]
    assert modules_of("no_such_module") == {}
    assert code("no_such_module:f") == {}
    assert code_of(RewardFields(reward_fn=("m.x y:f",))) == {}


def test_source_that_does_not_parse_counts_by_its_bytes(place):
    (place / "helper_here.py").write_text("def (")
    assert set(modules_of("rewards_here")) == USED - {"deeper_here.words"}
