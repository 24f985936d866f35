"""Options that several subcommands have, with the same words in each."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import typer

from esdtool.cli.completion import module_names
from esdtool.report.tables.experts import Experts
from esdtool.spectra.options import FITS


def finite(value: float | None) -> float | None:
    """Refuse NaN and infinity, which Python reads as numbers, as the value of an option.

    Raises:
        typer.BadParameter: for either of them.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"must be finite, not {value}.")
    return value


TableFormat = Literal["table", "markdown"]

FitOption = Annotated[
    list[str] | None,
    typer.Option(
        help=f"Estimator of alpha: {', '.join(FITS)}; repeatable, the table and decays use the first. Default: hill.",
        show_default=False,
        autocompletion=lambda: list(FITS),
    ),
]
KFractionOption = Annotated[
    float, typer.Option(help="Fraction of the eigenvalues in the tail of 'hill'.", callback=finite)
]
MinEigsOption = Annotated[int, typer.Option(help="Do not score modules with fewer eigenvalues than this.")]
FastOption = Annotated[
    bool, typer.Option("--fast", help="Use float32 where its error bound permits it. Alphas stay within 1e-4.")
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Analyse only modules or parameters that match this regular expression; repeatable.",
        metavar="REGEX",
        autocompletion=module_names,
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Leave out modules or parameters that match this regular expression; repeatable.",
        metavar="REGEX",
        autocompletion=module_names,
    ),
]
SplitFusedOption = Annotated[
    bool, typer.Option("--split-fused/--no-split-fused", help="Split fused tensors into q, k, v and gate, up.")
]
SplitOption = Annotated[
    list[str] | None,
    typer.Option(
        "--split",
        help="Split tensors with matching names in this layout, if no family determines it: thirds, thirds:H/G, "
        "per-head:H, per-head:H/G, interleaved, gate-up, up-gate or gate-up-interleaved, with H heads in G groups. "
        "Repeatable.",
        metavar="REGEX=LAYOUT",
    ),
]
ExpertsOption = Annotated[
    Experts, typer.Option(help="Rows of the table for a mixture of experts: the mean of each layer, or all.")
]
HtmlOption = Annotated[
    str | None, typer.Option("--html", help="Write a report as one self-contained HTML file.", metavar="PATH")
]
TableFormatOption = Annotated[
    TableFormat,
    typer.Option("--format", help="Format of the tables: for the terminal, or Markdown to paste into an issue."),
]
TopOption = Annotated[int | None, typer.Option(help="Show only the first N rows of the table.", min=1)]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print neither tables nor progress.")]
DeviceOption = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:N or mps.")]
JobsOption = Annotated[
    int | None, typer.Option("--jobs", "-j", help="Modules to process at a time. Default: one per core.", min=1)
]
CacheOption = Annotated[
    bool,
    typer.Option("--cache/--no-cache", help="Reuse cached spectra of weights that were analysed before."),
]

DistancesOption = Annotated[
    bool,
    typer.Option(
        "--distances",
        help="Also compare the singular vectors with the base's: CKA, overlap of subspaces, principal angles, intruder "
        "dimensions. Takes several times as long.",
    ),
]
IntruderVectorsOption = Annotated[
    int,
    typer.Option(
        help="Number of the largest singular vectors among which --distances seeks intruder dimensions.", min=1
    ),
]
IntruderSimilarityOption = Annotated[
    float,
    typer.Option(
        help="A vector that resembles none of the base as much as this, as |cosine|, is an intruder dimension.",
        callback=finite,
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Memory limit for the modules in progress, such as 4GB. A larger module is processed alone.",
        metavar="SIZE",
    ),
]
DownloadOption = Annotated[
    bool,
    typer.Option(
        "--download",
        help="Download models of the Hub to its cache. Default: those of less than 1 GB that are analysed as a whole; "
        "of others the tensors are fetched when it is their turn.",
    ),
]


def download_of(asked: bool, *, in_part: bool) -> bool | None:
    """Return what opening a checkpoint is told about downloads: what is read in part need not be here as a whole."""
    return True if asked else False if in_part else None
