"""One module's matrices to its alpha: the estimators on the cheapest spectrum that is accurate enough.

The paths of `esdtool.spectra.spectrum` form a ladder, gram-float32 (only if `fast`), gram-float64,
svd-float64. Each fit says which eigenvalues it rests on; if the path's own error bound there
is too large, the next path is taken. `analyze`, `train` and `AlphaDecay` all come through here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from esdtool.spectra.cache import SpectrumCache, content_hash, entry_key
from esdtool.spectra.farms import farms_shape, farms_windows
from esdtool.spectra.likelihood import LikelihoodRatio, powerlaw_fit
from esdtool.spectra.marchenko_pastur import mp_quantiles
from esdtool.spectra.options import ScoreOptions, SpectrumPath
from esdtool.spectra.slq import SlqEstimate, estimate_tail
from esdtool.spectra.spectrum import (
    Spectrum,
    compute_spectrum,
    compute_stacked,
    in_float32_range,
    peak_of,
    scaling_exponent,
)
from esdtool.spectra.tail import TailFit, Vector, fix_finger_fit, hill, hill_index, ks_fit

_TOLERANCE: dict[SpectrumPath, float] = {"gram-float32": 1e-4, "gram-float64": 1e-7, "svd-float64": 1e-7}
"""Largest relative error of alpha for which a path is accepted while there is a better one."""

_WORST = 1e-3
"""Largest accepted error on the last path of the ladder."""

_CONSTANT = 1e-6
"""Mean ln(lambda / xmin) of a constant tail: float32 arithmetic leaves about this much on an orthogonal matrix."""

ALL_ZERO = "all elements are zero"
"""Status of a matrix without any weight."""

_BELOW_GRAM = "the tail starts below the resolution of the Gram path; allow --spectrum auto or svd"


@dataclass(frozen=True, kw_only=True)
class MatrixScore:
    """The spectrum and the tails of one module."""

    status: str
    """`ok`, or what is wrong, in words."""
    alpha: float | None = None
    """Alpha by the first fit; None unless the status is `ok`."""
    fits: dict[str, TailFit | None] = field(default_factory=dict)
    """Each fit by its name; None where that estimator found no tail."""
    comparisons: dict[str, LikelihoodRatio] | None = None
    """Likelihood-ratio tests of the estimator `powerlaw`."""
    spectrum: Spectrum | None = None
    """The eigenvalues; None where there are none to speak of (NaN, all zero) and where alpha is estimated."""
    estimate: SlqEstimate | None = None
    """Where alpha was estimated without eigenvalues (`--spectrum slq`)."""


class _Unresolved(Exception):  # noqa: N818 - a signal between functions here, not an error
    """A fit rests on eigenvalues that the path does not resolve; the ladder has a better one."""


class _NoTail(Exception):  # noqa: N818 - likewise
    """A fit does not exist for this spectrum; the message is the status."""


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """The matrices of one module, and what is wanted of them."""

    matrices: Sequence[torch.Tensor]
    """[rows, columns] each, of one shape, floating point; their eigenvalues are pooled."""
    options: ScoreOptions
    """Estimators and precision."""
    scale: float = 1.0
    """Factor of the eigenvalues (`WeightModule.eigenvalue_scale`); alpha does not depend on it."""
    roundoff: float | None = None
    """Relative rounding error of the stored weights, where it is more than that of the matrices' dtype."""
    content: str | None = None
    """What identifies the matrices in the cache; default a hash of their bytes."""


def score_matrices(
    matrices: Sequence[torch.Tensor],
    options: ScoreOptions,
    *,
    device: torch.device | None = None,
    scale: float = 1.0,
    roundoff: float | None = None,
    cache: SpectrumCache | None = None,
    content: str | None = None,
) -> MatrixScore:
    """Alpha of one module; arguments as of `ScoreRequest` and `score_batch`."""
    request = ScoreRequest(matrices=matrices, options=options, scale=scale, roundoff=roundoff, content=content)
    return score_batch([request], device=device, cache=cache)[0]


def score_batch(
    requests: Sequence[ScoreRequest], *, device: torch.device | None = None, cache: SpectrumCache | None = None
) -> list[MatrixScore]:
    """Alpha of several modules; spectra of matrices of one shape are computed together, for an accelerator's sake.

    Args:
        requests: the modules.
        device: where to compute; default the matrices' own.
        cache: where spectra are looked up and kept.

    Returns:
        A score each, never an exception for bad weights: the status says what is wrong with them.
    """
    prepared = [_prepare(request, device, cache) for request in requests]
    _compute_together([source for source in prepared if isinstance(source, _Source)])
    return [source if isinstance(source, MatrixScore) else _climb(source) for source in prepared]


