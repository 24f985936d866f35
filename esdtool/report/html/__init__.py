"""Reports as one HTML file each, with everything they need inside."""

from esdtool.report.html.analysis_report import analysis_page

__all__ = ["analysis_page"]
