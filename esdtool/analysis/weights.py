"""A module's weights for scoring: read, or, where they are known to be those of an earlier analysis, only promised.

A remote store tells by etags which bytes it has. For these the cache of spectra keeps a note of what the matrices are,
so that a second analysis finds its spectra without fetching a byte. Should a spectrum be missing, the promise is kept:
the weights are fetched then.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from esdtool._version import __version__
from esdtool.analysis.difference import Pairs
from esdtool.analysis.distances import Distances
from esdtool.analysis.plan import Base, Plan
from esdtool.analysis.task_vectors import TaskVectors, task_vectors
from esdtool.modules import WeightModule
from esdtool.modules.reading import Rows
from esdtool.spectra.cache import MatrixFacts, content_hash


@dataclass(frozen=True, kw_only=True)
class Read:
    """The matrices of a module as they were read."""

    matrices: Sequence[torch.Tensor]
    """[rows, columns] each: those to decompose."""
    roundoff: float | None
    """Relative rounding error of the stored weights where it is not that of their dtype."""
    pairs: Pairs = ()
    """The module's own matrices beside those of its base, whose distances are to be measured."""


Reader = Callable[[Plan, WeightModule, Rows | None], Read]


@dataclass(frozen=True, kw_only=True)
class ModuleWeights:
    """A module's matrices, and what is known of them."""

    matrices: Sequence[torch.Tensor]
    """[rows, columns] each; on the meta device, without data, where `load` is given."""
    roundoff: float | None
    """Relative rounding error of the stored weights where it is not that of their dtype."""
    content: str
    """Hash of the matrices."""
    key: str | None = None
    """Identifies the matrices by their source; None where nothing does."""
    known: MatrixFacts | None = None
    """Facts that an earlier analysis has kept of the matrices."""
    load: Callable[[], Sequence[torch.Tensor]] | None = None
    """Reads the matrices, should they be needed after all."""
    tasks: TaskVectors | None = None
    """What the parents of a merge changed in them."""
    pairs: Pairs = ()
    """The module's own matrices beside those of its base."""


def weights_of_batch(plan: Plan, batch: Sequence[WeightModule], read: Reader) -> list[ModuleWeights]:
    """Read the weights of several modules, or promise them where an earlier analysis has read the same bytes.

    What several modules are parts of is read once.

    Args:
        plan: the analysis.
        batch: its modules.
        read: reads the matrices of one of them, and tells their rounding error.

    Raises:
        CheckpointError: if they cannot be read.
    """
    shared: Rows | None = {} if len(batch) > 1 else None
    return [_weights(plan, module, functools.partial(read, plan, module), shared) for module in batch]


def _weights(
    plan: Plan, module: WeightModule, read: Callable[[Rows | None], Read], shared: Rows | None
) -> ModuleWeights:
    # No note holds what the parents of a merge changed, nor where the singular vectors point.
    key = None if plan.cache is None or plan.parents or plan.pairs.distances else _key(plan, module)
    known = None if plan.cache is None or key is None else plan.cache.recall(key)
    if known is not None:
        empty = torch.empty(known.shape, dtype=getattr(torch, known.dtype), device="meta")
        return ModuleWeights(
            matrices=[empty] * known.count,
            roundoff=known.roundoff,
            content=known.content,
            known=known,
            load=lambda: read(None).matrices,
        )
    found = read(shared)
    return ModuleWeights(
        matrices=found.matrices,
        roundoff=found.roundoff,
        content=content_hash(found.matrices),
        key=key,
        pairs=found.pairs,
        tasks=None if plan.base is None else _task_vectors(plan, plan.base, module),
    )


def remember_weights(plan: Plan, read: ModuleWeights, distances: Distances | None) -> None:
    """Keep what is known of a module's matrices by now, if their source has an identity."""
    if plan.cache is None or read.key is None:
        return
    first = read.matrices[0]
    facts = MatrixFacts(
        content=read.content,
        shape=(first.shape[0], first.shape[1]),
        count=len(read.matrices),
        dtype=str(first.dtype).removeprefix("torch."),
        roundoff=read.roundoff,
        relative_distance=None if distances is None else distances.measure("relative_distance"),
    )
    plan.cache.remember(read.key, facts)


def _task_vectors(plan: Plan, base: Base, module: WeightModule) -> TaskVectors | None:
    parents = [
        (parent.checkpoint, parent.pairing.base[module.name])
        for parent in plan.parents
        if module.name in parent.pairing.base
    ]
    return task_vectors(parents, base.checkpoint, base.pairing.base[module.name])


def _key(plan: Plan, module: WeightModule) -> str | None:
    """Return what identifies the matrices without reading them; None where nothing does."""
    sides = [(plan.checkpoint, module)]
    if plan.base is not None:
        sides.append((plan.base.checkpoint, plan.base.pairing.base[module.name]))
    parts: list[object] = [__version__, *MatrixFacts.model_fields]
    for checkpoint, side in sides:
        fingerprint = checkpoint.fingerprint(side.parameter)
        if fingerprint is None:
            return None
        parts.append((fingerprint, side.view, side.kind, side.rank, side.shape, side.roundoff))
    return hashlib.sha256(repr(parts).encode()).hexdigest()
