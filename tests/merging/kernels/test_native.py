"""Kernels as machine code: the same results as through numba, kept on disk, and loaded without numba."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma2.merging.kernels import native
from gemma2.merging.kernels.machine_code import MachineCode
from gemma2.merging.kernels.native import Kernel, announced, compiled


@compiled()
def twice(number: float) -> float:
    """A kernel that another one calls."""
    return number * 2.0


@compiled()
def mixed(numbers: np.ndarray, pair: tuple[int, tuple[bool, float]], table: np.ndarray, single: np.float32) -> float:
    """Arrays of one and two dimensions, a nested tuple, numbers of all kinds; writes into its argument."""
    count, (negative, factor) = pair
    total = 0.0
    for i in range(count):
        table[i, 1] = np.int64(numbers[i])
        total += twice(numbers[i]) * factor
    return -total if negative else total + np.float64(single)


@compiled()
def is_large(words: np.ndarray) -> bool:
    """A truth."""
    return words[0] > np.uint64(1 << 63)


@compiled()
def largest(words: np.ndarray) -> np.uint64:
    """A number beyond int64."""
    return words.max()


@compiled()
def fill(numbers: np.ndarray, number: int) -> None:
    """No result."""
    for i in range(numbers.size):
        numbers[i] = number


@compiled()
def reversed_sum(numbers: np.ndarray) -> float:
    """A kernel that allocates."""
    return np.flip(numbers).copy().sum()


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Two empty folders for machine code, and kernels that know nothing yet."""
    found = [tmp_path / "bytecode", tmp_path / "cache"]
    monkeypatch.setattr(native, "_places", lambda kernel: found)
    for kernel in (mixed, is_large, largest, fill, reversed_sum):
        monkeypatch.setattr(kernel, "_entries", {})
    return found


def test_arguments_and_results_of_every_kind_pass(places):
    numbers = np.arange(5, dtype=np.float32)
    table = np.zeros((5, 2), np.int64)
    assert mixed(numbers, (4, (True, 0.5)), table, np.float32(1)) == -6.0
    assert table[:, 1].tolist() == [0, 1, 2, 3, 0]
    assert mixed(numbers, (5, (False, 0.5)), table, np.float32(0.25)) == 10.25
    words = np.array([3, 2**64 - 1], np.uint64)
    assert is_large(words) is False
    assert is_large(words[1:]) is True
    assert largest(words) == 2**64 - 1
    assert fill(numbers, 7) is None
    assert numbers.tolist() == [7.0] * 5


def test_the_same_function_through_numba_gives_the_same(places):
    numbers, table = np.random.default_rng(0).standard_normal(100), np.zeros((100, 2), np.int64)
    arguments = (numbers, (100, (False, 0.1)), table, np.float32(3))
    assert mixed(*arguments) == pytest.approx(mixed._through_numba(*arguments), rel=1e-15)


def compiled_now(monkeypatch, call):
    """Whether the call compiles."""
    seen = []
    with announced(seen.append):
        call()
    return bool(seen)


def test_code_is_compiled_once_and_found_in_either_place(places, monkeypatch):
    words = np.array([1], np.uint64)
    assert compiled_now(monkeypatch, lambda: is_large(words))
    [file] = places[0].iterdir()
    for _ in range(2):
        monkeypatch.setattr(is_large, "_entries", {})
        assert not compiled_now(monkeypatch, lambda: is_large(words))
        places[1].mkdir(exist_ok=True)
        file.rename(places[1] / file.name)
        file = places[1] / file.name


def test_other_types_are_other_code(places, monkeypatch):
    fill(np.zeros(1), 1)
    assert compiled_now(monkeypatch, lambda: fill(np.zeros(1, np.float32), 1))
    assert len([*places[0].iterdir()]) == 2


def test_a_place_that_cannot_be_written_is_passed_over(places, tmp_path):
    places[0].write_text("a file")
    assert largest(np.array([5], np.uint64)) == 5
    assert [path.name.split("-")[0] for path in places[1].iterdir()] == ["largest"]


def test_without_any_place_the_kernel_runs(places, monkeypatch):
    for place in places:
        place.write_text("a file")
    assert largest(np.array([5], np.uint64)) == 5


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-1], lambda text: b"", lambda text: text[:60] + b"?" + text[61:]]
)
def test_damaged_code_is_compiled_again(places, monkeypatch, damage):
    largest(np.array([5], np.uint64))
    [file] = places[0].iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    monkeypatch.setattr(largest, "_entries", {})
    assert compiled_now(monkeypatch, lambda: largest(np.array([5], np.uint64)))
    assert MachineCode.decoded(file.read_bytes()) is not None


def test_code_of_older_sources_is_removed(places, monkeypatch):
    largest(np.array([5], np.uint64))
    monkeypatch.setattr(native, "_sources", lambda kernel: ["other"])
    monkeypatch.setattr(largest, "_entries", {})
    assert compiled_now(monkeypatch, lambda: largest(np.array([5], np.uint64)))
    assert len([*places[0].iterdir()]) == 1


@pytest.mark.parametrize("argument", [np.arange(8.0)[::2], np.arange(8.0)], ids=["strided", "contiguous"])
def test_what_only_numba_can_run_runs_through_numba_and_is_not_compiled_twice(places, monkeypatch, argument):
    assert reversed_sum(argument) == argument.sum()
    monkeypatch.setattr(reversed_sum, "_entries", {})
    assert not compiled_now(monkeypatch, lambda: reversed_sum(argument))


def test_a_change_of_a_called_kernel_counts(monkeypatch):
    before = native._names(mixed, ["f"])
    monkeypatch.setattr(native, "_source", lambda path: f"new {Path(path).name}")
    assert native._names(mixed, ["f"])[1] != before[1]
    assert [one.__name__ for one in mixed.references().values()] == ["twice"]
    assert all(isinstance(one, Kernel) for one in mixed.references().values())


RUN = """
import sys
import numpy as np
from gemma2.merging.kernels.dense import check_sum
print(check_sum(np.arange(16, dtype=np.uint8), 0), "numba" in sys.modules)
"""


def test_kept_code_runs_without_numba(tmp_path):
    (tmp_path / "gemma2").symlink_to(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode")}
    command = [sys.executable, "-c", RUN]
    runs = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    ]
    assert [run[1] for run in runs] == ["True", "False"]
    assert runs[0][0] == runs[1][0]
