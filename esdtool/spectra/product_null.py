"""The spectrum of a product of two untrained factors: what those of attention heads are compared with.

The product A B of Gaussian matrices [m, d] and [d, n] has no Marchenko-Pastur spectrum: its d eigenvalues are those of
a product of two Wishart matrices. With the QR decompositions of both factors they are the squared singular values of
R_A R_B^T, and the R of a Gaussian matrix is known without the matrix (Bartlett 1933): independent normal elements above
a diagonal of chi variables with m, m - 1, ... degrees of freedom. So a few draws cost no more than a few heads.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from esdtool.spectra.estimator import load_estimator
from esdtool.spectra.options import ScoreOptions

Vector = npt.NDArray[np.float64]

_DRAWS = 16


@lru_cache(maxsize=64)
def product_quantiles(width: int, rows: int, columns: int) -> Vector | None:
    """Return the mean sorted eigenvalues of a product of random factors with elements of variance 1.

    Args:
        width: the inner dimension d of [rows, d] times [d, columns].
        rows: rows of the product.
        columns: columns of the product.

    Returns:
        [d] ascending, the same for the same arguments; None where a factor is wider than long: its rank is not d.
    """
    if min(rows, columns) < width:
        return None
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(_DRAWS):
        one, other = (_triangle(width, length, generator) for length in (rows, columns))
        draws.append(np.linalg.svd(one @ other.T, compute_uv=False) ** 2)
    return np.sort(np.mean(draws, axis=0))


def product_null_alpha(name: str, width: int, rows: int, columns: int, options: ScoreOptions) -> float | None:
    """Compute the alpha of a product of untrained factors.

    Args:
        name: the estimator's.
        width: as of `product_quantiles`.
        rows: rows of the product.
        columns: columns of the product.
        options: settings of the estimator.

    Returns:
        None for an estimator that needs parts of the matrix, and where the law has no tail for it.
    """
    estimator, quantiles = load_estimator(name), product_quantiles(width, rows, columns)
    if quantiles is None or estimator.sub_matrices is not None:
        return None
    try:
        return (estimator.null_fit or estimator.fit)(quantiles, options).alpha
    except ValueError:
        return None


def _triangle(width: int, length: int, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw the R [width, width] of a Gaussian matrix [length, width]."""
    drawn = np.triu(generator.standard_normal((width, width)), 1)
    drawn[np.diag_indices(width)] = np.sqrt(generator.chisquare(length - np.arange(width)))
    return drawn
