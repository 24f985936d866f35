"""`filter_zeros`: eigenvalues of at most 1e-5 take no part in the fits, as in the public code of AlphaDecay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import esdtool
from esdtool.errors import UsageError
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.scoring import score_matrices


def with_spectrum(eigenvalues: np.ndarray) -> torch.Tensor:
    generator = np.random.default_rng(0)
    size = eigenvalues.size
    left, _ = np.linalg.qr(generator.standard_normal((size, size)))
    right, _ = np.linalg.qr(generator.standard_normal((size, size)))
    return torch.from_numpy(left @ np.diag(np.sqrt(eigenvalues)) @ right)


SPECTRUM = np.concatenate([np.geomspace(1e-9, 9e-6, 80), np.geomspace(1.1e-5, 30, 120)])


def public_alpha(eigenvalues: np.ndarray) -> float:
    """Alpha by the formula of the public code (`pl_fitting="median"`, `filter_zeros=True`)."""
    kept = np.sort(eigenvalues[eigenvalues > 1e-5])
    tail = kept[int(len(kept) / 2) :]
    return float(1 + len(tail) / (np.log(tail).sum() - len(tail) * np.log(tail[0])))


def test_hill_is_that_of_the_public_code() -> None:
    matrix = with_spectrum(SPECTRUM)
    score = score_matrices([matrix], ScoreOptions(filter_zeros=True))
    assert score.alpha == pytest.approx(public_alpha(SPECTRUM), rel=1e-9)
    plain = score_matrices([matrix], ScoreOptions())
    assert plain.alpha is not None
    assert abs(plain.alpha - public_alpha(SPECTRUM)) > 0.01


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_where_all_are_small_none_is_left_out(scale: float) -> None:
    matrix = with_spectrum(SPECTRUM[:80] * scale)
    options = ScoreOptions(fit=("hill", "ks"))
    plain = score_matrices([matrix], options)
    filtered = score_matrices([matrix], ScoreOptions(fit=("hill", "ks"), filter_zeros=True))
    assert filtered.fits == plain.fits


def test_the_analysis_says_so() -> None:
    analysis = esdtool.analyze({"layers.0.mlp.up_proj.weight": with_spectrum(SPECTRUM)}, filter_zeros=True)
    assert analysis.settings.filter_zeros
    assert analysis.modules[0].alpha == pytest.approx(public_alpha(SPECTRUM), rel=1e-9)
    assert analysis.modules[0].num_eigs == 200


def test_estimates_cannot_leave_out_what_they_do_not_compute() -> None:
    with pytest.raises(UsageError, match="--filter-zeros"):
        ScoreOptions(spectrum="slq", filter_zeros=True)
