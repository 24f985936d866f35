"""Sort the sources of `esdtool compare` into runs, checkpoints and analyses, and analyse the checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from esdtool.analysis.distances import Distances
from esdtool.analysis.document import Analysis
from esdtool.analysis.pairs import measure_pairs
from esdtool.analysis.plan import Plan, make_plan
from esdtool.analysis.run import OnProgress, run
from esdtool.cli.output import note, progress_bar
from esdtool.cli.sources import SourceKind, checkpoint_of, format_of, kind_of, runs_in
from esdtool.comparison.monitor_log import last_of_log
from esdtool.comparison.runs import has_result
from esdtool.errors import CheckpointError, ConfigError, UsageError
from esdtool.modules import WeightModule
from esdtool.modules.choice import ModuleChoice
from esdtool.spectra.options import PairOptions, ScoreOptions

_WORK_OF_DISTANCES = 4
"""What the distances of a pair cost beside a spectrum, about."""


@dataclass(frozen=True, kw_only=True)
class ComparedSources:
    """The sources by what they are: either `runs` is empty, or `models` is."""

    runs: tuple[str, ...]
    """Run directories."""
    models: tuple[str | Analysis, ...]
    """Names of checkpoints, and analyses that were read from a file, as given."""
    notes: tuple[str, ...] = ()
    """Runs of a folder of runs that are left out, one line each."""

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """What is to be analysed."""
        return tuple(model for model in self.models if isinstance(model, str))

    @property
    def analyses(self) -> tuple[Analysis, ...]:
        """What is analysed already."""
        return tuple(model for model in self.models if isinstance(model, Analysis))


def sort_out(sources: Sequence[str], *, quiet: bool = False) -> ComparedSources:
    """Recognise each source; checkpoints are not opened yet.

    Args:
        sources: as given. Beside a checkpoint, a run directory stands for its final or newest checkpoint.
        quiet: whether that is not mentioned.

    Raises:
        UsageError: for a mixture of checkpoints and folders of runs, or a single checkpoint.
        ConfigError: for folders of runs of which none has a validation result.
        CheckpointError: for a JSON file of esdtool's that holds no analysis.
    """
    held = [(source, runs_in(source)) for source in sources]
    runs = tuple(run for _, found in held for run in found)
    others = tuple(source for source, found in held if not found)
    if runs and others:
        taken = tuple(checkpoint_of(source, quiet=quiet) for source in sources)
        if not any(runs_in(source) for source in taken):
            runs, others = (), taken
    if runs and others:
        raise UsageError(
            f"{runs[0]} is a training run and {others[0]} is not: compare runs with runs, or the run's checkpoint "
            f"{Path(runs[0]) / 'final'} with {others[0]}"
        )
    # A single folder is opened first: perhaps it was meant as a run.
    if len(others) == 1 and not Path(others[0]).is_dir():
        raise _too_few(others[0])
    young = [run for run in runs if run not in sources and not has_result(Path(run))]
    if runs and len(young) == len(runs):
        raise ConfigError(f"none of the {len(runs)} runs in {', '.join(sources)} has a validation result yet")
    return ComparedSources(
        runs=tuple(run for run in runs if run not in young),
        models=tuple(map(_analysis_or_name, others)),
        notes=tuple(f"{run} has no validation result yet: left out" for run in young),
    )


def analyses_of(
    found: ComparedSources,
    options: ScoreOptions,
    *,
    pairs: PairOptions,
    choice: ModuleChoice,
    device: str,
    jobs: int | None,
    memory: int | None,
    cache: bool,
    download: bool | None,
    quiet: bool,
) -> tuple[list[Analysis], list[Mapping[str, Distances]]]:
    """Return the analyses of all sources, in their order, and the distances of all but the first from the first.

    Args:
        found: the sources.
        options: what is computed of each module.
        pairs: what is measured of the weights of two checkpoints. Without `pairs.distances` nothing is fetched from a
            remote store for it, and there are no distances where a source is an analysis.
        choice: which modules are analysed.
        device: where to compute.
        jobs: modules worked on at a time; None takes the default.
        memory: bytes that the modules in flight may take together; None: no limit.
        cache: whether spectra are looked up and kept.
        download: whether models of the Hub are downloaded, see `esdtool.checkpoint.open_checkpoint`.
        quiet: whether progress and remarks are left out.

    Raises:
        UsageError: if there is only one, an analysis is by another estimator than `options`, or distances are asked
            for of an analysis.
        CheckpointError: if a checkpoint cannot be read.
    """
    if pairs.distances and found.analyses:
        raise UsageError(
            f"--distances needs the weights, and the analysis of {found.analyses[0].source.checkpoint} does not hold "
            "them: give the checkpoint"
        )
    if found.checkpoints:
        for analysis in found.analyses:
            if analysis.settings.fit[0] != options.fit[0]:
                fit = analysis.settings.fit[0]
                raise UsageError(
                    f"{found.checkpoints[0]} would be analysed by {options.fit[0]}, but {analysis.source.checkpoint} "
                    f"is by {fit}: use --fit {fit}"
                )

    def plan(checkpoint: str) -> Plan:
        try:
            return make_plan(
                checkpoint,
                options,
                choice=choice,
                device=device,
                jobs=jobs,
                memory=memory,
                cache=cache,
                download=download,
            )
        except CheckpointError as error:
            if not Path(checkpoint).is_dir():
                raise
            raise CheckpointError(f"{error}; and no run directory of `esdtool train` either") from error

    # All are opened before the first is computed: a mistake in the last name shows at once.
    planned = [plan(model) if isinstance(model, str) else model for model in found.models]
    if len(planned) < 2:
        raise _too_few(found.checkpoints[0])
    plans = [model for model in planned if isinstance(model, Plan)]
    for made in plans:
        for remark in made.notes:
            note(remark, quiet=quiet)
    first, *others = planned
    more = _WORK_OF_DISTANCES * sum(made.cost for made in plans[1:]) if pairs.distances else 0
    with progress_bar(sum(made.cost for made in plans) + more, quiet=quiet) as advance:
        analyses = [run(model, on_progress=advance) if isinstance(model, Plan) else model for model in planned]
        distances = [_distances(first, other, pairs, advance if pairs.distances else None) for other in others]
    return analyses, distances


def _distances(
    first: Plan | Analysis, other: Plan | Analysis, pairs: PairOptions, on_progress: OnProgress | None
) -> Mapping[str, Distances]:
    if not isinstance(first, Plan) or not isinstance(other, Plan):
        return {}
    if not pairs.distances and (first.limits.is_remote or other.limits.is_remote):
        return {}  # all bytes would come over the network a second time

    def advance(module: WeightModule, cost: float) -> None:
        if on_progress is not None:
            on_progress(module, _WORK_OF_DISTANCES * cost)

    return measure_pairs(first, other, pairs, on_progress=advance)


def _too_few(source: str) -> UsageError:
    return UsageError(f"{source} is one checkpoint: a comparison needs at least two")


def _analysis_or_name(source: str) -> str | Analysis:
    kind = kind_of(source)
    if kind is SourceKind.ANALYSIS:
        return Analysis.from_json(source)
    if kind is SourceKind.MONITOR_LOG:
        return last_of_log(source)
    if kind in (SourceKind.TRAJECTORY, SourceKind.ASSIGNMENT, SourceKind.OTHER_DOCUMENT):
        raise CheckpointError(
            f"{source}: {format_of(source)}, but an analysis of one checkpoint is needed ('analyze --json')"
        )
    return source
