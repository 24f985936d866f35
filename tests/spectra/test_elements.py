"""Sums over elements, and the distance from random, against numpy and scipy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from esdtool.spectra.cache import SpectrumCache, content_hash
from esdtool.spectra.elements import element_statistics, known_elements
from esdtool.spectra.marchenko_pastur import mp_quantiles
from esdtool.spectra.null_distance import null_distance, random_distance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_channels(dtype: torch.dtype, scale: float) -> None:
    weight = (scale * torch.randn(50, 30, generator=torch.Generator().manual_seed(0))).to(dtype)
    weight[7] *= 20
    weight[:, 3] = 0
    found = element_statistics([weight])
    assert found is not None
    squares = weight.double().square().numpy()
    assert (found.rows.largest, found.rows.num_zero, found.rows.first_zero) == (7, 0, None)
    assert found.rows.largest_share == pytest.approx(squares[7].sum() / squares.sum(), rel=1e-12)
    upper = np.quantile(squares.sum(axis=1), 0.95)
    assert found.rows.largest_over_upper == pytest.approx(squares[7].sum() / upper, rel=1e-9)
    assert (found.columns.count, found.columns.num_zero, found.columns.first_zero) == (30, 1, 3)
    kurtosis = (squares**2).mean() / squares.mean() ** 2
    for side, axis in ((found.rows, 1), (found.columns, 0)):
        sums = squares.sum(axis=axis)
        length = squares.shape[axis]
        assert side.dispersion == pytest.approx(sums.std() / sums.mean() / np.sqrt((kurtosis - 1) / length), rel=1e-9)
    assert found.largest == float(weight.double().abs().max())


def test_extreme_scales_and_bad_elements() -> None:
    weight = torch.randn(20, 20, generator=torch.Generator().manual_seed(0)).double()
    usual = element_statistics([weight])
    assert usual is not None
    for scale in (1e-300, 1e300):
        found = element_statistics([weight * scale])
        assert found is not None
        assert found.rows.largest_share == pytest.approx(usual.rows.largest_share)
    for bad in (torch.nan, torch.inf):
        spoilt = weight.clone()
        spoilt[3, 3] = bad
        assert element_statistics([spoilt]) is None
    assert element_statistics([torch.zeros(3, 3)]) is None


def test_what_is_known_is_not_computed_again(tmp_path: Path) -> None:
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    spoilt = torch.full((4, 4), torch.nan)
    cache = SpectrumCache(folder=tmp_path, limit=2**20)

    def never() -> list[torch.Tensor]:
        raise AssertionError("the matrices are read again")

    for matrix in (weight, spoilt):
        first = known_elements(lambda: [matrix], cache=cache, content=content_hash([matrix]))  # noqa: B023
        assert first == element_statistics([matrix])
        assert known_elements(never, cache=cache, content=content_hash([matrix])) == first
    with pytest.raises(AssertionError):
        known_elements(never, cache=cache, content=content_hash([2 * weight]))


def test_the_distance_is_a_wasserstein_distance() -> None:
    generator = np.random.default_rng(0)
    for rows, columns in ((40, 40), (30, 90)):
        eigenvalues = np.sort(generator.pareto(2.0, min(rows, columns)))
        quantiles = mp_quantiles(rows, columns)
        distance = scipy.stats.wasserstein_distance(eigenvalues / eigenvalues.mean(), quantiles / quantiles.mean()) / 2
        assert null_distance(eigenvalues, rows, columns) == pytest.approx(distance, rel=1e-9)
        assert null_distance(1e7 * eigenvalues, columns, rows) == pytest.approx(distance, rel=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(20, 20), (48, 160), (128, 64)])
def test_the_distance_of_a_random_matrix(rows: int, columns: int) -> None:
    generator = np.random.default_rng(1)
    found = [
        null_distance(
            np.sort(np.linalg.svd(generator.standard_normal((rows, columns)), compute_uv=False) ** 2), rows, columns
        )
        for _ in range(40)
    ]
    expected, spread = random_distance(rows, columns)
    assert np.mean(found) == pytest.approx(expected, rel=0.2)
    assert max(found) < expected + 4.5 * spread
