"""The untrained null against numerical integration and random matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad

from esdtool.spectra.estimators.hill import hill
from esdtool.spectra.marchenko_pastur import mp_edges, mp_quantiles

SHAPES = [(300, 300), (100, 1000), (1000, 100), (2048, 5461)]


@pytest.mark.parametrize("shape", SHAPES)
def test_quantiles_by_integrating_the_density(shape: tuple[int, int]) -> None:
    low, high = mp_edges(*shape)
    quantiles = mp_quantiles(*shape)
    assert quantiles.shape == (min(shape),)
    assert low < quantiles[0] < quantiles[-1] < high

    def density(x: float) -> float:
        return math.sqrt(max((high - x) * (x - low), 0.0)) / x

    total = quad(density, low, high, limit=400)[0]
    for index in (0, 7, min(shape) // 2, min(shape) - 1):
        below = quad(density, low, quantiles[index], limit=400)[0]
        assert below / total == pytest.approx((index + 0.5) / min(shape), abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_eigenvalue_is_the_long_side(shape: tuple[int, int]) -> None:
    # trace(W^T W) = rows * columns for elements of variance 1
    assert mp_quantiles(*shape).mean() == pytest.approx(max(shape), rel=1e-4)


def test_random_matrices_follow_the_law() -> None:
    matrix = np.random.default_rng(0).standard_normal((400, 1000))
    eigenvalues = np.sort(np.linalg.svd(matrix, compute_uv=False) ** 2)
    np.testing.assert_allclose(eigenvalues[20:-20], mp_quantiles(400, 1000)[20:-20], rtol=0.02)
    assert hill(eigenvalues).alpha == pytest.approx(hill(mp_quantiles(1000, 400)).alpha, rel=0.01)


def test_quantiles_are_cached_and_read_only() -> None:
    first = mp_quantiles(64, 32)
    assert mp_quantiles(64, 32) is first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1.0


def test_a_pool_has_more_quantiles_of_the_same_law() -> None:
    pooled = mp_quantiles(64, 32, 9 * 32)
    assert pooled.shape == (288,)
    assert np.median(pooled) == pytest.approx(np.median(mp_quantiles(64, 32)), rel=0.01)
