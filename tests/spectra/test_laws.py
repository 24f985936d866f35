"""Laws that end or bend, against likelihoods written down independently; and the choice among laws."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import minimize, minimize_scalar
from typer.testing import CliRunner

import esdtool
from esdtool.analysis.module_record import TailResult
from esdtool.cli import app
from esdtool.errors import UsageError
from esdtool.report.tables.density import tail_density
from esdtool.spectra.estimators.bounded import bounded_fit
from esdtool.spectra.estimators.hill import hill
from esdtool.spectra.estimators.tpl import tpl_fit
from esdtool.spectra.laws import best_law
from esdtool.spectra.options import TRAINING_FITS, ScoreOptions
from esdtool.spectra.scoring import score_matrices
from esdtool.spectra.tail import LikelihoodRatio


def bounded_sample(alpha: float, top: float, size: int, seed: int) -> np.ndarray:
    """Eigenvalues between 1 and `top` by inversion of the distribution function."""
    uniform = np.random.default_rng(seed).random(size)
    if alpha == 1:
        return top**uniform
    return (1 - uniform * (1 - top ** (1 - alpha))) ** (1 / (1 - alpha))


def truncated_sample(alpha: float, rate: float, size: int, seed: int) -> np.ndarray:
    """Eigenvalues from 1 on, exponential ones kept with the probability of the power law."""
    generator = np.random.default_rng(seed)
    drawn = 1 + generator.exponential(1 / rate, 60 * size)
    return drawn[generator.random(drawn.size) < drawn**-alpha][:size]


@pytest.mark.parametrize(("alpha", "top"), [(0.5, 5), (1.0, 20), (1.5, 100), (2.5, 4), (4.0, 30)])
def test_bounded_alpha_and_error_are_those_of_the_likelihood(alpha: float, top: float) -> None:
    fit = bounded_fit(bounded_sample(alpha, top, 300, seed=1))
    assert fit.law is not None
    assert fit.law.xmax is not None
    assert fit.alpha_stderr is not None
    tail = bounded_sample(alpha, top, 300, seed=1)
    tail = tail[tail >= fit.xmin] / fit.xmin
    assert (tail.size, fit.law.xmax) == (fit.num_tail, pytest.approx(tail.max() * fit.xmin))

    def cost(exponent: float) -> float:
        if exponent > 0:
            return -float(stats.truncpareto.logpdf(tail, exponent, fit.law.xmax / fit.xmin).sum())
        integral = float(mpmath.quad(lambda log: mpmath.exp(-exponent * log), [0, math.log(tail.max())]))
        return float((1 + exponent) * np.log(tail).sum() + tail.size * math.log(integral))

    best = minimize_scalar(cost, bounds=(fit.alpha - 2, fit.alpha), method="bounded", options={"xatol": 1e-9})
    assert fit.alpha - 1 == pytest.approx(best.x, abs=1e-5)
    step = 1e-3
    curvature = (cost(best.x + step) - 2 * cost(best.x) + cost(best.x - step)) / step**2
    assert fit.alpha_stderr == pytest.approx(curvature**-0.5, rel=1e-3)


@pytest.mark.parametrize(("alpha", "top"), [(0.5, 10), (1.5, 10), (2.0, 10), (3.0, 3)])
def test_bounded_recovers_what_a_law_without_end_does_not(alpha: float, top: float) -> None:
    values = bounded_sample(alpha, top, 4000, seed=2)
    fit = bounded_fit(values)
    assert fit.alpha_stderr is not None
    # The choice of xmin adds to the standard error, as with `ks`.
    assert abs(fit.alpha - alpha) < 5 * fit.alpha_stderr
    endless = hill(values)
    assert endless.alpha_stderr is not None
    assert endless.alpha - alpha > 5 * endless.alpha_stderr


def test_bounded_scan_equals_brute_force() -> None:
    values = np.sort(bounded_sample(1.7, 8, 120, seed=3))
    best = math.inf
    for index in range(values.size - 2):
        tail = values[index:] / values[index]
        length, mean = math.log(tail[-1]), np.log(tail).mean()
        exponent = float(mpmath.findroot(lambda b: 1 / b - length / mpmath.expm1(b * length) - mean, 0.7))  # noqa: B023
        model = np.expm1(-exponent * np.log(tail)) / math.expm1(-exponent * length)
        best = min(best, np.abs(model - np.arange(tail.size) / tail.size).max())
    assert bounded_fit(values).ks_distance == pytest.approx(best, rel=1e-9)


def log_likelihood(tail: np.ndarray, alpha: float, rate: float) -> mpmath.mpf:
    """Logarithm of the likelihood of a tail from 1 on under the truncated power law, with mpmath's integral."""
    integral = mpmath.expint(alpha, rate)
    return -alpha * mpmath.mpf(np.log(tail).sum()) - rate * mpmath.mpf(tail.sum()) - tail.size * mpmath.log(integral)


