"""Say which module of a base checkpoint is subtracted from which module of a checkpoint.

Modules are compared, not tensors: a fused projection meets its separate counterparts, a stack of experts the
experts' own files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from esdtool.analysis.counterparts import find_counterparts
from esdtool.modules import SkipKind, SkippedTensor, WeightModule
from esdtool.support.words import dimensions


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """The modules that two checkpoints share."""

    base: Mapping[str, WeightModule]
    """The base's module by the other's name."""
    unmatched: tuple[SkippedTensor, ...]
    """Modules of either checkpoint without a counterpart, with the reason."""


def pair_modules(
    modules: Sequence[WeightModule], base_modules: Sequence[WeightModule], *, location: str, base_location: str
) -> Pairing:
    """Find each module's counterpart in the base.

    Args:
        modules: of the checkpoint.
        base_modules: of the base.
        location: the checkpoint's, for the reasons.
        base_location: the base's.
    """
    found = find_counterparts(modules, base_modules)
    taken = {module.name for module in (*found.pairs.values(), *found.wrong_shape.values())}
    unmatched = [
        _unmatched(module, _reason(module, found.wrong_shape.get(module.name), base_location))
        for module in modules
        if module.name not in found.pairs
    ]
    unmatched += [
        _unmatched(module, f"only in the base: {location} has no such module")
        for module in base_modules
        if module.name not in taken
    ]
    return Pairing(base=found.pairs, unmatched=tuple(unmatched))


def _reason(module: WeightModule, other: WeightModule | None, base_location: str) -> str:
    if other is None:
        return f"not in the base {base_location}"
    return f"shape {dimensions(module.shape)}, but {dimensions(other.shape)} in the base {base_location}"


def _unmatched(module: WeightModule, reason: str) -> SkippedTensor:
    return SkippedTensor(
        name=module.name, shape=module.shape, dtype=module.dtype, kind=SkipKind.NO_COUNTERPART, reason=reason
    )
