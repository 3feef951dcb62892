"""No test asserts how long something takes, and no bound on a hang is short: other work may run on the same machine.

`waiting.py` is the one place that looks at a clock and sleeps.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from processes import ROOT
from waiting import PATIENCE

HERE = ROOT / "tests"
FILES = [path for path in sorted(HERE.rglob("*.py")) if path.name != "waiting.py"]
CLOCKS = {f"{name}{unit}" for name in ("time", "monotonic", "perf_counter", "process_time") for unit in ("", "_ns")}
PLACES = {"wait": 0, "join": 0, "timeout": 0, "communicate": 1, "finish": 1, "wait_for": 1}  # of the bound
WAITS = {*PLACES, "call", "check_call", "check_output", "get", "gemma2", "result", "run", "start"}
SHORTEST = 30.0  # seconds


def imported(tree: ast.AST) -> dict[str, str]:
    """Names of this file that stand for a function of the module `time`: `from time import sleep as nap`."""
    return {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "time"
        for alias in node.names
    }


def of_time(node: ast.Call, names: dict[str, str]) -> str:
    """`sleep` for time.sleep(...); empty for what is no function of the module `time`."""
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) and node.func.value.id == "time":
        return node.func.attr
    return names.get(node.func.id, "") if isinstance(node.func, ast.Name) else ""


def short_bounds(node: ast.Call) -> list[float]:
    """Numbers below SHORTEST that bound a wait, by name or by place."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name not in WAITS:
        return []
    given = [word.value for word in node.keywords if word.arg in ("timeout", "seconds")]
    given += node.args[PLACES[name] :][:1] if name in PLACES else []  # " ".join(...) has no number
    numbers = [value.value for value in given if isinstance(value, ast.Constant)]
    return [value for value in numbers if isinstance(value, int | float) and value < SHORTEST]


def faults(source: str) -> list[str]:
    """Every line of a file that depends on time."""
    tree = ast.parse(source)
    names = imported(tree)
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if of_time(node, names) == "sleep":
            found.append(f"{node.lineno}: sleeps; wait_for a condition, or pause before a kill")
        elif of_time(node, names) in CLOCKS:
            found.append(f"{node.lineno}: looks at a clock; use a fake one, an event or an order")
        found += [f"{node.lineno}: gives up after {bound} s" for bound in short_bounds(node)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(HERE).as_posix())
def test_no_test_depends_on_how_fast_the_machine_is(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "assert time.perf_counter() - began < 4",
        "assert 0.2 <= time.monotonic() - began",
        "until = time.time() + 10",
        "from time import monotonic as clock; clock()",
        "time.sleep(0.5)",
        "from time import sleep; sleep(1)",
        "process.wait(10)",
        "process.wait(timeout=29.9)",
        "thread.join(1)",
        "process.communicate(timeout=5)",
        "process.communicate(None, 5)",
        "subprocess.run(['true'], timeout=20)",
        "finish(process, 10)",
        "finish(process, seconds=10)",
        "wait_for(condition, 10)",
        "pytest.mark.timeout(5)",
        "queue.get(timeout=1)",
    ],
)
def test_a_line_that_depends_on_time_is_found(line: str) -> None:
    assert len(faults(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "process.wait()",
        "process.wait(60)",
        "finish(process)",
        "process.communicate(timeout=PATIENCE)",
        "' '.join(words)",
        "monkeypatch.setattr(module.time, 'monotonic', lambda: now[0])",
        "clock.sleep(5)",
        "GenerateConfig(timeout=0.5)",
        "wait_for(condition)",
        "run.finish({})",
        "counts.get(name, 0)",
    ],
)
def test_other_lines_are_not(line: str) -> None:
    assert faults(line) == []


def test_the_bounds_in_use_are_generous() -> None:
    assert PATIENCE >= 60