def test_truncated_law_and_its_error_are_those_of_the_likelihood() -> None:
    values = truncated_sample(1.6, 0.08, 400, seed=4)
    fit = tpl_fit(3.0 * values, compare=False)
    assert fit.law is not None
    assert fit.law.truncation is not None
    assert fit.alpha_stderr is not None
    tail = np.sort(3.0 * values)[fit.xmin_index :] / fit.xmin
    found = fit.alpha, fit.law.truncation * fit.xmin
    best = minimize(
        lambda point: -float(log_likelihood(tail, *point)), found, method="Nelder-Mead", options={"xatol": 1e-6}
    )
    assert fit.alpha == pytest.approx(best.x[0], abs=0.1 * fit.alpha_stderr)
    steps = np.array([1e-3, 1e-4])

    def second(first: int, other: int) -> float:
        """Mixed second difference."""
        shifts = [(a, b) for a in (1, -1) for b in (1, -1)]
        total = sum(
            a * b * log_likelihood(tail, *(best.x + a * steps * np.eye(2)[first] + b * steps * np.eye(2)[other]))
            for a, b in shifts
        )
        return float(total / (4 * steps[first] * steps[other]))

    information = -np.array([[second(row, column) for column in (0, 1)] for row in (0, 1)])
    assert fit.alpha_stderr == pytest.approx(math.sqrt(np.linalg.inv(information)[0, 0]), rel=0.02)
    # That of a pure law is far too small.
    assert fit.alpha_stderr > 1.5 * (fit.alpha - 1) / math.sqrt(fit.num_tail)
    assert abs(fit.alpha - 1.6) < 4 * fit.alpha_stderr


def test_at_lambda_zero_no_error_is_claimed() -> None:
    """A tail heavier than the law at Lambda = 0: the likelihood has no maximum inside."""
    heavy = np.linspace(0.005, 0.995, 100) ** (-1 / 2.5)
    heavy[:3] *= 1000
    fit = tpl_fit(heavy, compare=False)
    assert fit.alpha > 2  # else the mean of the law without Lambda is infinite, and Lambda is above 0
    assert fit.alpha_stderr is None


def test_exponential_tails_have_no_alpha() -> None:
    bulk = 1 + np.random.default_rng(6).random(100)
    with pytest.raises(ValueError, match="falls exponentially"):
        tpl_fit(bulk)


@pytest.mark.parametrize(
    ("likelihoods", "p_values", "words"),
    [
        ({"power_law": -10, "lognormal": -2}, {"lognormal": 0.001}, "lognormal"),
        ({"power_law": -10, "lognormal": -8}, {"lognormal": 0.2}, "lognormal or power law"),
        ({"power_law": -10, "truncated_power_law": -9.5}, {"truncated_power_law": 0.3},
         "power law or truncated power law"),
        ({"power_law": -10, "exponential": -40}, {"exponential": 1e-6}, "power law"),
    ],
)  # fmt: skip
def test_the_best_law_in_words(likelihoods: dict[str, float], p_values: dict[str, float], words: str) -> None:
    tests = {name: LikelihoodRatio(ratio=0.0, p_value=p_value) for name, p_value in p_values.items()}
    assert best_law(likelihoods, tests) == words


def test_the_law_that_made_a_sample_is_among_the_best() -> None:
    found = tpl_fit(truncated_sample(1.3, 0.2, 500, seed=7)).best_law
    assert found is not None
    assert found.split(" or ")[0] == "truncated power law"


@pytest.mark.parametrize(
    "fit",
    [
        TailResult(alpha=2.2, alpha_stderr=0.1, xmin=0.5, num_tail=30),
        TailResult(alpha=2.2, alpha_stderr=0.1, xmin=0.5, num_tail=30, xmax=4.0),
        TailResult(alpha=1.0, alpha_stderr=0.1, xmin=0.5, num_tail=30, xmax=4.0),
        TailResult(alpha=0.4, alpha_stderr=0.1, xmin=0.5, num_tail=30, truncation_lambda=1.5),
    ],
)
def test_drawn_densities_hold_the_share_of_the_tail(fit: TailResult) -> None:
    grid = np.geomspace(0.5, fit.xmax or 1e6, 20_001)
    density = tail_density(grid, fit, total=60)
    assert np.trapezoid(density, grid) == pytest.approx(0.5, rel=1e-4)


