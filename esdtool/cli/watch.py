"""`esdtool watch`: follow the checkpoints of a run as they land."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from esdtool.cli.analyze import FailOn
from esdtool.cli.options import (
    DeviceOption,
    FastOption,
    FitOption,
    HtmlOption,
    JobsOption,
    KFractionOption,
    MinEigsOption,
    QuietOption,
    finite,
)
from esdtool.spectra.options import ScoreOptions

if TYPE_CHECKING:
    from esdtool.analysis.document import Analysis
    from esdtool.comparison.journal import Journal
    from esdtool.comparison.landed import Landing

_QUIET_SECONDS = 2.0
"""For how long nobody must have written to a checkpoint before it is taken for whole."""


def watch(
    source: Annotated[
        str,
        typer.Argument(
            help="A run directory, any folder whose folders or files are checkpoints with a number in their names, or "
            "a quoted pattern such as 'run/step_*'. It need not exist yet.",
            metavar="RUN",
        ),
    ],
    every: Annotated[
        float, typer.Option(help="Seconds between two looks.", min=0.1, metavar="SECONDS", callback=finite)
    ] = 60.0,
    html_path: HtmlOption = None,
    fail_on: Annotated[
        FailOn | None,
        typer.Option(
            help="End with exit code 4 as soon as a checkpoint has a finding of this severity or a graver one.",
            metavar="SEVERITY",
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Analyse what is there, and end instead of waiting for more.")
    ] = False,
    fit: FitOption = None,
    k_fraction: KFractionOption = ScoreOptions.k_fraction,
    min_eigs: MinEigsOption = ScoreOptions.min_eigs,
    fast: FastOption = False,
    device: DeviceOption = "auto",
    jobs: JobsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Follow the checkpoints of a run as they land: alphas by role, and findings.

    Checkpoints are analysed when they are whole, each once. What was analysed is kept in the cache, so that a later
    watch goes on where this one stopped, and points stay when the run removes old checkpoints. The watch ends with
    Ctrl-C, or when a run of 'esdtool train' has finished.
    """
    from esdtool.cli.output import note
    from esdtool.cli.targets import check_outputs
    from esdtool.comparison.journal import Journal
    from esdtool.comparison.landed import is_one_checkpoint
    from esdtool.errors import NothingToAnalyzeError, UsageError
    from esdtool.findings.diagnosis import fail_on_findings

    options = ScoreOptions(fit=tuple(fit or ScoreOptions.fit), k_fraction=k_fraction, min_eigs=min_eigs, fast=fast)
    stdout_is_data = check_outputs({"--html": html_path}, sources=[source])
    if stdout_is_data:
        raise UsageError("--html of a watch is written again and again: give a file, not -")
    if is_one_checkpoint(source):
        raise UsageError(f"{source} is one checkpoint: give the folder that holds the checkpoints of the run")
    watcher = _Watcher(
        source=source, options=options, device=device, jobs=jobs, quiet=quiet, journal=Journal(source, options)
    )
    show = _shown(source, html_path, every=every, quiet=quiet, stays=not once)
    analyses = list(watcher.known().values())
    waiting = False
    if analyses:
        show(analyses, analyses[-1])
    while True:
        has_ended = once or _has_finished(source)
        for analysis in watcher.look(patient=not has_ended):
            analyses = list(watcher.known().values())
            show(analyses, analysis)
            if fail_on is not None:
                fail_on_findings([analysis], fail_on)
        if has_ended:
            break
        if not analyses and not waiting:
            note(f"waiting for the first checkpoint in {source}", quiet=quiet)
            waiting = True
        time.sleep(every)
    analyses = list(watcher.known().values())  # another watcher may have been faster
    if not analyses:
        raise NothingToAnalyzeError(f"{source}: no whole checkpoint with a number in its name")
    if html_path is not None:
        _write_page(html_path, analyses, refresh=None, quiet=quiet)
    if not quiet and not sys.stdout.isatty():
        from esdtool.comparison.trajectory import make_trajectory
        from esdtool.report.terminal.watch import print_watch

        print_watch(make_trajectory(analyses))


@dataclass(kw_only=True)
class _Watcher:
    """Analyses what has landed."""

    source: str
    options: ScoreOptions
    device: str
    jobs: int | None
    quiet: bool
    journal: Journal
    refused: set[str] = field(default_factory=set)
    """Signatures of what is no checkpoint that can be read."""

    def known(self) -> dict[str, Analysis]:
        """Return what was analysed so far, in the order of training."""
        return self.journal.read()

    def look(self, *, patient: bool) -> Iterator[Analysis]:
        """Analyse the whole checkpoints that are new, one after the other.

        Args:
            patient: leave what was written to a moment ago for the next time.
        """
        from esdtool.comparison.landed import landings

        for landing in landings(self.source):
            if landing.signature in self.refused or not landing.has_all_shards:
                continue
            if patient and not landing.is_quiet(_QUIET_SECONDS):
                continue
            with self.journal.alone():
                self.journal.read()  # another watcher may have been here
                if self.journal.knows(landing.signature):
                    continue
                analysis = self._analysis(landing)
                if analysis is not None:
                    self.journal.add(landing.path, landing.signature, analysis)
            if analysis is not None:
                yield analysis

    def _analysis(self, landing: Landing) -> Analysis | None:
        """Analyse one checkpoint; None if it is gone, or not whole after all."""
        from esdtool.analysis.plan import make_plan
        from esdtool.analysis.run import run
        from esdtool.cli.output import note, progress_bar
        from esdtool.errors import CheckpointError, NothingToAnalyzeError
        from esdtool.findings.diagnosis import diagnose

        try:
            plan = make_plan(landing.path, self.options, device=self.device, jobs=self.jobs)
            with progress_bar(plan.cost, quiet=self.quiet) as advance:
                return diagnose(run(plan, on_progress=advance))
        except (CheckpointError, NothingToAnalyzeError) as error:
            if Path(landing.path).exists():
                self.refused.add(landing.signature)
                note(f"left out until it changes: {error}", quiet=self.quiet)
            return None


def _has_finished(source: str) -> bool:
    """Tell whether a run of `esdtool train` has written its last file."""
    from esdtool.cli.sources import is_run

    return is_run(Path(source)) and (Path(source) / "final").is_dir()


def _shown(
    source: str, html_path: str | None, *, every: float, quiet: bool, stays: bool
) -> Callable[[list[Analysis], Analysis], None]:
    """Return a function that draws the analyses so far, of which one is new."""
    from esdtool.cli.output import note
    from esdtool.comparison.trajectory import make_trajectory
    from esdtool.report.terminal.watch import news, print_watch

    def show(analyses: list[Analysis], new: Analysis) -> None:
        if html_path is not None:
            _write_page(html_path, analyses, refresh=max(1, round(every)) if stays else None, quiet=True)
        if sys.stdout.isatty() and not quiet:
            print_watch(make_trajectory(analyses), clear=stays)
            note(f"watching {source}; Ctrl-C ends", quiet=not stays)
        else:
            note(news(new), quiet=quiet)

    return show


def _write_page(path: str, analyses: list[Analysis], *, refresh: int | None, quiet: bool) -> None:
    from esdtool.cli.output import write_text
    from esdtool.comparison.trajectory import make_trajectory
    from esdtool.report.html import trajectory_page

    write_text(path, trajectory_page(make_trajectory(analyses), refresh=refresh), quiet=quiet)
