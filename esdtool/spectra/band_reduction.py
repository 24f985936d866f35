"""The reduction of a symmetric matrix to a band by matrix products, on whatever device the matrix is.

It is the first stage of the two-stage tridiagonal reduction (Haidar, Ltaief and Dongarra, SC 2011). The one-stage
reduction that the libraries of accelerators use spends half of its flops in matrix-vector products, at the speed of the
memory. Here nearly all are matrix products. The second stage, which chases bulges within the band, is for the CPU.
"""

from __future__ import annotations

import torch


def reduce_to_band(matrix: torch.Tensor, *, band: int) -> torch.Tensor:
    """Reduce a symmetric matrix by orthogonal similarity to one with `band` off-diagonals.

    Each panel of `band` columns is made triangular below the band by Householder reflections, gathered as
    Q = I - V T V^T (Schreiber and Van Loan 1989, with T by its inverse as in Puglisi 1992), and the rest A becomes
    Q^T A Q = A - V W^T - W V^T with W = Y - V ((V T)^T Y) / 2 and Y = A V T.

    Args:
        matrix: [n, n] float32 or float64, symmetric, in both triangles; it is overwritten.
        band: off-diagonals to keep, at least 1.

    Returns:
        [n, band + 1] on the same device: the diagonal and the sub-diagonals of the band matrix, which has the same
        eigenvalues; element [j, i] stands in row j + i and column j.
    """
    order = matrix.shape[0]
    for start in range(0, order - band - 1, band):
        below = start + band
        panel, rest = matrix[below:, start:below], matrix[below:, below:]
        packed, factors = torch.geqrf(panel)
        width = factors.shape[0]
        panel.copy_(packed.triu())
        # A factor of 0 means no reflection, for a column that is zero already.
        used = factors != 0
        vectors = packed[:, :width].tril(-1)
        vectors.diagonal().fill_(1)
        vectors *= used
        inverse = (vectors.mT @ vectors).triu(1)
        inverse.diagonal().copy_(torch.where(used, factors, 1).reciprocal())
        combined = torch.linalg.solve_triangular(inverse, vectors, upper=True, left=False)
        product = rest @ combined
        product.addmm_(vectors, combined.mT @ product, alpha=-0.5)
        rest.addmm_(torch.cat((vectors, product), dim=1), torch.cat((product, vectors), dim=1).mT, alpha=-1)
    banded = matrix.new_zeros(order, band + 1)
    for offset in range(min(band + 1, order)):
        banded[: order - offset, offset] = matrix.diagonal(-offset)
    return banded
