"""Estimate the relative rounding error of each format from first principles.

Assume that weights are Gaussian, and that each group of n weights is scaled so that its largest becomes the largest
code. The largest of n has the median m(n) = Phi^-1((1 + 2^(-1/n)) / 2) in units of the standard deviation. So the codes
are the levels of the format, scaled to +- m(n). Every weight is rounded to the nearest level, and the error is

    sqrt((1 - 1/n) E[(w - nearest(w))^2])    over a standard Gaussian cut off at m(n),

summed over 4096 quantiles; the largest weight itself has no error. For n = 128 and 4-bit integers it is 0.11. Methods
that optimise the outputs (GPTQ, AWQ) have a larger error in the weights, and so have weights with heavier tails. If
scales are powers of two, no weight is exact, and the error is divided by E[w^2] of the truncated Gaussian instead.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np

_QUANTILES = 4096
_PHASES = 8
"""Number of ratios of the largest weight to its power-of-two scale over which the error is averaged."""

Levels = tuple[float, ...]


def integer_roundoff(bits: int, group: int) -> float:
    """Return the error of integers of `bits` bits with one scale for `group` weights.

    >>> round(integer_roundoff(4, 128), 3)
    0.107
    """
    return _relative_error(_integers(bits), group)


def float_roundoff(dtype: str, group: int) -> float:
    """Return the error of an 8-bit float, scaled so that the largest of `group` weights is the largest number."""
    return _relative_error(_small_floats(*_FLOAT8[dtype]), group)


def microscaling_roundoff(dtype: str, group: int) -> float:
    """Return the error of `float4_e2m1` or an 8-bit float with power-of-two scales (MXFP4, MXFP8).

    The scale is 2^(floor(log2 largest) - e), e being the largest code's exponent (OCP Microscaling Formats
    Specification 1.0, 6.3): the largest weight becomes a number between 2^e and 2^(e + 1), uniformly distributed on
    a logarithmic scale; values above the largest code are clipped.
    """
    levels = E2M1_LEVELS if dtype == "float4_e2m1" else _small_floats(*_FLOAT8[dtype])
    binade = 2.0 ** math.floor(math.log2(levels[-1]))
    squares = [_relative_error(levels, group, binade * 2 ** ((i + 0.5) / _PHASES)) ** 2 for i in range(_PHASES)]
    return math.sqrt(sum(squares) / _PHASES)


def nvfp4_roundoff(group: int = 16) -> float:
    """Return the error of 4-bit floats with one fp8 scale for `group` weights."""
    return _relative_error(E2M1_LEVELS, group)


def nf4_roundoff(group: int) -> float:
    """Return the error of `nf4` of bitsandbytes."""
    return _relative_error(_normal_levels(), group)


def bnb_fp4_roundoff(group: int) -> float:
    """Return the error of `fp4` of bitsandbytes, whose subnormal is 1/192 of the largest number."""
    return _relative_error(_signed((0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)), group)


@functools.lru_cache(maxsize=1024)
def _relative_error(levels: Levels, group: int, peak: float | None = None) -> float:
    """Compute the error for ascending codes `levels`, if the largest of `group` weights becomes `peak`."""
    normal = NormalDist()
    largest = normal.inv_cdf((1 + 0.5 ** (1 / max(group, 2))) / 2)
    weights = _gaussian()
    weights = weights[np.abs(weights) <= largest]
    codes = np.asarray(levels) * (largest / (levels[-1] if peak is None else peak))
    nearest = codes[np.searchsorted((codes[1:] + codes[:-1]) / 2, weights)]
    square = float(np.mean((weights - nearest) ** 2))
    return math.sqrt(square * (1 - 1 / max(group, 2)) if peak is None else square / float(np.mean(weights**2)))


@functools.lru_cache(maxsize=1)
def _gaussian() -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / _QUANTILES) for i in range(_QUANTILES)])


def _integers(bits: int) -> Levels:
    return tuple(float(code) - (2**bits - 1) / 2 for code in range(2**bits))


_FLOAT8 = {
    # dtype: (mantissa bits, exponent of the smallest normal number, largest number)
    "float8_e4m3fn": (3, -6, 448.0),
    "float8_e5m2": (2, -14, 57344.0),
    "float8_e4m3fnuz": (3, -7, 240.0),
    "float8_e5m2fnuz": (2, -15, 57344.0),
}


@functools.lru_cache(maxsize=8)
def _small_floats(mantissa: int, lowest: int, largest: float) -> Levels:
    steps = 2**mantissa
    positive = [math.ldexp(i, lowest - mantissa) for i in range(steps)]
    exponent = lowest
    while positive[-1] < largest:
        positive.extend(math.ldexp(steps + i, exponent - mantissa) for i in range(steps))
        exponent += 1
    return _signed(tuple(value for value in positive if value <= largest))


def _signed(positive: Levels) -> Levels:
    """Return the levels with both signs, ascending; `positive` begins with 0."""
    return (*(-value for value in reversed(positive[1:])), *positive)


E2M1_LEVELS: Levels = _signed((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))


@functools.lru_cache(maxsize=1)
def _normal_levels() -> Levels:
    """Return the levels of NF4: normal quantiles, 7 below and 8 above 0 (Dettmers et al. 2023, arXiv 2305.14314)."""
    top = 0.9677083  # midway between 1 - 1/30 and 1 - 1/32, as the paper has it

    def quantiles(count: int) -> list[float]:
        return [NormalDist().inv_cdf(top + (0.5 - top) * i / count) for i in range(count)]

    levels = [*(-value for value in quantiles(7)), 0.0, *reversed(quantiles(8))]
    return tuple(level / levels[-1] for level in levels)
