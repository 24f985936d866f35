"""One module's score in the form of the analysis file."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from esdtool.analysis.module_record import LikelihoodTest, ModuleResult, TailResult, TrainedResult
from esdtool.analysis.verdict import Verdict, within_limits
from esdtool.modules import WeightModule
from esdtool.spectra.measure import MeasuredSpectrum, measure_estimate, measure_spectrum
from esdtool.spectra.metrics import alpha_weighted, estimated_metrics, log_alpha_norm, spectral_metrics
from esdtool.spectra.null_distance import null_distance
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.scoring import MatrixScore, null_alpha
from esdtool.spectra.slq import SlqEstimate
from esdtool.spectra.spectrum import Spectrum
from esdtool.spectra.tail import TailFit

_WARNING_FIT = "ks"
"""The estimator for which the literature gives limits of a well-trained layer."""


def module_result(module: WeightModule, score: MatrixScore, options: ScoreOptions) -> ModuleResult:
    """Bring a module's score into the form of the file."""
    described: dict[str, Any] = {
        "name": module.name,
        "parameter": module.parameter,
        "role": module.role,
        "layer": module.layer,
        "expert": module.expert,
        "shape": module.shape,
        "parameter_shape": module.parameter_shape,
        "dtype": module.dtype,
        "rank": module.rank,
        "trained": None
        if module.trained is None
        else tuple(TrainedResult(name=item.name, shape=item.shape) for item in module.trained),
        "num_eigs": module.num_eigs,
        "identified_by": module.identified_by,
        "note": module.note,
        "status": score.status,
        "spectrum": None if score.spectrum is None else score.spectrum.path,
        "solver": None if score.spectrum is None else score.spectrum.solver,
    }
    if score.estimate is not None:
        described["spectrum"] = "slq"
        return ModuleResult(**described, **_estimated(score.estimate, module, options))
    if score.alpha is None or score.spectrum is None:
        return ModuleResult(**described)
    first = score.fits[options.fit[0]]
    assert first is not None
    metrics = asdict(spectral_metrics(score.spectrum, module.matrix_shape))
    metrics |= measure_spectrum(
        MeasuredSpectrum(
            spectrum=score.spectrum,
            shape=module.matrix_shape,
            num_matrices=module.num_matrices,
            rank=module.rank,
            fits=score.fits,
        )
    )
    null = None
    if module.rank is None:
        metrics["null_distance"] = null_distance(score.spectrum.eigenvalues, *module.matrix_shape)
        null = null_alpha(options.fit[0], module.matrix_shape, module.num_matrices, options)
    warned = score.fits.get(_WARNING_FIT)
    return ModuleResult(
        **described,
        alpha=first.alpha,
        alpha_stderr=first.alpha_stderr,
        xmin=score.spectrum.unscaled(first.xmin),
        num_tail=first.num_tail,
        ks_distance=first.ks_distance,
        mp_alpha=null,
        alphas={name: None if fit is None else fit.alpha for name, fit in score.fits.items()},
        fits={name: None if fit is None else _tail_result(fit, score.spectrum) for name, fit in score.fits.items()},
        comparisons=None
        if score.comparisons is None
        else {name: LikelihoodTest(ratio=test.ratio, p_value=test.p_value) for name, test in score.comparisons.items()},
        best_law=next((fit.best_law for fit in score.fits.values() if fit is not None and fit.best_law), None),
        truncation_lambda=_truncation(score.fits.get("tpl"), score.spectrum),
        **metrics,
        alpha_weighted=first.alpha * metrics["log_spectral_norm"],
        log_alpha_norm=log_alpha_norm(first.alpha, score.spectrum.eigenvalues, exponent=score.spectrum.exponent),
        warning=None if warned is None else _warning(warned.alpha),
    )


def _estimated(estimate: SlqEstimate, module: WeightModule, options: ScoreOptions) -> dict[str, Any]:
    """List the numbers of a module without eigenvalues; what has no estimate is None."""
    tail: dict[str, Any] = {
        "alpha": estimate.alpha,
        "alpha_stderr": (estimate.alpha - 1) / math.sqrt(estimate.num_tail),
        "xmin": estimate.xmin,
        "num_tail": estimate.num_tail,
    }
    fits = dict.fromkeys(options.fit) | {"hill": TailResult(**tail)}
    return {
        **tail,
        "alpha_ci": estimate.alpha_ci,
        "mp_alpha": null_alpha("hill", module.matrix_shape, module.num_matrices, options),
        "alphas": {name: None if fit is None else fit.alpha for name, fit in fits.items()},
        "fits": fits,
        **asdict(estimated_metrics(estimate)) | measure_estimate(estimate, module.matrix_shape),
        "alpha_weighted": alpha_weighted(estimate.alpha, estimate.lambda_max),
        "log_alpha_norm": estimate.log_alpha_norm,
    }


def _tail_result(fit: TailFit, spectrum: Spectrum) -> TailResult:
    return TailResult(
        alpha=fit.alpha,
        alpha_stderr=fit.alpha_stderr,
        xmin=spectrum.unscaled(fit.xmin),
        num_tail=fit.num_tail,
        ks_distance=fit.ks_distance,
        xmax=None if fit.law is None or fit.law.xmax is None else spectrum.unscaled(fit.law.xmax),
        truncation_lambda=_truncation(fit, spectrum),
    )


def _truncation(fit: TailFit | None, spectrum: Spectrum) -> float | None:
    """Return Lambda in inverse eigenvalues; None where the law has none, or float64 no number of its size."""
    if fit is None or fit.law is None or fit.law.truncation is None:
        return None
    return replace(spectrum, exponent=-spectrum.exponent).unscaled(fit.law.truncation)


def _warning(alpha: float) -> str | None:
    found = within_limits(alpha)
    return None if found is Verdict.HEAVY_TAILED else found.value
