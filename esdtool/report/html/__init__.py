"""Reports as one HTML file each, with everything they need inside."""

from esdtool.report.html.analysis_report import analysis_page
from esdtool.report.html.comparison_report import comparison_page
from esdtool.report.html.runs_report import runs_page
from esdtool.report.html.trajectory_report import trajectory_page

__all__ = ["analysis_page", "comparison_page", "runs_page", "trajectory_page"]
