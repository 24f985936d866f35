"""The distances of a module from its counterpart in a base, as analyses and comparisons hold them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, create_model

from esdtool.analysis.record import Record
from esdtool.spectra.measure import Number
from esdtool.spectra.pair_measure import all_pair_quantities, load_pair_measures


class _Distances(Record):
    """A module beside its counterpart in the base. Null is what was not asked for, or has no value."""

    def measure(self, name: str) -> Number:
        """Return a quantity of `esdtool.spectra.pairs` by its name.

        Raises:
            KeyError: if there is no such quantity.
        """
        if name not in quantity_names():
            raise KeyError(name)
        value: Number = getattr(self, name)
        return value

    @classmethod
    def mean(cls, several: Sequence[Self]) -> Self:
        """Average those of several modules, such as the experts of a layer; counts are summed.

        Args:
            several: at least one.
        """
        means: dict[str, Number] = {}
        for quantity in all_pair_quantities():
            values = [value for one in several if (value := one.measure(quantity.name)) is not None]
            if quantity.whole:
                same = len(set(values)) == 1
                total = sum(values) if quantity.name.startswith("num_") else values[0] if same else None
                means[quantity.name] = total if values else None
            else:
                means[quantity.name] = fmean(values) if values else None
        return cls(**means)


def quantity_names(*, cheap_only: bool = False) -> list[str]:
    """Return the names of what is measured of two versions of a module, in the order of the output.

    Args:
        cheap_only: only what needs no singular vectors.
    """
    return [
        quantity.name
        for measure in load_pair_measures()
        for quantity in measure.quantities
        if measure.is_cheap or not cheap_only
    ]


def _with_quantities() -> Any:
    """Add a key for each quantity of each registered measure."""
    keys: dict[str, Any] = {
        quantity.name: (
            int | None if quantity.whole else float | None,
            Field(default=None, description=quantity.description),
        )
        for quantity in all_pair_quantities()
    }
    return create_model("Distances", __base__=_Distances, __module__=__name__, __doc__=_Distances.__doc__, **keys)


if TYPE_CHECKING:
    Distances = _Distances
else:
    Distances = _with_quantities()


def intruder_words(found: Iterable[tuple[str, Distances | None]], *, similarity: float | None) -> str | None:
    """Say which modules have intruder dimensions; None where nobody looked.

    Args:
        found: names and distances of the modules.
        similarity: the threshold.
    """
    counts = [
        (name, int(count))
        for name, distances in found
        if distances is not None and (count := distances.measure("num_intruders")) is not None
    ]
    if not counts or similarity is None:
        return None
    having = sorted(((name, count) for name, count in counts if count), key=lambda pair: -pair[1])
    if not having:
        return f"No intruder dimensions below a similarity of {similarity:g} in {len(counts)} modules."
    named = ", ".join(f"{name} ({count})" for name, count in having[:3])
    total = sum(count for _, count in having)
    return (
        f"{total} intruder dimension{'' if total == 1 else 's'} below a similarity of {similarity:g} in {len(having)} "
        f"of {len(counts)} modules, most: {named}."
    )
