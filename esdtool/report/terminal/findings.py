"""The findings of an analysis in the terminal: the gravest first, a few lines each."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from esdtool.analysis.document import Analysis
from esdtool.analysis.finding import Severity
from esdtool.report.tables.findings import findings_of, findings_title, headline, lines
from esdtool.support.terminal import styled

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold cyan"}

_WIDEST = 120
"""Columns of text that are easily read."""


def print_findings(analysis: Analysis, console: Console) -> None:
    """Print the findings; a single line where there are none, and nothing where nobody looked."""
    if analysis.findings is None:
        return
    found = findings_of(analysis)
    console.print(styled(findings_title(found), "bold"))
    for finding in found:
        title = styled(f"{finding.severity.value.upper()} {finding.rule}: ", _STYLES[finding.severity])
        console.print(title.append_text(styled(headline(finding))))
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for line in lines(finding):
            grid.add_row(styled(line.label, "dim"), styled(line.text, "bold" if line.is_code else ""))
        console.print(Padding(grid, (0, 0, 0, 2), expand=False), width=min(console.width, _WIDEST))
    console.print()
