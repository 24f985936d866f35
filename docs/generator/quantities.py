"""Make the table of the settings of `esdtool assign --for` from the quantities themselves."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from esdtool.assignment.quantities import QUANTITY_NAMES, WEIGHT_DECAY
from esdtool.assignment.quantity import load_quantity
from generator.markdown import cell, code, table


def settings() -> str:
    """Return a table of every setting of every quantity: its name for `--set`, its default, its choices and meaning."""
    rows = []
    for name in QUANTITY_NAMES:
        if name == WEIGHT_DECAY:
            continue
        for setting, field in load_quantity(name).settings.model_fields.items():
            choices = _choices(field.annotation)
            words = f"{field.description} Choices: {choices}." if choices else field.description
            rows.append([code(f"{name}.{setting}"), _default(field.default), cell(words)])
    return table(["`--set`", "default", ""], rows)


def _choices(kind: Any) -> str:
    return ", ".join(code(choice) for choice in get_args(kind)) if get_origin(kind) is Literal else ""


def _default(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return code(",".join(str(item) for item in value))
    return code(str(value).lower() if isinstance(value, bool) else str(value))
