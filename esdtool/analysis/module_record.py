"""Define what the analysis file says about one module: its fits, metrics, and keys of every registered measure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pydantic import Field, create_model

from esdtool.analysis.distances import Distances
from esdtool.analysis.record import Record
from esdtool.modules.identification import IdentifiedBy
from esdtool.spectra.measure import Number, all_quantities
from esdtool.spectra.options import Solver
from esdtool.spectra.trap_records import Traps
from esdtool.spectra.vector_records import Vectors

_STDERR: Final = (
    "Standard error of alpha: (alpha - 1) / sqrt(num_tail) for a power law without end; from the Fisher information "
    "about alpha for 'bounded' and 'tpl'; null where it is not known."
)

_TRUNCATION: Final = "Lambda of the factor exp(-Lambda lambda), in inverse eigenvalues"


class TailResult(Record):
    """One estimator's power-law fit of the tail."""

    alpha: float = Field(description="Power-law exponent of the tail density.")
    alpha_stderr: float | None = Field(description=_STDERR)
    xmin: float | None = Field(description="Smallest eigenvalue of the tail; null where float64 has no such number.")
    num_tail: int = Field(description="Number of eigenvalues in the tail, xmin included.")
    ks_distance: float | None = Field(
        default=None, description="Kolmogorov-Smirnov distance between the tail and its fit; null if estimated."
    )
    xmax: float | None = Field(
        default=None,
        exclude_if=lambda xmax: xmax is None,
        description="Where the law ends. Absent for one that does not (all estimators but 'bounded').",
    )
    truncation_lambda: float | None = Field(
        default=None,
        exclude_if=lambda rate: rate is None,
        description=f"{_TRUNCATION}. Absent for a law without it (all estimators but 'tpl').",
    )


class LikelihoodTest(Record):
    """Likelihood-ratio test of the power law against another distribution (package `powerlaw`)."""

    ratio: float = Field(description="Log-likelihood ratio; positive favours the power law.")
    p_value: float = Field(description="Significance of its sign.")


class TrainedResult(Record):
    """A parameter that a trainer has."""

    name: str
    shape: tuple[int, ...]


