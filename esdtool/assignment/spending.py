"""Spend a budget of steps, such as bits per weight, where they save most."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def spend(costs: Sequence[Sequence[float]], sizes: Sequence[int], *, ladder: Sequence[int], budget: float) -> list[int]:
    """Choose a rung for each of several things greedily, the step that saves most for its price first.

    Where each cost is convex along the ladder, this is optimal while all steps fit.

    >>> spend([[4.0, 1.0, 0.25], [64.0, 16.0, 4.0]], [1, 1], ladder=[2, 3, 4], budget=3.0)
    [2, 4]

    Args:
        costs: [n, rungs] what each thing costs on each rung, per unit of its size; falling along the ladder.
        sizes: [n] what each counts in the budget and in the total cost.
        ladder: [rungs] the values to choose from, ascending.
        budget: largest mean value, at least the first rung.

    Returns:
        [n] values whose mean, weighted by size, is at most the budget.
    """
    place = [0] * len(sizes)
    # Rounding must not forbid a step that fits exactly.
    left = (budget - ladder[0]) * sum(sizes) * (1 + 1e-12)
    heap: list[tuple[float, int]] = []

    def offer(index: int) -> None:
        """Put the next step of a thing among the candidates."""
        here = place[index]
        if here + 1 < len(ladder):
            saved = (costs[index][here] - costs[index][here + 1]) / (ladder[here + 1] - ladder[here])
            heapq.heappush(heap, (-saved, index))

    for index in range(len(sizes)):
        offer(index)
    while heap:
        _, index = heapq.heappop(heap)
        price = (ladder[place[index] + 1] - ladder[place[index]]) * sizes[index]
        if price <= left:  # what does not fit now never will
            left -= price
            place[index] += 1
            offer(index)
    return [ladder[index] for index in place]
