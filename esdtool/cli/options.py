"""Options that several subcommands have, with the same words in each."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from esdtool.report.tables.experts import Experts
from esdtool.spectra.options import FITS

TableFormat = Literal["table", "markdown"]

FitOption = Annotated[
    list[str] | None,
    typer.Option(
        help=f"Estimator of alpha: {', '.join(FITS)}; repeatable, the first one counts. Default: hill.",
        show_default=False,
        autocompletion=lambda: list(FITS),
    ),
]
KFractionOption = Annotated[float, typer.Option(help="Fraction of the eigenvalues in the tail of 'hill'.")]
MinEigsOption = Annotated[int, typer.Option(help="Do not score modules with fewer eigenvalues.")]
FastOption = Annotated[
    bool, typer.Option("--fast", help="Use float32 where its error bound admits it: alphas within 1e-4.")
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Analyse only modules or parameters that match this regular expression; repeatable.", metavar="REGEX"
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Leave out modules or parameters that match this regular expression; repeatable.", metavar="REGEX"
    ),
]
SplitFusedOption = Annotated[
    bool, typer.Option("--split-fused/--no-split-fused", help="Split q, k, v and gate, up out of one tensor.")
]
ExpertsOption = Annotated[
    Experts, typer.Option(help="Rows of a mixture of experts in the table: each layer's mean, or all.")
]
HtmlOption = Annotated[
    str | None, typer.Option("--html", help="Write a report: one HTML file that needs nothing else.", metavar="PATH")
]
TableFormatOption = Annotated[
    TableFormat, typer.Option("--format", help="Form of the tables: for a terminal, or to paste into an issue.")
]
TopOption = Annotated[int | None, typer.Option(help="Show only the first N rows of the table.", min=1)]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print neither tables nor progress.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
JobsOption = Annotated[
    int | None, typer.Option("--jobs", "-j", help="Modules at a time. Default: one per core.", min=1)
]
CacheOption = Annotated[
    bool,
    typer.Option("--cache/--no-cache", help="Take spectra of weights that were analysed before from the user's cache."),
]
