"""From a checkpoint to its analysis: which modules, in which order, on which cores or device.

On the CPU a pool of threads works on one module each, the most expensive first (see
`esdtool.threads`); tensors are read by the worker that needs them, so that few are in memory at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from esdtool._version import __version__
from esdtool.analysis import Analysis, Comparison, ModuleResult, Settings, SkippedResult, Source, TailResult
from esdtool.checkpoint import Checkpoint, from_model, from_state_dict, open_checkpoint
from esdtool.checkpoint.base import DTYPE_BYTES
from esdtool.errors import DeviceError, NothingToAnalyzeError, UsageError
from esdtool.metrics import alpha_weighted, log_alpha_norm, spectral_metrics
from esdtool.modules import Selection, WeightModule, select_modules
from esdtool.options import ScoreOptions
from esdtool.scoring import MatrixScore, cost, null_alpha, score_matrices
from esdtool.summary import summarize
from esdtool.tail import TailFit, Vector
from esdtool.threads import available_cores, single_blas_workers

OnProgress = Callable[[WeightModule, float], None]
"""Called in the main thread after each module with the module and its cost."""

# The estimator for which the literature gives limits of a well-trained layer (Martin and Mahoney 2021).
_WARNING_FIT = "ks"
_OVER_TRAINED, _UNDER_TRAINED = 2.0, 6.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an analysis will do, known from headers alone."""

    checkpoint: Checkpoint
    selection: Selection
    options: ScoreOptions
    device: torch.device
    jobs: int
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def cost(self) -> float:
        """Predicted work in flops."""
        return sum(cost(module) for module in self.selection.modules)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak memory of the matrices in flight: the `jobs` largest modules at once."""
        needs = sorted((_working_bytes(module) for module in self.selection.modules), reverse=True)
        return sum(needs[: self.jobs])


def analyze(
    source: str | Path | torch.nn.Module | Mapping[str, torch.Tensor] | Checkpoint,
    *,
    fit: str | Sequence[str] = "hill",
    k_fraction: float = 0.5,
    min_eigs: int = 50,
    spectrum: str = "auto",
    fast: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str | torch.device = "auto",
    jobs: int | None = None,
    revision: str | None = None,
    fix_finger_bound: str = "linear",
    farms_rows: int = 100,
    farms_ratio: float = 2.0,
    farms_windows: int = 10,
    on_progress: OnProgress | None = None,
) -> Analysis:
    """Spectra and alphas of every weight module.

    Args:
        source: a path or Hub id, a live model, a state dict, or an open checkpoint.
        fit: one or more of `hill`, `ks`, `fix-finger`, `farms`, `powerlaw`; the first gives `alpha`.
        k_fraction: fraction of the eigenvalues in the Hill estimator's tail.
        min_eigs: modules with fewer eigenvalues are not scored.
        spectrum: `auto`, `gram` or `svd`; see `esdtool.spectrum`.
        fast: allow float32 where its error bound admits it (alphas within 1e-4).
        include: regular expressions on parameter names; if given, only tensors that match one are analysed.
        exclude: regular expressions on parameter names to leave out.
        device: `auto` (CUDA if there is one, else the CPU), `cpu`, `cuda`, `cuda:N` or `mps`.
        jobs: modules worked on at a time; default one per core on the CPU, one on an accelerator.
        revision: branch, tag or commit of a Hub checkpoint.
        fix_finger_bound: `linear`, or `legacy` for the public code's window.
        farms_rows: rows of a FARMS window.
        farms_ratio: columns over rows of a FARMS window.
        farms_windows: FARMS windows per dimension.
        on_progress: called after each module.

    Returns:
        The analysis; `Analysis.esds` holds the eigenvalues of each module.

    Raises:
        CheckpointError: if the source cannot be read.
        UsageError: if an option has no such value or a pattern matches nothing.
        NothingToAnalyzeError: if the source holds no weight matrix.
    """
    options = ScoreOptions(
        fit=(fit,) if isinstance(fit, str) else tuple(fit),
        k_fraction=k_fraction,
        min_eigs=min_eigs,
        spectrum=spectrum,  # type: ignore[arg-type] # checked by ScoreOptions itself
        fast=fast,
        fix_finger_bound=fix_finger_bound,  # type: ignore[arg-type]
        farms_rows=farms_rows,
        farms_ratio=farms_ratio,
        farms_windows=farms_windows,
    )
    plan = make_plan(source, options, include=include, exclude=exclude, device=device, jobs=jobs, revision=revision)
    return run(plan, on_progress=on_progress)


def make_plan(
    source: str | Path | torch.nn.Module | Mapping[str, torch.Tensor] | Checkpoint,
    options: ScoreOptions,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str | torch.device = "auto",
    jobs: int | None = None,
    revision: str | None = None,
) -> Plan:
    """Open the source and choose its modules, without reading weights. Arguments and errors as `analyze`."""
    chosen = resolve_device(device)
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs must be at least 1, not {jobs}")
    checkpoint = _open(source, revision)
    selection = select_modules(
        checkpoint.tensors.values(), config=checkpoint.config, include=tuple(include), exclude=tuple(exclude)
    )
    if not selection.modules:
        raise NothingToAnalyzeError(
            f"{checkpoint.location}: no weight matrix to analyse among {len(checkpoint.tensors)} tensors"
            + _reasons(selection)
        )
    available = available_cores() if chosen.type == "cpu" else 1
    if checkpoint.collective_reads:
        jobs = 1  # one thread, one order
    return Plan(
        checkpoint=checkpoint,
        selection=selection,
        options=options,
        device=chosen,
        jobs=min(jobs or available, len(selection.modules)),
        include=tuple(include),
        exclude=tuple(exclude),
    )


def run(plan: Plan, *, on_progress: OnProgress | None = None) -> Analysis:
    """Carry out a plan. The result does not depend on `plan.jobs`."""
    scored: dict[str, tuple[ModuleResult, Vector | None]] = {}
    for module, result, eigenvalues in _results(plan):
        scored[module.parameter] = result, eigenvalues
        if on_progress is not None:
            on_progress(module, cost(module))
    results = [scored[module.parameter] for module in plan.selection.modules]
    checkpoint, options = plan.checkpoint, plan.options
    uses_farms = "farms" in options.fit
    analysis = Analysis(
        created_by=f"esdtool {__version__}",
        source=Source(
            checkpoint=checkpoint.location,
            revision=checkpoint.revision,
            model_type=checkpoint.model_type,
            files=checkpoint.files,
        ),
        settings=Settings(
            fit=options.fit,
            k_fraction=options.k_fraction,
            min_eigs=options.min_eigs,
            spectrum=options.spectrum,
            fast=options.fast,
            fix_finger_bound=options.fix_finger_bound,
            farms_rows=options.farms_rows if uses_farms else None,
            farms_ratio=options.farms_ratio if uses_farms else None,
            farms_windows=options.farms_windows if uses_farms else None,
            include=plan.include,
            exclude=plan.exclude,
        ),
        modules=tuple(result for result, _ in results),
        skipped=tuple(
            SkippedResult(name=tensor.name, shape=tensor.shape, dtype=tensor.dtype, reason=tensor.reason)
            for tensor in plan.selection.skipped
        ),
        summary=summarize([result for result, _ in results], num_skipped=len(plan.selection.skipped)),
    )
    return analysis.with_esds({result.name: eigenvalues for result, eigenvalues in results if eigenvalues is not None})


def resolve_device(device: str | torch.device) -> torch.device:
    """The device to compute on.

    Raises:
        UsageError: for an unknown name.
        DeviceError: if the device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}; choose auto, cpu, cuda, cuda:N or mps") from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise DeviceError(f"device {device!r} is not available: torch sees {count} CUDA devices; use --device cpu")
    elif chosen.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError("device 'mps' is not available on this machine; use --device cpu")
    elif chosen.type != "cpu":
        raise UsageError(f"unknown device {device!r}; choose auto, cpu, cuda, cuda:N or mps")
    return chosen


