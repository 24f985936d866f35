"""Write numbers that are read together: with one number of decimals, or as many as their error allows."""

from __future__ import annotations

import math
from collections.abc import Sequence

_WIDEST = 6
"""Powers of ten between the largest and the smallest number of a column that are still written as decimals."""


def aligned(values: Sequence[float], *, digits: int = 3) -> list[str]:
    """Write the numbers of a column with the same number of decimals.

    Args:
        values: finite.
        digits: significant digits that the smallest number other than 0 keeps.

    >>> aligned([0.067, 0.3214, 0.5]), aligned([0.0, 12.0, 150.0])
    (['0.0670', '0.3214', '0.5000'], ['0.0', '12.0', '150.0'])
    >>> aligned([1e-12, 1.0])
    ['1.00e-12', '1.00e+00']
    """
    sizes = [abs(value) for value in values if value]
    if not sizes:
        return [f"{value:g}" for value in values]
    lowest, highest = (math.floor(math.log10(size)) for size in (min(sizes), max(sizes)))
    if highest - lowest > _WIDEST:
        return [f"{value:.{digits - 1}e}" for value in values]
    return [f"{value:.{max(0, digits - 1 - lowest)}f}" for value in values]


def with_error(value: float, error: float | None, *, signed: bool = False) -> str:
    """Write a number with the digits that its standard error leaves it: two of the error's.

    >>> with_error(52.7064, 0.3047), with_error(-0.0141, 0.24312, signed=True), with_error(820.7, 5.92)
    ('52.71 ± 0.30', '-0.01 ± 0.24', '820.7 ± 5.9')
    >>> with_error(20.5, None)
    '20.500'
    """
    sign = "+" if signed else ""
    if error is None:
        return f"{value:{sign}.3f}"
    decimals = error_decimals(error)
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}"


def error_decimals(error: float) -> int:
    """Return the decimals at which an error has two significant digits; 3 where there is no error at all.

    >>> error_decimals(0.3047), error_decimals(5.92), error_decimals(592.0), error_decimals(0.0)
    (2, 1, 0, 3)
    """
    if not error > 0 or not math.isfinite(error):
        return 3
    return max(0, 1 - math.floor(math.log10(error) + 1e-12))
