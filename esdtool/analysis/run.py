"""From a checkpoint to its analysis: which modules, in which order, on which cores or device.

The most expensive modules come first, so that the last ones to finish are small. `esdtool.analysis.execution` has the
threads, `esdtool.analysis.ranks` several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from esdtool._version import __version__
from esdtool.analysis.difference import difference_of, read_pairs
from esdtool.analysis.distances import Distances
from esdtool.analysis.document import Analysis, Settings, SkippedResult, Source
from esdtool.analysis.execution import Batch, carry_out, lack_of_memory_named
from esdtool.analysis.head_result import HeadResult, LeftOutHeads
from esdtool.analysis.heads import analyze_heads
from esdtool.analysis.module_record import ModuleResult
from esdtool.analysis.module_result import module_result
from esdtool.analysis.observation import Observation, observe
from esdtool.analysis.pairs import distances_of, pairs_of_merged
from esdtool.analysis.plan import Plan, Readable, make_plan
from esdtool.analysis.ranks import AnalysisRanks
from esdtool.analysis.summary import summarize
from esdtool.analysis.weights import ModuleWeights, Read, remember_weights, weights_of_batch
from esdtool.modules import WeightModule
from esdtool.modules.base import cost
from esdtool.modules.choice import ModuleChoice
from esdtool.modules.reading import Rows, read_matrices
from esdtool.modules.splitting import SplitRequest
from esdtool.spectra.options import LOW_RANK_MIN_EIGS, PairOptions, ScoreOptions
from esdtool.spectra.scoring import ALL_ZERO, MatrixScore, ScoreRequest, score_batch
from esdtool.spectra.tail import Vector
from esdtool.spectra.traps import drawn_traps, known_traps
from esdtool.spectra.vectors import known_vectors
from esdtool.support.devices import own_stream

OnProgress = Callable[[WeightModule, float], None]
"""Called in the main thread after each module with the module and its cost."""

Scored = tuple[ModuleResult, Vector | None, Observation]
"""A module's result, its eigenvalues if float64 can hold them, and what was noticed about its weights."""

_UNCHANGED = "unchanged: equal to the base to the last bit"