def _open(
    source: str | Path | torch.nn.Module | Mapping[str, torch.Tensor] | Checkpoint, revision: str | None
) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, torch.nn.Module):
        return from_model(source)
    if isinstance(source, Mapping):
        return from_state_dict(source)
    return open_checkpoint(source, revision=revision)


def _results(plan: Plan) -> Iterator[tuple[WeightModule, ModuleResult, Vector | None]]:
    """Every module's result, in the order in which they get done."""
    largest_first = sorted(plan.selection.modules, key=cost, reverse=True)
    with single_blas_workers(plan.jobs) as pool:
        futures = {pool.submit(_score, plan, module): module for module in largest_first}
        for future in as_completed(futures):
            yield futures[future], *future.result()


def _score(plan: Plan, module: WeightModule) -> tuple[ModuleResult, Vector | None]:
    """Read one module and score it; runs in a worker thread."""
    tensor = plan.checkpoint.read(module.parameter)
    score = score_matrices(module.matrices(tensor), plan.options, device=plan.device, scale=module.eigenvalue_scale)
    return module_result(module, score, plan.options), None if score.spectrum is None else score.spectrum.eigenvalues


def module_result(module: WeightModule, score: MatrixScore, options: ScoreOptions) -> ModuleResult:
    """A module's score in the form of the file."""
    described: dict[str, Any] = {
        "name": module.name,
        "parameter": module.parameter,
        "role": module.role,
        "layer": module.layer,
        "shape": module.shape,
        "dtype": module.dtype,
        "num_eigs": module.num_eigs,
        "status": score.status,
        "spectrum": None if score.spectrum is None else score.spectrum.path,
    }
    if score.alpha is None or score.spectrum is None:
        return ModuleResult(**described)
    first = score.fits[options.fit[0]]
    assert first is not None
    metrics = spectral_metrics(score.spectrum, module.matrix_shape, num_matrices=module.num_matrices)
    warned = score.fits.get(_WARNING_FIT)
    return ModuleResult(
        **described,
        alpha=first.alpha,
        alpha_stderr=first.alpha_stderr,
        xmin=first.xmin,
        num_tail=first.num_tail,
        ks_distance=first.ks_distance,
        mp_alpha=null_alpha(options.fit[0], module.matrix_shape, module.num_matrices, options),
        alphas={name: None if fit is None else fit.alpha for name, fit in score.fits.items()},
        fits={name: None if fit is None else _tail_result(fit) for name, fit in score.fits.items()},
        comparisons=None
        if score.comparisons is None
        else {name: Comparison(ratio=test.ratio, p_value=test.p_value) for name, test in score.comparisons.items()},
        **asdict(metrics),
        alpha_weighted=alpha_weighted(first.alpha, metrics.lambda_max),
        log_alpha_norm=log_alpha_norm(first.alpha, score.spectrum.eigenvalues),
        warning=None if warned is None else _warning(warned.alpha),
    )


def _tail_result(fit: TailFit) -> TailResult:
    return TailResult(
        alpha=fit.alpha,
        alpha_stderr=fit.alpha_stderr,
        xmin=fit.xmin,
        num_tail=fit.num_tail,
        ks_distance=fit.ks_distance,
    )


def _warning(alpha: float) -> str | None:
    if alpha < _OVER_TRAINED:
        return "over-trained"
    return "under-trained" if alpha > _UNDER_TRAINED else None


def _working_bytes(module: WeightModule) -> int:
    """Memory of one module in flight: stored tensor, a float64 slice of it, its Gram matrix and a solver's copy."""
    short, long = sorted(module.matrix_shape)
    stored = math.prod(module.shape) * DTYPE_BYTES.get(module.dtype, 4)
    return stored + 8 * short * min(long, max(short, 2048)) + 3 * 8 * short**2


def _reasons(selection: Selection) -> str:
    """The commonest reasons for leaving tensors out, for the message that none is left."""
    counts = Counter(tensor.reason for tensor in selection.skipped)
    if not counts:
        return ""
    return " (skipped: " + "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(3)) + ")"
