"""Encode what the script shows when a module's row is opened, in as few bytes as possible.

A row's entry is a list in the order of `_entry`, or a text where the row has no spectrum of its own. The
Marchenko-Pastur densities of all matrices of a shape differ in scale only: each shape is sampled once, and a module
holds its scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from esdtool.analysis.distances import quantity_names
from esdtool.analysis.document import Analysis
from esdtool.analysis.module_record import ModuleResult, TailResult
from esdtool.report.html.markup import rounded
from esdtool.report.html.rows import ModuleRows
from esdtool.report.tables.density import drawn_fit, esd_histogram, height_at_xmin, null_density
from esdtool.spectra.marchenko_pastur import mp_edges
from esdtool.spectra.measure import all_quantities
from esdtool.spectra.pair_measure import all_pair_quantities

_METRICS: tuple[tuple[str, str], ...] = (
    ("num_eigs", "eigenvalues"),
    ("lambda_max", "λ max"),
    ("lambda_median", "λ median"),
    ("lambda_min", "λ min"),
    ("spectral_norm", "spectral norm"),
    ("frobenius_norm", "Frobenius norm"),
    ("stable_rank", "stable rank"),
    ("effective_rank", "effective rank"),
    ("matrix_rank", "matrix rank"),
    ("entropy", "spectral entropy"),
    ("alpha_weighted", "alpha log₁₀ λ max"),
    ("truncation_lambda", "Λ of the truncation"),
    *((quantity.name, quantity.title) for quantity in all_quantities()),
)

_SAMPLES = 60

FOLDED = "This row is the mean of a layer's experts and has no spectrum of its own; --experts all shows each."
NO_ESDS = "No figures: the analysis was read from a file, which does not hold the eigenvalues."


def panel_data(analysis: Analysis, rows: ModuleRows) -> dict[str, Any]:
    """Build the data that `figure.js` reads: one entry for each row of the module table, and shared values."""
    nulls = _Nulls()
    names = quantity_names(cheap_only=not analysis.settings.distances)
    # The columns of all modules: without a base there are none.
    pairs = names if any(module.distances is not None for module in analysis.modules) else []
    titles = {quantity.name: quantity.title for quantity in all_pair_quantities()}
    return {
        "estimators": list(analysis.settings.fit),
        "metrics": [*(label for _, label in _METRICS), *(titles[name] for name in pairs)],
        "rows": [
            FOLDED if rows.folded and module.expert is not None else _entry(module, analysis, nulls, pairs)
            for module in rows.modules
        ],
        "nulls": nulls.samples,
        "missing": None if analysis.esds or not analysis.scored else NO_ESDS,
    }


class _Nulls:
    """The Marchenko-Pastur densities met so far."""

    def __init__(self) -> None:
        self.samples: list[list[Any]] = []
        """[lower edge, upper edge, densities] for elements of variance 1, one for each shape."""
        self._position: dict[tuple[int, ...], int] = {}

    def reference(self, module: ModuleResult) -> list[Any] | None:
        """[position in `samples`, scale] of a module's null; None where it has none."""
        sigma = module.measure("mp_sigma")
        if sigma is None:
            return None
        shape = tuple(sorted(module.shape[:2]))
        scale = sigma * sigma
        if scale == 0 or math.isinf(scale):  # float64 has no such number
            return None
        if shape not in self._position:
            sample = _sample(module, scale)
            if sample is None:
                return None
            self._position[shape] = len(self.samples)
            self.samples.append(sample)
        return [self._position[shape], rounded(scale)]


def _entry(module: ModuleResult, analysis: Analysis, nulls: _Nulls, pairs: Sequence[str]) -> list[Any]:
    fits = [_fit(module.fits.get(name)) for name in analysis.settings.fit]
    drawn = drawn_fit(module)
    words = [module.status if not module.ok else None, module.warning, module.spectrum]
    if module.best_law is not None:
        words.append(module.best_law)
    return [
        [
            *(rounded(getattr(module, field)) for field, _ in _METRICS),
            *(None if module.distances is None else rounded(module.distances.measure(name)) for name in pairs),
        ],
        fits,
        words,
        _histogram(module, analysis),
        None if drawn is None else analysis.settings.fit.index(drawn[0]),
        nulls.reference(module),
    ]


def _fit(fit: TailResult | None) -> list[Any] | None:
    if fit is None:
        return None
    numbers = [rounded(value) for value in (fit.alpha, fit.alpha_stderr, fit.xmin, fit.num_tail)]
    numbers.append(rounded(fit.ks_distance, 4))
    if fit.xmin is None or (fit.xmax is None and fit.truncation_lambda is None):
        return numbers
    return [*numbers, rounded(height_at_xmin(fit)), rounded(fit.truncation_lambda)]


def _histogram(module: ModuleResult, analysis: Analysis) -> list[Any] | None:
    """[first edge, last edge, eigenvalues in all, those in each bin]; the edges between are in equal ratios."""
    eigenvalues = analysis.esds.get(module.name)
    if not module.ok or eigenvalues is None or not eigenvalues.max() > 0:
        return None
    histogram = esd_histogram(eigenvalues)
    low, high = float(histogram.edges[0]), float(histogram.edges[-1])
    return [rounded(low, 12), rounded(high, 12), histogram.total, histogram.counts.tolist()]


def _sample(module: ModuleResult, scale: float) -> list[Any] | None:
    """[lower edge, upper edge, densities] of the null, brought to elements of variance 1.

    The densities stand at exp(middle - half cos(pi i / (k - 1))) between the logarithms of the edges: close together
    where the curve is steep.
    """
    low, high = mp_edges(module.shape[0], module.shape[1])
    low = max(low, high * 1e-9)  # a square matrix's reaches 0, which no logarithmic axis does
    ends = np.log([low, high])
    cosines = np.cos(np.linspace(0.0, np.pi, _SAMPLES))
    grid = np.exp(ends.mean() - (ends[1] - ends[0]) / 2 * cosines)
    density = null_density(grid * scale, module)
    if density is None:
        return None
    return [rounded(low), rounded(high), [rounded(value, 4) for value in (density * scale).tolist()]]
