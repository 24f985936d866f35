"""Predict the base decay of AdamW by the law of Power Lines (Bergsma et al. 2025, arXiv 2505.13738)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from esdtool.errors import ConfigError

COEFFICIENT: Final = 1.084
"""c of tau = c (D / N)^m, as the paper is quoted; not read in the paper itself, unlike the form of the law."""
EXPONENT: Final = -0.527
"""m of the same law, as several summaries of the paper give it."""
SMALLEST_MODEL: Final = 111e6
"""Parameters of the smallest model of the paper's experiments."""
LARGEST_MODEL: Final = 3.3e9
"""Parameters of the largest model of the paper's experiments."""


@dataclass(frozen=True, kw_only=True)
class PowerLines:
    """The law for one run.

    The weights of AdamW are an average of its updates over a timescale of 1 / (lr decay) steps, which is the fraction
    tau = B / (lr decay D) of the run. The best tau depends on the tokens per parameter alone:
    tau = 1.084 (D / N)^-0.527. So decay = B / (lr tau D).

    >>> law = PowerLines(parameters=610_000_000, tokens=12_200_000_000, batch_tokens=400_000, lr=1e-3)
    >>> round(law.tau, 3), round(law.base, 3)
    (0.224, 0.147)
    """

    parameters: int
    """N, all of the model's."""
    tokens: int
    """D, of the whole run."""
    batch_tokens: int
    """B, of one update."""
    lr: float
    """Peak learning rate."""

    def __post_init__(self) -> None:
        """Refuse runs that the law does not speak of.

        Raises:
            ConfigError: if the model is smaller or larger than those of the paper, or tau would be more than the run.
        """
        if not SMALLEST_MODEL <= self.parameters <= LARGEST_MODEL:
            raise ConfigError(
                f'weight_decay.base "power-lines": the law was fitted on models of {SMALLEST_MODEL:,.0f} to '
                f"{LARGEST_MODEL:,.0f} parameters, and this one has {self.parameters:,}; give a number"
            )
        if self.tau > 1:
            raise ConfigError(
                f'weight_decay.base "power-lines": {self.tokens:,} tokens are {self.ratio:.3g} per parameter, so few '
                "that the law asks for an average over more than the whole run; give a number"
            )

    @property
    def ratio(self) -> float:
        """D / N, tokens per parameter."""
        return self.tokens / self.parameters

    @property
    def tau(self) -> float:
        """The best timescale, as a fraction of the run."""
        return float(COEFFICIENT * self.ratio**EXPONENT)

    @property
    def base(self) -> float:
        """The predicted decay."""
        return self.batch_tokens / (self.lr * self.tau * self.tokens)

    @property
    def explanation(self) -> str:
        """Say how the decay comes about, in one line."""
        return (
            f"weight_decay.base = {self.base:.4g} by power-lines (arXiv 2505.13738): {self.tokens:,} tokens / "
            f"{self.parameters:,} parameters = {self.ratio:.4g}, tau = {COEFFICIENT} x {self.ratio:.4g}^{EXPONENT} = "
            f"{self.tau:.4g}, base = {self.batch_tokens:,} / ({self.lr:g} x {self.tau:.4g} x {self.tokens:,})"
        )
