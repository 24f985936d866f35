"""Define a quantity that follows spectra: the form of every file in `esdtool.assignment.quantities`."""

from __future__ import annotations

import functools
import importlib
import math
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esdtool.assignment import quantities
from esdtool.assignment.fused import weighted_mean
from esdtool.errors import UsageError

if TYPE_CHECKING:
    import torch

    from esdtool.analysis.module_record import ModuleResult
    from esdtool.spectra.tail import Vector

ControlName = Literal["none", "mean", "shuffled", "reversed"]
Value = float | int | bool


class QuantitySettings(BaseModel):
    """Base of the settings of a quantity: immutable, and other keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=False)


class ControlledSettings(QuantitySettings):
    """Settings of a quantity that has the fair controls of an experiment."""

    control: ControlName = Field(
        default="none",
        description="A control made of the method's own numbers: 'mean' (all modules alike), 'shuffled' or 'reversed'.",
    )
    control_seed: int = Field(default=0, description="Which permutation 'shuffled' takes.")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A parameter to which a value is given, and the modules that it holds."""

    parameter: str
    """Canonical name."""
    shape: tuple[int, ...]
    """Shape of the parameter."""
    modules: tuple[ModuleResult, ...]
    """The modules in it, at least one; their spectra are what is known of it."""
    eigenvalues: tuple[Vector | None, ...]
    """Eigenvalues of each module, ascending; None where they are not at hand."""
    read_rows: Callable[[], Iterable[torch.Tensor]] = tuple
    """Reads the weights, some rows at a time, [rows, columns] each; nothing unless `Needs.weights` asks for them."""

    @property
    def layer(self) -> int | None:
        """Index of the block."""
        return self.modules[0].layer

    @property
    def roles(self) -> tuple[str, ...]:
        """The distinct roles of the modules, in order."""
        return tuple(dict.fromkeys(module.role for module in self.modules))

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def sizes(self) -> list[int]:
        """Number of weights of each module."""
        return [math.prod(module.shape) for module in self.modules]

    @property
    def status(self) -> str:
        """`ok`, or why no module of the parameter was scored."""
        return "ok" if any(module.ok for module in self.modules) else self.modules[0].status

    def mean(self, of: Callable[[ModuleResult], float | None]) -> float | None:
        """Take the mean of a number over the modules that have it, weighted by size; None if none has."""
        return weighted_mean([of(module) if module.ok else None for module in self.modules], self.sizes)

    def alpha(self, fit: str) -> float | None:
        """Return the mean alpha by an estimator."""
        return self.mean(lambda module: module.alphas.get(fit))


@dataclass(frozen=True, kw_only=True)
class End:
    """A token embedding or an output head, which has no spectrum of its own."""

    parameter: str
    """Canonical name."""
    shape: tuple[int, ...]
    role: Literal["token-embedding", "output-head"]

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Given:
    """The value of one parameter and where it comes from."""

    value: Value
    source: str
    """Where the value comes from, in words: `its own score`, `mean of its block`, `not scored: ...`."""
    ratio: float | None = None
    """The value over what a uniform assignment would give."""
    score: float | None = None
    """The number that the value follows."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The numbers that a quantity rests on, besides metrics."""

    fits: tuple[str, ...] = ()
    """Estimators of alpha."""
    eigenvalues: bool = False
    """Whether it needs whole spectra."""
    weights: bool = False
    """Whether it reads the weights again."""


def needs_fit(settings: Any) -> Needs:
    """Ask for the estimator of alpha that the settings name as `fit`."""
    return Needs(fits=(settings.fit,))


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A quantity that follows spectra."""

    key: str
    """The key of its values in the file."""
    summary: str
    """One sentence without its full stop, for help and documentation."""
    method: str
    """The method's name."""
    source: str
    """Where the method is published."""
    settings: type[Any]
    """A `QuantitySettings`, whose defaults are the published ones."""
    needs: Callable[[Any], Needs]
    """What the settings ask for."""
    assign: Callable[[Sequence[Unit], Sequence[End], Any], dict[str, Given]]
    """Give values by parameter. Only parameters with a value are in the result."""


@functools.cache
def load_quantity(name: str) -> Quantity:
    """Import a quantity by its name, one of `QUANTITY_NAMES` besides weight decay."""
    quantity: Quantity = importlib.import_module(f"{quantities.__name__}.{name.replace('-', '_')}").QUANTITY
    return quantity