def analyze(
    source: Readable,
    *,
    fit: str | Sequence[str] = ScoreOptions.fit,
    k_fraction: float = ScoreOptions.k_fraction,
    min_eigs: int = ScoreOptions.min_eigs,
    spectrum: str = ScoreOptions.spectrum,
    fast: bool = ScoreOptions.fast,
    include: Sequence[str] = ModuleChoice.include,
    exclude: Sequence[str] = ModuleChoice.exclude,
    split_fused: bool = ModuleChoice.split_fused,
    split: Sequence[str | SplitRequest] = ModuleChoice.split,
    sample_layers: int | None = ModuleChoice.sample_layers,
    base: Readable | None = None,
    merged_from: Sequence[Readable] = (),
    device: str | torch.device = "auto",
    jobs: int | None = None,
    revision: str | None = None,
    download: bool | None = None,
    filter_zeros: bool = ScoreOptions.filter_zeros,
    fix_finger_bound: str = ScoreOptions.fix_finger_bound,
    traps: str = ScoreOptions.traps,
    seed: int = ScoreOptions.seed,
    vectors: bool = ScoreOptions.vectors,
    farms_rows: int = ScoreOptions.farms_rows,
    farms_ratio: float = ScoreOptions.farms_ratio,
    farms_windows: int = ScoreOptions.farms_windows,
    cache: bool = True,
    memory: int | None = None,
    per_head: bool = False,
    budget: float | None = None,
    distances: bool = PairOptions.distances,
    intruder_vectors: int = PairOptions.intruder_vectors,
    intruder_similarity: float = PairOptions.intruder_similarity,
    on_progress: OnProgress | None = None,
) -> Analysis:
    """Spectra and alphas of every weight module.

    Args:
        source: a path or Hub id, a live model, a state dict, or an open checkpoint.
        fit: one or more names of `esdtool.spectra.estimators`, such as `hill`, `ks`, `bounded`, `tpl`, `powerlaw`; the
            first gives `alpha`.
        k_fraction: fraction of the eigenvalues in the Hill estimator's tail.
        min_eigs: modules with fewer eigenvalues are not scored.
        spectrum: `auto`, `gram` or `svd`, see `esdtool.spectra.spectrum`; `slq` estimates large modules, see
            `esdtool.spectra.slq`.
        fast: allow float32 where its error bound admits it (alphas within 1e-4).
        include: regular expressions on parameter and module names; if given, only what matches one is analysed.
        exclude: regular expressions on parameter and module names to leave out.
        split_fused: False keeps fused projections in one module.
        split: how tensors are split that no known family tells, each as `REGEX=LAYOUT` with a layout of
            `esdtool.modules.splitting`.
        sample_layers: analyse only so many layers, evenly by depth, with all their modules.
        base: another checkpoint: the differences from its weights are analysed; for an adapter: the base's weights
            with the adapter merged in.
        merged_from: two or more checkpoints that were merged into this one, all made from `base`: findings say where
            their changes cancel.
        device: `auto` (CUDA if there is one, else the CPU), `cpu`, `cuda`, `cuda:N` or `mps`.
        jobs: modules worked on at a time; default one per core on the CPU, one on an accelerator.
        revision: branch, tag or commit of a Hub checkpoint.
        download: whether models of the Hub are downloaded, rather than read by ranges of bytes; see
            `esdtool.checkpoint.open_checkpoint`.
        filter_zeros: leave eigenvalues of at most 1e-5 out of the fits, as the public code of AlphaDecay can.
        fix_finger_bound: `linear`, or `legacy` for the public code's window.
        traps: `law`, or `shuffle` to also count correlation traps in a shuffled copy (`esdtool.spectra.traps`).
        seed: of the shuffles.
        vectors: also compute the singular vectors, and how localised they are (`esdtool.spectra.vectors`).
        farms_rows: rows of a FARMS window.
        farms_ratio: columns over rows of a FARMS window.
        farms_windows: FARMS windows per dimension.
        cache: look up and keep the spectra of a path or Hub id in the user's cache (`esdtool.spectra.cache`).
        memory: bytes that the modules in flight may take together; one that needs more is done alone.
        per_head: also analyse the parts of q, k, v and o that belong to each attention head, and their products
            (`esdtool.analysis.heads`).
        budget: seconds; if all exactly would take longer, the most expensive modules are estimated as by `slq`, as
            few as needed.
        distances: with `base`: compare the singular vectors with the base's (`esdtool.spectra.pairs`).
        intruder_vectors: largest singular vectors among which intruder dimensions are sought.
        intruder_similarity: |cosine| with a vector of the base below which a vector is an intruder.
        on_progress: called after each module.

    Returns:
        The analysis; `Analysis.esds` holds the eigenvalues of each module that float64 can hold.

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
        filter_zeros=filter_zeros,
        fix_finger_bound=fix_finger_bound,  # type: ignore[arg-type]
        traps=traps,  # type: ignore[arg-type]
        seed=seed,
        vectors=vectors,
        farms_rows=farms_rows,
        farms_ratio=farms_ratio,
        farms_windows=farms_windows,
    )
    plan = make_plan(
        source,
        options,
        choice=ModuleChoice.of(
            include=include, exclude=exclude, split_fused=split_fused, split=split, sample_layers=sample_layers
        ),
        base=base,
        merged_from=merged_from,
        device=device,
        jobs=jobs,
        revision=revision,
        cache=cache,
        memory=memory,
        download=download,
        pairs=PairOptions(
            distances=distances, intruder_vectors=intruder_vectors, intruder_similarity=intruder_similarity
        ),
        per_head=per_head,
    )
    if budget is not None:
        from esdtool.analysis.budget import keep_within

        plan, _ = keep_within(plan, budget)
    return run(plan, on_progress=on_progress)


def run(plan: Plan, *, ranks: AnalysisRanks | None = None, on_progress: OnProgress | None = None) -> Analysis:
    """Carry out a plan. The result does not depend on `plan.jobs`, nor on the number of ranks.

    Args:
        plan: from `make_plan`.
        ranks: processes that share the work, each with the same plan; only the first one's analysis has modules.
        on_progress: called in the main thread after each module.
    """
    modules = plan.selection.modules if ranks is None else tuple(ranks.share(plan.selection.modules))

    def work() -> list[Scored]:
        results = []
        for module, result in _results(plan, modules):
            results.append(result)
            if on_progress is not None:
                on_progress(module, cost(module))
        return results

    scored = {found[0].name: found for found in (work() if ranks is None else ranks.collect(work))}
    heads = analyze_heads(plan, ranks=ranks) if plan.attention else ()
    if plan.cache is not None:
        plan.cache.trim()
    all_here = ranks is None or ranks.is_first
    return _analysis(plan, [scored[module.name] for module in plan.selection.modules if all_here], heads)


def _analysis(plan: Plan, results: Sequence[Scored], heads: tuple[HeadResult, ...]) -> Analysis:
    """Bring the results into the form of the file."""
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
            merged_from=tuple(parent.checkpoint.location for parent in plan.parents) or None,
        ),
        settings=Settings(
            fit=options.fit,
            k_fraction=options.k_fraction,
            min_eigs=options.min_eigs,
            spectrum=options.spectrum,
            fast=options.fast,
            filter_zeros=options.filter_zeros,
            fix_finger_bound=options.fix_finger_bound,
            farms_rows=options.farms_rows if uses_farms else None,
            farms_ratio=options.farms_ratio if uses_farms else None,
            farms_windows=options.farms_windows if uses_farms else None,
            traps=options.traps,
            seed=options.seed if options.traps == "shuffle" else None,
            vectors=options.vectors,
            distances=plan.pairs.distances,
            intruder_vectors=plan.pairs.intruder_vectors if plan.pairs.distances else None,
            intruder_similarity=plan.pairs.intruder_similarity if plan.pairs.distances else None,
            per_head=bool(plan.attention),
            split_fused=plan.choice.split_fused,
            split=tuple(request.words for request in plan.choice.split),
            include=plan.choice.include,
            exclude=plan.choice.exclude,
            sample_layers=plan.choice.sample_layers,
        ),
        modules=tuple(result for result, *_ in results),
        skipped=tuple(
            SkippedResult(
                name=tensor.name, shape=tensor.shape, dtype=tensor.dtype, kind=tensor.kind, reason=tensor.reason
            )
            for tensor in plan.selection.skipped
        ),
        heads=heads,
        heads_left_out=tuple(LeftOutHeads(name=block.name, reason=block.reason) for block in plan.left_out_attention),
        summary=summarize([result for result, *_ in results], num_skipped=len(plan.selection.skipped)),
    )
    esds = {result.name: eigenvalues for result, eigenvalues, _ in results if eigenvalues is not None}
    return analysis.with_esds(esds).with_observations({result.name: noticed for result, _, noticed in results})


def _results(plan: Plan, modules: Sequence[WeightModule]) -> Iterator[tuple[WeightModule, Scored]]:
    """Yield every module's result, in the order in which they get done."""
    limits, location = plan.limits, plan.checkpoint.location

    def read(batch: Batch) -> list[ModuleWeights]:
        with lack_of_memory_named(batch, limits, location=location):
            return weights_of_batch(plan, batch, _read)

    def compute(batch: Batch, weights: list[ModuleWeights]) -> list[Scored]:
        with lack_of_memory_named(batch, limits, location=location), own_stream(plan.device):
            return _score(plan, batch, weights)

    for batch, results in carry_out(plan.batches(modules), read, compute, limits=limits):
        yield from zip(batch, results, strict=True)