def _prepare(request: ScoreRequest, device: torch.device | None, cache: SpectrumCache | None) -> _Source | MatrixScore:
    """What is to be computed, or the score if nothing is."""
    matrices, options = request.matrices, request.options
    num_eigs = min(matrices[0].shape) * len(matrices)
    peak = peak_of(matrices)
    if not math.isfinite(peak):
        return MatrixScore(status="not finite: contains NaN or infinity")
    if peak == 0:
        return MatrixScore(status=ALL_ZERO)
    if num_eigs < options.min_eigs:
        return MatrixScore(status=f"too few eigenvalues: {num_eigs} < {options.min_eigs}")

    if options.spectrum == "slq" and len(matrices) == 1 and in_float32_range(peak):
        estimate = estimate_tail(
            matrices[0], k_fraction=options.k_fraction, roundoff=request.roundoff, device=device, scale=request.scale
        )
        if estimate is not None:
            return MatrixScore(status="ok", alpha=estimate.alpha, estimate=estimate)
    return _Source(request=request, device=device or matrices[0].device, peak=peak, cache=cache)


def _compute_together(sources: Sequence[_Source]) -> None:
    """The spectra with which the sources begin, where several are of one shape and not known from before."""
    alike: dict[Any, list[_Source]] = defaultdict(list)
    for source in sources if len(sources) > 1 else ():
        (first, *more), path = source.request.matrices, source.request.options.ladder[0]
        if not more and scaling_exponent(source.peak, path) == 0 and source.known(path) is None:
            alike[first.shape, first.dtype, path].append(source)
    for (_, _, path), group in alike.items():
        spectra = compute_stacked(
            [source.request.matrices[0] for source in group],
            path,
            device=group[0].device,
            scales=[source.request.scale for source in group],
            roundoffs=[source.request.roundoff for source in group],
        )
        for source, spectrum in zip(group, spectra, strict=True):
            source.keep(path, spectrum)


def _climb(source: _Source) -> MatrixScore:
    """The score on the first path that resolves what the fits rest on."""
    for path in source.request.options.ladder:
        try:
            return _score_on(source, path)
        except _Unresolved:
            continue
    raise AssertionError("the last path of the ladder always gives a result")


