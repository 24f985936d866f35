"""Figures with matplotlib, headless: PNG, SVG or PDF."""

from esdtool.report.figures.collect import (
    KINDS,
    Material,
    save_comparison,
    save_figures,
    save_run_figures,
)

__all__ = ["KINDS", "Material", "save_comparison", "save_figures", "save_run_figures"]