def _read(plan: Plan, module: WeightModule, shared: Rows | None) -> Read:
    if plan.base is not None:
        counterpart = plan.base.pairing.base[module.name]
        pairs = read_pairs(plan.checkpoint, module, plan.base.checkpoint, counterpart)
        matrices, roundoff = difference_of(pairs, module, counterpart)
        return Read(matrices=matrices, roundoff=roundoff, pairs=pairs)
    matrices = read_matrices(plan.checkpoint, module, shared=shared)
    return Read(matrices=matrices, roundoff=module.roundoff, pairs=pairs_of_merged(plan, module, matrices))


def _score(plan: Plan, batch: Sequence[WeightModule], weights: Sequence[ModuleWeights]) -> list[Scored]:
    requests = [
        ScoreRequest(
            matrices=read.matrices,
            options=_options(plan, module),
            scale=module.eigenvalue_scale,
            roundoff=read.roundoff,
            content=read.content,
            load=read.load,
        )
        for module, read in zip(batch, weights, strict=True)
    ]
    results = []
    scores = score_batch(requests, device=plan.device, cache=plan.cache)
    for module, read, request, score in zip(batch, weights, requests, scores, strict=True):
        if plan.base is not None and score.status == ALL_ZERO:
            score = replace(score, status=_UNCHANGED)
        distances = _distances(plan, read)
        if read.known is None:
            remember_weights(plan, read, distances)
        noticed = _notice(plan, module, read, request, score)
        result = module_result(module, score, request.options).model_copy(update={"distances": distances})
        if result.ok:
            result = result.model_copy(update=_traps(plan, module, request) | _vectors(plan, module, request, score))
        results.append((result, _eigenvalues(score), noticed))
    return results


