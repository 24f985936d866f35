"""The fits that carry a method's name, against the method's own arithmetic in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esdtool.spectra.estimators.fix_finger import fix_finger_fit
from esdtool.spectra.estimators.hill_classic import hill_classic
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.scoring import score_matrices


@pytest.fixture(scope="module")
def matrix() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(90, 240, generator=generator) * torch.logspace(0, -1.5, 240)


def alpha(matrix: torch.Tensor, fit: str, **options: str) -> float:
    score = score_matrices([matrix], ScoreOptions(fit=(fit,), **options))  # type: ignore[arg-type]
    assert score.alpha is not None, score.status
    return score.alpha


def eigenvalues(matrix: torch.Tensor) -> np.ndarray:
    return np.sort(np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2)


@pytest.mark.parametrize("size", [2, 3, 11, 12, 99, 100, 1000])
def test_hill_classic_is_that_of_alphaq(size: int) -> None:
    values = np.sort(np.random.default_rng(size).pareto(2.0, size) + 0.1)
    k = max(1, min(max(10, int(size * 0.1)), size - 1))
    expected = 1 + k / np.log(values[-k:] / max(values[-k - 1], 1e-12)).sum()
    assert hill_classic(values).alpha == pytest.approx(expected, rel=1e-12)


def test_hill_classic_of_a_matrix(matrix: torch.Tensor) -> None:
    values = eigenvalues(matrix)
    assert alpha(matrix, "hill-classic") == pytest.approx(1 + 10 / np.log(values[-10:] / values[-11]).sum(), rel=1e-9)


def test_hill_third_is_that_of_model_balancing(matrix: torch.Tensor) -> None:
    values = eigenvalues(matrix)
    index = int(len(values) / 1.5)
    tail = values[index:]
    assert alpha(matrix, "hill-third") == pytest.approx(1 + len(tail) / np.log(tail / tail[0]).sum(), rel=1e-9)


def test_fix_finger_legacy_ignores_the_bound(matrix: torch.Tensor) -> None:
    expected = fix_finger_fit(eigenvalues(matrix), bound="legacy").alpha
    assert alpha(matrix, "fix-finger-legacy") == pytest.approx(expected, rel=1e-9)


def test_farms_fix_finger_pools_square_windows(matrix: torch.Tensor) -> None:
    """The windows of HUST-AI-HYZ/FARMS @ 8e07c3f with num_row 2000, Q 1 and 15 positions, on a 90 x 240 matrix."""
    step = (240 - 90) // 14
    count = min(15, (240 - 90) // step + 1)
    windows = [matrix[:, start : start + 90] for start in (min(number * step, 150) for number in range(count))]
    pooled = np.concatenate([eigenvalues(window) for window in windows])
    expected = fix_finger_fit(pooled, bound="legacy").alpha
    assert alpha(matrix, "farms-fix-finger") == pytest.approx(expected, rel=1e-9)


def test_equal_eigenvalues_have_no_alpha() -> None:
    with pytest.raises(ValueError, match="all eigenvalues are equal"):
        hill_classic(np.ones(64))
