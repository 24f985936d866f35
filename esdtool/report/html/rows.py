"""The rows of the module table, and which row a module is in."""

from __future__ import annotations

from dataclasses import dataclass

from esdtool.analysis.document import Analysis
from esdtool.analysis.module_record import ModuleResult
from esdtool.report.html.markup import Html, name_tag, tag
from esdtool.report.tables.experts import Experts, fold_experts, starred


@dataclass(frozen=True, kw_only=True)
class ModuleRows:
    """The rows of the module table, from top to bottom."""

    modules: tuple[ModuleResult, ...]
    """One for each row; that of several experts holds their means."""
    position: dict[str, int]
    """Row of each module of the analysis, by name."""
    folded: bool
    """Whether the experts of a layer share a row."""

    def link(self, name: str) -> Html:
        """Return a link to the module's row."""
        return tag("a", name_tag(name), href=f"#{anchor(self.position[name])}")


def rows_of_modules(analysis: Analysis, experts: Experts) -> ModuleRows:
    """Return the rows of an analysis, experts averaged by layer or each in its own."""
    folded = experts == "mean"
    keys: dict[object, int] = {}
    position = {}
    for module in analysis.modules:
        # As `fold_experts` groups them.
        key: object = module.name
        if folded and module.expert is not None:
            key = (starred(module.name, module.expert), module.role)
        position[module.name] = keys.setdefault(key, len(keys))
    modules = fold_experts(analysis.modules) if folded else analysis.modules
    return ModuleRows(modules=tuple(modules), position=position, folded=folded)


def anchor(row: int) -> str:
    """Return the id of a row."""
    return f"m{row}"
