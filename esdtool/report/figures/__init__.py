"""Figures with matplotlib, headless: PNG, SVG or PDF. Each kind of figure is one file in `kinds`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esdtool.support.lazy import exporter

if TYPE_CHECKING:
    from esdtool.report.figures.collect import save_comparison, save_figures, save_run_figures
    from esdtool.report.figures.kind import Material
    from esdtool.report.figures.kinds import KINDS

__all__ = ["KINDS", "Material", "save_comparison", "save_figures", "save_run_figures"]

# On first use: the command line names the kinds in its help, and must not wait for matplotlib.
__getattr__ = exporter(
    __name__,
    {
        "KINDS": "kinds",
        "Material": "kind",
        **dict.fromkeys(["save_comparison", "save_figures", "save_run_figures"], "collect"),
    },
)
