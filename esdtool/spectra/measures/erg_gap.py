"""The gap between two ideas of where the tail begins: SETOL's trace-log condition, and the best power law."""

from __future__ import annotations

from esdtool.spectra.measure import Measure, MeasuredSpectrum, Number, Quantity

_ESTIMATOR = "ks"


def erg_gap(measured: MeasuredSpectrum) -> dict[str, Number]:
    """Subtract the size of the power-law tail from the size of the trace-log tail."""
    from esdtool.spectra.estimators.ks import ks_fit
    from esdtool.spectra.metrics import is_resolved, num_trace_log

    spectrum = measured.spectrum
    eigenvalues = spectrum.eigenvalues
    count = num_trace_log(eigenvalues)
    if not is_resolved(spectrum, float(eigenvalues[-count])):
        return {"erg_gap": None}
    if _ESTIMATOR in measured.fits:
        fit = measured.fits[_ESTIMATOR]
    else:
        try:
            fit = ks_fit(measured.above_rounding)
        except ValueError:
            fit = None
    return {"erg_gap": None if fit is None else count - fit.num_tail}


MEASURE = Measure(
    quantities=(
        Quantity(
            name="erg_gap",
            title="ERG gap",
            formula="num_trace_log minus the size of the tail by the estimator ks, computed with sums of logarithms; "
            "near 0 where a layer is ideally trained",
            source="Martin and Hinrichs, SETOL, arXiv 2507.17912",
            whole=True,
        ),
    ),
    compute=erg_gap,
)