@lru_cache(maxsize=256)
def null_alpha(name: str, shape: tuple[int, int], num_matrices: int, options: ScoreOptions) -> float | None:
    """The alpha that an untrained matrix of this shape has: the estimator on Marchenko-Pastur quantiles.

    The estimator `powerlaw` has the null of `ks`, whose fit it shares.
    """
    if name == "farms":
        window = farms_shape(shape, rows=options.farms_rows, ratio=options.farms_ratio)
        matrix = torch.empty(shape, device="meta")
        count = len(
            farms_windows([matrix], rows=options.farms_rows, ratio=options.farms_ratio, windows=options.farms_windows)
        )
        quantiles = mp_quantiles(*window, count * num_matrices * min(window))
    else:
        quantiles = mp_quantiles(*shape, min(shape) * num_matrices)
    try:
        if name in ("hill", "farms"):
            return hill(quantiles, k_fraction=options.k_fraction).alpha
        if name == "fix-finger":
            return fix_finger_fit(quantiles, bound=options.fix_finger_bound).alpha
        return ks_fit(quantiles).alpha
    except ValueError:
        return None


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The matrices of one module and where to work on them."""

    request: ScoreRequest
    device: torch.device
    peak: float
    """Largest absolute element."""
    cache: SpectrumCache | None
    spectra: dict[SpectrumPath, Spectrum] = field(default_factory=dict)
    """Those that are known."""

    @cached_property
    def content(self) -> str:
        """What identifies the matrices in the cache."""
        return self.request.content or content_hash(self.request.matrices)

    def known(self, path: SpectrumPath) -> Spectrum | None:
        """The spectrum by a path, if it is here or in the cache."""
        if path not in self.spectra and self.cache is not None:
            cached = self.cache.load(self._key(path))
            if cached is not None:
                self.spectra[path] = cached
        return self.spectra.get(path)

    def keep(self, path: SpectrumPath, spectrum: Spectrum) -> None:
        """Remember a spectrum, and save it in the cache."""
        self.spectra[path] = spectrum
        if self.cache is not None:
            self.cache.save(self._key(path), spectrum)

    def spectrum(self, path: SpectrumPath) -> Spectrum:
        """The spectrum by a path, computed if it is not known."""
        found = self.known(path)
        if found is None:
            request = self.request
            found = compute_spectrum(
                request.matrices,
                path,
                device=self.device,
                scale=request.scale,
                peak=self.peak,
                roundoff=request.roundoff,
            )
            self.keep(path, found)
        return found

    def _key(self, path: SpectrumPath) -> str:
        return entry_key(self.content, path, self.device.type, self.request.scale, self.request.roundoff)


def _score_on(source: _Source, path: SpectrumPath) -> MatrixScore:
    """All fits on one path; raises `_Unresolved` if a better path is needed and allowed."""
    spectrum, options = source.spectrum(path), source.request.options
    last = path == options.ladder[-1]
    fits: dict[str, TailFit | None] = {}
    problems: list[str] = []
    comparisons: dict[str, LikelihoodRatio] | None = None
    for name in options.fit:
        try:
            if name == "hill":
                fits[name] = _hill(spectrum, options, last=last)
            elif name == "farms":
                fits[name] = _farms(source, options)
            elif name == "powerlaw":
                fits[name], comparisons = _scan(spectrum, powerlaw_fit, last=last)
            else:
                fits[name], _ = _scan(spectrum, _without_comparison(name, options), last=last)
        except _NoTail as problem:
            fits[name] = None
            problems.append(f"{name}: {problem}" if len(options.fit) > 1 else str(problem))
    first = fits[options.fit[0]]
    if first is None:
        return MatrixScore(status=problems[0], fits=fits, spectrum=spectrum)
    return MatrixScore(status="ok", alpha=first.alpha, fits=fits, comparisons=comparisons, spectrum=spectrum)


def _hill(spectrum: Spectrum, options: ScoreOptions, *, last: bool) -> TailFit:
    """The Hill fit, if the path resolves the eigenvalue at xmin."""
    eigenvalues = spectrum.eigenvalues
    try:
        fit = hill(eigenvalues, k_fraction=options.k_fraction)
    except ValueError:
        fit = None
    xmin = float(eigenvalues[hill_index(eigenvalues.size, options.k_fraction)])
    if xmin <= spectrum.resolution and spectrum.resolution > spectrum.storage_floor and spectrum.path != "svd-float64":
        if not last:
            raise _Unresolved
        raise _NoTail(_BELOW_GRAM)
    floor = max(spectrum.storage_floor, spectrum.resolution)
    if fit is None or xmin <= floor:
        raise _NoTail(
            "rank-deficient: the tail starts at the rounding floor of the stored weights "
            f"({int((eigenvalues > floor).sum())} of {eigenvalues.size} eigenvalues are above it)"
        )
    return _accepted(fit, spectrum, last=last)


Fitter = Callable[[Vector], tuple[TailFit, dict[str, LikelihoodRatio] | None]]


def _without_comparison(name: str, options: ScoreOptions) -> Fitter:
    """Our own scanning estimators in the form of `powerlaw_fit`."""
    if name == "fix-finger":
        return lambda eigenvalues: (fix_finger_fit(eigenvalues, bound=options.fix_finger_bound), None)
    return lambda eigenvalues: (ks_fit(eigenvalues), None)


def _scan(spectrum: Spectrum, fitter: Fitter, *, last: bool) -> tuple[TailFit, dict[str, LikelihoodRatio] | None]:
    """A fit that scans xmin over all eigenvalues above the floor."""
    if spectrum.path == "gram-float32" and not last and spectrum.relative_error(float(spectrum.eigenvalues[0])) > 1e-4:
        # The scan would try eigenvalues that float32 does not resolve, and could neither take nor rule them out.
        raise _Unresolved
    usable = np.where(spectrum.eigenvalues > spectrum.storage_floor, spectrum.eigenvalues, 0.0)
    try:
        fit, comparisons = fitter(usable)
    except ValueError as error:
        raise _NoTail(str(error)) from error
    return _accepted(fit, spectrum, last=last), comparisons


def _accepted(fit: TailFit, spectrum: Spectrum, *, last: bool) -> TailFit:
    """The fit itself, if its alpha exists and is known well enough."""
    if fit.mean_log_spread <= _CONSTANT:
        raise _NoTail("constant spectrum: the eigenvalues in the tail are equal up to rounding, alpha is infinite")
    sensitivity = max(1.0, (fit.alpha - 1) ** 2 / fit.alpha)
    error = spectrum.relative_error(fit.xmin) * sensitivity
    if error > _TOLERANCE[spectrum.path]:
        if not last:
            raise _Unresolved
        if error > _WORST:
            raise _NoTail(_BELOW_GRAM)
    return fit


def _farms(source: _Source, options: ScoreOptions) -> TailFit:
    """Hill on the pooled ESD of the FARMS windows, which climb a ladder of their own."""
    request = source.request
    windows = farms_windows(
        request.matrices, rows=options.farms_rows, ratio=options.farms_ratio, windows=options.farms_windows
    )
    inner = replace(options, fit=("hill",))
    score = score_matrices(
        windows,
        inner,
        device=source.device,
        scale=request.scale,
        roundoff=request.roundoff,
        cache=source.cache,
        # The windows overlap: hashing them would cost many times what hashing the matrices does.
        content=None
        if source.cache is None
        else f"{source.content} farms {options.farms_rows} {options.farms_ratio} {options.farms_windows}",
    )
    fit = score.fits.get("hill")
    if fit is None:
        raise _NoTail(score.status)
    return fit
