"""Compare four laws on one tail, with the package `powerlaw` (Alstott, Bullmore and Plenz 2014).

The power law is tested against each other law by a likelihood ratio (Clauset, Shalizi and Newman 2009, section 5). The
best law is that of the smallest AIC, since two of the four have a parameter more (Akaike 1974).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from esdtool.spectra.tail import LikelihoodRatio

_POWER_LAW: Final = "power_law"

_PARAMETERS: Final = {_POWER_LAW: 1, "lognormal": 2, "exponential": 1, "truncated_power_law": 2}
"""Free parameters of each law, by the package's names; xmin is given."""

ALTERNATIVES = tuple(name for name in _PARAMETERS if name != _POWER_LAW)
"""Laws that the power law is tested against, by their names in the package."""

_SIGNIFICANT = 0.05
"""Probability below which a law counts as told from the power law."""

# `warnings.catch_warnings` changes the state of the whole process.
_LOCK = threading.Lock()


@contextmanager
def quiet_package() -> Iterator[Any]:
    """Give the package `powerlaw`, without notes on its optimisers' progress; one thread at a time."""
    with _LOCK, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        import powerlaw  # imports pyplot, so not at the top

        yield powerlaw


def compare_laws(fit: Any) -> tuple[dict[str, LikelihoodRatio], str | None]:
    """Test the power law against the alternatives on one tail, and say in words which law is best.

    Args:
        fit: a `powerlaw.Fit`, inside `quiet_package`.

    Returns:
        The tests by the alternatives' names, and the best law; without a test that gives a number, no law.
    """
    comparisons, likelihoods = {}, {_POWER_LAW: _log_likelihood(fit, _POWER_LAW)}
    for alternative in ALTERNATIVES:
        ratio, p_value = fit.distribution_compare(_POWER_LAW, alternative, normalized_ratio=True)
        if np.isfinite(ratio) and np.isfinite(p_value):
            comparisons[alternative] = LikelihoodRatio(ratio=float(ratio), p_value=float(p_value))
            likelihoods[alternative] = _log_likelihood(fit, alternative)
    return comparisons, best_law(likelihoods, comparisons) if comparisons else None


def best_law(likelihoods: Mapping[str, float], comparisons: Mapping[str, LikelihoodRatio]) -> str:
    """Name the law with the smallest AIC, and those that the tests do not tell from it.

    >>> tests = {"lognormal": LikelihoodRatio(ratio=-1.0, p_value=0.3)}
    >>> best_law({"power_law": -10.0, "lognormal": -7.0}, tests)
    'lognormal or power law'

    Args:
        likelihoods: logarithm of the likelihood of the tail under each law, by the package's names.
        comparisons: tests of the power law against the others.
    """
    best = min(likelihoods, key=lambda name: 2 * _PARAMETERS[name] - 2 * likelihoods[name])
    told = {name for name, test in comparisons.items() if test.p_value < _SIGNIFICANT}
    if best == _POWER_LAW:
        names = [best, *(name for name in comparisons if name not in told)]
    else:
        names = [best] if best in told else [best, _POWER_LAW]
    return " or ".join(name.replace("_", " ") for name in names)


def _log_likelihood(fit: Any, name: str) -> float:
    return float(np.sum(getattr(fit, name).loglikelihoods(fit.data)))
