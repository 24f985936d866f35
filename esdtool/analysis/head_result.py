"""Define how the spectra of attention heads stand in the analysis file."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from esdtool.analysis.record import Record
from esdtool.support.words import dimensions


class HeadResult(Record):
    """The spectrum of one head's part of a projection, or of a product of two. Numbers are null unless it is 'ok'."""

    name: str = Field(
        description="E.g. 'model.layers.0.self_attn.q_proj.heads.3', or '...self_attn.heads.3.qk' for a product."
    )
    attention: str = Field(description="Attention block, e.g. 'model.layers.0.self_attn'.")
    role: str = Field(description="Role of the projection, or 'qk' (W_q^T W_k) or 'vo' (W_o W_v).")
    layer: int | None = Field(description="Index of the block; null outside a numbered stack.")
    head: int = Field(description="Index of the head: of keys and values for k and v, else of queries.")
    key_value_head: int = Field(description="Index of the head of keys and values that it uses.")
    modules: tuple[str, ...] = Field(description="The module that it is a part of, or the two of a product.")
    shape: tuple[int, int] = Field(description="Shape of the part, (width of a head, channels), or of the product.")
    num_eigs: int = Field(description="Number of eigenvalues, those aside that are zero by construction.")
    status: str = Field(default="ok", description="'ok', or what is wrong, in words.")

    alpha: float | None = Field(default=None, description="Tail exponent by the first estimator.")
    alpha_stderr: float | None = Field(default=None, description="(alpha - 1) / sqrt(num_tail).")
    xmin: float | None = Field(default=None, description="Smallest eigenvalue of the tail.")
    num_tail: int | None = Field(default=None, description="Number of eigenvalues in the tail.")
    ks_distance: float | None = Field(default=None, description="Kolmogorov-Smirnov distance of the first fit.")
    mp_alpha: float | None = Field(
        default=None, description="Alpha of an untrained matrix of the part's shape, or of a product of two such."
    )
    alphas: dict[str, float | None] = Field(default_factory=dict, description="Alpha by estimator.")
    null_distance: float | None = Field(
        default=None, description="Distance from the spectrum of the same, as that of modules: 0 to 1."
    )
    lambda_max: float | None = Field(default=None, description="Largest eigenvalue.")
    frobenius_norm: float | None = Field(default=None, description="sqrt(sum lambda).")
    stable_rank: float | None = Field(default=None, description="sum lambda / lambda_max.")
    effective_rank: float | None = Field(default=None, description="exp of the spectral entropy.")

    @property
    def ok(self) -> bool:
        """Whether the head was scored."""
        return self.status == "ok"

    def flat_row(self) -> dict[str, Any]:
        """Return the values of a table's row, whose columns are named as those of modules where they mean the same."""
        row = self.model_dump(exclude={"alphas", "shape", "modules"})
        row |= {"shape": dimensions(self.shape), "modules": " ".join(self.modules)}
        return row | {f"alphas.{fit}": alpha for fit, alpha in self.alphas.items()}


class LeftOutHeads(Record):
    """An attention block whose heads are not analysed."""

    name: str
    reason: str = Field(description="Why not, in words.")
