"""Flat names for the numbers of a model's modules, as dashboards want them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Literal, Self, get_args

from esdtool.assignment.fused import joined_roles
from esdtool.modules import WeightModule
from esdtool.names import module_name

Level = Literal["mean", "role", "layer", "module"]
LEVELS: Final[tuple[Level, ...]] = get_args(Level)
"""What a scalar may be of: the whole model, a role, a block, or one module."""

PREFIX: Final = "train/"
"""What stands before the names in a dashboard: that which the Hugging Face Trainer writes there."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Locate a module in its model."""

    role: str
    layer: int | None
    """Index of the block; None outside a numbered stack."""

    @classmethod
    def of(cls, modules: Sequence[WeightModule]) -> Self:
        """Return the place of a parameter that holds these modules."""
        return cls(role=joined_roles(module.role for module in modules), layer=modules[0].layer)


def shown_name(parameter: str, modules: Sequence[WeightModule]) -> str:
    """Return what a parameter is called in a dashboard: its module, or what several modules share."""
    return modules[0].name if len(modules) == 1 else module_name(parameter)


def scalars(
    values: Mapping[str, Mapping[str, float]], places: Mapping[str, Place], *, levels: Sequence[Level] = LEVELS
) -> dict[str, float]:
    """Give each number of each module a name, and each mean over the modules of a role, a block and the model.

    >>> place = Place(role="q_proj", layer=0)
    >>> scalars({"alpha": {"layers.0.q_proj": 2.5}}, {"layers.0.q_proj": place}, levels=("mean", "role"))
    {'alpha/mean': 2.5, 'alpha/role/q_proj': 2.5}

    Args:
        values: the numbers of each quantity by module; a module without one is left out.
        places: all modules, in the model's order.
        levels: which names are wanted.

    Returns:
        Scalars by name: `QUANTITY/mean`, `QUANTITY/role/ROLE`, `QUANTITY/layer/INDEX`, `QUANTITY/module/NAME`. Means
        are over modules, not weighted, as in the summary of `esdtool analyze`.
    """
    found: dict[str, float] = {}
    for quantity, numbers in values.items():
        grouped: dict[str, list[float]] = {}
        for name, place in places.items():
            if name not in numbers:
                continue
            where: dict[Level, str | None] = {
                "mean": f"{quantity}/mean",
                "role": f"{quantity}/role/{place.role}",
                "layer": None if place.layer is None else f"{quantity}/layer/{place.layer}",
                "module": f"{quantity}/module/{name}",
            }
            for level in levels:
                key = where[level]
                if key is not None:
                    grouped.setdefault(key, []).append(numbers[name])
        found |= {key: fmean(members) for key, members in grouped.items()}
    return found
