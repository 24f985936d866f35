"""The ladder of paths: right alphas on every input, and words where there is none."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from esdtool.errors import UsageError
from esdtool.spectra import scoring
from esdtool.spectra.cache import SpectrumCache
from esdtool.spectra.estimators.fix_finger import fix_finger_fit
from esdtool.spectra.estimators.hill import hill
from esdtool.spectra.estimators.ks import ks_fit
from esdtool.spectra.metrics import spectral_metrics
from esdtool.spectra.options import FITS, TRAINING_FITS, ScoreOptions
from esdtool.spectra.scoring import ScoreRequest, null_alpha, score_batch, score_matrices

GENERATOR = torch.Generator().manual_seed(0)


def svd_eigenvalues(matrix: torch.Tensor) -> np.ndarray:
    return np.sort(np.linalg.svd(matrix.to(torch.float64).numpy(), compute_uv=False) ** 2)


def with_condition(condition: float, size: int = 150, columns: int = 220) -> torch.Tensor:
    """Singular values log-spaced from 1 to 1 / condition, stored in float64."""
    rng = np.random.default_rng(1)
    left, _ = np.linalg.qr(rng.standard_normal((size, size)))
    right, _ = np.linalg.qr(rng.standard_normal((columns, size)))
    return torch.from_numpy((left * np.logspace(0, -math.log10(condition), size)) @ right.T)


MATRICES = {
    "square": torch.randn(128, 128, generator=GENERATOR),
    "wide": torch.randn(100, 400, generator=GENERATOR),
    "tall": torch.randn(400, 100, generator=GENERATOR),
    "bfloat16": torch.randn(128, 300, generator=GENERATOR).to(torch.bfloat16),
    "float8": torch.randn(128, 300, generator=GENERATOR).to(torch.float8_e4m3fn),
    "spiked": torch.randn(120, 120, generator=GENERATOR, dtype=torch.float64)
    + 1e3 * torch.outer(torch.ones(120), torch.ones(120)),
    "condition 1e3": with_condition(1e3),
    "condition 1e6": with_condition(1e6),
    "condition 1e10": with_condition(1e10),
    "dead rows": torch.cat([torch.randn(90, 200, generator=GENERATOR), torch.zeros(60, 200)]),
}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", MATRICES)
def test_alphas_are_those_of_a_float64_svd(name: str, fast: bool) -> None:
    matrix = MATRICES[name]
    score = score_matrices([matrix], ScoreOptions(fit=("hill", "ks", "fix-finger"), fast=fast))
    assert score.status == "ok"
    eigenvalues = svd_eigenvalues(matrix)
    positive = eigenvalues[eigenvalues > 1e-28 * eigenvalues[-1]]
    tolerance = 1e-4 if fast else 1e-6
    assert score.alpha == pytest.approx(hill(eigenvalues).alpha, rel=tolerance)
    scanned, expected = score.fits["ks"], ks_fit(positive)
    assert scanned is not None
    assert scanned.alpha == pytest.approx(expected.alpha, rel=tolerance)
    assert scanned.num_tail == expected.num_tail
    finger = score.fits["fix-finger"]
    assert finger is not None
    assert finger.alpha == pytest.approx(fix_finger_fit(positive).alpha, rel=tolerance)


def path_of(matrix: torch.Tensor, **options: object) -> str:
    spectrum = score_matrices([matrix], ScoreOptions(**options)).spectrum
    assert spectrum is not None
    return spectrum.path


def test_the_ladder_climbs_only_as_far_as_needed() -> None:
    assert path_of(MATRICES["square"]) == "gram-float64"
    assert path_of(MATRICES["square"], fast=True) == "gram-float32"
    assert path_of(MATRICES["wide"], fast=True, fit=("ks",)) == "gram-float32"
    # A square matrix has eigenvalues near 0, which the scan of ks would try.
    assert path_of(MATRICES["square"], fast=True, fit=("ks",)) == "gram-float64"
    assert path_of(MATRICES["condition 1e6"], fast=True) == "gram-float64"
    assert path_of(MATRICES["condition 1e10"]) == "svd-float64"
    assert path_of(MATRICES["square"], spectrum="svd") == "svd-float64"


def test_a_forced_gram_path_refuses_what_it_cannot_resolve() -> None:
    score = score_matrices([with_condition(1e15)], ScoreOptions(spectrum="gram"))
    assert score.alpha is None
    assert "resolution of the Gram path" in score.status
    assert score_matrices([with_condition(1e15)], ScoreOptions()).status == "ok"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tail_of_rounding_noise_has_no_alpha(dtype: torch.dtype) -> None:
    product = torch.randn(128, 12, generator=GENERATOR) @ torch.randn(12, 300, generator=GENERATOR)
    score = score_matrices([product.to(dtype)], ScoreOptions())
    assert score.alpha is None
    assert "rank-deficient" in score.status
    assert "12 of 128" in score.status or dtype == torch.bfloat16
    # ks fits the eigenvalues that are there.
    scanned = score_matrices([product.to(dtype)], ScoreOptions(fit=("ks",))).fits["ks"]
    assert scanned is not None
    assert scanned.num_tail <= 12 + 20 * (dtype == torch.bfloat16)


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (torch.zeros(80, 80), "zero"),
        (torch.full((80, 80), math.nan), "not finite"),
        (torch.eye(80).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(math.inf)), "not finite"),
        (torch.ones(1, 300), "too few eigenvalues: 1 < 50"),
        (torch.eye(80), "constant spectrum"),
        (torch.linalg.qr(torch.randn(200, 200, generator=GENERATOR))[0], "constant spectrum"),
        (torch.ones(80, 90), "rank-deficient"),
        (torch.zeros(0, 80), "zero"),
    ],
    ids=["zero", "nan", "inf", "vector", "identity", "orthogonal", "rank one", "empty"],
)
@pytest.mark.parametrize("fast", [False, True])
def test_degenerate_modules_get_words_and_no_number(matrix: torch.Tensor, words: str, fast: bool) -> None:
    score = score_matrices([matrix], ScoreOptions(fast=fast))
    assert words in score.status
    assert score.alpha is None


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("fit", ["hill", "ks", "farms"])
def test_scale_changes_nothing(scale: float, fit: str) -> None:
    matrix = MATRICES["wide"].to(torch.float64)
    options = ScoreOptions(fit=(fit,), farms_rows=60, farms_windows=3)
    assert score_matrices([matrix * scale], options).alpha == pytest.approx(
        score_matrices([matrix], options).alpha, rel=1e-9
    )


@pytest.mark.parametrize("fit", TRAINING_FITS)
@pytest.mark.parametrize("scale", [1e-305, 1e-200, 1e-160, 1e-155, 1e150, 1e153, 1e200, 1e305])
@pytest.mark.filterwarnings("error")
def test_the_range_of_float64_changes_nothing(scale: float, fit: str) -> None:
    matrix = torch.randn(56, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    options = ScoreOptions(fit=(fit,), farms_rows=30, farms_windows=3)
    plain, scaled = score_matrices([matrix], options), score_matrices([matrix * scale], options)
    assert scaled.status == "ok"
    assert scaled.alpha == pytest.approx(plain.alpha, rel=1e-9)
    found, expected = (
        spectral_metrics(score.spectrum, (56, 64)) for score in (scaled, plain) if score.spectrum is not None
    )
    for name in ("stable_rank", "entropy", "effective_rank"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9)
    for name in ("matrix_rank", "num_trace_log"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.log_norm == pytest.approx(expected.log_norm + 2 * math.log10(scale), rel=1e-9)
    assert found.log_spectral_norm == pytest.approx(expected.log_spectral_norm + 2 * math.log10(scale), rel=1e-9)
    assert found.spectral_norm == pytest.approx(expected.spectral_norm * scale, rel=1e-9)
    # As numpy has it in a wider format, where the platform has one.
    largest = np.longdouble(expected.lambda_max) * np.longdouble(scale) ** 2
    if np.finfo(np.float64).tiny < largest < np.finfo(np.float64).max:
        assert found.lambda_max == pytest.approx(float(largest), rel=1e-9)
    else:
        assert found.lambda_max is None
    xmin, plain_xmin = scaled.fits[fit].xmin, plain.fits[fit].xmin
    assert xmin / scaled.spectrum.lambda_max == pytest.approx(plain_xmin / plain.spectrum.lambda_max, rel=1e-9)


def test_advice_is_what_is_not_done_already() -> None:
    for condition in (1e9, 1e13, 1e18):
        for spectrum in ("auto", "svd", "gram"):
            status = score_matrices([with_condition(condition)], ScoreOptions(spectrum=spectrum)).status
            assert ("allow --spectrum" in status) <= (spectrum == "gram"), (condition, spectrum, status)


def test_farms_is_hill_on_the_windows() -> None:
    matrix = MATRICES["wide"]
    score = score_matrices([matrix], ScoreOptions(fit=("farms",), farms_rows=60, farms_ratio=2, farms_windows=2))
    windows = [matrix[top : top + 60, left : left + 120] for top in (0, 40) for left in (0, 280)]
    pooled = np.concatenate([svd_eigenvalues(window) for window in windows])
    assert score.alpha == pytest.approx(hill(pooled).alpha, rel=1e-9)
    transposed = score_matrices([matrix.T], ScoreOptions(fit=("farms",), farms_rows=60, farms_windows=2))
    assert transposed.alpha == pytest.approx(score.alpha, rel=1e-9)


def test_null_alpha_is_what_random_matrices_have() -> None:
    generator = torch.Generator().manual_seed(7)
    for shape in ((400, 400), (300, 900), (900, 300)):
        drawn = score_matrices([torch.randn(shape, generator=generator)], ScoreOptions(fit=("hill", "farms")))
        for fit in ("hill", "farms"):
            expected = null_alpha(fit, shape, 1, ScoreOptions())
            assert drawn.fits[fit].alpha == pytest.approx(expected, rel=0.02)


def test_every_fit_runs_together() -> None:
    score = score_matrices([MATRICES["wide"]], ScoreOptions(fit=FITS))
    assert set(score.fits) == set(FITS)
    # The bulk of a random matrix falls exponentially, not by a power law that is cut off.
    assert {name for name, fit in score.fits.items() if fit is None} == {"tpl"}
    assert score.comparisons is not None
    assert score.fits["powerlaw"].alpha == pytest.approx(score.fits["ks"].alpha, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fit": ()}, "at least one"),
        ({"fit": ("hil",)}, "unknown fit 'hil'"),
        ({"fit": ("ks", "ks")}, "twice"),
        ({"k_fraction": 0.0}, "k-fraction"),
        ({"k_fraction": math.nan}, "k-fraction"),
        ({"min_eigs": 1}, "min-eigs"),
        ({"spectrum": "qr"}, "unknown spectrum"),
        ({"fix_finger_bound": "x"}, "fix-finger"),
        ({"farms_rows": 1}, "FARMS"),
        ({"fast": True, "spectrum": "svd"}, "contradicts"),
    ],
)
def test_impossible_options(options: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ScoreOptions(**options)


@pytest.mark.parametrize("batched", [False, True])
def test_several_at_once_are_each_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batched: bool) -> None:
    """Good and bad matrices, of one shape and of others, with scales and a cache that knows one of them."""
    if batched:  # as an accelerator does it
        monkeypatch.setattr(scoring, "gains_from_batches", lambda _: True)
    generator = torch.Generator().manual_seed(3)
    matrices = [torch.randn(60, 90, generator=generator) for _ in range(4)]
    matrices += [
        torch.zeros(60, 90),
        matrices[0] * math.nan,
        matrices[1] * 1e-30,
        torch.randn(90, 60, generator=generator),
        torch.randn(20, 90, generator=generator),
    ]
    matrices += [with_condition(1e12)[:60, :90], matrices[2].to(torch.bfloat16)]
    cache = SpectrumCache(folder=tmp_path, limit=2**30)
    score_matrices([matrices[3]], ScoreOptions(), cache=cache)
    requests = [
        ScoreRequest(matrices=[matrix], options=ScoreOptions(fit=("hill", "ks")), scale=1 + index)
        for index, matrix in enumerate(matrices)
    ]
    for known in (None, cache, cache):
        for request, found in zip(requests, score_batch(requests, cache=known), strict=True):
            alone = score_matrices(request.matrices, request.options, scale=request.scale)
            assert found.status == alone.status
            if alone.alpha is not None:
                assert found.alpha == (pytest.approx(alone.alpha, rel=1e-9) if batched else alone.alpha)
            if alone.spectrum is not None and found.spectrum is not None:
                assert found.spectrum.path == alone.spectrum.path
                largest = alone.spectrum.lambda_max
                np.testing.assert_allclose(
                    found.spectrum.eigenvalues, alone.spectrum.eigenvalues, rtol=1e-9, atol=1e-12 * largest
                )