class _Module(Record):
    """One weight module: what it is, its tail and its metrics. Numbers are null unless status is 'ok'."""

    name: str = Field(description="Module, e.g. 'model.layers.0.self_attn.q_proj'.")
    parameter: str = Field(
        description="Parameter, e.g. 'model.layers.0.self_attn.q_proj.weight'; modules of a fused one share it."
    )
    role: str = Field(description="Role in the block, e.g. 'q_proj'.")
    layer: int | None = Field(description="Index of the block; null outside a numbered stack.")
    expert: int | None = Field(default=None, description="Index of the expert; null outside a mixture of experts.")
    shape: tuple[int, ...] = Field(description="Shape of the module's weight.")
    parameter_shape: tuple[int, ...] | None = Field(
        default=None, description="Shape of the parameter, where it holds more than this module."
    )
    dtype: str = Field(description="Storage dtype, or the format of quantised weights.")
    rank: int | None = Field(default=None, description="Largest possible rank of a low-rank update (LoRA).")
    trained: tuple[TrainedResult, ...] | None = Field(
        default=None,
        exclude_if=lambda trained: trained is None,  # nearly everywhere: the key would only repeat that
        description="The parameters that a trainer has in the place of a weight that is computed from them (weight "
        "normalisation, pruning, adapters); empty for an adapter's update. Absent where the parameter is the weight.",
    )
    num_eigs: int = Field(description="Number of eigenvalues in the ESD.")
    identified_by: IdentifiedBy | None = Field(
        default=None,
        description="How sure it is that this is a matrix of the model: 'family' (names of an established family, or "
        "the user's word), 'model' (the model's own code) or 'shape' (nothing but a name and a shape).",
    )
    note: str | None = Field(default=None, description="What else the tensor may be, e.g. several projections in one.")

    alpha: float | None = Field(default=None, description="Tail exponent by the first estimator.")
    alpha_stderr: float | None = Field(default=None, description=_STDERR)
    alpha_ci: tuple[float, float] | None = Field(
        default=None,
        description="95 % confidence interval of the exact alpha, where alpha is estimated without eigenvalues.",
    )
    xmin: float | None = Field(default=None, description="Smallest eigenvalue of the tail.")
    num_tail: int | None = Field(default=None, description="Eigenvalues in the tail.")
    ks_distance: float | None = Field(default=None, description="KS distance of the tail fit.")
    mp_alpha: float | None = Field(
        default=None,
        description="The first estimator on the Marchenko-Pastur law of the same shape: the untrained null.",
    )
    alphas: dict[str, float | None] = Field(default_factory=dict, description="Alpha by estimator.")
    fits: dict[str, TailResult | None] = Field(default_factory=dict, description="Whole fit by estimator.")
    comparisons: dict[str, LikelihoodTest] | None = Field(
        default=None, description="Power law against alternatives; only with the estimators 'powerlaw' and 'tpl'."
    )
    best_law: str | None = Field(
        default=None,
        description="Best of the laws compared (smallest AIC), in words, and after 'or' those that a test at 5 % does "
        "not tell from it; only with the estimators 'powerlaw' and 'tpl'.",
    )
    truncation_lambda: float | None = Field(default=None, description=f"{_TRUNCATION}, by the estimator 'tpl'.")

    lambda_max: float | None = Field(default=None, description="Largest eigenvalue of W^T W.")
    lambda_min: float | None = Field(default=None, description="Smallest; 0 when below the numerical floor.")
    lambda_median: float | None = Field(default=None)
    frobenius_norm: float | None = Field(default=None, description="sqrt(sum lambda).")
    spectral_norm: float | None = Field(default=None, description="sqrt(lambda_max).")
    stable_rank: float | None = Field(default=None, description="sum lambda / lambda_max.")
    entropy: float | None = Field(default=None, description="Spectral entropy over ln(num_eigs), in [0, 1].")
    entropy_smoothed: float | None = Field(
        default=None, description="Spectral entropy as the public code of AlphaDecay defines it."
    )
    effective_rank: float | None = Field(default=None, description="exp of the unnormalised spectral entropy.")
    matrix_rank: int | None = Field(default=None, description="Eigenvalues above numpy's float32 rank tolerance.")
    log_norm: float | None = Field(default=None, description="log10 sum lambda.")
    log_spectral_norm: float | None = Field(default=None, description="log10 lambda_max.")
    alpha_weighted: float | None = Field(default=None, description="alpha * log10 lambda_max.")
    log_alpha_norm: float | None = Field(default=None, description="log10 sum lambda^alpha.")
    null_distance: float | None = Field(
        default=None,
        description="Distance from the spectrum of a random matrix: the share of the squared Frobenius norm that lies "
        "elsewhere, 0 to 1; it compares across shapes. Null for a low-rank update and without eigenvalues.",
    )
    num_trace_log: int | None = Field(default=None, description="Tail size by SETOL's trace-log condition.")

    num_traps: int | None = Field(
        default=None, description="Correlation traps, by the law: spikes that survive a shuffle of the elements."
    )
    num_traps_drawn: int | None = Field(
        default=None, description="Spikes that survived one shuffle; only with the option traps = 'shuffle'."
    )
    traps: Traps | None = Field(default=None, description="What makes the correlation traps; null where there is none.")
    vectors: Vectors | None = Field(
        default=None,
        description="Localisation of the singular vectors; only with the option vectors, null for low-rank updates.",
    )

    distances: Distances | None = Field(
        default=None,
        exclude_if=lambda distances: distances is None,  # all that is not compared with a base
        description="How far the weights are from the base's. Absent without a base, and where a weight is not finite.",
    )

    status: str = Field(default="ok", description="'ok', or what is wrong, in words.")
    warning: str | None = Field(default=None, description="'over-trained' or 'under-trained' (estimator ks only).")
    spectrum: str | None = Field(
        default=None, description="Path taken: 'gram-float64', 'gram-float32', 'svd-float64', or 'slq' for an estimate."
    )
    solver: Solver | None = Field(
        default=None,
        description="Who computed the eigenvalues: 'torch', or 'openblas-one-stage' or 'openblas-two-stage' of numpy's "
        "or scipy's OpenBLAS; 'accelerator-two-stage' is a reduction to a band on the accelerator, with its second "
        "stage on the CPU. The fastest on the machine at hand is chosen by a trial.",
    )

    def measure(self, name: str) -> Number:
        """Return a quantity of `esdtool.spectra.measures` by its name.

        Raises:
            KeyError: if there is no such quantity.
        """
        if name not in {quantity.name for quantity in all_quantities()}:
            raise KeyError(name)
        value: Number = getattr(self, name)
        return value

    @property
    def ok(self) -> bool:
        """Whether the module was scored."""
        return self.status == "ok"

    @property
    def alpha_half_width(self) -> float | None:
        """Half of the 95 % interval of an estimated alpha; None where alpha is exact."""
        return None if self.alpha_ci is None else (self.alpha_ci[1] - self.alpha_ci[0]) / 2

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self.shape if self.parameter_shape is None else self.parameter_shape


def _with_measures() -> Any:
    """Add a key for each quantity of each registered measure."""
    keys: dict[str, Any] = {
        quantity.name: (
            int | None if quantity.whole else float | None,
            Field(default=None, description=quantity.description),
        )
        for quantity in all_quantities()
    }
    return create_model("ModuleResult", __base__=_Module, __module__=__name__, __doc__=_Module.__doc__, **keys)


if TYPE_CHECKING:
    ModuleResult = _Module
else:
    ModuleResult = _with_measures()