def _notice(
    plan: Plan, module: WeightModule, read: ModuleWeights, request: ScoreRequest, score: MatrixScore
) -> Observation:
    return observe(
        lambda: request.data,
        score.spectrum,
        content=read.content,
        is_product=module.rank is not None,
        tasks=read.tasks,
        cache=plan.cache,
    )


def _distances(plan: Plan, read: ModuleWeights) -> Distances | None:
    if read.known is not None:
        return (
            None if plan.base is None else Distances.model_validate({"relative_distance": read.known.relative_distance})
        )
    return distances_of(read.pairs, device=plan.device, options=plan.pairs) if read.pairs else None


def _traps(plan: Plan, module: WeightModule, request: ScoreRequest) -> dict[str, Any]:
    """Return the keys of a module's correlation traps."""
    found = known_traps(lambda: request.data, scale=request.scale, cache=plan.cache, content=request.content)
    drawn = None
    if request.options.traps == "shuffle":
        drawn = drawn_traps(request.data, seed=request.options.seed, name=module.name, device=plan.device)
    return {"num_traps": found.count, "num_traps_drawn": drawn, "traps": found if found.count else None}


def _vectors(plan: Plan, module: WeightModule, request: ScoreRequest, score: MatrixScore) -> dict[str, Any]:
    """Return the key of a module's singular vectors; nothing where nobody asked, or for a low-rank update.

    Of such an update only a small matrix of its singular values is in memory, whose vectors are not the update's.
    """
    first = score.fits.get(request.options.fit[0])
    if not request.options.vectors or module.rank is not None or score.spectrum is None or first is None:
        return {}
    found = known_vectors(
        lambda: request.data,
        score.spectrum,
        xmin=first.xmin,
        scale=request.scale,
        device=plan.device,
        cache=plan.cache,
        content=request.content,
    )
    return {"vectors": found}


def _eigenvalues(score: MatrixScore) -> Vector | None:
    """Return the eigenvalues of a module, or None where there are none or float64 has no numbers of their size."""
    return None if score.spectrum is None or score.spectrum.exponent else score.spectrum.eigenvalues


def _options(plan: Plan, module: WeightModule) -> ScoreOptions:
    """Adapt the plan's options to a module."""
    options = plan.options
    if module.name in plan.estimated:
        options = replace(options, spectrum="slq")
    if module.rank is not None:
        options = replace(options, min_eigs=min(options.min_eigs, LOW_RANK_MIN_EIGS))
    return options
