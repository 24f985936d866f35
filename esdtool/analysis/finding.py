"""Define a finding: what is wrong in a model or worth knowing, where, how that shows, and what to do about it."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from esdtool.analysis.record import Record


class Severity(StrEnum):
    """The weight of a finding."""

    ERROR = "error"
    """The model cannot be what was meant: something broke while it was trained, converted or loaded."""
    WARNING = "warning"
    """Seldom meant, and often the sign of a fault: worth a look before the model is used."""
    INFO = "info"
    """Good to know: it limits what the numbers say, or it may be meant."""

    @property
    def rank(self) -> int:
        """Place in a list that begins with the gravest: 0 for errors."""
        return list(Severity).index(self)


class Evidence(Record):
    """One measured number behind a finding."""

    measure: str = Field(description="What was measured, in words.")
    module: str | None = Field(default=None, description="Module that it was measured on; null: on all together.")
    value: float = Field(description="The number.")
    uncertainty: float | None = Field(
        default=None, description="Its standard error; null where it is exact, up to rounding."
    )
    expected: float | None = Field(default=None, description="The number that is expected where nothing is wrong.")
    expected_spread: float | None = Field(default=None, description="Standard deviation of what is expected.")
    expected_of: str | None = Field(default=None, description="What has the expected number, in words.")

    @property
    def words(self) -> str:
        """The evidence as a phrase, without the module's name."""
        text = f"{self.measure} = {_number(self.value)}"
        if self.uncertainty is not None:
            text += f" +- {_number(self.uncertainty)}"
        if self.expected is not None:
            spread = "" if self.expected_spread is None else f" +- {_number(self.expected_spread)}"
            text += f" ({self.expected_of or 'expected'}: {_number(self.expected)}{spread})"
        return text


class Finding(Record):
    """One finding about one or several modules."""

    rule: str = Field(description="Rule that found it, e.g. 'untrained'; the reference of findings describes each.")
    severity: Severity
    title: str = Field(description="The finding in a few words.")
    modules: tuple[str, ...] = Field(description="Modules concerned, in the model's order.")
    where: tuple[str, ...] = Field(description="The same, grouped: names that differ in numbers only share a line.")
    evidence: tuple[Evidence, ...] = Field(description="Measured numbers, of the clearest modules first.")
    meaning: str = Field(description="What it usually means.")
    caveat: str = Field(description="What it does not prove.")
    action: str = Field(description="What to do.")
    command: str | None = Field(default=None, description="Command that helps with that.")


def _number(value: float) -> str:
    """Format a number with three digits, and whole ones as they are."""
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.3g}"
