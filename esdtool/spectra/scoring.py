"""One module's matrices to its alpha: the estimators on the cheapest spectrum that is accurate enough.

The paths of `esdtool.spectra.spectrum` form a ladder, gram-float32 (only if `fast`), gram-float64,
svd-float64. Each fit says which eigenvalues it rests on; if the path's own error bound there
is too large, the next path is taken. `analyze`, `train` and `AlphaDecay` all come through here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from esdtool.spectra.acceptance import NoTailError, UnresolvedError, accepted_fit
from esdtool.spectra.cache import SpectrumCache, content_hash, entry_key
from esdtool.spectra.estimator import Estimator, SubMatrices, load_estimator
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
from esdtool.spectra.tail import LikelihoodRatio, TailFit

ALL_ZERO = "all elements are zero"
"""Status of a matrix without any weight."""

NOT_FINITE = "not finite: contains NaN or infinity"
"""Status of a matrix that holds such an element."""


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
    """Likelihood-ratio tests by an estimator that makes them (`powerlaw`)."""
    spectrum: Spectrum | None = None
    """The eigenvalues; None where there are none to speak of (NaN, all zero) and where alpha is estimated."""
    estimate: SlqEstimate | None = None
    """Where alpha was estimated without eigenvalues (`--spectrum slq`)."""


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
    load: Callable[[], Sequence[torch.Tensor]] | None = None
    """Reads the matrices where `matrices` are without data (on the meta device): only if the cache lacks a spectrum."""

    @cached_property
    def data(self) -> Sequence[torch.Tensor]:
        """The matrices with their data."""
        return self.matrices if self.load is None else self.load()


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
    """Compute alpha of one module.

    The arguments are the fields of `ScoreRequest` and the arguments of `score_batch`.
    """
    request = ScoreRequest(matrices=matrices, options=options, scale=scale, roundoff=roundoff, content=content)
    return score_batch([request], device=device, cache=cache)[0]


def score_batch(
    requests: Sequence[ScoreRequest], *, device: torch.device | None = None, cache: SpectrumCache | None = None
) -> list[MatrixScore]:
    """Compute alpha of several modules; an accelerator computes the spectra of matrices of one shape together.

    Args:
        requests: the modules.
        device: where to compute; default the matrices' own.
        cache: where spectra are looked up and kept.

    Returns:
        One score each, never an exception for bad weights: the status says what is wrong with them.
    """
    prepared = [_prepare(request, device, cache) for request in requests]
    _compute_together([each for each in prepared if isinstance(each, _Source) and gains_from_batches(each.device)])
    return [source if isinstance(source, MatrixScore) else _climb(source) for source in prepared]


def _prepare(request: ScoreRequest, device: torch.device | None, cache: SpectrumCache | None) -> _Source | MatrixScore:
    """Find what is to be computed, or the score if nothing is."""
    prepared = _prepare_exact(request, device, cache)
    options = request.options
    if isinstance(prepared, MatrixScore) or options.spectrum != "slq" or len(request.matrices) > 1:
        return prepared
    if not in_float32_range(prepared.peak):
        return prepared
    estimate = estimate_tail(
        request.data[0], k_fraction=options.k_fraction, roundoff=request.roundoff, device=device, scale=request.scale
    )
    return prepared if estimate is None else MatrixScore(status="ok", alpha=estimate.alpha, estimate=estimate)


def _prepare_exact(
    request: ScoreRequest, device: torch.device | None, cache: SpectrumCache | None
) -> _Source | MatrixScore:
    """Refuse matrices that have no tail of eigenvalues, before any is computed."""
    matrices, options = request.matrices, request.options
    num_eigs = min(matrices[0].shape) * len(matrices)
    found = _Source(request=request, device=device or matrices[0].device, cache=cache)
    if request.load is not None and any(found.known(path) is not None for path in options.ladder):
        return found  # there is no spectrum in the cache of what is refused here
    peak = found.peak
    if not math.isfinite(peak):
        return MatrixScore(status=NOT_FINITE)
    if peak == 0:
        return MatrixScore(status=ALL_ZERO)
    if num_eigs < options.min_eigs:
        return MatrixScore(status=f"too few eigenvalues: {num_eigs} < {options.min_eigs}")
    return found


def gains_from_batches(device: torch.device) -> bool:
    """Tell whether matrices of one shape are computed together on a device.

    On a CPU nothing is gained, and the last digits would depend on which modules happen to share a tensor.
    """
    return device.type != "cpu"


def _compute_together(sources: Sequence[_Source]) -> None:
    """Compute the first spectra of sources of one shape together, unless they are known already."""
    alike: dict[Any, list[_Source]] = defaultdict(list)
    for source in sources if len(sources) > 1 else ():
        (first, *more), path = source.request.matrices, source.request.options.ladder[0]
        if not more and source.known(path) is None and scaling_exponent(source.peak, path) == 0:
            alike[first.shape, first.dtype, path].append(source)
    for (_, _, path), group in alike.items():
        spectra = compute_stacked(
            [source.request.data[0] for source in group],
            path,
            device=group[0].device,
            scales=[source.request.scale for source in group],
            roundoffs=[source.request.roundoff for source in group],
        )
        for source, spectrum in zip(group, spectra, strict=True):
            source.keep(path, spectrum)


def _climb(source: _Source) -> MatrixScore:
    """Score on the first path that resolves what the fits rest on."""
    for path in source.request.options.ladder:
        with suppress(UnresolvedError):
            return _score_on(source, path)
    raise AssertionError("the last path of the ladder always gives a result")


@lru_cache(maxsize=256)
def null_alpha(name: str, shape: tuple[int, int], num_matrices: int, options: ScoreOptions) -> float | None:
    """Compute the alpha of an untrained matrix: the estimator on Marchenko-Pastur quantiles.

    Args:
        name: the estimator's.
        shape: (rows, columns) of each matrix.
        num_matrices: matrices whose eigenvalues are pooled.
        options: settings of the estimator.

    Returns:
        None if the law of this shape has no tail that the estimator could fit.
    """
    estimator = load_estimator(name)
    parts = [torch.empty(shape, device="meta")] * num_matrices
    if estimator.sub_matrices is not None:
        parts = estimator.sub_matrices.cut(parts, options)
    rows, columns = parts[0].shape
    quantiles = mp_quantiles(rows, columns, min(rows, columns) * len(parts))
    try:
        return (estimator.null_fit or estimator.fit)(quantiles, options).alpha
    except ValueError:
        return None


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The matrices of one module, and where their spectra are computed and kept."""

    request: ScoreRequest
    device: torch.device
    cache: SpectrumCache | None
    spectra: dict[SpectrumPath, Spectrum] = field(default_factory=dict)
    """The spectra that are known, by path."""

    @cached_property
    def peak(self) -> float:
        """Largest absolute element."""
        return peak_of(self.request.data)

    @cached_property
    def content(self) -> str:
        """Text that identifies the matrices in the cache."""
        return self.request.content or content_hash(self.request.data)

    def known(self, path: SpectrumPath) -> Spectrum | None:
        """Find the spectrum by a path in memory or in the cache."""
        if path not in self.spectra and self.cache is not None:
            cached = self.cache.load(self._key(path))
            matrices = self.request.matrices
            if cached is not None and cached.eigenvalues.size == min(matrices[0].shape) * len(matrices):
                self.spectra[path] = cached
        return self.spectra.get(path)

    def keep(self, path: SpectrumPath, spectrum: Spectrum) -> None:
        """Remember a spectrum, and save it in the cache."""
        self.spectra[path] = spectrum
        if self.cache is not None:
            self.cache.save(self._key(path), spectrum)

    def spectrum(self, path: SpectrumPath) -> Spectrum:
        """Find or compute the spectrum by a path."""
        found = self.known(path)
        if found is None:
            request = self.request
            found = compute_spectrum(
                request.data,
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
    """Make all fits on one path.

    Raises:
        UnresolvedError: if a better path is needed and the ladder has one.
    """
    spectrum, options = source.spectrum(path), source.request.options
    last = path == options.ladder[-1]
    fits: dict[str, TailFit | None] = {}
    problems: list[str] = []
    for name in options.fit:
        estimator = load_estimator(name)
        try:
            if estimator.sub_matrices is None:
                fits[name] = accepted_fit(estimator, spectrum, options, last=last)
            else:
                fits[name] = _fit_parts(source, name, estimator, estimator.sub_matrices, spectrum.exponent)
        except NoTailError as problem:
            fits[name] = None
            problems.append(f"{name}: {problem}" if len(options.fit) > 1 else str(problem))
    first = fits[options.fit[0]]
    if first is None:
        return MatrixScore(status=problems[0], fits=fits, spectrum=spectrum)
    comparisons = next((fit.comparisons for fit in fits.values() if fit is not None and fit.comparisons), None)
    return MatrixScore(status="ok", alpha=first.alpha, fits=fits, comparisons=comparisons, spectrum=spectrum)


def _fit_parts(source: _Source, name: str, estimator: Estimator, cutting: SubMatrices, exponent: int) -> TailFit:
    """Fit the pooled eigenvalues of parts of the matrices, which climb a ladder of their own."""
    request = source.request
    options = request.options
    settings = " ".join(str(getattr(options, option)) for option in cutting.options)
    parts = replace(
        request,
        matrices=cutting.cut(request.matrices, options),
        load=None if request.load is None else lambda: cutting.cut(request.data, options),
        # The parts may overlap: hashing them would cost many times what hashing the matrices does.
        content=None if source.cache is None else f"{source.content} {name} {settings}",
    )
    prepared = _prepare_exact(parts, source.device, source.cache)
    if isinstance(prepared, MatrixScore):
        raise NoTailError(prepared.status)
    for path in options.ladder:
        with suppress(UnresolvedError):
            spectrum = prepared.spectrum(path)
            fit = accepted_fit(estimator, spectrum, options, last=path == options.ladder[-1])
            # In the units of the module's own spectrum, in which xmin is read.
            return replace(fit, xmin=math.ldexp(fit.xmin, spectrum.exponent - exponent))
    raise AssertionError("the last path of the ladder always gives a result")
