"""The corpus of malformed inputs through the real command line, and good inputs that must be accepted.

The unit tests run cases that need no network, every third, of the slower parts every eighth; `make torture` runs all.
"""

import os
import shutil
import sys
from importlib import import_module

import pytest
from corpus import MOST_BYTES, bounded, difference, judge, run, snapshot, tried, write_world
from corpus import Ended as End
from corpus_data import ROWS, TABLES, TEMPLATES
from corpus_files import MANIFESTS, OUTPUTS, YAML
from corpus_good import GOOD
from corpus_models import DIRECTORIES, HEADERS, INDEXES, MEANING, SHARDS
from corpus_pairs import ADAPTERS, PAIRS
from ledger import recorded
from processes import MAIN, start

from gemma2.posttrain.data import template_time

PARTS = {
    "shard": SHARDS,
    "header": HEADERS,
    "index": INDEXES,
    "directory": DIRECTORIES,
    "meaning": MEANING,
    "pair": PAIRS,
    "adapter": ADAPTERS,
    "rows": ROWS,
    "table": TABLES,
    "template": TEMPLATES,
    "yaml": YAML,
    "manifest": MANIFESTS,
    "output": OUTPUTS,
}
CASES = {f"{part}: {name}": case for part, cases in PARTS.items() for name, case in cases.items()}
# These are refused only after torch was imported, which takes longer than all others together.
NETWORKS = ("gemma2.posttrain.sft.sft", "gemma2.posttrain.preferences.score", "gemma2.posttrain.evaluation.pareto")
HEAVY = {
    *("meaning: a tensor less", "meaning: a tensor more", "meaning: NaN, trained", "meaning: zeros alone, trained"),
    *("meaning: a reward model of two outputs", "manifest: pareto: an earlier front that is no JSON"),
    *("manifest: not resumed: a begun run", "manifest: a teacher's cache without an index"),
    *("output: a partial run that is a link", "output: sft: an input", "output: sft: in /proc"),
    *(f"manifest: {name}" for name in MANIFESTS if name.startswith("resume: ")),
}
SLOWER = ("rows", "table", "template", "yaml", "manifest")
QUICK = [name for name in CASES if name not in HEAVY and not name.startswith(SLOWER)]
SLOW = [name for name in CASES if name not in HEAVY and name.startswith(SLOWER)]
LIGHT = QUICK[::3] + SLOW[::8]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield write_world(tmp_path_factory.mktemp("corpus") / "world")
    del os.environ["XDG_CACHE_HOME"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(template_time, "TEMPLATE_SECONDS", 0.5)


def failures(names, template, tmp_path):
    """Run cases; what is wrong with each that does not end as promised."""
    found = {}
    for number, name in enumerate(names):
        ended, faults = tried(CASES[name], template, tmp_path / str(number))
        if faults:
            found[name] = [*faults, ended.err]
    return found


def accepted(name, template, place):
    """Run a control; what is wrong with its end."""
    good = GOOD[name]
    shutil.copytree(template, place, symlinks=True)
    good.change(place)
    before = snapshot(place)
    ended = run(place, good.words.split())
    changes = [
        one
        for one in difference(before, snapshot(place))
        if not one.startswith("left behind") and ".out.lock" not in one
    ]
    hidden = [path.name for path in place.glob(".*") if f"left behind: {path.name}" in changes]
    said = [part for part in good.says if part not in ended.err + ended.out]
    wrong = [ended.trace, ended.err] if ended.code or ended.trace else []
    return [*wrong, *changes, *hidden, *(f"{part!r} is missing in {ended.err}" for part in said)]


def test_malformed_inputs_are_refused_with_file_and_cause_and_leave_nothing(template, tmp_path):
    assert len(CASES) >= 150
    assert failures(LIGHT, template, tmp_path) == {}


def test_good_inputs_are_accepted(template, tmp_path):
    assert len(GOOD) >= 15
    wrong = {
        name: accepted(name, template, tmp_path / str(n))
        for n, name in enumerate(GOOD)
        if "--dry-run" not in GOOD[name].words or n % 4 == 0
    }
    assert {name: faults for name, faults in wrong.items() if faults} == {}


@pytest.mark.torture
def test_the_whole_corpus(template, tmp_path):
    for module in NETWORKS:  # before the clock of a case runs
        import_module(module)
    with recorded("malformed inputs through the command line, one change each") as figures:
        wrong = failures(CASES, template, tmp_path)
        figures["refused in one line, nothing left"] = len(CASES) - len(wrong)
        figures["otherwise"] = len(wrong)
    assert wrong == {}
    with recorded("good inputs through the command line") as figures:
        wrong = {name: accepted(name, template, tmp_path / f"good-{n}") for n, name in enumerate(GOOD)}
        wrong = {name: faults for name, faults in wrong.items() if faults}
        figures["accepted"] = len(GOOD) - len(wrong)
        figures["refused"] = len(wrong)
    assert wrong == {}


SPOT = (
    *(
        "shard: half of the file",
        "header: deep",
        "header: a shape that overflows",
        "index: a key of the weight_map twice",
    ),
    *(
        "meaning: NaN",
        "adapter: without a configuration",
        "rows: deep",
        "table: gzip cut off",
        "yaml: recipe with a billion laughs",
    ),
    *(
        "manifest: pick: a list",
        "output: of others, forced",
        "yaml: pipeline with a broken row",
        "meaning: zeros alone, trained",
    ),
)


@pytest.mark.torture
def test_processes_end_in_the_same_way_within_their_memory(template, tmp_path):
    """What a test in this process cannot see: the interpreter's own end, and how much memory it took."""
    wrong, most = {}, 0
    with recorded("malformed inputs, each in a process") as figures:
        for number, name in enumerate(SPOT):
            case, place = CASES[name], tmp_path / str(number)
            shutil.copytree(template, place, symlinks=True)
            case.damage(place)
            before = snapshot(place)
            process = start(MAIN, *case.words.split(), cwd=place, stdin=-3)
            with process.stdout, process.stderr, bounded(60):
                out, err = process.stdout.read(), process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            faults = judge(case, End(process.returncode, out, err), difference(before, snapshot(place)))
            most = max(most, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
            if faults:
                wrong[name] = faults
        figures |= {"refused": len(SPOT) - len(wrong), "MB of memory at most": most >> 20}
    assert wrong == {}
    assert most < MOST_BYTES
