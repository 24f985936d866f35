"""The experts of a layer as one row of a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from esdtool.analysis.module_record import ModuleResult

_AVERAGED = ("alpha", "alpha_stderr", "mp_alpha", "ks_distance", "stable_rank", "lambda_max", "null_distance")
"""What the tables show of a module."""


def fold_experts(modules: Sequence[ModuleResult]) -> list[ModuleResult]:
    """Return the modules, with all experts of one layer and role replaced by their mean.

    The row is named with `*` for the expert's number, and says how many experts it stands for. Those that could not
    be scored take no part; if none could, the row has the status of the first.
    """
    groups: dict[tuple[object, ...], list[ModuleResult]] = {}
    for position, module in enumerate(modules):
        key = (position,) if module.expert is None else (starred(module.name, module.expert), module.role)
        groups.setdefault(key, []).append(module)
    return [group[0] if group[0].expert is None else _mean(group) for group in groups.values()]


def starred(name: str, expert: int | None) -> str:
    """Return the name of an expert's module with a star for its number; any other name as it is.

    >>> starred("layers.3.mlp.experts.12.up_proj", 12)
    'layers.3.mlp.experts.*.up_proj'
    """
    if expert is None:
        return name
    return re.sub(rf"(\bexperts\.(?:[^.]+\.)?(?:expert_)?){expert}(?=\.|$)", r"\1*", name, count=1)


def _mean(group: Sequence[ModuleResult]) -> ModuleResult:
    scored = [module for module in group if module.ok]
    count = str(len(group)) if len(scored) == len(group) else f"{len(scored)} of {len(group)}"
    name = f"{starred(group[0].name, group[0].expert)} ({count})"
    if not scored:
        return group[0].model_copy(update={"name": name})
    # An interval is one matrix's, and so are a law and its parameter.
    means: dict[str, object] = {"alpha_ci": None, "best_law": None, "truncation_lambda": None}
    for field in _AVERAGED:
        values = [value for module in scored if (value := getattr(module, field)) is not None]
        means[field] = fmean(values) if values else None
    alphas = {
        fit: fmean(values) if (values := [v for m in scored if (v := m.alphas.get(fit)) is not None]) else None
        for fit in scored[0].alphas
    }
    measured = [module.distances for module in scored if module.distances is not None]
    means["distances"] = measured[0].mean(measured) if measured else None
    return scored[0].model_copy(update={"name": name, "alphas": alphas, **means})


Experts = Literal["mean", "all"]
