"""Alpha of a huge matrix without its eigenvalues: stochastic Lanczos quadrature (`--spectrum slq`).

A block of p random orthonormal probes runs N steps of block Lanczos on W W^T, all in products of W with p columns.
The Ritz values and the probes' shares in them are a quadrature of the spectral density (Golub and Meurant 1994; Lin,
Saad and Yang 2016); from its counting function come the eigenvalue at xmin and from its nodes the Hill sum. Three
things make it sharp enough for an alpha:

- Ritz values of a block come in packs of about p, one pack where a single vector would have one Ritz value. The
  counting function is read off means over p neighbours, which levels these stairs.
- Ritz values at the top that have converged are eigenvalues: they count exactly once, whatever the probes' shares.
- sum lambda is known exactly; the other nodes' weights are shifted linearly until they agree with it.

The probes are Gaussian and then orthonormalised, so that the error depends on the eigenvalues alone, never on the
eigenvectors. The interval of an estimate has two parts: the jackknife over the probes for the chance, and the
difference from the same quadrature with fewer steps for what the steps do not resolve. Where the density around xmin is
not smooth on the scale that the steps resolve, there is no estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from esdtool.spectra.estimators.hill import hill_index
from esdtool.spectra.lanczos import (
    NOISE,
    PROBES,
    STEPS,
    Matrix,
    Quadrature,
    Vector,
    block_lanczos,
    gram_operator,
    quadrature,
)
from esdtool.spectra.precision import full_precision_matmul
from esdtool.spectra.spectrum import storage_floor

FEWER_STEPS = (24, 28)
"""The quadratures that are compared with that of `STEPS`."""
SMALLEST = 1536
"""Fewest eigenvalues of a module that is estimated: near 1024 the exact ones are as fast (benchmarks/slq.py)."""
_WIDEST = 0.065
"""Largest accepted half-width of the interval over alpha - 1; what is wider is worth the exact eigenvalues."""
_STUDENT = 2.131
"""97.5 % quantile of Student's t with PROBES - 1 degrees of freedom."""
_GAP = 0.4
"""Largest accepted distance of neighbouring nodes at xmin over the length of three packs; usual are 0.1 to 0.25."""
_SMOOTH = (1.1, 1.65)
"""Accepted median of the nodes' residuals around xmin over the length of a pack. Of a smooth density it is 1.2 to 1.6,
whatever its shape: a pack is what the steps resolve. Below, the nodes have settled on clusters; above, they straddle
gaps."""
_SETTLED = 0.92
"""Smallest accepted lower decile of the same ratio; usual are 1 to 1.3."""
_PER_NODE = 1.6
"""Eigenvalues per node up to which the nodes may settle: on single eigenvalues, not on clusters."""
_MARGIN = 1.25
"""Factor of the interval for what neither the jackknife nor the coarser quadratures see: with it, at least 93 % hold on
every kind of spectrum (`python -m tests.spectra.slq_coverage`)."""
_ABOVE_FLOOR = 4.0
"""Smallest accepted xmin over the rounding floor of the stored weights."""
_RESOLVED = 1e-3
"""Largest accepted relative error of the eigenvalue at xmin, over ln(lambda / xmin) where that is less than 1."""
_FLATTEST = 1e4
"""Largest alpha that is estimated: beyond, the eigenvalues in the tail are equal for all that can be said of them."""


@dataclass(frozen=True, kw_only=True)
class SlqEstimate:
    """The tail of one module, estimated."""

    alpha: float
    """Hill's alpha."""
    alpha_ci: tuple[float, float]
    """95 % confidence interval of the exact alpha of this very matrix."""
    xmin: float
    """The eigenvalue at which the tail starts."""
    num_tail: int
    """Eigenvalues in the tail: known, not estimated."""
    lambda_max: float
    """The largest Ritz value."""
    lambda_median: float
    """Median eigenvalue."""
    total: float
    """sum lambda: computed, not estimated."""
    top: Vector
    """The converged eigenvalues at the top, ascending."""
    log_alpha_norm: float
    """log10 sum lambda^alpha."""


