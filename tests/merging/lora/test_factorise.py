"""Low-rank factors against numpy's own SVD in float64."""

import numpy as np
import pytest

from gemma2.merging.lora.factorise import factorise


def noise(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decaying(shape, seed=0):
    """Singular values 1, 1/2, 1/3, ..., as the updates of a training have them."""
    side = min(shape)
    left, right = np.linalg.qr(noise((shape[0], side), seed))[0], np.linalg.qr(noise((shape[1], side), seed + 1))[0]
    return ((left / np.arange(1, side + 1)) @ right.T).astype(np.float32)


def error(matrix, factors):
    return np.linalg.norm(matrix - factors.left @ factors.right)


def least(matrix, rank):
    """The least possible error of any matrix of this rank."""
    return np.sqrt((np.linalg.svd(matrix.astype(float), compute_uv=False)[rank:] ** 2).sum())


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (2100, 16), (16, 2100), (7, 7), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("rank", [1, 4])
def test_the_exact_factors_have_the_least_possible_error(shape, rank):
    matrix = noise(shape)
    found = factorise(matrix, rank, None, "exact")
    assert found.rank == min(rank, *shape)
    assert error(matrix, found) == pytest.approx(least(matrix, found.rank), rel=1e-6, abs=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.left, axis=0), np.linalg.norm(found.right, axis=1), rtol=1e-6)


@pytest.mark.parametrize("shape", [(400, 240), (240, 400)], ids=str)
@pytest.mark.parametrize(("make", "above"), [(decaying, 1.0005), (noise, 1.01)])
def test_the_randomised_factors_are_as_good_as_stated(shape, make, above):
    matrix = make(shape)
    found = factorise(matrix, 12, None)
    assert (found.svd, found.rank) == ("randomised", 12)
    assert least(matrix, 12) * 0.9999 < error(matrix, found) < least(matrix, 12) * above
    again = factorise(matrix, 12, None)
    assert (found.left == again.left).all()
    assert (found.right == again.right).all()


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99, 1.0])
def test_the_smallest_rank_that_holds_the_share_is_taken(share):
    matrix = decaying((60, 30))
    found = factorise(matrix, None, share)
    held = np.cumsum(np.linalg.svd(matrix.astype(float), compute_uv=False) ** 2)
    assert found.svd == "exact"
    assert found.rank == np.searchsorted(held / held[-1], share * (1 - 1e-12)) + 1
    assert 1 - error(matrix, found) ** 2 / np.linalg.norm(matrix) ** 2 >= share - 1e-6
    assert factorise(matrix, 2, share).rank == min(2, found.rank)


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_singular_values_that_are_zero_get_no_columns(svd):
    matrix = (noise((64, 3)).astype(float) @ noise((3, 40))).astype(np.float32)
    found = factorise(matrix, 20, None, svd)
    assert found.rank < 20
    assert error(matrix, found) < 1e-5 * np.linalg.norm(matrix)
    single = np.zeros((6, 5), np.float32)
    single[2, 3] = -7
    one = factorise(single, 4, None, svd)
    assert one.rank == 1
    np.testing.assert_allclose(one.left @ one.right, single, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e12])
def test_the_size_of_the_difference_does_not_matter(scale):
    matrix = noise((40, 24)) * np.float32(scale)
    assert error(matrix, factorise(matrix, 4, None)) == pytest.approx(least(matrix, 4), rel=1e-5)
