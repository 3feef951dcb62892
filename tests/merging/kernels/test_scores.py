"""The divergence of rows and the variance over models, against float64 of numpy."""

import numpy as np
import pytest

from gemma2.merging.kernels.scores import CHUNK, divergence, exponentials, variances

MODELS = {"near": 0.002, "far": 1.0, "far apart": 60.0, "at the ends of fp32": 1e30}


def log_softmax(row):
    return row - np.logaddexp.reduce(row)


@pytest.mark.parametrize("size", [1, 7, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
@pytest.mark.parametrize("kind", MODELS)
def test_a_divergence_is_that_of_float64(kind, size):
    generator = np.random.default_rng(size)
    base = generator.standard_normal(size).astype(np.float32)
    model = (base + MODELS[kind] * generator.standard_normal(size)).astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        logs = [log_softmax(row.astype(np.float64)) for row in (model, base)]
        expected = (np.exp(logs[0]) * (logs[0] - logs[1])).sum()
    found = divergence(model, base, np.empty((3, CHUNK)))
    assert found == pytest.approx(max(expected, 0.0), rel=1e-9, abs=1e-13)


def test_exponentials_are_right_to_the_last_bits_over_their_whole_range():
    powers = np.concatenate([np.linspace(-690, 0, 20_001), -(2.0 ** np.arange(-60, 9))]).astype(np.float32)
    found = np.empty(powers.size)
    exponentials(powers, 0.0, found)
    np.testing.assert_allclose(found, np.exp(powers.astype(np.float64)), rtol=1e-14)


@pytest.mark.parametrize("models", [2, 3, 5])
def test_a_variance_is_that_of_float64(models):
    deltas = np.random.default_rng(models).standard_normal((models, CHUNK)) * 1e-3
    bits = np.empty(CHUNK - 3, np.uint32)
    variances(deltas, np.empty(CHUNK), np.empty(CHUNK), bits)
    expected = deltas[:, : bits.size].var(axis=0)
    np.testing.assert_allclose(bits.view(np.float32), expected, rtol=2e-7)
