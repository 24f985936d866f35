"""Explanations of what becomes of single tensors, and why: `esdtool analyze --explain`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from esdtool.checkpoint.base import TensorInfo
from esdtool.modules.base import Selection, View, WeightModule
from esdtool.modules.patterns import compile_patterns
from esdtool.modules.skipped import SkippedTensor
from esdtool.support.words import dimensions


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One tensor, the modules in it, and what the decision rests on."""

    tensor: TensorInfo
    rule: str
    """The table and the pattern that decided, or what else did."""
    modules: tuple[WeightModule, ...]
    skipped: tuple[SkippedTensor, ...]
    """The tensor itself, or parts of it that are left out."""

    @property
    def lines(self) -> tuple[str, ...]:
        """The explanation for the terminal: the tensor, then a line for each fact."""
        facts = [("rule", self.rule)]
        if self.modules:
            facts.insert(0, ("identified by", self.modules[0].identified_by.value))
        for module in self.modules:
            place = "outside the blocks" if module.layer is None else f"layer {module.layer}"
            expert = "" if module.expert is None else f", expert {module.expert}"
            facts.append(("scored as", f"{module.name}: role {module.role}, {place}{expert}"))
            if module.view is not None:
                facts.append(("split", f"{dimensions(module.shape)} from {where(module.view)}"))
            if module.note is not None:
                facts.append(("note", module.note))
        facts += [("skipped", f"{_part(entry, self.tensor)}{entry.reason}") for entry in self.skipped]
        head = f"{self.tensor.name}  {dimensions(self.tensor.shape) or 'scalar'} {self.tensor.storage}"
        return (head, *(f"  {f'{label}:':<15}{words}" for label, words in facts))


def explain(tensors: Mapping[str, TensorInfo], selection: Selection, pattern: str) -> list[Explanation]:
    """Explain what becomes of the tensors whose names, or whose modules' names, match.

    Args:
        tensors: every tensor of the checkpoint by name.
        selection: what became of them.
        pattern: a regular expression, searched in the names.

    Returns:
        An explanation for each tensor, in the checkpoint's order.

    Raises:
        UsageError: if the expression is none or matches nothing.
    """
    modules: dict[str, list[WeightModule]] = {name: [] for name in tensors}
    skipped: dict[str, list[SkippedTensor]] = {name: [] for name in tensors}
    for module in selection.modules:
        modules[module.parameter].append(module)
    for entry in selection.skipped:
        skipped[entry.name if entry.parameter is None else entry.parameter].append(entry)
    names = {
        name: {name, *(module.name for module in modules[name]), *(entry.name for entry in skipped[name])}
        for name in tensors
    }
    everything = sorted(name for several in names.values() for name in several)
    (regex,) = compile_patterns([pattern], everything, option="--explain", what="tensor name")
    return [
        Explanation(
            tensor=tensors[name],
            rule=selection.rules.get(name, "the shape"),
            modules=tuple(modules[name]),
            skipped=tuple(skipped[name]),
        )
        for name in tensors
        if any(regex.search(one) for one in names[name])
    ]


def where(view: View) -> str:
    """Say which positions of a tensor belong to a part.

    >>> where(View(axis=0, groups=8, start=16, stop=32))
    'positions 16 to 31 of each of 8 equal groups of rows'
    """
    expert = "" if view.expert is None else f"matrix {view.expert} of {view.num_experts}"
    if view.stop is None:
        return expert or "the whole tensor"
    axis = ("rows", "columns")[view.axis]
    last = view.stop - 1
    if view.groups == 1:
        place = f"{axis} {view.start} to {last}"
    else:
        positions = f"position {last}" if view.start == last else f"positions {view.start} to {last}"
        place = f"{positions} of each of {view.groups} equal groups of {axis}"
    return f"{expert}, {place}" if expert else place


def _part(entry: SkippedTensor, tensor: TensorInfo) -> str:
    return "" if entry.name == tensor.name else f"{entry.name}: "
