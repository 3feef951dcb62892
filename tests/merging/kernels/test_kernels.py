"""Kernels against numpy: every fp16 pattern, rounding to nearest even, sums with the documented precision."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from model_files import from_bytes, random_arrays, to_bytes, write_model

from gemma2.merging.kernels.dense import BLOCK, check_sum, combine, gram
from gemma2.merging.kernels.dtypes import narrow, widen
from gemma2.merging.kernels.number_formats import KINDS

PATTERNS = np.arange(65536, dtype=np.uint16)


def widened(data: np.ndarray, dtype: str) -> np.ndarray:
    raw = data.view(np.uint8)
    out = np.empty(raw.size // (4 if dtype == "F32" else 2), np.float32)
    widen(raw, KINDS[dtype], out)
    return out


def narrowed(values: np.ndarray, dtype: str) -> tuple[np.ndarray, bool]:
    raw = np.empty(values.size * (4 if dtype == "F32" else 2), np.uint8)
    finite = narrow(values.astype(np.float32), KINDS[dtype], raw)
    return raw, finite


def test_every_fp16_pattern_is_widened_exactly():
    ours, numpys = widened(PATTERNS, "F16"), PATTERNS.view(np.float16).astype(np.float32)
    finite = np.isfinite(numpys)
    assert np.array_equal(ours[finite].view(np.uint32), numpys[finite].view(np.uint32))
    assert np.array_equal(np.isnan(ours), np.isnan(numpys))
    assert np.array_equal(np.isinf(ours), np.isinf(numpys))


def test_every_bf16_pattern_is_widened_exactly():
    assert np.array_equal(widened(PATTERNS, "BF16").view(np.uint32), PATTERNS.astype(np.uint32) << 16)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_values_halfway_between_two_stored_ones_go_to_the_even_one(dtype):
    patterns = np.arange(0x0000, 0x7000, dtype=np.uint16)  # up to where the next value is finite in both
    low = widened(patterns, dtype).astype(np.float64)
    high = widened(patterns + np.uint16(1), dtype).astype(np.float64)
    middle, finite = narrowed(((low + high) / 2).astype(np.float32), dtype)
    assert finite
    assert np.array_equal(middle.view(np.uint16), patterns + (patterns & 1))


def test_fp16_is_rounded_as_numpy_rounds():
    bits = np.random.default_rng(0).integers(0, 2**32, 500_000, dtype=np.uint64).astype(np.uint32)
    small = np.random.default_rng(1).standard_normal(100_000).astype(np.float32) * np.float32(1e-6)  # subnormal in fp16
    values = np.concatenate([bits.view(np.float32), small])
    values = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    assert np.array_equal(narrowed(values, "F16")[0].view(np.uint16), expected)


@pytest.mark.parametrize(
    ("dtype", "largest", "beyond"), [("F16", 65504.0, 65520.0), ("BF16", 3.3895e38, 3.397e38), ("F32", 3e38, np.inf)]
)
def test_a_result_that_does_not_fit_is_noticed(dtype, largest, beyond):
    assert narrowed(np.array([1.0, largest, -largest]), dtype)[1]
    assert not narrowed(np.array([1.0, -beyond]), dtype)[1]


def measured(operands: list[np.ndarray], based: bool) -> np.ndarray:
    """Sums of the results of `gram` over all blocks."""
    stored = np.stack([operand.astype(np.float32) for operand in operands])
    count, models = operands[0].size, len(operands) - based
    out = np.empty((-(-count // BLOCK), 1 + models * (models + 1) // 2))
    gram(stored, count, based, out)
    return out.sum(axis=0)


def test_gram_measures_differences_to_the_base():
    generator = np.random.default_rng(0)
    base = generator.standard_normal(10_001)
    first, second = (base + 1e-3 * generator.standard_normal(base.size) for _ in range(2))
    base, first, second = (x.astype(np.float32).astype(np.float64) for x in (base, first, second))
    deltas = first - base, second - base
    expected = [base @ base, deltas[0] @ deltas[0], deltas[0] @ deltas[1], deltas[1] @ deltas[1]]
    assert measured([base, first, second], True) == pytest.approx(expected, rel=1e-6, abs=1e-10)


def test_the_norm_of_a_long_vector_is_right_where_one_fp32_sum_is_not():
    values = np.full(1 << 24, 0.1, np.float32)
    exact = float(np.float32(0.1)) * 2.0**12
    running = np.cumsum(values * values, dtype=np.float32)[-1]  # one fp32 sum over everything
    assert abs(np.sqrt(running) / exact - 1) > 1e-3
    assert np.sqrt(measured([values], False)[1]) == pytest.approx(exact, rel=1e-6)


def test_squares_that_overflow_fp32_are_still_finite():
    assert measured([np.full(10, 1e30)], False)[1] == pytest.approx(1e61, rel=1e-6)


def combined(weights: list[float], *operands: np.ndarray) -> np.ndarray:
    stored = np.stack([operand.astype(np.float32) for operand in operands])
    out = np.empty((1, stored.shape[1]), np.float32)
    assert combine(stored, operands[0].size, np.array([weights]), np.empty(BLOCK, np.float32), out)
    return out[0]


def test_a_single_weight_of_one_gives_the_operand_bit_for_bit():
    first = np.array([0.0, -0.0, 1e-45, -3.4e38, 0.1], np.float32)
    second = np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32)
    assert combined([0.0, 1.0, 0.0], second, first, second).tobytes() == first.tobytes()


def test_equal_operands_give_themselves_bit_for_bit():
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    values[0] = -0.0
    third = 1.0 / 3.0
    assert combined([third, third, third], values, values, values).tobytes() == values.tobytes()


def test_weights_that_do_not_sum_to_one_scale_the_result():
    assert combined([0.75, 0.75], np.array([2.0]), np.array([4.0])).tolist() == [4.5]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_helpers_of_these_tests_round_trip(dtype):
    values = np.array([1.0, -2.5, 0.0, 2.0**-20])
    assert from_bytes(to_bytes(values, dtype), dtype, [4]).tolist() == values.tolist()


@pytest.mark.parametrize("operands", [1, 2, 3, 4, 5])
def test_bf16_bits_and_the_same_numbers_in_fp32_give_the_same_sums_and_results(operands):
    bits = np.random.default_rng(operands).integers(0x3E00, 0x4100, (operands, 5000), dtype=np.uint16)
    numbers = (bits.astype(np.uint32) << 16).view(np.float32)
    weights = np.random.default_rng(0).uniform(-1, 1, (2, operands))
    sums, results = [], []
    for stored in (bits, numbers):
        out = np.empty((2, 1 + operands * (operands + 1) // 2))
        gram(stored, 5000, False, out)
        merged = np.empty((2, 5000), np.float32)
        assert combine(stored, 5000, weights, np.empty(BLOCK, np.float32), merged)
        sums.append(out.sum(axis=0))
        results.append(merged)
    pairs = numbers.astype(np.float64) @ numbers.astype(np.float64).T
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)
    assert sums[0][1:] == pytest.approx(pairs[np.triu_indices(operands)], rel=1e-5)
    assert np.allclose(results[0], results[1], rtol=0, atol=1e-5)
    assert np.allclose(results[0], weights @ numbers, rtol=0, atol=2e-5)


@pytest.mark.parametrize("place", [0, 4096, 4098, 8205])
def test_check_sums_of_pieces_add_up_wherever_a_file_is_cut(place):
    data = np.random.default_rng(0).integers(0, 256, 1003, dtype=np.uint8)
    whole = int(check_sum(data, place))
    for cut in (0, 1, 7, 8, 302, 1000, 1003):
        assert (int(check_sum(data[:cut], place)) + int(check_sum(data[cut:], place + cut))) % 2**64 == whole
    padded = np.zeros((place + 1003 + 7) // 8 * 8, np.uint8)
    padded[place : place + 1003] = data
    assert whole == sum(int(word) * (2 * i + 1) for i, word in enumerate(padded.view(np.uint64))) % 2**64


def test_a_check_sum_notices_a_flipped_bit_a_swap_and_a_shift():
    data = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
    whole = int(check_sum(data, 0))
    flipped, swapped = data.copy(), data.copy()
    flipped[500] ^= 1
    swapped[:8], swapped[8:16] = data[8:16], data[:8]
    assert int(check_sum(flipped, 0)) != whole
    assert int(check_sum(swapped, 0)) != whole
    assert int(check_sum(data, 8)) != whole


MERGE = """
from pathlib import Path
from gemma2.merging import MergeRequest, merge
from gemma2.core.progress import SILENT
type(SILENT).note = lambda self, text: print(text)
merge(MergeRequest(method="linear", models=(Path("a"), Path("b"))), out=Path("out"), force=True)
"""


@pytest.mark.slow
def test_kernels_are_compiled_once_per_machine_and_announced_in_one_line(tmp_path):
    (tmp_path / "gemma2").symlink_to(Path(__file__).parents[3])
    for name in ("a", "b"):
        write_model(tmp_path / name, random_arrays(0), "BF16")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode")}
    command = [sys.executable, "-c", MERGE]
    runs = [
        subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [run.stdout.count("compiling the merge kernels") for run in runs] == [1, 0]


def test_importing_the_package_loads_neither_numba_nor_numpy(tmp_path):
    (tmp_path / "gemma2").symlink_to(Path(__file__).parents[3])
    code = "import sys, gemma2.core.outputs.staging; print(sorted({'numba', 'numpy', 'torch'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
