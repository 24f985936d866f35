"""`esdtool plot`: figures of checkpoints, analyses, assignments and runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from esdtool.cli.completion import module_names
from esdtool.cli.options import (
    DeviceOption,
    DownloadOption,
    FastOption,
    FitOption,
    JobsOption,
    KFractionOption,
    MinEigsOption,
    download_of,
)
from esdtool.report.figures.kinds import FIGURES
from esdtool.spectra.options import ScoreOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esdtool.analysis.document import Analysis
    from esdtool.analysis.plan import Plan
    from esdtool.assignment.document import Assignment
    from esdtool.comparison.runs import Run
    from esdtool.comparison.trajectory import Trajectory
    from esdtool.report.figures import Material

FigureFormat = Literal["png", "svg", "pdf"]


def plot(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Checkpoints, analysis JSON files, wd.json files, run directories of 'esdtool train' and JSONL "
            "files of SpectralMonitor, in any combination. Default: the latest analysis.",
            show_default=False,
            metavar="[SOURCE]...",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the figures.", metavar="DIR")] = Path("figures"),
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="Figure to draw; repeatable. Default: all that the sources allow. "
            + "; ".join(f"{name}: {figure.summary}" for name, figure in FIGURES.items())
            + ".",
            show_default=False,
            metavar="KIND",
            autocompletion=lambda: list(FIGURES),
        ),
    ] = None,
    module: Annotated[
        list[str] | None,
        typer.Option(
            help="Modules for esd and ks; repeatable. Default: the heaviest, the median and the lightest tail.",
            show_default=False,
            metavar="REGEX",
            autocompletion=module_names,
        ),
    ] = None,
    esd_path: Annotated[
        str | None,
        typer.Option("--esd", help="Eigenvalues (.safetensors) that belong to an analysis JSON file.", metavar="FILE"),
    ] = None,
    figure_format: Annotated[FigureFormat, typer.Option("--format", help="Format of the figures.")] = "png",
    dpi: Annotated[int, typer.Option(help="Pixels per inch of PNG files.", min=30, max=1200)] = 150,
    fit: FitOption = None,
    k_fraction: KFractionOption = ScoreOptions.k_fraction,
    min_eigs: MinEigsOption = ScoreOptions.min_eigs,
    fast: FastOption = False,
    device: DeviceOption = "auto",
    jobs: JobsOption = None,
    download: DownloadOption = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print neither progress nor the names of the files.")
    ] = False,
) -> None:
    """Draw spectra, alphas, weight decays and training curves, as PNG, SVG or PDF files."""
    from esdtool.analysis.plan import make_plan
    from esdtool.cli.output import wrote
    from esdtool.cli.targets import check_folder
    from esdtool.comparison.trajectory import in_order_of_training
    from esdtool.errors import UsageError

    for wanted in kind or ():
        if wanted not in FIGURES:
            raise UsageError(f"--kind {wanted}: no such figure; there are {', '.join(FIGURES)}")
    options = ScoreOptions(fit=tuple(fit or ScoreOptions.fit), k_fraction=k_fraction, min_eigs=min_eigs, fast=fast)
    check_folder(out)
    found = _sort_out(sources or [])
    if not found.checkpoints and not found.analyses and any(FIGURES[wanted].of_weights for wanted in kind or ()):
        from esdtool.cli.sources import checkpoint_of

        found.checkpoints += [checkpoint_of(str(run.path), quiet=quiet) for run in found.runs]
    if esd_path is not None and len(found.analyses) != 1:
        raise UsageError("--esd goes with one analysis that is read from a file")
    if esd_path is not None:
        from esdtool.cli.output import read_esds

        found.analyses[0] = found.analyses[0].with_esds(read_esds(esd_path))
    plans = [
        make_plan(checkpoint, options, device=device, jobs=jobs, download=download_of(download, in_part=False))
        for checkpoint in in_order_of_training(found.checkpoints)
    ]
    material = _material(found, plans, modules=tuple(module or ()), quiet=quiet)

    from esdtool.report.figures import save_figures

    for path in save_figures(material, out, kinds=kind or (), suffix=figure_format, dpi=dpi):
        wrote(path, quiet=quiet)


@dataclass(kw_only=True)
class _Found:
    """The sources by what they are."""

    checkpoints: list[str] = field(default_factory=list)
    analyses: list[Analysis] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    assignments: list[tuple[str, Assignment]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


def _sort_out(sources: list[str]) -> _Found:
    """Recognise each source and read it; checkpoints are only named."""
    from esdtool.analysis.document import Analysis
    from esdtool.assignment.reading import load_assignment
    from esdtool.cli.sources import SourceKind, kind_of
    from esdtool.comparison.monitor_log import trajectory_of_log
    from esdtool.comparison.runs import load_run
    from esdtool.comparison.trajectory import Trajectory

    found = _Found()
    if not sources:
        from esdtool.analysis.latest import recall

        found.analyses.append(recall()[0])
    for source in sources:
        match kind_of(source):
            case SourceKind.TRAJECTORY:
                found.trajectories.append(Trajectory.from_json(source))
            case SourceKind.MONITOR_LOG:
                found.trajectories.append(trajectory_of_log(source))
            case SourceKind.ASSIGNMENT:
                found.assignments.append((source, load_assignment(source)))
            case SourceKind.ANALYSIS:
                found.analyses.append(Analysis.from_json(source))
            case SourceKind.RUN:
                found.runs.append(load_run(Path(source)))
            case _:
                found.checkpoints.append(source)  # an index of shards, or an error that says what it is
    return found


def _material(found: _Found, plans: Sequence[Plan], *, modules: tuple[str, ...], quiet: bool) -> Material:
    """Collect the material of the figures, and analyse the checkpoints among it."""
    from esdtool.analysis.run import run
    from esdtool.cli.output import note, progress_bar
    from esdtool.comparison.trajectory import make_trajectory, step_of
    from esdtool.report.figures import Material

    for plan in plans:
        for remark in plan.notes:
            note(remark, quiet=quiet)
    with progress_bar(sum(plan.cost for plan in plans), quiet=quiet) as advance:
        computed = [run(plan, on_progress=advance) for plan in plans]
    trajectories = list(found.trajectories)
    steps = {step_of(checkpoint) for checkpoint in found.checkpoints}
    if len(computed) > 1 and None not in steps and len(steps) == len(computed):
        trajectories.append(make_trajectory(computed))
    return Material(
        analyses=(*found.analyses, *computed),
        trajectories=tuple(trajectories),
        assignments=tuple(found.assignments),
        runs=tuple(found.runs),
        modules=modules,
    )
