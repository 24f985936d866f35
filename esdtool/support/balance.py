"""Work of known cost spread evenly over ranks."""

from __future__ import annotations

from collections.abc import Sequence


def balance(costs: Sequence[float], num_ranks: int) -> list[int]:
    """Assign each piece of work to a rank: the largest first, each to the rank with the least so far (Graham 1969).

    >>> balance([5, 4, 3, 3], 2)
    [0, 1, 1, 0]

    Args:
        costs: predicted costs, in any unit.
        num_ranks: number of ranks.
    """
    loads = [0.0] * num_ranks
    owners = [0] * len(costs)
    for index in most_expensive_first(costs):
        owner = loads.index(min(loads))
        loads[owner] += costs[index]
        owners[index] = owner
    return owners


def most_expensive_first(costs: Sequence[float]) -> list[int]:
    """Return the positions by falling cost; equal costs in the order given.

    >>> most_expensive_first([1, 3, 3])
    [1, 2, 0]
    """
    return sorted(range(len(costs)), key=lambda index: (-costs[index], index))
