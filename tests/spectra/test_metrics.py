"""Metrics against their definitions on the matrix itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from esdtool.spectra.metrics import alpha_weighted, log_alpha_norm, num_trace_log, spectral_metrics
from esdtool.spectra.spectrum import compute_spectrum

MATRIX = torch.randn(80, 150, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_metrics_are_those_of_the_matrix() -> None:
    metrics = spectral_metrics(compute_spectrum([MATRIX], "gram-float64"), (80, 150))
    matrix = MATRIX.numpy()
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert metrics.frobenius_norm == pytest.approx(np.linalg.norm(matrix))
    assert metrics.spectral_norm == pytest.approx(np.linalg.norm(matrix, 2))
    assert metrics.stable_rank == pytest.approx((np.linalg.norm(matrix) / np.linalg.norm(matrix, 2)) ** 2)
    assert metrics.matrix_rank == np.linalg.matrix_rank(matrix) == 80
    assert (metrics.lambda_min, metrics.lambda_max) == pytest.approx((singular[-1] ** 2, singular[0] ** 2))
    assert metrics.lambda_median == pytest.approx(np.median(singular**2))
    share = singular**2 / (singular**2).sum()
    entropy = -(share * np.log(share)).sum()
    assert metrics.entropy == pytest.approx(entropy / np.log(80))
    assert metrics.effective_rank == pytest.approx(np.exp(entropy))
    assert metrics.log_norm == pytest.approx(2 * np.log10(np.linalg.norm(matrix)))
    assert metrics.log_spectral_norm == pytest.approx(2 * np.log10(singular[0]))


def test_float32_reports_only_what_it_resolves() -> None:
    spectrum = compute_spectrum([torch.randn(150, 150).square()], "gram-float32")
    metrics = spectral_metrics(spectrum, (150, 150))
    assert (metrics.lambda_min, metrics.matrix_rank) == (None, None)
    assert metrics.lambda_median is not None
    resolved = spectral_metrics(compute_spectrum([MATRIX.to(torch.float32)], "gram-float32"), (80, 150))
    assert resolved.lambda_min == pytest.approx(np.linalg.svd(MATRIX.numpy(), compute_uv=False)[-1] ** 2, rel=1e-4)
    assert resolved.matrix_rank == 80


def test_rank_deficiency_is_counted_in_float64() -> None:
    low = MATRIX[:, :30] @ MATRIX[:30, :]
    assert spectral_metrics(compute_spectrum([low], "gram-float64"), (80, 150)).matrix_rank == 30


def test_scaling_moves_norms_and_nothing_else() -> None:
    base = spectral_metrics(compute_spectrum([MATRIX], "gram-float64"), (80, 150))
    scaled = spectral_metrics(compute_spectrum([MATRIX * 1e-6], "gram-float64"), (80, 150))
    for name in ("stable_rank", "entropy", "effective_rank"):
        assert getattr(scaled, name) == pytest.approx(getattr(base, name), rel=1e-9)
    assert (scaled.matrix_rank, scaled.num_trace_log) == (base.matrix_rank, base.num_trace_log)
    assert scaled.frobenius_norm == pytest.approx(1e-6 * base.frobenius_norm)


@pytest.mark.parametrize(
    ("eigenvalues", "expected"),
    [
        ([1.0, 1.0, 1.0], 1),  # every sum is 0: the smallest tail
        ([0.5, 0.5, 2.0, 1.0], 3),  # ln 2 + ln 1 + ln 0.5 = 0
        ([1e-6, 1e-6, 3.0], 1),  # ln 3 is nearer to 0 than ln 3 + ln 1e-6
        ([0.0, 5.0, 20.0, 5.0, 10.0], 4),  # mean 8: 0.92, 1.14, 0.67, 0.20
    ],
)
def test_num_trace_log(eigenvalues: list[float], expected: int) -> None:
    assert num_trace_log(np.array(eigenvalues)) == expected
    assert num_trace_log(7.0 * np.array(eigenvalues)) == expected


def test_log_alpha_norm_does_not_overflow() -> None:
    eigenvalues = np.array([1e-3, 1.0, 1e200])
    assert log_alpha_norm(3.0, eigenvalues) == pytest.approx(600)
    assert log_alpha_norm(2.0, np.array([1.0, 2.0, 3.0])) == pytest.approx(math.log10(14))
    assert alpha_weighted(2.5, 100.0) == pytest.approx(5.0)
