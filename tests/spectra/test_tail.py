"""Estimators of alpha against known answers, brute force, and the powerlaw package."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esdtool.spectra.estimators.fix_finger import fix_finger_fit
from esdtool.spectra.estimators.hill import hill, hill_index
from esdtool.spectra.estimators.ks import ks_distances, ks_fit
from esdtool.spectra.estimators.powerlaw import powerlaw_fit


def pareto_quantiles(exponent: float, size: int) -> np.ndarray:
    """The quantile grid of a Pareto law with density exponent 1 + `exponent`."""
    q = (np.arange(1, size + 1) - 0.5) / size
    return (1 - q) ** (-1 / exponent)


def brute_force_ks(eigenvalues: np.ndarray) -> tuple[float, float, float]:
    """(alpha, xmin, D) by the definition, one candidate at a time."""
    ordered = np.sort(eigenvalues)
    best = (math.inf, 0.0, 0.0)
    for index in range(len(ordered) - 1):
        xmin, tail = ordered[index], ordered[index:]
        if xmin <= 0 or (index and ordered[index - 1] == xmin) or tail[-1] == xmin:
            continue
        alpha = 1 + len(tail) / np.log(tail / xmin).sum()
        distance = np.abs(1 - (tail / xmin) ** (1 - alpha) - np.arange(len(tail)) / len(tail)).max()
        if distance < best[0]:
            best = (distance, alpha, xmin)
    return best[1], best[2], best[0]


def test_quantile_grid_of_a_pareto_law() -> None:
    fit = ks_fit(pareto_quantiles(1.5, 1000))
    assert fit.alpha == pytest.approx(2.50127, abs=5e-6)
    assert fit.ks_distance == pytest.approx(0.000673, abs=5e-7)
    assert (fit.xmin_index, fit.num_tail) == (0, 1000)


def test_harmonic_spectrum() -> None:
    eigenvalues = 1 / np.arange(1, 65) ** 2.0
    assert hill(eigenvalues).alpha == pytest.approx(1.54523, abs=5e-6)
    assert ks_fit(eigenvalues).alpha == pytest.approx(1.52459, abs=5e-6)


def test_pareto_sample_with_known_fit() -> None:
    fit = ks_fit(np.random.RandomState(123).pareto(2.5, 100))
    assert fit.alpha == pytest.approx(2.535777, abs=5e-7)
    assert fit.xmin == pytest.approx(0.432972, abs=5e-7)
    assert fit.ks_distance == pytest.approx(0.070437, abs=5e-7)
    assert fit.num_tail == 40


@pytest.mark.parametrize("size", [2, 3, 50, 64, 65, 300, 1500])
@pytest.mark.parametrize("kind", ["pareto", "gaussian", "uniform", "ties", "spike"])
def test_pruned_scan_equals_brute_force(kind: str, size: int) -> None:
    rng = np.random.default_rng(size)
    eigenvalues = {
        "pareto": rng.pareto(1.5, size) + 0.01,
        "gaussian": rng.standard_normal(size) ** 2 + 1e-9,
        "uniform": rng.uniform(0.1, 1, size),
        "ties": np.append(rng.integers(1, 9, size - 1).astype(float), 100.0),
        "spike": np.append(rng.uniform(0.1, 1, size - 1), 1e9),
    }[kind]
    alpha, xmin, distance = brute_force_ks(eigenvalues)
    fit = ks_fit(eigenvalues)
    assert fit.ks_distance == pytest.approx(distance, rel=1e-9, abs=1e-14)
    assert fit.alpha == pytest.approx(alpha, rel=1e-9)
    assert fit.xmin == xmin


def test_whole_scan_agrees_with_its_minimum() -> None:
    eigenvalues = np.random.default_rng(0).pareto(2.0, 500) + 0.1
    xmins, alphas, distances = ks_distances(eigenvalues)
    fit = ks_fit(eigenvalues)
    best = int(distances.argmin())
    assert (xmins[best], alphas[best], distances[best]) == pytest.approx((fit.xmin, fit.alpha, fit.ks_distance))


@pytest.mark.parametrize("alpha", [1.3, 2.0, 3.5, 5.0])
def test_estimators_recover_a_planted_exponent(alpha: float) -> None:
    eigenvalues = pareto_quantiles(alpha - 1, 4000)
    assert hill(eigenvalues).alpha == pytest.approx(alpha, rel=5e-3)
    assert ks_fit(eigenvalues).alpha == pytest.approx(alpha, rel=5e-3)


def test_hill_is_the_package_at_the_same_xmin() -> None:
    import powerlaw

    eigenvalues = np.random.default_rng(1).pareto(2.2, 400) + 0.05
    fit = hill(eigenvalues)
    package = powerlaw.Fit(eigenvalues, xmin=fit.xmin, verbose=False, parameter_ranges={"alpha": [1, None]})
    assert package.power_law.alpha == pytest.approx(fit.alpha, rel=1e-12)
    assert fit.ks_distance == pytest.approx(package.power_law.D, abs=1e-12)


def test_powerlaw_fit_agrees_with_our_scan_and_prefers_the_true_law() -> None:
    eigenvalues = pareto_quantiles(4.0, 300)  # alpha 5, beyond the package's default range
    fit, _ = powerlaw_fit(1e-9 * eigenvalues)
    ours = ks_fit(1e-9 * eigenvalues)
    assert fit.alpha == pytest.approx(ours.alpha, rel=1e-9)
    assert (fit.xmin, fit.num_tail) == (ours.xmin, ours.num_tail)
    _, comparisons = powerlaw_fit(pareto_quantiles(1.5, 300))
    assert comparisons["exponential"].ratio > 0
    assert comparisons["exponential"].p_value < 0.05


def test_fix_finger_windows() -> None:
    rng = np.random.default_rng(2)
    eigenvalues = np.exp(rng.normal(-4, 1.0, 2000))
    counts, edges = np.histogram(np.log10(eigenvalues), bins=100)
    peak = 10 ** edges[counts.argmax()]
    linear = fix_finger_fit(eigenvalues)
    assert 0.95 * peak <= linear.xmin <= 1.5 * peak
    # The public code's lower bound is negative here, so that every small eigenvalue is admitted.
    legacy = fix_finger_fit(eigenvalues, bound="legacy")
    xmins, _, distances = ks_distances(eigenvalues)
    admitted = xmins <= 1.5 * peak
    assert legacy.xmin == xmins[admitted][distances[admitted].argmin()]
    inside = admitted & (xmins >= 0.95 * peak)
    assert linear.xmin == xmins[inside][distances[inside].argmin()]


@pytest.mark.parametrize(
    ("size", "fraction", "index"),
    [(100, 0.5, 50), (101, 0.5, 50), (7, 0.5, 3), (100, 0.1, 90), (1000, 0.3, 700), (10, 1.0, 0), (10, 0.01, 8)],
)
def test_hill_index(size: int, fraction: float, index: int) -> None:
    assert hill_index(size, fraction) == index
    fit = hill(np.arange(1.0, size + 1), k_fraction=fraction)
    assert (fit.xmin_index, fit.num_tail) == (index, size - index)


def test_standard_error() -> None:
    fit = hill(pareto_quantiles(2.0, 200))
    assert fit.alpha_stderr == pytest.approx((fit.alpha - 1) / 10)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    exponent=st.floats(-12, 12),
    size=st.integers(10, 200),
)
def test_alpha_does_not_depend_on_scale_or_order(seed: int, exponent: float, size: int) -> None:
    rng = np.random.default_rng(seed)
    eigenvalues = rng.pareto(1.5, size) + 0.1
    scaled = rng.permutation(eigenvalues) * 10.0**exponent
    assert hill(scaled).alpha == pytest.approx(hill(eigenvalues).alpha, rel=1e-9)
    ours, theirs = ks_fit(eigenvalues), ks_fit(scaled)
    assert theirs.ks_distance == pytest.approx(ours.ks_distance, rel=1e-7)
    assert theirs.alpha == pytest.approx(ours.alpha, rel=1e-7)


def test_zeros_are_outside_the_power_law() -> None:
    eigenvalues = np.random.default_rng(3).pareto(1.5, 100) + 0.1
    padded = ks_fit(np.concatenate([np.zeros(20), eigenvalues]))
    plain = ks_fit(eigenvalues)
    assert padded.alpha == plain.alpha
    assert padded.xmin_index == plain.xmin_index + 20


@pytest.mark.parametrize(
    ("fit", "eigenvalues", "message"),
    [
        (hill, [1.0], "at least two eigenvalues"),
        (hill, [0.0, 0.0, 0.0, 1.0], "must be positive"),
        (hill, [1.0, math.nan], "finite"),
        (ks_fit, [0.0, 1.0], "two positive eigenvalues"),
        (ks_fit, [2.0, 2.0, 2.0], "all eigenvalues are equal"),
        (fix_finger_fit, [0.0, 0.0], "two positive eigenvalues"),
        (powerlaw_fit, [2.0, 2.0], "two distinct"),
    ],
)
def test_spectra_without_a_tail_are_refused(fit, eigenvalues: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(eigenvalues)


def test_hill_of_equal_eigenvalues_is_infinite() -> None:
    assert hill([2.0, 2.0, 2.0, 2.0]).alpha == math.inf


def test_k_fraction_must_be_a_fraction() -> None:
    with pytest.raises(ValueError, match="k_fraction"):
        hill([1.0, 2.0], k_fraction=0)
