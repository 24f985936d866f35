"""From a checkpoint to its analysis: which modules, in which order, on which cores or device.

The most expensive modules come first, so that the last ones to finish are small. `esdtool.execution` has the threads,
`esdtool.ranks` several processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from esdtool._version import __version__
from esdtool.analysis import Analysis, ModuleResult, Settings, SkippedResult, Source
from esdtool.checkpoint import Checkpoint, from_model, from_state_dict, open_checkpoint
from esdtool.checkpoint.adapter import is_adapter
from esdtool.devices import resolve_device
from esdtool.difference import Pairing, difference, pair_modules
from esdtool.errors import NothingToAnalyzeError, UsageError
from esdtool.execution import Batch, Limits, batches_of, carry_out, peak_bytes
from esdtool.merge import merged
from esdtool.modules import Selection, WeightModule, select_modules
from esdtool.options import LOW_RANK_MIN_EIGS, ScoreOptions
from esdtool.ranks import AnalysisRanks
from esdtool.reading import read_matrices
from esdtool.results import module_result
from esdtool.scoring import ALL_ZERO, ScoreRequest, cost, score_batch
from esdtool.spectrum_cache import SpectrumCache
from esdtool.summary import summarize
from esdtool.tail import Vector
from esdtool.threads import available_cores

Readable = str | Path | torch.nn.Module | Mapping[str, torch.Tensor] | Checkpoint
"""What can be analysed: a path or Hub id, a live model, a state dict, or an open checkpoint."""

OnProgress = Callable[[WeightModule, float], None]
"""Called in the main thread after each module with the module and its cost."""

_UNCHANGED = "unchanged: equal to the base to the last bit"


@dataclass(frozen=True, kw_only=True)
class Base:
    """A checkpoint to subtract, and which of its modules corresponds to which."""

    checkpoint: Checkpoint
    pairing: Pairing

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the base, and how much of the two checkpoints has no counterpart."""
        lost = self.pairing.unmatched
        if not lost:
            return self.checkpoint.notes
        more = f"; {len(lost)} in all, see the list of what is skipped" if len(lost) > 1 else ""
        return (*self.checkpoint.notes, f"{lost[0].name}: {lost[0].reason}{more}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an analysis will do, known from headers alone."""

    checkpoint: Checkpoint
    selection: Selection
    options: ScoreOptions
    device: torch.device
    jobs: int
    base: Base | None = None
    """Whose weights are subtracted; None: the weights themselves are analysed."""
    merged_with: str | None = None
    """The checkpoint that an adapter is merged into."""
    split_fused: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    cache: SpectrumCache | None = None
    """Where spectra are looked up and kept; None: all are computed."""
    memory: int | None = None
    """Bytes that the modules in flight may take together; None: no limit."""
    estimated: frozenset[str] = frozenset()
    """Names of modules whose alpha is estimated to save time (`esdtool.budget`)."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks that the user should see."""
        return (*self.checkpoint.notes, *(() if self.base is None else self.base.notes))

    @property
    def cost(self) -> float:
        """Predicted work in flops."""
        return sum(cost(module) for module in self.selection.modules)

    def batches(self, modules: Sequence[WeightModule]) -> list[Batch]:
        """What is computed at a time, dearest first."""
        ordered = sorted(modules, key=cost, reverse=True)
        return batches_of(ordered, together=self.device.type != "cpu", limits=self.limits)

    @property
    def limits(self) -> Limits:
        """How much is done at a time."""
        return Limits(jobs=self.jobs, memory=self.memory, read_ahead=not self.checkpoint.collective_reads)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak memory of the modules in flight."""
        return peak_bytes(self.batches(self.selection.modules), self.limits)


def analyze(
    source: Readable,
    *,
    fit: str | Sequence[str] = "hill",
    k_fraction: float = 0.5,
    min_eigs: int = 50,
    spectrum: str = "auto",
    fast: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    split_fused: bool = True,
    base: Readable | None = None,
    device: str | torch.device = "auto",
    jobs: int | None = None,
    revision: str | None = None,
    fix_finger_bound: str = "linear",
    farms_rows: int = 100,
    farms_ratio: float = 2.0,
    farms_windows: int = 10,
    cache: bool = True,
    memory: int | None = None,
    budget: float | None = None,
    on_progress: OnProgress | None = None,
) -> Analysis:
    """Spectra and alphas of every weight module.

    Args:
        source: a path or Hub id, a live model, a state dict, or an open checkpoint.
        fit: one or more of `hill`, `ks`, `fix-finger`, `farms`, `powerlaw`; the first gives `alpha`.
        k_fraction: fraction of the eigenvalues in the Hill estimator's tail.
        min_eigs: modules with fewer eigenvalues are not scored.
        spectrum: `auto`, `gram` or `svd`, see `esdtool.spectrum`; `slq` estimates large modules, see `esdtool.slq`.
        fast: allow float32 where its error bound admits it (alphas within 1e-4).
        include: regular expressions on parameter and module names; if given, only what matches one is analysed.
        exclude: regular expressions on parameter and module names to leave out.
        split_fused: False keeps fused projections in one module.
        base: another checkpoint: the differences from its weights are analysed; for an adapter: the base's weights
            with the adapter merged in.
        device: `auto` (CUDA if there is one, else the CPU), `cpu`, `cuda`, `cuda:N` or `mps`.
        jobs: modules worked on at a time; default one per core on the CPU, one on an accelerator.
        revision: branch, tag or commit of a Hub checkpoint.
        fix_finger_bound: `linear`, or `legacy` for the public code's window.
        farms_rows: rows of a FARMS window.
        farms_ratio: columns over rows of a FARMS window.
        farms_windows: FARMS windows per dimension.
        cache: look up and keep the spectra of a path or Hub id in the user's cache (`esdtool.spectrum_cache`).
        memory: bytes that the modules in flight may take together; one that needs more is done alone.
        budget: seconds; if all exactly would take longer, the most expensive modules are estimated as by `slq`, as
            few as needed.
        on_progress: called after each module.

    Returns:
        The analysis; `Analysis.esds` holds the eigenvalues of each module.

    Raises:
        CheckpointError: if the source cannot be read.
        UsageError: if an option has no such value or a pattern matches nothing.
        NothingToAnalyzeError: if the source holds no weight matrix.
    """
    options = ScoreOptions(
        fit=(fit,) if isinstance(fit, str) else tuple(fit),
        k_fraction=k_fraction,
        min_eigs=min_eigs,
        spectrum=spectrum,  # type: ignore[arg-type] # checked by ScoreOptions itself
        fast=fast,
        fix_finger_bound=fix_finger_bound,  # type: ignore[arg-type]
        farms_rows=farms_rows,
        farms_ratio=farms_ratio,
        farms_windows=farms_windows,
    )
    plan = make_plan(
        source,
        options,
        include=include,
        exclude=exclude,
        split_fused=split_fused,
        base=base,
        device=device,
        jobs=jobs,
        revision=revision,
        cache=cache,
        memory=memory,
    )
    if budget is not None:
        from esdtool.budget import keep_within

        plan, _ = keep_within(plan, budget)
    return run(plan, on_progress=on_progress)


def make_plan(
    source: Readable,
    options: ScoreOptions,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    split_fused: bool = True,
    base: Readable | None = None,
    device: str | torch.device = "auto",
    jobs: int | None = None,
    revision: str | None = None,
    cache: bool = True,
    memory: int | None = None,
) -> Plan:
    """Open the source and choose its modules, without reading weights. Arguments and errors as `analyze`."""
    chosen = resolve_device(device)
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs must be at least 1, not {jobs}")
    checkpoint = _open(source, revision)
    other = None if base is None else _open(base, None)
    merged_with = None
    if other is not None and is_adapter(checkpoint):
        merged_with, checkpoint, other = other.location, merged(checkpoint, other), None
    selection = select_modules(
        checkpoint.tensors.values(),
        config=checkpoint.config,
        include=tuple(include),
        exclude=tuple(exclude),
        split_fused=split_fused,
    )
    paired = None
    if other is not None:
        paired, selection = _paired(checkpoint, selection, other, split_fused=split_fused)
    if not selection.modules:
        raise NothingToAnalyzeError(
            f"{checkpoint.location}: no weight matrix to analyse among {len(checkpoint.tensors)} tensors"
            + _reasons(selection)
        )
    available = available_cores() if chosen.type == "cpu" else 1
    if checkpoint.collective_reads:
        jobs = 1  # one thread, one order
    return Plan(
        checkpoint=checkpoint,
        selection=selection,
        options=options,
        device=chosen,
        jobs=min(jobs or available, len(selection.modules)),
        base=paired,
        merged_with=merged_with,
        split_fused=split_fused,
        include=tuple(include),
        exclude=tuple(exclude),
        # What is in memory changes and is not met again.
        cache=SpectrumCache.of_user() if cache and isinstance(source, str | Path) else None,
        memory=memory,
    )


def _paired(
    checkpoint: Checkpoint, selection: Selection, base: Checkpoint, *, split_fused: bool
) -> tuple[Base, Selection]:
    """The base's counterparts, and the selection without the modules that have none."""
    theirs = select_modules(base.tensors.values(), config=base.config, split_fused=split_fused)
    pairing = pair_modules(selection.modules, theirs.modules, location=checkpoint.location, base_location=base.location)
    matched = tuple(module for module in selection.modules if module.name in pairing.base)
    skipped = (*selection.skipped, *pairing.unmatched)
    return Base(checkpoint=base, pairing=pairing), Selection(modules=matched, skipped=skipped)


def run(plan: Plan, *, ranks: AnalysisRanks | None = None, on_progress: OnProgress | None = None) -> Analysis:
    """Carry out a plan. The result does not depend on `plan.jobs`, nor on the number of ranks.

    Args:
        plan: from `make_plan`.
        ranks: processes that share the work, each with the same plan; only the first one's analysis has modules.
        on_progress: called in the main thread after each module.
    """
    modules = plan.selection.modules if ranks is None else tuple(ranks.share(plan.selection.modules))

    def work() -> list[tuple[ModuleResult, Vector | None]]:
        results = []
        for module, result in _results(plan, modules):
            results.append(result)
            if on_progress is not None:
                on_progress(module, cost(module))
        return results

    scored = {found[0].name: found for found in (work() if ranks is None else ranks.collect(work))}
    if plan.cache is not None:
        plan.cache.trim()
    all_here = ranks is None or ranks.is_first
    return _analysis(plan, [scored[module.name] for module in plan.selection.modules if all_here])


def _analysis(plan: Plan, results: Sequence[tuple[ModuleResult, Vector | None]]) -> Analysis:
    """The results in the form of the file."""
    checkpoint, options = plan.checkpoint, plan.options
    uses_farms = "farms" in options.fit
    analysis = Analysis(
        created_by=f"esdtool {__version__}",
        source=Source(
            checkpoint=checkpoint.location,
            revision=checkpoint.revision,
            model_type=checkpoint.model_type,
            files=checkpoint.files,
            base=None if plan.base is None else plan.base.checkpoint.location,
            merged_with=plan.merged_with,
        ),
        settings=Settings(
            fit=options.fit,
            k_fraction=options.k_fraction,
            min_eigs=options.min_eigs,
            spectrum=options.spectrum,
            fast=options.fast,
            fix_finger_bound=options.fix_finger_bound,
            farms_rows=options.farms_rows if uses_farms else None,
            farms_ratio=options.farms_ratio if uses_farms else None,
            farms_windows=options.farms_windows if uses_farms else None,
            split_fused=plan.split_fused,
            include=plan.include,
            exclude=plan.exclude,
        ),
        modules=tuple(result for result, _ in results),
        skipped=tuple(
            SkippedResult(name=tensor.name, shape=tensor.shape, dtype=tensor.dtype, reason=tensor.reason)
            for tensor in plan.selection.skipped
        ),
        summary=summarize([result for result, _ in results], num_skipped=len(plan.selection.skipped)),
    )
    return analysis.with_esds({result.name: eigenvalues for result, eigenvalues in results if eigenvalues is not None})


def _open(source: Readable, revision: str | None) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, torch.nn.Module):
        return from_model(source)
    if isinstance(source, Mapping):
        return from_state_dict(source)
    return open_checkpoint(source, revision=revision)


