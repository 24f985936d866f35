"""Block Lanczos: the spectral density of a symmetric operator as nodes and weights, all in products with p columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

PROBES = 16
STEPS = 32

_SEED = 0x51EC7124
"""Far from the seeds that weights are drawn with: probes from the stream of the weights would not be independent."""
NOISE = {torch.float32: 6e-8, torch.float64: 1e-15}
"""Absolute error of a Ritz value over lambda_max."""
_BREAKDOWN = 30
"""Smallest accepted norm of a new direction over the noise: below, it is rounding and no direction of the matrix."""
_CONVERGED = 0.1
"""Largest residual of a converged Ritz value over its distance to the next."""

Operator = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Q [n, p] to (A Q [n, p], Q^T A Q [p, p])."""


@dataclass(frozen=True, kw_only=True)
class Quadrature:
    """The spectral density as nodes and weights."""

    nodes: Vector
    """[k] Ritz values, ascending; what rounding made negative is cut to a tiny positive number."""
    shares: Matrix
    """[p, k]: each probe's weights, of sum 1."""
    residuals: Vector
    """[k] norms of A x - node x for the Ritz vectors x: some eigenvalue is no farther from a node than that."""
    converged: int
    """How many of the last nodes are eigenvalues."""
    order: int
    """Number of eigenvalues, n."""
    total: float
    """sum lambda."""

    def weights(self, probes: npt.NDArray[np.bool_] | slice = slice(None)) -> Vector:
        """[k] weights of sum 1 from some of the probes: 1/n for eigenvalues, the others' corrected to give `total`."""
        weights: Vector = self.shares[probes].mean(axis=0)
        rest = self.nodes.size - self.converged
        weights[rest:] = 1 / self.order
        nodes, open_weights = self.nodes[:rest], weights[:rest]
        open_weights *= (1 - self.converged / self.order) / open_weights.sum()
        mass = open_weights.sum()
        mean = open_weights @ nodes / mass
        variance = open_weights @ (nodes - mean) ** 2 / mass
        wanted = (self.total - self.nodes[rest:].sum()) / self.order / mass
        if variance > 0:
            factors = 1 + (wanted - mean) / variance * (nodes - mean)
            # Weights below zero would be no density: a node far out is then as good as an eigenvalue itself.
            if factors.min() > 0:
                open_weights *= factors
        return weights


def gram_operator(wide: torch.Tensor) -> Operator:
    """Return the operator W W^T for W [n, m], n <= m."""

    def product(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image = wide.T @ block
        return wide @ image, image.T @ image

    return product


def block_lanczos(
    product: Operator,
    order: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
    seed: int = 0,
) -> Matrix | None:
    """`STEPS` steps of block Lanczos with full re-orthogonalisation, from `PROBES` random orthonormal probes.

    Args:
        product: the operator.
        order: its order, n.
        dtype: of the basis.
        device: of the basis.
        seed: of the probes, which are drawn on the CPU in float64: the same on every device.

    Returns:
        [STEPS * PROBES, STEPS * PROBES] float64, symmetric and block tridiagonal; the first block belongs to the
        probes. None if the Krylov space is exhausted: the operator has few distinct eigenvalues, or they
        are too small for the precision.
    """
    size = STEPS * PROBES
    if order <= size:
        return None
    draw = torch.randn(order, PROBES, dtype=torch.float64, generator=torch.Generator().manual_seed(_SEED + seed))
    block = torch.linalg.qr(draw)[0].to(device=device, dtype=dtype)
    basis = torch.empty(size, order, dtype=dtype, device=device)  # rows, so that its leading part is contiguous
    projected = np.zeros((size, size))
    for step in range(STEPS):
        here, after = slice(step * PROBES, (step + 1) * PROBES), slice((step + 1) * PROBES, (step + 2) * PROBES)
        basis[here] = block.T
        image, diagonal = product(block)
        projected[here, here] = diagonal.cpu().to(torch.float64).numpy()
        if step == STEPS - 1:
            break
        known = basis[: here.stop]
        for _ in range(2):  # once leaves what float32 rounds; twice is enough
            image = image - known.T @ (known @ image)
        block, factor = torch.linalg.qr(image)
        coupling = factor.cpu().to(torch.float64).numpy()
        if np.abs(np.diag(coupling)).min() <= _BREAKDOWN * NOISE[dtype] * np.abs(projected).max():
            return None
        projected[after, here], projected[here, after] = coupling, coupling.T
    return projected


def quadrature(blocks: Matrix, steps: int, order: int, total: float) -> Quadrature:
    """Nodes and shares of the first `steps` steps of a block Lanczos run. Arguments as `estimate_from`."""
    size = steps * PROBES
    nodes, vectors = np.linalg.eigh(blocks[:size, :size])
    shares = vectors[:PROBES] ** 2
    nodes = np.maximum(nodes, np.finfo(np.float64).eps * nodes[-1])
    # The coupling to the step that was not taken is about that to the last one.
    coupling = np.linalg.norm(blocks[size - PROBES : size, size - 2 * PROBES : size - PROBES], 2)
    residuals = coupling * np.linalg.norm(vectors[-PROBES:], axis=0)
    return Quadrature(
        nodes=nodes,
        shares=shares,
        residuals=residuals,
        converged=_converged(nodes, shares, residuals, order),
        order=order,
        total=total,
    )


def _converged(nodes: Vector, shares: Matrix, residuals: Vector, order: int) -> int:
    """Count the Ritz values from the top that are single eigenvalues."""
    single = residuals[1:] <= _CONVERGED * np.diff(nodes)
    count = int(np.argmin(np.r_[single[::-1], False]))
    # One eigenvalue's shares sum to about 1 / n; a cluster behind one Ritz value has more, one by one or together.
    numbers = order * shares.mean(axis=0)[::-1][:count]
    ranks = np.arange(1, count + 1)
    strange = np.abs(np.cumsum(numbers) - ranks) > 2 + 4 * np.sqrt(2 * ranks / PROBES)
    return int(np.argmax(strange)) if strange.any() else count
