"""Figures of one module: its ESD with the fitted tail, and the scan of the KS distance over xmin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from esdtool.analysis.module_record import ModuleResult, TailResult
from esdtool.report.figures.style import BULK, COLOURS, new_figure, plain, set_title
from esdtool.report.tables.density import drawn_fit, esd_histogram, in_drawable_units, null_density, tail_density
from esdtool.spectra.estimators.ks import ks_distances

Vector = npt.NDArray[np.float64]

EIGENVALUE = "eigenvalue λ of WᵀW"
_BARS, _TAIL, _OTHER = "#9CC3E0", COLOURS[1], COLOURS[2]
_CURVE_POINTS = 400


def save_esd(path: Path, module: ModuleResult, eigenvalues: Vector, *, subject: str, dpi: int = 150) -> Path:
    """The ESD of a module on log-log axes, with its tail and its null.

    Args:
        path: target, .png, .svg or .pdf.
        module: scored.
        eigenvalues: [num_eigs], ascending.
        subject: the checkpoint, for the title.
        dpi: of a PNG.

    Returns:
        The path.
    """
    with new_figure(path, width=5.6, height=3.9, dpi=dpi) as (_, (axes,)):
        draw_esd(axes, module, eigenvalues)
        set_title(axes, f"ESD of {plain(module.name)}\n{subject}")
    return path


def draw_esd(axes: Axes, module: ModuleResult, eigenvalues: Vector) -> None:
    """Draw an ESD: histogram, fitted power law from xmin, Marchenko-Pastur density of the same shape."""
    module, eigenvalues, exponent = in_drawable_units(module, eigenvalues)
    histogram = esd_histogram(eigenvalues)
    shown = histogram.density[histogram.counts > 0]
    found = drawn_fit(module)
    # The density falls by many decades: below right nothing is hidden, and above right there is room for the legend.
    low, high = float(shown.min()) / 2, float(shown.max()) * 3
    if found is not None:
        end = float(tail_density(histogram.edges[-1:], found[1], histogram.total)[0])
        low = max(min(low, end / 2), low / 1e3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.stairs(histogram.density, histogram.edges, baseline=low, fill=True, color=_BARS, label="eigenvalues")
    # The edges of empty bins next to full ones would fall off the axes.
    axes.stairs(
        np.maximum(histogram.density, low / 10), histogram.edges, baseline=None, color=COLOURS[0], linewidth=0.8
    )
    grid = np.geomspace(histogram.edges[0], histogram.edges[-1], _CURVE_POINTS)
    null = null_density(grid, module)
    if null is not None and (null > 0).any():
        axes.plot(grid, np.where(null > 0, null, np.nan), "--", color=BULK, label="Marchenko-Pastur, same shape")
    if found is not None:
        name, fit = found
        assert fit.xmin is not None
        grid = np.geomspace(fit.xmin, histogram.edges[-1], _CURVE_POINTS)
        axes.plot(grid, tail_density(grid, fit, histogram.total), color=_TAIL, label=fit_label(name, fit))
        axes.axvline(fit.xmin, color=_TAIL, linestyle=":", linewidth=1, label=f"xmin = {fit.xmin:.3g}")
    if histogram.num_below:
        axes.plot([], [], " ", label=f"{histogram.num_below} eigenvalues near 0 not shown")
    axes.set_ylim(low, high)
    axes.set_xlabel(eigenvalue_label(exponent))
    axes.set_ylabel("density p(λ)")
    axes.legend(loc="upper right")


def eigenvalue_label(exponent: int) -> str:
    """Name the axis of eigenvalues that are divided by a power of ten."""
    return EIGENVALUE if exponent == 0 else f"{EIGENVALUE}, in units of 10^{exponent}"


def fit_label(name: str, fit: TailResult) -> str:
    """A tail in the words of a legend."""
    error = "" if fit.alpha_stderr is None else f" ± {fit.alpha_stderr:.3f}"
    cut = "" if fit.truncation_lambda is None else f", Λ = {fit.truncation_lambda:.3g}"
    return f"{name}: α = {fit.alpha:.3f}{error}{cut} (tail of {fit.num_tail})"


def save_ks_scan(path: Path, module: ModuleResult, eigenvalues: Vector, *, subject: str, dpi: int = 150) -> Path:
    """KS distance and alpha of the tail for every xmin, with the minimum and the tail that was used.

    Args:
        path: target, .png, .svg or .pdf.
        module: scored.
        eigenvalues: [num_eigs], ascending.
        subject: the checkpoint, for the title.
        dpi: of a PNG.

    Returns:
        The path.
    """
    module, eigenvalues, exponent = in_drawable_units(module, eigenvalues)
    xmins, alphas, distances = ks_distances(eigenvalues)
    # The last few tails hold a handful of eigenvalues, and their alphas would set the scale of the axis.
    usable = slice(None, -5) if xmins.size > 20 else slice(None)
    best = int(np.argmin(distances))
    with new_figure(path, width=5.6, height=4.6, dpi=dpi, rows=2, sharex=True) as (_, (above, below)):
        above.plot(xmins, distances, color=COLOURS[0])
        above.plot(
            xmins[best], distances[best], "o", color=_TAIL, label=f"minimum: {distances[best]:.3f} at {xmins[best]:.3g}"
        )
        below.plot(xmins[usable], alphas[usable], color=COLOURS[0])
        below.plot(xmins[best], alphas[best], "o", color=_TAIL, label=f"there α = {alphas[best]:.3f}")
        found = drawn_fit(module)
        if found is not None and found[1].xmin != xmins[best]:
            name, fit = found
            assert fit.xmin is not None
            if fit.ks_distance is not None:
                above.plot(fit.xmin, fit.ks_distance, "s", color=_OTHER, label=f"{name}: {fit.ks_distance:.3f}")
            below.plot(fit.xmin, fit.alpha, "s", color=_OTHER, label=f"{name}: α = {fit.alpha:.3f}")
        above.set_xscale("log")
        above.set_ylim(bottom=0)
        above.set_ylabel("KS distance")
        set_title(above, f"KS distance against xmin: {plain(module.name)}\n{subject}")
        below.set_ylabel("α of the tail above xmin")
        below.set_xlabel(f"xmin, {eigenvalue_label(exponent)}")
        for axes in (above, below):
            axes.legend()
    return path
