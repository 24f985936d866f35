"""From the options of `esdtool assign` to the settings of each quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esdtool.assignment.quantities import WEIGHT_DECAY
from esdtool.errors import UsageError

OF_WEIGHT_DECAY = frozenset(
    {
        "weight_decay",
        "control",
        "optimizer",
        "assign",
        "min_ratio",
        "max_ratio",
        "score",
        "fit",
        "granularity",
        "normalize",
    }
) | {"unlisted"}
"""The options that weight decay has."""


def settings_of(
    quantities: Sequence[str], shared: Mapping[str, Any], assigned: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the settings of each quantity besides weight decay.

    Args:
        quantities: names that were asked for.
        shared: options that were given, by the name of the setting: each holds for every quantity that has it.
        assigned: `QUANTITY.NAME=VALUE` each, which counts more.

    Raises:
        UsageError: for an option that none of the quantities has, or text of another form.
    """
    from esdtool.assignment.allocate import check_quantities
    from esdtool.assignment.quantity import load_quantity

    check_quantities(quantities)
    others = [name for name in quantities if name != WEIGHT_DECAY]
    found: dict[str, dict[str, Any]] = {name: {} for name in others}
    for setting, value in shared.items():
        owners = [name for name in others if setting in load_quantity(name).settings.model_fields]
        for name in owners:
            found[name][setting] = value
        if not owners and not (WEIGHT_DECAY in quantities and setting in OF_WEIGHT_DECAY):
            raise UsageError(f"--{setting.replace('_', '-')} is no setting of {', '.join(dict.fromkeys(quantities))}")
    for text in assigned:
        where, equals, value = text.partition("=")
        name, dot, setting = where.partition(".")
        if not (equals and dot and setting):
            raise UsageError(f"--set {text!r}: write it as QUANTITY.NAME=VALUE, for example sparsity.target=0.5")
        if name not in others:
            raise UsageError(f"--set {text!r}: {name!r} was not asked for; add --for {name}")
        found[name][setting.replace("-", "_")] = value
    return found


def check_writing(quantities: Sequence[str], file_format: str, learning_rate: float | None) -> None:
    """Refuse a format that cannot hold the quantities, and a learning rate that it would not hold.

    Args:
        quantities: names that were asked for.
        file_format: the form to write.
        learning_rate: that of the schedule, if given.

    Raises:
        UsageError: with the formats that can.
    """
    from esdtool.assignment.allocate import check_quantities
    from esdtool.assignment.formats import FORMAT_NAMES
    from esdtool.assignment.quantity import load_quantity
    from esdtool.assignment.writer import WriteOptions, check_format, load_writer

    check_quantities(quantities)
    keys = ["weight_decay" if name == WEIGHT_DECAY else load_quantity(name).key for name in quantities]
    check_format(file_format, keys, WriteOptions(learning_rate=learning_rate))
    if learning_rate is not None and not load_writer(file_format).absolute:
        able = [name for name in FORMAT_NAMES if load_writer(name).absolute]
        raise UsageError(f"--learning-rate is only for formats with absolute rates: {', '.join(able)}")
