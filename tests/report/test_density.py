"""What is drawn of a spectrum, against random matrices and integrals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import esdtool
from esdtool.analysis.module_record import TailResult
from esdtool.report.tables.density import drawn_fit, esd_histogram, null_density, tail_density
from esdtool.spectra.marchenko_pastur import mp_density, mp_edges, mp_quantiles


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=200), st.integers(0, 5))
def test_every_eigenvalue_is_counted_once(values: list[float], zeros: int) -> None:
    histogram = esd_histogram([*values, *[0.0] * zeros])
    shown = sum(value > max(values) * 1e-9 for value in values)
    assert histogram.counts.sum() == shown
    assert histogram.num_below == len(values) + zeros - shown
    integral = float((histogram.density * np.diff(histogram.edges)).sum())
    assert integral == pytest.approx(shown / (len(values) + zeros))


def test_an_esd_of_zeros_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a positive eigenvalue"):
        esd_histogram([0.0, 0.0])


def test_the_tail_holds_its_share_of_the_eigenvalues() -> None:
    fit = TailResult(alpha=2.5, alpha_stderr=0.1, xmin=0.3, num_tail=40, ks_distance=0.1)
    grid = np.geomspace(0.3, 0.3e9, 200_001)
    assert np.trapezoid(tail_density(grid, fit, 100), grid) == pytest.approx(0.4, rel=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(400, 100), (100, 400), (300, 250)])
def test_marchenko_pastur_density_is_that_of_its_quantiles(rows: int, columns: int) -> None:
    low, high = mp_edges(rows, columns)
    edges = np.linspace(low, high, 11)
    expected, _ = np.histogram(mp_quantiles(rows, columns, 100_000), edges)
    for left, right, count in zip(edges, edges[1:], expected, strict=False):
        grid = np.linspace(left, right, 2001)
        assert np.trapezoid(mp_density(grid, rows, columns), grid) == pytest.approx(count / 100_000, abs=2e-4)
    assert not mp_density(np.array([low * 0.99, high * 1.01]), rows, columns).any()


def test_the_null_lies_on_a_random_matrix() -> None:
    weight = 0.02 * torch.randn(600, 300, generator=torch.Generator().manual_seed(0))
    analysis = esdtool.analyze({"layers.0.mlp.up_proj.weight": weight})
    (module,) = analysis.modules
    histogram = esd_histogram(analysis.esds[module.name], bins=12)
    middles = np.sqrt(histogram.edges[1:] * histogram.edges[:-1])
    null = null_density(middles, module)
    assert null is not None
    assert histogram.density[2:-2] == pytest.approx(null[2:-2], rel=0.25)


def test_a_low_rank_update_has_no_null_and_farms_no_line() -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    analysis = esdtool.analyze({"layers.0.mlp.up_proj.weight": weight}, fit=["farms", "hill"])
    (module,) = analysis.modules
    assert null_density(np.ones(3), module.model_copy(update={"rank": 8})) is None
    found = drawn_fit(module)
    assert found is not None
    assert found[0] == "hill"
    assert drawn_fit(module.model_copy(update={"fits": {"farms": module.fits["farms"]}})) is None