def estimate_tail(
    matrix: torch.Tensor,
    *,
    k_fraction: float = 0.5,
    roundoff: float | None = None,
    device: torch.device | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> SlqEstimate | None:
    """Hill's alpha of one matrix, estimated.

    Args:
        matrix: [rows, columns], floating point, finite, not all zero, its largest element within 2^-40 .. 2^40.
        k_fraction: fraction of the eigenvalues in the tail.
        roundoff: relative rounding error of the stored weights, where it is more than that of the matrix's dtype.
        device: where to compute; default the matrix's own.
        scale: factor of the eigenvalues.
        seed: of the probes; the same seed gives the same estimate.

    Returns:
        None where the matrix does not lend itself to it: fewer than `SMALLEST` eigenvalues, a tail that starts at
        the rounding floor or in a gap of the spectrum, too low a rank, an interval too wide to be of use.
    """
    device = matrix.device if device is None else device
    shape = (matrix.shape[0], matrix.shape[1])
    order = min(shape)
    if order < SMALLEST:
        return None
    for dtype in (torch.float32,) if device.type == "mps" else (torch.float32, torch.float64):
        wide = (matrix if shape[0] <= shape[1] else matrix.T).to(device=device, dtype=dtype)
        # By rows, so that no sum is over millions of elements: in float32 it would be off by 1e-4.
        precise = torch.float32 if device.type == "mps" else torch.float64
        total = float(torch.linalg.vector_norm(wide, dim=1, dtype=precise).cpu().to(torch.float64).square().sum())
        with full_precision_matmul():
            blocks = block_lanczos(gram_operator(wide), order, dtype=dtype, device=device, seed=seed)
        if blocks is None:
            continue  # what is rounding in float32 may be a direction in float64
        tail = estimate_from(blocks, order, total, k_fraction=k_fraction)
        floor = storage_floor(shape, total / (shape[0] * shape[1]), matrix.dtype, roundoff)
        if tail is None or tail.xmin <= _ABOVE_FLOOR * floor:
            return None
        if NOISE[dtype] * tail.lambda_max * max(1.0, tail.alpha - 1) <= _RESOLVED * tail.xmin:
            return _scaled(tail, scale)
    return None


def estimate_from(blocks: Matrix, order: int, total: float, *, k_fraction: float = 0.5) -> SlqEstimate | None:
    """Hill's alpha from the matrix of a block Lanczos run.

    Args:
        blocks: from `block_lanczos`.
        order: number of eigenvalues, n.
        total: sum lambda.
        k_fraction: fraction of the eigenvalues in the tail.

    Returns:
        None if the interval is too wide to be of use.
    """
    index = hill_index(order, k_fraction)
    rule = quadrature(blocks, STEPS, order, total)
    weights = rule.weights()
    log_xmin = _log_eigenvalue(rule, weights, index)
    if index < order - rule.converged and (_in_gap(rule.nodes, log_xmin) or not _is_smooth(rule, weights, log_xmin)):
        return None
    alpha = _alpha(rule, weights, index)
    if alpha > _FLATTEST:
        return None
    coarser = [quadrature(blocks, steps, order, total) for steps in FEWER_STEPS]
    unresolved = max(abs(_alpha(less, less.weights(), index) - alpha) for less in coarser)
    half = _MARGIN * (_STUDENT * _jackknife(rule, index) + unresolved)
    if not half <= _WIDEST * (alpha - 1):
        return None
    return SlqEstimate(
        alpha=alpha,
        alpha_ci=(alpha - half, alpha + half),
        xmin=math.exp(log_xmin),
        num_tail=order - index,
        lambda_max=float(rule.nodes[-1]),
        lambda_median=math.exp(_log_eigenvalue(rule, weights, order // 2)),
        total=total,
        top=rule.nodes[rule.nodes.size - rule.converged :],
        log_alpha_norm=_log_norm(rule.nodes, weights * order, alpha),
    )


def _log_eigenvalue(rule: Quadrature, weights: Vector, index: int) -> float:
    """Return ln of the eigenvalue with this index among all n, ascending."""
    if index >= rule.order - rule.converged:
        return math.log(rule.nodes[index - rule.order])  # known itself: means over neighbours would only blur it
    kernel = np.full(PROBES, 1 / PROBES)
    counts = np.convolve(np.cumsum(weights) - weights / 2, kernel, "valid")
    return float(np.interp((index + 0.5) / rule.order, counts, np.convolve(np.log(rule.nodes), kernel, "valid")))


def _in_gap(nodes: Vector, log_xmin: float) -> bool:
    """Return whether xmin lies in a gap of the spectrum, where a small error of the count is a large error of xmin."""
    here = int(np.searchsorted(np.log(nodes), log_xmin))
    near = np.log(nodes[max(0, here - 3 * PROBES // 2) : here + 3 * PROBES // 2])
    return near.size < 2 or float(np.diff(near).max()) > _GAP * float(near[-1] - near[0])


def _is_smooth(rule: Quadrature, weights: Vector, log_xmin: float) -> bool:
    """Return whether the density around xmin is smooth on the scale that the steps resolve.

    The counting function is read off means over a pack of nodes. On a spectrum of clusters these means are biased by as
    much as the distance between clusters, and the probes agree on the wrong value. There the residuals tell: nodes that
    lie in a cluster have settled, and a pack says nothing about their distance to the next eigenvalue.
    """
    logs = np.log(rule.nodes)
    here = int(np.searchsorted(logs, log_xmin))
    wide = logs[max(0, here - 3 * PROBES) : here + 3 * PROBES]
    pack = float(np.median(wide[PROBES:] - wide[:-PROBES])) if wide.size > PROBES else 0.0
    if pack <= 0:
        return False
    near = slice(max(0, here - 3 * PROBES // 2), here + 3 * PROBES // 2)
    if rule.order * float(np.mean(weights[near])) <= _PER_NODE:
        return True  # there are about as many nodes as eigenvalues, and nothing finer to resolve
    ratios = rule.residuals[near] / rule.nodes[near] / pack
    low, high = _SMOOTH
    return low <= float(np.median(ratios)) <= high and float(np.quantile(ratios, 0.1)) >= _SETTLED


def _alpha(rule: Quadrature, weights: Vector, index: int) -> float:
    """Hill's alpha of the tail that starts at the eigenvalue with this index."""
    logs = np.log(rule.nodes) - _log_eigenvalue(rule, weights, index)
    spread = float(weights @ np.clip(logs, 0.0, None))
    return 1 + (1 - index / rule.order) / spread if spread > 0 else math.inf


def _jackknife(rule: Quadrature, index: int) -> float:
    """Standard error of alpha from leaving out one probe at a time."""
    others = (np.arange(PROBES) != probe for probe in range(PROBES))
    return math.sqrt((PROBES - 1) * float(np.var([_alpha(rule, rule.weights(kept), index) for kept in others])))


def _log_norm(nodes: Vector, numbers: Vector, alpha: float) -> float:
    """Compute log10 sum numbers * nodes^alpha without overflow."""
    logs = alpha * np.log(nodes)
    peak = float(logs.max())
    return (peak + math.log(float(numbers @ np.exp(logs - peak)))) / math.log(10)


def _scaled(tail: SlqEstimate, scale: float) -> SlqEstimate:
    """Return the estimate for eigenvalues times a factor; alpha does not depend on it."""
    return replace(
        tail,
        xmin=tail.xmin * scale,
        lambda_max=tail.lambda_max * scale,
        lambda_median=tail.lambda_median * scale,
        total=tail.total * scale,
        top=tail.top * scale,
        log_alpha_norm=tail.log_alpha_norm + tail.alpha * math.log10(scale),
    )
