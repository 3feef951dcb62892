"""Spherical means against the same steps on the vectors themselves, and against angles derived by hand."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gemma2.core.errors import InputError, UsageError
from gemma2.merging.methods.coefficients import norm, slerp
from gemma2.merging.methods.spherical import karcher, multislerp, nuslerp


def gram_of(*vectors):
    matrix = np.array(vectors, dtype=np.float64)
    return matrix @ matrix.T


def stepped(vectors, weights, steps):
    """`steps` tangent steps from the mean of the directions, on vectors of any dimension."""
    lengths = np.linalg.norm(vectors, axis=1)
    directions = vectors / lengths[:, None]
    x = weights @ directions
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        tangent = np.zeros_like(x)
        for weight, u in zip(weights, directions, strict=True):
            across = u - (u @ x) * x
            size = np.linalg.norm(across)
            if size > 0:
                tangent += weight * np.arctan2(size, u @ x) * across / size
        length = np.linalg.norm(tangent)
        if length > 0:
            x = np.cos(length) * x + np.sin(length) * tangent / length
    return (weights @ lengths) * x


# Two unit vectors: the mean of weights (1 - t, t) lies at t of the angle between them, whatever the iteration.
@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_the_karcher_mean_of_two_directions_is_slerp(t):
    gram = gram_of([1, 0], [np.cos(1.2), np.sin(1.2)])
    ours = karcher(gram, [1 - t, t], max_iterations=50, tolerance=1e-12).coefficients
    assert ours == pytest.approx(slerp(gram, t).coefficients, abs=1e-10)


def test_karcher_and_multislerp_of_orthogonal_directions_point_along_the_diagonal():
    # lengths 1, 2, 3: mean length 2; direction (1, 1, 1) / sqrt 3; coefficients 2 / sqrt 3 / length
    gram = np.diag([1.0, 4.0, 9.0])
    expected = 2 / np.sqrt(3) / np.array([1, 2, 3])
    assert karcher(gram).coefficients == pytest.approx(expected)
    assert multislerp(gram).coefficients == pytest.approx(expected)


def test_multislerp_is_one_step_from_the_mean_direction():
    # Weights 3/4, 1/4 at 90 degrees: the mean direction is at atan(1/3) = 18.435 degrees; the tangent mean of -18.435
    # and +71.565 is 3/4 * -18.435 + 1/4 * 71.565 = 4.065 degrees: the result is at 22.5.
    ours = multislerp(np.eye(2), [3, 1]).coefficients
    assert ours == pytest.approx([np.cos(np.pi / 8), np.sin(np.pi / 8)])


vectors_of = st.lists(st.lists(st.floats(-3, 3), min_size=6, max_size=6), min_size=2, max_size=5)


@given(vectors_of, st.lists(st.floats(0.1, 2), min_size=5, max_size=5))
def test_coefficients_from_the_gram_matrix_are_those_of_steps_on_the_vectors(vectors, weights):
    vectors = np.array(vectors)
    shares = np.array(weights[: len(vectors)]) / sum(weights[: len(vectors)])
    lengths = np.linalg.norm(vectors, axis=1)
    assume(lengths.min() > 0.1)
    directions = vectors / lengths[:, None]
    assume((directions @ directions.T).min() > -0.5)
    gram = gram_of(*vectors)
    assert multislerp(gram, shares).coefficients @ vectors == pytest.approx(stepped(vectors, shares, 1), abs=1e-6)
    ours = karcher(gram, shares, max_iterations=40, tolerance=1e-9).coefficients @ vectors
    assert ours == pytest.approx(stepped(vectors, shares, 60), abs=1e-6)


def test_iterations_and_tolerance_end_the_search():
    gram = gram_of([1, 0, 0], [0.2, 1, 0], [0.1, -0.3, 1])
    weights = [5, 1, 2]
    first = karcher(gram, weights, max_iterations=1).coefficients
    assert first == pytest.approx(multislerp(gram, weights).coefficients, abs=1e-15)
    assert karcher(gram, weights, tolerance=9.0).coefficients.tolist() == first.tolist()
    assert np.abs(karcher(gram, weights).coefficients - first).max() > 1e-4


def test_the_length_of_a_spherical_mean_is_the_weighted_mean_of_the_lengths():
    gram = gram_of([3, 0, 0], [1, 1, 0], [0, 1, 2])
    lengths = np.sqrt(np.diag(gram))
    for mean in (karcher, multislerp):
        assert norm(gram, mean(gram, [1, 2, 3]).coefficients) == pytest.approx(lengths @ [1 / 6, 2 / 6, 3 / 6])


def test_equal_vectors_keep_themselves():
    gram = gram_of([1, 2], [1, 2], [1, 2])
    for mean in (karcher, multislerp):
        assert mean(gram).coefficients.sum() == pytest.approx(1.0, abs=1e-12)


def test_nuslerp_takes_its_t_from_the_weights():
    gram = gram_of([1, 0], [0.5, np.sqrt(0.75)])
    assert nuslerp(gram, [3, 1]).coefficients == pytest.approx([0.816497, 0.298858], abs=1e-6)  # t = 1/4 at 60 degrees
    assert nuslerp(gram).coefficients.tolist() == slerp(gram).coefficients.tolist()


@pytest.mark.parametrize("mean", [karcher, multislerp])
def test_a_zero_vector_falls_back_to_linear_and_says_so(mean):
    result = mean(gram_of([0, 0], [1, 0]), [1, 3])
    assert result.coefficients.tolist() == [0.25, 0.75]
    assert result.fallback == "zero task vector"


@pytest.mark.parametrize("mean", [karcher, multislerp])
def test_directions_without_a_mean_are_an_error_that_names_the_group(mean):
    with pytest.raises(InputError, match=r"layers\.3: the directions of the models cancel"):
        mean(gram_of([1, 2], [-2, -4]), group="layers.3")
    with pytest.raises(InputError, match=r"layers\.3: model 2 points opposite to the mean .*180\.00 degrees"):
        mean(gram_of([1, 2], [-2, -4]), [3, 1], group="layers.3")


def test_weights_that_are_no_shares_are_refused():
    with pytest.raises(UsageError, match=r"weights \[1\.0, -2\.0\]"):
        karcher(np.eye(2), [1, -2])
    with pytest.raises(UsageError, match=r"weights \[0\.0, 0\.0\]"):
        nuslerp(np.eye(2), [0, 0])