Weights = tuple[list[torch.Tensor], float | None]
"""A module's matrices, and the relative rounding error of its stored weights where it is not that of their dtype."""


def _results(
    plan: Plan, modules: Sequence[WeightModule]
) -> Iterator[tuple[WeightModule, tuple[ModuleResult, Vector | None]]]:
    """Every module's result, in the order in which they get done."""
    for batch, results in carry_out(
        plan.batches(modules),
        lambda batch: [_read(plan, module) for module in batch],
        lambda batch, weights: _score(plan, batch, weights),
        limits=plan.limits,
    ):
        yield from zip(batch, results, strict=True)


def _read(plan: Plan, module: WeightModule) -> Weights:
    if plan.base is None:
        return read_matrices(plan.checkpoint, module), module.roundoff
    return difference(plan.checkpoint, module, plan.base.checkpoint, plan.base.pairing.base[module.name])


def _score(
    plan: Plan, batch: Sequence[WeightModule], weights: Sequence[Weights]
) -> list[tuple[ModuleResult, Vector | None]]:
    requests = [
        ScoreRequest(
            matrices=matrices, options=_options(plan, module), scale=module.eigenvalue_scale, roundoff=roundoff
        )
        for module, (matrices, roundoff) in zip(batch, weights, strict=True)
    ]
    results = []
    scores = score_batch(requests, device=plan.device, cache=plan.cache)
    for module, request, score in zip(batch, requests, scores, strict=True):
        if plan.base is not None and score.status == ALL_ZERO:
            score = replace(score, status=_UNCHANGED)
        eigenvalues = None if score.spectrum is None else score.spectrum.eigenvalues
        results.append((module_result(module, score, request.options), eigenvalues))
    return results


def _options(plan: Plan, module: WeightModule) -> ScoreOptions:
    """The plan's options, for this module."""
    options = plan.options
    if module.name in plan.estimated:
        options = replace(options, spectrum="slq")
    if module.rank is not None:
        options = replace(options, min_eigs=min(options.min_eigs, LOW_RANK_MIN_EIGS))
    return options


def _reasons(selection: Selection) -> str:
    """The commonest reasons for leaving tensors out, for the message that none is left."""
    counts = Counter(tensor.reason for tensor in selection.skipped)
    if not counts:
        return ""
    return " (skipped: " + "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(3)) + ")"
