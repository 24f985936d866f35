"""`esdtool compare`: checkpoints, or training runs, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from esdtool.cli.options import (
    CacheOption,
    DeviceOption,
    DistancesOption,
    DownloadOption,
    ExcludeOption,
    ExpertsOption,
    FastOption,
    FitOption,
    HtmlOption,
    IncludeOption,
    IntruderSimilarityOption,
    IntruderVectorsOption,
    JobsOption,
    KFractionOption,
    MemoryOption,
    MinEigsOption,
    QuietOption,
    SplitFusedOption,
    TopOption,
    download_of,
)
from esdtool.spectra.options import PairOptions, ScoreOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

SortKey = Literal["order", "name", "role", "layer", "difference"]

Format = Literal["table", "markdown", "csv"]

# Names of parameters below.
_OF_DISTANCES = ("distances", "intruder_vectors", "intruder_similarity")
_OF_ANALYSES = (
    *(
        "fit",
        "k_fraction",
        "min_eigs",
        "fast",
        "include",
        "exclude",
        "split_fused",
        "device",
        "jobs",
        "cache",
        "memory",
    ),
    *_OF_DISTANCES,
)
_OF_CHECKPOINTS = (*_OF_ANALYSES, "experts", "sort", "top")


def compare(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            help="At least two checkpoints, analysis JSON files or JSONL files of SpectralMonitor (their last "
            "readings); the others are compared with the first. Or run directories of 'esdtool train', or folders that "
            "contain them.",
            show_default=False,
            metavar="SOURCE...",
        ),
    ],
    distances: DistancesOption = PairOptions.distances,
    intruder_vectors: IntruderVectorsOption = PairOptions.intruder_vectors,
    intruder_similarity: IntruderSimilarityOption = PairOptions.intruder_similarity,
    fit: FitOption = None,
    k_fraction: KFractionOption = ScoreOptions.k_fraction,
    min_eigs: MinEigsOption = ScoreOptions.min_eigs,
    fast: FastOption = False,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    split_fused: SplitFusedOption = True,
    experts: ExpertsOption = "mean",
    json_path: Annotated[
        str | None, typer.Option("--json", help="Write the comparison as JSON; - for stdout.", metavar="PATH")
    ] = None,
    csv_path: Annotated[
        str | None,
        typer.Option(
            "--csv", help="Write one CSV line per module and checkpoint, or per run; - for stdout.", metavar="PATH"
        ),
    ] = None,
    html_path: HtmlOption = None,
    plots: Annotated[
        str | None,
        typer.Option(
            help="Write figures to this folder. Checkpoints: alpha by role, differences by layer and role. Runs: loss, "
            "alphas and decays over time.",
            metavar="DIR",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="For runs: compare the other settings with this one seed by seed. Use its name in the table. "
            "Default: uniform decay with the same base.",
            metavar="SETTING",
            show_default=False,
        ),
    ] = None,
    table_format: Annotated[
        Format,
        typer.Option(
            "--format", help="Format of the tables: for the terminal, Markdown to paste into an issue, or CSV."
        ),
    ] = "table",
    sort: Annotated[
        SortKey, typer.Option(help="Order of the table of modules. 'order' is the order in the first checkpoint.")
    ] = "order",
    top: TopOption = None,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
    jobs: JobsOption = None,
    memory: MemoryOption = None,
    cache: CacheOption = True,
    download: DownloadOption = False,
) -> None:
    """Compare checkpoints module by module, or the validation perplexities of training runs.

    For checkpoints, the table shows how each alpha differs from that in the first one, and whether by more than chance,
    and how far the weights are apart.
    Runs that differ only in the seed are grouped. Their table shows mean and standard error by policy and base decay,
    and the difference from uniform decay, seed by seed.
    """
    from esdtool.cli.compare_sources import analyses_of, sort_out
    from esdtool.cli.output import note, write_text, wrote
    from esdtool.cli.targets import check_outputs
    from esdtool.modules.choice import ModuleChoice
    from esdtool.support.sizes import parse_size

    pairs = PairOptions(distances=distances, intruder_vectors=intruder_vectors, intruder_similarity=intruder_similarity)
    options = ScoreOptions(fit=tuple(fit or ScoreOptions.fit), k_fraction=k_fraction, min_eigs=min_eigs, fast=fast)
    outputs = {"--json": json_path, "--csv": csv_path, "--html": html_path}
    shown = not check_outputs(outputs, sources=sources, folder=plots) and not quiet
    found = sort_out(sources, quiet=quiet)
    if found.runs:
        _refuse(context, _OF_CHECKPOINTS, "concerns checkpoints, and these are training runs")
        for remark in found.notes:
            note(remark, quiet=quiet)
        form = table_format if shown else None
        _compare_runs(found.runs, json_path, csv_path, html_path, plots, against=against, quiet=quiet, form=form)
        return
    _refuse(context, ("against",), "concerns training runs, and these are checkpoints")
    if not found.checkpoints:
        _refuse(context, _OF_ANALYSES, "concerns checkpoints that are not analysed yet, and these all are")
    analyses, measured = analyses_of(
        found,
        options,
        pairs=pairs,
        choice=ModuleChoice.of(include=include or (), exclude=exclude or (), split_fused=split_fused),
        device=device,
        jobs=jobs,
        memory=None if memory is None else parse_size(memory),
        cache=cache,
        download=download_of(download, in_part=bool(include)),
        quiet=quiet,
    )

    from esdtool.comparison.checkpoints import compare_analyses
    from esdtool.comparison.document import PairSettings

    settings = PairSettings(intruder_vectors=intruder_vectors, intruder_similarity=intruder_similarity)
    comparison = compare_analyses(analyses, distances=measured, pairs=settings if distances else None)
    for remark in comparison.notes:
        note(remark, quiet=quiet)
    if json_path is not None:
        write_text(json_path, comparison.to_json(), quiet=quiet)
    if csv_path is not None:
        write_text(csv_path, comparison.to_csv(), quiet=quiet)
    if html_path is not None:
        from esdtool.report.html import comparison_page

        write_text(html_path, comparison_page(comparison), quiet=quiet)
    if plots is not None:
        from esdtool.report.figures import save_comparison

        for path in save_comparison(analyses, Path(plots)):
            wrote(path, quiet=quiet)
    if shown and table_format == "markdown":
        from esdtool.report.markdown import comparison_markdown
        from esdtool.support.terminal import say

        say(comparison_markdown(comparison, sort=sort, top=top, experts=experts))
    elif shown and table_format == "csv":
        write_text("-", comparison.to_csv(), quiet=quiet)
    elif shown:
        from esdtool.report.terminal.comparison import print_comparison

        print_comparison(comparison, sort=sort, top=top, experts=experts)
    if not any(comparison.summary.num_compared[1:]):
        from esdtool.errors import NothingToAnalyzeError

        raise NothingToAnalyzeError(f"no module of {sources[0]} has a scored counterpart in another checkpoint")


def _compare_runs(
    folders: Sequence[str],
    json_path: str | None,
    csv_path: str | None,
    html_path: str | None,
    plots: str | None,
    *,
    against: str | None,
    quiet: bool,
    form: Format | None,
) -> None:
    from esdtool.cli.output import note, write_text, wrote
    from esdtool.comparison.runs import compare_runs, load_run

    runs = [load_run(folder) for folder in folders]
    table = compare_runs(runs, against=against)
    for remark in table.notes:
        note(remark, quiet=quiet)
    if json_path is not None:
        write_text(json_path, table.to_json(), quiet=quiet)
    if csv_path is not None:
        write_text(csv_path, table.to_csv(), quiet=quiet)
    if html_path is not None:
        from esdtool.report.html import runs_page

        write_text(html_path, runs_page(table, runs), quiet=quiet)
    if plots is not None:
        from esdtool.report.figures import save_run_figures

        for path in save_run_figures(runs, Path(plots)):
            wrote(path, quiet=quiet)
    if form == "table":
        from esdtool.report.terminal.runs import print_runs

        print_runs(table)
    elif form == "markdown":
        from esdtool.report.markdown import runs_markdown
        from esdtool.support.terminal import say

        say(runs_markdown(table))
    elif form == "csv":
        from esdtool.report.tables.runs import settings_csv

        write_text("-", settings_csv(table), quiet=quiet)


def _refuse(context: typer.Context, parameters: Sequence[str], why: str) -> None:
    """Refuse options that would be ignored.

    Raises:
        UsageError: if one of the parameters is given on the command line.
    """
    from esdtool.errors import UsageError

    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in parameters and source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"{parameter.opts[0]} {why}")
