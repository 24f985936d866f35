"""Measure how far modules are from their counterparts, while both are in memory, or in a pass of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from esdtool.analysis.counterparts import find_counterparts
from esdtool.analysis.difference import Pairs, read_pairs
from esdtool.analysis.distances import Distances
from esdtool.analysis.execution import Batch, Limits, carry_out, lack_of_memory_named, read_bytes
from esdtool.analysis.plan import Plan, pair_bytes
from esdtool.checkpoint.adapters import MergedCheckpoint
from esdtool.modules import WeightModule
from esdtool.modules.base import cost
from esdtool.modules.reading import read_rows
from esdtool.spectra.matrix_pair import MatrixPair
from esdtool.spectra.options import PairOptions
from esdtool.spectra.pair_measure import measure_pair


def distances_of(pairs: Pairs, *, device: torch.device, options: PairOptions) -> Distances | None:
    """Measure a module against its counterpart.

    The positions of a convolution's kernel are put side by side, [out, in * positions]: what acts on a patch.

    Args:
        pairs: (matrix of the module, matrix of the base) of one shape each; one pair, or one for each position.
        device: where to compute.
        options: what to measure.

    Returns:
        None where a weight is not finite.
    """
    others, bases = ([pair[side] for pair in pairs] for side in (0, 1))
    pair = MatrixPair(base=_joined(bases), other=_joined(others), device=device, options=options)
    found = measure_pair(pair, cheap_only=not options.distances)
    return None if found is None else Distances(**found)


def pairs_of_merged(plan: Plan, module: WeightModule, matrices: Sequence[torch.Tensor]) -> Pairs:
    """Put a module that an adapter changes beside the base's own; nothing where distances are not asked for.

    Args:
        plan: of an adapter merged into its base, or of anything else, which has no such pair.
        module: the module.
        matrices: its matrices, merged.

    Raises:
        CheckpointError: if a tensor of the base cannot be read.
    """
    merged = plan.checkpoint
    if not (plan.pairs.distances and isinstance(merged, MergedCheckpoint) and module.parameter in merged.base.tensors):
        return ()
    if module.parameter not in merged.updated and module.parameter not in merged.replaced:
        return ()
    bases = module.matrices_of_rows(read_rows(merged.base, module))
    return [(new, old.to(new.device)) for new, old in zip(matrices, bases, strict=True)]


def measure_pairs(
    first: Plan, other: Plan, options: PairOptions, *, on_progress: Callable[[WeightModule, float], None] | None = None
) -> dict[str, Distances]:
    """Measure the modules of two checkpoints against each other; the spectra of both are another matter.

    Args:
        first: plan of the base.
        other: plan of the other checkpoint; its device, jobs and memory hold.
        options: what to measure.
        on_progress: called after each pair with the module and its cost.

    Returns:
        The distances by the name of the first checkpoint's module, for all that have a counterpart and are finite.

    Raises:
        CheckpointError: if a tensor cannot be read.
    """
    found = find_counterparts(first.selection.modules, other.selection.modules).pairs
    bases = {module.name: module for module in first.selection.modules if module.name in found}
    limits = Limits(
        jobs=other.jobs,
        memory=other.memory,
        read_ahead=not (first.collective_reads or other.collective_reads),
        is_remote=other.limits.is_remote or first.limits.is_remote,
        beside={name: _beside(module, found[name], options) for name, module in bases.items()},
    )

    def read(batch: Batch) -> Pairs:
        with lack_of_memory_named(batch, limits, location=first.checkpoint.location):
            return read_pairs(other.checkpoint, found[batch[0].name], first.checkpoint, batch[0])

    def compute(batch: Batch, pairs: Pairs) -> Distances | None:
        with lack_of_memory_named(batch, limits, location=first.checkpoint.location):
            return distances_of(pairs, device=other.device, options=options)

    batches = [(module,) for module in sorted(bases.values(), key=cost, reverse=True)]
    results: dict[str, Distances] = {}
    for batch, distances in carry_out(batches, read, compute, limits=limits):
        if distances is not None:
            results[batch[0].name] = distances
        if on_progress is not None:
            on_progress(batch[0], cost(batch[0]))
    return results


def _beside(base: WeightModule, other: WeightModule, options: PairOptions) -> int:
    # A low-rank update is multiplied out.
    product = 8 * math.prod(base.shape) if base.rank is not None or other.rank is not None else 0
    return read_bytes(other) + 2 * product + pair_bytes(base.matrix_shape, base.num_matrices, options)


def _joined(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices), dim=1)
