"""An analysis under the column names of WeightWatcher 0.7.7, for notebooks that read its tables.

The values are esdtool's. Where its definition is another one, docs/comparison.md says so. Columns of draws without a
seed (`rand_*`, `max_rand_eval`, `ww_softrank`, `ww_maxdist`), of a product that overflows (`detX_val`), of singular
values below what a Gram matrix resolves (`rank_loss`), of histograms of vectors (`*_loc_ratio`, `*_part_ratio`,
`*_vec_entropy`) and of experimental options are left out.
"""

from __future__ import annotations

import math
from typing import Any, Final

from esdtool.analysis.document import Analysis
from esdtool.analysis.module_record import ModuleResult
from esdtool.errors import UsageError
from esdtool.support.csv_text import csv_text

FIT: Final = "ks"
"""The estimator that gives that tool's alpha."""

_LAYER_TYPES: Final = {2: "dense", 3: "conv1d", 4: "conv2d"}
"""Names of layers there, by the number of dimensions of their weights."""

_WEAK_RANK: Final = 1e-6
"""Eigenvalues below this count as lost in `weak_rank_loss`, whatever the scale of the weights."""

COLUMNS: Final = (
    "layer_id",
    "name",
    "D",
    "ERG_gap",
    "Lambda",
    "M",
    "N",
    "Q",
    "W_scale",
    "alpha",
    "alpha_weighted",
    "bulk_max",
    "bulk_min",
    "detX_num",
    "entropy",
    "has_esd",
    "lambda_max",
    "layer_type",
    "log_alpha_norm",
    "log_norm",
    "log_spectral_norm",
    "longname",
    "matrix_rank",
    "mp_softrank",
    "norm",
    "num_ERG_spikes",
    "num_evals",
    "num_pl_spikes",
    "num_spikes",
    "num_traps",
    "rf",
    "sigma",
    "sigma_mp",
    "spectral_norm",
    "stable_rank",
    "status",
    "sv_max",
    "sv_min",
    "warning",
    "weak_rank_loss",
    "xmax",
    "xmin",
)
"""Two columns that identify a layer, then the alphabet, as that tool sorts them."""


def weightwatcher_csv(analysis: Analysis) -> str:
    """Return a line of headings and a line a module, those that could not be scored included.

    Args:
        analysis: its first estimator is `ks`.

    Raises:
        UsageError: if it is another one.
    """
    check_fit(analysis.settings.fit)
    return csv_text(COLUMNS, [_row(position, module, analysis) for position, module in enumerate(analysis.modules, 1)])


def check_fit(fit: tuple[str, ...]) -> None:
    """Refuse an alpha that the column of that name does not mean.

    Args:
        fit: the estimators of an analysis.

    Raises:
        UsageError: if the first one is not `ks`.
    """
    if fit[0] != FIT:
        raise UsageError(f"WeightWatcher's alpha is by {FIT}, not by {fit[0]}: make {FIT} the first --fit")


def _row(position: int, module: ModuleResult, analysis: Analysis) -> dict[str, Any]:
    long, short, count = _sides(module)
    row: dict[str, Any] = {
        "layer_id": position,
        "name": module.name.rpartition(".")[2],
        "longname": module.name,
        "layer_type": "dense" if count == 1 else _LAYER_TYPES.get(len(module.shape), "dense"),
        "M": short,
        "N": long,
        "Q": long / short,
        "rf": count,
        "num_evals": module.num_eigs,
        "has_esd": module.ok,
        "status": "success" if module.ok else "failed",
        "warning": (module.warning or "") if module.ok else module.status,
    }
    return row | (_numbers(module, analysis, long) if module.ok else {})


def _numbers(module: ModuleResult, analysis: Analysis, long: int) -> dict[str, Any]:
    eigenvalues = analysis.esds.get(module.name)
    norm = None if module.frobenius_norm is None else module.frobenius_norm**2
    scale = math.sqrt(module.num_eigs / norm) if norm else None
    sigma = module.measure("mp_sigma")
    spikes = module.num_trace_log
    return {
        **{name: getattr(module, name) for name in _SAME},
        "D": module.ks_distance,
        "ERG_gap": module.measure("erg_gap"),
        "Lambda": module.truncation_lambda,  # that tool says -1 where it fits no truncated law
        "W_scale": scale,
        "bulk_max": module.measure("mp_bulk_max"),
        "bulk_min": module.measure("mp_bulk_min"),
        "detX_num": spikes,
        "mp_softrank": module.measure("mp_softrank"),
        "norm": norm,
        "num_ERG_spikes": spikes,
        "num_pl_spikes": module.num_tail,
        "num_spikes": module.measure("num_spikes"),
        "sigma": module.alpha_stderr,
        # Of the matrix that is divided by sqrt(N), and scaled so that its eigenvalues have the mean 1.
        "sigma_mp": None if sigma is None or scale is None else sigma * math.sqrt(long) * scale,
        "spectral_norm": module.lambda_max,
        "sv_max": module.spectral_norm,
        "sv_min": None if module.lambda_min is None else math.sqrt(module.lambda_min),
        "weak_rank_loss": None if eigenvalues is None else int((eigenvalues < _WEAK_RANK).sum()),
        "xmax": module.lambda_max,
    }


_SAME: Final = (
    "alpha",
    "alpha_weighted",
    "entropy",
    "lambda_max",
    "log_alpha_norm",
    "log_norm",
    "log_spectral_norm",
    "matrix_rank",
    "num_traps",
    "stable_rank",
    "xmin",
)
"""Columns that have the same name and meaning in the analysis."""


def _sides(module: ModuleResult) -> tuple[int, int, int]:
    """Return the long side and the short side of a module's matrices, and their number."""
    shape = module.shape
    short, long = sorted(shape[:2])
    if len(shape) == 3 and module.num_eigs != short * shape[2] and module.rank is None:  # one matrix a head
        short, long = sorted(shape[1:])
        return long, short, shape[0]
    return long, short, math.prod(shape[2:])
