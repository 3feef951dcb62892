"""Coefficients against numbers derived by hand from WARP's equations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma2.core.errors import InputError
from gemma2.merging.methods.coefficients import (
    angle_degrees,
    ema_coefficients,
    linear_coefficients,
    liti_coefficients,
    model_stock,
    norm,
    slerp,
    slerp_coefficients,
    task_arithmetic,
    warp_coefficients,
)


def gram_of(*vectors):
    matrix = np.array(vectors, dtype=np.float64)
    return matrix @ matrix.T


# At 90 degrees sin((1-l)O)/sin(O) = sin((1-l) 90), and merging k vectors of length 1 keeps length 1. The k-th step
# multiplies what is there by cos(90/k) and takes the new vector with sin(90/k):
# M=3: .7071 * cos 30 = .6124, sin 30 = .5; M=4: .6124 * cos 22.5 = .5658, .5 * cos 22.5 = .4619, sin 22.5 = .3827;
# M=5: times cos 18 = .9511: .5381 .4393 .3640, sin 18 = .3090.
@pytest.mark.parametrize(
    "expected",
    [
        [0.7071, 0.7071],
        [0.6124, 0.6124, 0.5],
        [0.5658, 0.5658, 0.4619, 0.3827],
        [0.5381, 0.5381, 0.4393, 0.3640, 0.3090],
    ],
    ids=["M=2", "M=3", "M=4", "M=5"],
)
def test_slerp_of_orthogonal_task_vectors_has_the_coefficients_of_equation_26(expected):
    assert slerp_coefficients(np.eye(len(expected))) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("models", [2, 3, 4, 5])
def test_slerp_keeps_the_norm_of_orthogonal_task_vectors_and_the_mean_divides_it(models):
    gram = 4.0 * np.eye(models)
    assert norm(gram, slerp_coefficients(gram)) == pytest.approx(2.0, abs=1e-12)
    assert norm(gram, linear_coefficients(models)) == pytest.approx(2.0 / np.sqrt(models), abs=1e-12)


def test_slerp_at_60_degrees_and_one_quarter():
    # sin 45 / sin 60 = .816497, sin 15 / sin 60 = .298858
    gram = gram_of([1, 0], [0.5, np.sqrt(0.75)])
    assert slerp_coefficients(gram, 0.25) == pytest.approx([0.816497, 0.298858], abs=1e-6)


def test_slerp_does_not_normalise_the_task_vectors():
    # d1 = (3, 0), d2 = (0, 1): sin 45 of each, not of their directions.
    assert slerp_coefficients(gram_of([3, 0], [0, 1])) == pytest.approx([np.sqrt(0.5)] * 2)


@pytest.mark.parametrize(("t", "expected"), [(0.0, [1.0, 0.0]), (1.0, [0.0, 1.0])])
def test_slerp_at_an_end_is_exactly_that_end(t, expected):
    assert slerp_coefficients(gram_of([1, 0.3], [0.2, 1]), t).tolist() == expected


def test_three_models_in_another_order_give_other_coefficients():
    vectors = [[1, 0, 0], [0.6, 0.8, 0], [0, 0, 2]]
    forward = slerp_coefficients(gram_of(*vectors)) @ np.array(vectors)
    backward = slerp_coefficients(gram_of(*vectors[::-1])) @ np.array(vectors[::-1])
    assert np.abs(forward - backward).max() > 0.05


@given(st.lists(st.lists(st.floats(-3, 3), min_size=6, max_size=6), min_size=2, max_size=5))
def test_coefficients_from_the_gram_matrix_are_those_of_sequential_slerp_on_the_vectors(vectors):
    vectors = [np.array(vector) for vector in vectors]
    merged = vectors[0]
    for k, vector in enumerate(vectors[1:], start=2):  # appendix B.3 on the vectors themselves
        lengths = np.linalg.norm(merged), np.linalg.norm(vector)
        if min(lengths) < 1e-3:
            return
        omega = np.arccos(np.clip(merged @ vector / (lengths[0] * lengths[1]), -1, 1))
        if not 0.01 < omega < 3.1:
            return
        share = 1 / k
        merged = (np.sin((1 - share) * omega) * merged + np.sin(share * omega) * vector) / np.sin(omega)
    ours = slerp_coefficients(gram_of(*vectors)) @ np.array(vectors)
    assert ours == pytest.approx(merged, rel=1e-6, abs=1e-6)


def test_a_zero_task_vector_falls_back_to_lerp_and_says_so():
    result = slerp(gram_of([0, 0], [1, 0]), 0.25)
    assert result.coefficients.tolist() == [0.75, 0.25]
    assert result.fallback == "zero task vector"


def test_colinear_task_vectors_fall_back_to_lerp_and_say_so():
    result = slerp(gram_of([1, 2], [2, 4]))
    assert result.coefficients.tolist() == [0.5, 0.5]
    assert result.fallback == "angle near 0"


def test_a_cosine_that_rounding_pushed_over_1_is_clamped():
    assert angle_degrees(np.array([[1.0, 1.0 + 1e-12], [1.0 + 1e-12, 1.0]]), 0, 1) == 0.0


def test_antiparallel_task_vectors_are_an_error_that_names_the_group():
    with pytest.raises(InputError, match=r"layers\.3: task vector 2 points opposite .*180\.00 degrees"):
        slerp(gram_of([1, 2], [-1, -2]), group="layers.3")


def test_liti_goes_from_the_init_to_the_merge():
    assert liti_coefficients(0.0).tolist() == [1.0, 0.0]
    assert liti_coefficients(0.25).tolist() == [0.75, 0.25]
    assert liti_coefficients(1.0).tolist() == [0.0, 1.0]


def test_warp_is_slerp_then_liti():
    init, first, second = np.array([[5.0, -1.0], [6.0, 0.0], [4.0, 1.0]])
    slerped = slerp_coefficients(gram_of(first - init, second - init))
    merged = init + slerped[0] * (first - init) + slerped[1] * (second - init)
    expected = 0.7 * init + 0.3 * merged
    assert warp_coefficients(slerped, 0.3) @ np.array([init, first, second]) == pytest.approx(expected)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 1.0])
def test_ema_coefficients_are_the_recursion(decay):
    checkpoints = np.array([3.0, -1.0, 4.0, 1.5])
    average = checkpoints[0]
    for value in checkpoints[1:]:
        average = decay * average + (1 - decay) * value
    assert ema_coefficients(4, decay) @ checkpoints == pytest.approx(average)


def test_ema_of_three_checkpoints_by_hand():
    # .9 (.9 c1 + .1 c2) + .1 c3
    assert ema_coefficients(3, 0.9) == pytest.approx([0.81, 0.09, 0.1])
    assert ema_coefficients(4).tolist() == [0.25] * 4


def test_task_arithmetic_scales_the_weights():
    assert task_arithmetic([0.5, 1.5], 0.5).tolist() == [0.25, 0.75]
    assert task_arithmetic([1, 3], 2.0, normalize=True).tolist() == [0.5, 1.5]


# Two at 60 degrees: t = 2 * .5 / (1 + .5) = 2/3. Three at 60: t = 3 * .5 / (1 + 2 * .5) = 3/4. Each takes t / M.
@pytest.mark.parametrize(("models", "expected"), [(2, 1 / 3), (3, 1 / 4)])
def test_model_stock_at_60_degrees(models, expected):
    lengths = np.arange(1.0, models + 1)
    gram = np.where(np.eye(models), 1.0, 0.5) * np.outer(lengths, lengths)
    assert model_stock(gram) == pytest.approx([expected] * models)


def test_model_stock_takes_the_mean_cosine_of_the_pairs():
    gram = np.array([[1.0, 0.9, 0.3], [0.9, 1.0, 0.6], [0.3, 0.6, 1.0]])  # mean .6: t = 1.8 / 2.2
    assert model_stock(gram) == pytest.approx([0.6 / 2.2] * 3)


def test_model_stock_of_equal_models_is_their_mean_and_of_opposed_ones_the_base():
    assert model_stock(gram_of([1, 2], [1, 2])).tolist() == pytest.approx([0.5, 0.5])
    assert model_stock(gram_of([1, 0], [0, 1])).tolist() == [0, 0]
    assert model_stock(gram_of([1, 0], [-1, 0.1])).tolist() == [0, 0]


def test_model_stock_counts_a_frozen_model_as_orthogonal():
    # cosines of the pairs: 1, 0, 0: t = 3 * (1/3) / (1 + 2/3) = .6
    assert model_stock(gram_of([1, 1], [1, 1], [0, 0])) == pytest.approx([0.2] * 3)


@given(st.lists(st.lists(st.floats(-3, 3), min_size=6, max_size=6), min_size=2, max_size=5))
def test_model_stock_against_the_vectors(vectors):
    vectors = np.array(vectors)
    lengths = np.linalg.norm(vectors, axis=1)
    if lengths.min() < 1e-3:
        return
    pairs = [(i, j) for i in range(len(vectors)) for j in range(i)]
    cosine = max(0.0, sum(vectors[i] @ vectors[j] / (lengths[i] * lengths[j]) for i, j in pairs) / len(pairs))
    t = len(vectors) * cosine / (1 + (len(vectors) - 1) * cosine)
    assert model_stock(gram_of(*vectors)) @ vectors == pytest.approx(t * vectors.mean(axis=0), abs=1e-9)
