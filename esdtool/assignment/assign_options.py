"""Everything that an assignment depends on besides the analysis. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from esdtool.assignment.options import ScoreName, Unlisted, check_base, check_choice, check_unlisted
from esdtool.assignment.rule import DecayRule


@dataclass(frozen=True, kw_only=True)
class AssignOptions:
    """The options of an assignment, checked on construction, before spectra that may take hours."""

    weight_decay: float = 0.1
    """Base decay: what uniform weight decay would be."""
    rule: DecayRule = field(default_factory=DecayRule)
    """From scores to ratios."""
    score: ScoreName = "alpha"
    """What the decays follow, see `esdtool.assignment.scores`."""
    fit: str | None = None
    """Estimator of alpha; None takes the first one of the analysis."""
    include: tuple[str, ...] = ()
    """Regular expressions on names of parameters and modules; with any, exactly the matching modules are assigned."""
    exclude: tuple[str, ...] = ()
    """Regular expressions on the same names: what is left out."""
    unlisted: Unlisted = "keep"
    """What the file says of all other parameters."""

    def __post_init__(self) -> None:
        """Refuse what no analysis could be assigned with.

        Raises:
            UsageError: with the option's name.
        """
        check_base(self.weight_decay)
        check_choice("score", self.score, ScoreName)
        check_unlisted(self.unlisted)
