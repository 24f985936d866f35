"""Check an assignment against a checkpoint: `esdtool assign --check`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from esdtool.assignment.document import Assignment
from esdtool.assignment.scope import Patterns, choose, names_of
from esdtool.checkpoint.base import TensorInfo
from esdtool.modules import select_modules
from esdtool.modules.model_code import kinds_of_architecture
from esdtool.names import canonical_name
from esdtool.support.words import dimensions, others


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """The result of checking an assignment against a checkpoint."""

    matched: tuple[str, ...]
    """Listed parameters that the checkpoint holds in the right shape."""
    unknown: tuple[str, ...]
    """Listed parameters that the checkpoint does not hold."""
    wrong_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """(name, shape in the file, shape in the checkpoint)."""
    uncovered: tuple[str, ...]
    """Matrices of the checkpoint's blocks that the file neither lists nor names under `left_out`."""
    unlisted: int
    """Tensors of the checkpoint that fall under the file's default, `uncovered` included."""

    @property
    def ok(self) -> bool:
        """Whether names, shapes and coverage are all right."""
        return self.problem is None

    @property
    def problem(self) -> str | None:
        """What is wrong, in one line; None if nothing is."""
        if self.wrong_shape:
            name, listed, found = self.wrong_shape[0]
            return f"{name} is {_shape(listed)} in the file, {_shape(found)} in the model" + others(self.wrong_shape)
        if self.unknown:
            return f"{self.unknown[0]} is not in the model" + others(self.unknown)
        if self.uncovered:
            return f"{self.uncovered[0]} of the model is not in the file" + others(self.uncovered)
        if not self.matched:
            return "the file lists no parameter"
        return None


def check(
    assignment: Assignment, tensors: Iterable[TensorInfo], *, config: Mapping[str, Any] | None = None
) -> CheckReport:
    """Compare an assignment with a checkpoint: names, shapes and coverage. Reads no weights.

    Args:
        assignment: what `load_assignment` returned.
        tensors: the checkpoint's catalogue, `Checkpoint.tensors.values()`.
        config: its config.json (`Checkpoint.config`), which decides some modules' roles.
    """
    catalogue = list(tensors)
    shapes = {canonical_name(tensor.name): tensor.shape for tensor in catalogue}
    shapes |= {canonical_name(part.name): part.shape for tensor in catalogue for part in tensor.trained or ()}
    kinds = functools.partial(kinds_of_architecture, config or {}, num_tensors=len(catalogue))
    modules = select_modules(catalogue, config=config, kinds=kinds).modules
    module_names = {canonical_name(module.name) for module in modules}
    matched, unknown, wrong = [], [], []
    for name, entry in assignment.parameters.items():
        shape = shapes.get(canonical_name(name))
        held = assignment.members[name].members if name in assignment.members else ()
        if shape is None and held and module_names.issuperset(map(canonical_name, held)):
            matched.append(name)  # stored as one tensor elsewhere, here as several
        elif shape is None:
            unknown.append(name)
        elif entry.shape is not None and entry.shape != shape:
            wrong.append((name, entry.shape, shape))
        else:
            matched.append(name)
    accounted = {canonical_name(name) for name in (*assignment.parameters, *assignment.left_out)}
    accounted |= {canonical_name(name) for fused in assignment.members.values() for name in fused.members}
    return CheckReport(
        matched=tuple(matched),
        unknown=tuple(unknown),
        wrong_shape=tuple(wrong),
        uncovered=tuple(
            module.parameter
            for module in choose(modules, Patterns()).assigned
            if accounted.isdisjoint(names_of(module))
        ),
        unlisted=len(catalogue) - len(matched) - len(wrong),
    )


def _shape(shape: tuple[int, ...]) -> str:
    return dimensions(shape) or "a scalar"