def low_rank(rank: int, rows: int = 64, columns: int = 80) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(rank, size, generator=generator, dtype=torch.float64) for size in (rows, columns))
    return (left.T * torch.logspace(0, 1, rank)) @ right


def test_a_spectrum_of_low_rank_is_fitted_above_its_zeros() -> None:
    score = score_matrices([low_rank(20)], ScoreOptions(fit=("bounded", "hill")))
    fit = score.fits["bounded"]
    assert fit is not None
    assert fit.num_tail <= 20
    assert 0 < fit.alpha < 3
    assert score.fits["hill"] is None


@pytest.mark.parametrize("fit", ["bounded", "tpl"])
def test_lambda_follows_the_scale_and_alpha_does_not(fit: str) -> None:
    matrix = low_rank(24, 24, 30)
    modules = [
        esdtool.analyze({"up_proj.weight": matrix * scale}, fit=fit, min_eigs=8).modules[0]
        for scale in (1.0, 2.0**-10, 2.0**-600)
    ]
    assert [module.alpha for module in modules] == pytest.approx([modules[0].alpha] * 3, rel=1e-9)
    if fit == "tpl":
        assert modules[0].truncation_lambda is not None
        assert modules[1].truncation_lambda == pytest.approx(2.0**20 * modules[0].truncation_lambda, rel=1e-9)
        assert modules[2].truncation_lambda is None  # float64 has no number of 2^1200
    else:
        found = modules[1].fits["bounded"]
        assert found is not None
        assert found.xmax == pytest.approx(modules[1].lambda_max, rel=1e-12)


@pytest.mark.parametrize("fit", ["bounded", "tpl"])
def test_what_has_no_tail_says_so(fit: str) -> None:
    weights = {
        "layers.0.nan_proj.weight": torch.full((64, 64), torch.nan),
        "layers.0.zero_proj.weight": torch.zeros(64, 64),
        "layers.0.one_proj.weight": torch.outer(torch.arange(1.0, 65), torch.ones(64)),
        "layers.0.row_proj.weight": torch.ones(1, 64),
        "layers.0.eye_proj.weight": torch.eye(64),
    }
    analysis = esdtool.analyze(weights, fit=fit, min_eigs=2)
    statuses = {module.role: module.status for module in analysis.modules}
    assert not analysis.scored
    assert (
        statuses["one_proj"]
        .split(":")[0]
        .startswith(
            ("a bounded tail needs at least 3 positive eigenvalues, not 1", "a truncated power law needs at least 8")
        )
    )
    assert "constant spectrum" in statuses["eye_proj"]
    assert "not finite" in statuses["nan_proj"]
    assert "zero" in statuses["zero_proj"]


def test_fast_spectra_give_the_same_bounded_alpha() -> None:
    matrix = low_rank(64).bfloat16()
    exact, fast = (score_matrices([matrix], ScoreOptions(fit=("bounded",), fast=fast)).alpha for fast in (False, True))
    assert exact == pytest.approx(fast, rel=1e-4)


@pytest.mark.parametrize("fit", ["bounded", "tpl"])
def test_estimates_are_refused_and_training_takes_what_is_fast(fit: str) -> None:
    with pytest.raises(UsageError, match="by 'hill' only"):
        ScoreOptions(fit=(fit,), spectrum="slq")
    assert (fit in TRAINING_FITS) == (fit == "bounded")


def test_lambda_and_the_law_stand_in_the_table_and_in_the_csv(bundled, tmp_path) -> None:
    path = tmp_path / "modules.csv"
    result = CliRunner().invoke(
        app,
        ["analyze", str(bundled), "--fit", "tpl", "--include", "layers.0.*v_proj", "--csv", str(path), "--quiet"],
        env={"COLUMNS": "200"},
    )
    assert result.exit_code == 0, result.output
    heading, row = path.read_text().splitlines()
    cells = dict(zip(heading.split(","), row.split(","), strict=True))
    assert float(cells["truncation_lambda"]) > 0
    assert "power law" in cells["best_law"]