def checked_settings(name: str, values: dict[str, Any]) -> Any:
    """Make the settings of a quantity from what the user gave.

    Args:
        name: the quantity.
        values: by the name of the setting; text is read as the setting's type.

    Raises:
        UsageError: for a setting that it does not have or a value that is not valid; the message names both.
    """
    kind: type[BaseModel] = load_quantity(name).settings
    unknown = [key for key in values if key not in kind.model_fields]
    if unknown:
        raise UsageError(f"{name} has no setting {unknown[0]!r}; choose from {', '.join(kind.model_fields)}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{name}{'.' if where else ''}{where}: {message[:1].lower()}{message[1:]}") from error


OWN_SCORE: Final = "its own score"
"""The source of a value that follows the parameter's own spectrum."""


def controlled(scores: Sequence[float], control: str, seed: int) -> list[float]:
    """Exchange scores as a control says; a rule that keeps a budget keeps it whatever the scores.

    >>> controlled([1.0, 3.0, 2.0], "reversed", 0), controlled([1.0, 3.0, 2.0], "mean", 0)
    ([3.0, 1.0, 2.0], [2.0, 2.0, 2.0])

    Args:
        scores: [n].
        control: `none`, `mean` (all alike), `shuffled` or `reversed` (the smallest exchanged with the largest, ...).
        seed: which permutation `shuffled` takes.

    Returns:
        [n] scores.
    """
    if control == "mean":
        return [math.fsum(scores) / len(scores)] * len(scores) if scores else []
    if control == "shuffled":
        dealt = list(scores)
        random.Random(seed).shuffle(dealt)
        return dealt
    if control == "reversed":
        order = sorted(range(len(scores)), key=lambda index: scores[index])
        exchanged = list(scores)
        for index, other in zip(order, reversed(order), strict=True):
            exchanged[index] = scores[other]
        return exchanged
    return list(scores)


def controlled_groups(scores: Sequence[float], groups: Sequence[Hashable], settings: ControlledSettings) -> list[float]:
    """Exchange the scores of whole groups as the settings' control says.

    Args:
        scores: [n], those of a group alike (see `group_means`).
        groups: [n] the group of each.
        settings: the control and its seed.

    Returns:
        [n] scores.
    """
    by_group = dict(zip(groups, scores, strict=True))
    dealt = controlled(list(by_group.values()), settings.control, settings.control_seed)
    exchanged = dict(zip(by_group, dealt, strict=True))
    return [exchanged[group] for group in groups]


def group_means(scores: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """Replace each score by the mean of its group.

    >>> group_means([1.0, 3.0, 5.0], ["a", "a", "b"])
    [2.0, 2.0, 5.0]
    """
    members: dict[Hashable, list[float]] = defaultdict(list)
    for score, group in zip(scores, groups, strict=True):
        members[group].append(score)
    # Relative to the first, so that the mean of equal numbers is that number to the last bit.
    means = {group: found[0] + math.fsum(x - found[0] for x in found) / len(found) for group, found in members.items()}
    return [means[group] for group in groups]


def grouping(units: Sequence[Unit], by: str) -> tuple[list[Hashable], str]:
    """Return the group of each parameter, and how a value that follows the group's mean is described.

    Args:
        units: the parameters.
        by: `module`, `block` or `role`; a parameter outside numbered blocks is a block of its own.
    """
    if by == "block":
        blocks: list[Hashable] = [("outside", n) if unit.layer is None else unit.layer for n, unit in enumerate(units)]
        return blocks, "mean of its block"
    if by == "role":
        return [unit.roles for unit in units], "mean of its role"
    return list(range(len(units))), OWN_SCORE


def scored(
    units: Sequence[Unit], score: Callable[[Unit], float | None]
) -> tuple[list[Unit], list[float], dict[str, str]]:
    """Separate the parameters that have a score from those that have none.

    Returns:
        The parameters with a score, their scores, and why the others have none, by parameter.
    """
    found, scores, missing = [], [], {}
    for unit in units:
        value = score(unit)
        if value is None or not math.isfinite(value):
            missing[unit.parameter] = f"not scored: {unit.status if unit.status != 'ok' else 'it has no such number'}"
        else:
            found.append(unit)
            scores.append(value)
    return found, scores, missing
